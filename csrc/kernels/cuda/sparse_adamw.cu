#include <algorithm>

#include "../common/limits.h"
#include "../common/random.h"
#include "convert.cuh"
#include "sparse_adamw.h"
#include "table.cuh"

namespace smt_ext::cuda {

constexpr int kThreads = 256;
constexpr int64_t kChunkEntries = 4096;  // 16 of a thread; 128 KB moved, a launch's cost is little

// See the head of ../common/sparse_adamw.h.
template <typename Acc>
constexpr Acc kLargestGradient =
    std::is_same_v<Acc, double> ? static_cast<Acc>(0x1p511) : static_cast<Acc>(0x1p63);
constexpr float kLargestHalf = 65504;

template <typename Acc>
struct Factors {
  Acc grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;
};

struct Prepared {
  Factors<float> single;
  Factors<double> wide;
  uint32_t key;  // of the step
  int skip;
  double pull;  // lr * weight_decay
};
static_assert(sizeof(Prepared) % 16 == 0);

// 16 bytes an instruction; T lies on the device, written by an earlier kernel.
template <typename T>
__device__ __forceinline__ T load_struct(const T* p) {
  constexpr int kWords = sizeof(T) / 16;
  static_assert(sizeof(T) % 16 == 0);
  uint4 words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = ptx::ld_global_nc(reinterpret_cast<const uint4*>(p) + i);
  }
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
}

template <typename Acc>
__device__ __forceinline__ void store_factors(Factors<Acc>* to, const Factors<double>& f) {
  const Acc values[] = {static_cast<Acc>(f.grad_scale),      static_cast<Acc>(f.decay),
                        static_cast<Acc>(f.one_minus_beta1), static_cast<Acc>(f.beta2),
                        static_cast<Acc>(f.one_minus_beta2), static_cast<Acc>(f.step_size),
                        static_cast<Acc>(f.root_correction), static_cast<Acc>(f.eps)};
  Acc* p = &to->grad_scale;
#pragma unroll
  for (int i = 0; i < 8; ++i) ptx::st_global(p + i, values[i]);
}

static __global__ void __launch_bounds__(1) prepare_kernel(AdamWOptions o, Prepared* prepared) {
  const double step = ptx::ld_global(o.step), lr = ptx::ld_global(o.lr);
  const Factors<double> f{ptx::ld_global(o.grad_scale),
                          1 - lr * o.weight_decay,
                          1 - o.beta1,
                          o.beta2,
                          1 - o.beta2,
                          lr / (1 - pow(o.beta1, step)),
                          sqrt(1 - pow(o.beta2, step)),
                          o.eps};
  store_factors(&prepared->single, f);
  store_factors(&prepared->wide, f);
  ptx::st_global(&prepared->key, step_key(o.seed, static_cast<int64_t>(step)));
  ptx::st_global(&prepared->skip, ptx::ld_global(o.found_inf) != 0 ? 1 : 0);
  ptx::st_global(&prepared->pull, lr * o.weight_decay);
}

struct alignas(16) LayerRecord {
  AdamWLayer layer;
  int64_t wide;  // vectors, not single entries
};

static __host__ __device__ __forceinline__ int64_t rows_of_chunk(int64_t L) {
  static_assert(kMaxBlockSize <= kChunkEntries);
  return kChunkEntries / L;
}

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

template <typename Acc>
__device__ __forceinline__ Acc clip(Acc x, Acc limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

// A finite number too large for float16 becomes the largest that it has.
template <typename To, typename Acc>
__device__ __forceinline__ Acc saturate(Acc x) {
  if constexpr (std::is_same_v<To, f16> && sizeof(Acc) > 2) {
    const Acc clipped = clip(x, static_cast<Acc>(kLargestHalf));
    return x - x == 0 ? clipped : x;  // inf and NaN stay
  } else {
    return x;
  }
}

// V entries into the weight, by as few instructions as hold them.
template <typename W, int V, typename P>
__device__ __forceinline__ void store_weight(W* w, int64_t stride, const Vector<P, V>& p) {
  constexpr int kPart = V < 16 / static_cast<int>(sizeof(W)) ? V : 16 / static_cast<int>(sizeof(W));
#pragma unroll
  for (int at = 0; at < V; at += kPart) {
    Vector<W, kPart> part;
#pragma unroll
    for (int i = 0; i < kPart; ++i) part.at[i] = convert<W>(saturate<W>(p.at[at + i]));
    store<kPart>(w + at * stride, part);  // V > 1 has stride 1
  }
}

// p moves towards the layer's origin by a share of the distance.
template <int V, typename Acc>
__device__ __forceinline__ void pull_back(const AdamWLayer& a, int64_t at, Acc pull,
                                          Vector<Acc, V>* p) {
  dispatch(a.origin_dtype, [&](auto type) {
    using O = typename decltype(type)::type;
    if constexpr (sizeof(O) <= sizeof(Acc)) {
      const auto origin = load_nc<V>(static_cast<const O*>(a.origin) + at);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        p->at[e] -= pull * (p->at[e] - static_cast<Acc>(widen(origin.at[e])));
      }
    } else {
      __trap();
    }
  });
}

template <bool kPulls, typename B, int V>
__device__ __forceinline__ void step_chunk(const AdamWLayer& a, int64_t first_row,
                                           const Factors<accumulator_t<B>>& f,
                                           accumulator_t<B> pull, bool stochastic, uint32_t key) {
  using Acc = accumulator_t<B>;
  const bool pulls = kPulls && a.origin;
  const Acc decay = pulls ? Acc{1} : f.decay;
  const unsigned L = static_cast<unsigned>(a.L), vectors = L / V;
  const int64_t rows_left = a.S * a.L - first_row, rows_wanted = rows_of_chunk(a.L);
  const unsigned rows = static_cast<unsigned>(rows_left < rows_wanted ? rows_left : rows_wanted);
  for (unsigned i = threadIdx.x; i < rows * vectors; i += kThreads) {
    const unsigned row = static_cast<unsigned>(first_row) + i / vectors, j = i % vectors * V;
    const unsigned s = row / L;
    const int64_t n0 = static_cast<int64_t>(ptx::ld_global_nc(a.rows + s)) * L;
    const int64_t k0 = static_cast<int64_t>(ptx::ld_global_nc(a.cols + s)) * L;
    if (n0 < 0 || n0 >= a.N || k0 < 0 || k0 >= a.K) __trap();
    const int64_t n = n0 + (row - s * L), k = k0 + j;
    if (n >= a.N || k >= a.K) continue;

    const int64_t at = static_cast<int64_t>(row) * L + j;
    B* const blocks = static_cast<B*>(a.blocks) + at;
    Acc* const m_at = static_cast<Acc*>(a.m) + at;
    Acc* const v_at = static_cast<Acc*>(a.v) + at;
    const auto grad = load_nc<V>(static_cast<const B*>(a.grad) + at);
    auto m = load<V>(m_at);
    auto v = load<V>(v_at);
    Vector<Acc, V> p;
    if (std::is_same_v<Acc, float> && a.master) {
      p = convert<Acc>(load<V>(a.master + at));
    } else {
      p = convert<Acc>(load<V>(blocks));
    }
    if (pulls) pull_back<V>(a, at, pull, &p);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const Acc g = clip(widen(grad.at[e]) * f.grad_scale, kLargestGradient<Acc>);
      m.at[e] += f.one_minus_beta1 * (g - m.at[e]);
      v.at[e] = f.beta2 * v.at[e] + f.one_minus_beta2 * (g * g);
      p.at[e] = p.at[e] * decay -
                f.step_size * (m.at[e] / (square_root(v.at[e]) / f.root_correction + f.eps));
    }
    store<V>(m_at, m);
    store<V>(v_at, v);
    if (std::is_same_v<Acc, float> && a.master) store<V>(a.master + at, convert<float>(p));

    if constexpr (std::is_same_v<B, f16>) {
#pragma unroll
      for (int e = 0; e < V; ++e) p.at[e] = saturate<B>(p.at[e]);
    }
    auto rounded = convert<B>(p);
    if constexpr (std::is_same_v<B, bf16>) {
      if (stochastic && !a.master) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          rounded.at[e] = to_bf16_stochastic(p.at[e], random_bits(key, at + e));
          p.at[e] = widen(rounded.at[e]);
        }
      }
    }
    store<V>(blocks, rounded);
    if (!a.w) continue;
    // From the float32 value where that is kept, so that the weight is rounded once; else from the
    // block, which is what the model trains.
    if constexpr (!std::is_same_v<B, Acc>) {
      if (!a.master) p = convert<Acc>(rounded);
    }
    dispatch(a.w_dtype, [&](auto type) {
      using W = typename decltype(type)::type;
      store_weight(static_cast<W*>(a.w) + n * a.stride_n + k * a.stride_k, a.stride_k, p);
    });
  }
}

// kPulls: some layer has an origin. Apart, since it takes more registers; two blocks of it are
// asked for, as the compiler would else spill some on sm_100 to fit three (0: left to it).
template <bool kPulls>
static __global__ void __launch_bounds__(kThreads, kPulls ? 2 : 0)
    sparse_adamw_kernel(Table<LayerRecord> table, const Prepared* prepared, bool stochastic) {
  if (ptx::ld_global_nc(&prepared->skip)) return;
  const auto chunk = table.chunk();
  const AdamWLayer& layer = chunk.record.layer;
  const int64_t first_row = chunk.at * rows_of_chunk(layer.L);
  const uint32_t key = layer_key(ptx::ld_global_nc(&prepared->key), chunk.index);
  dispatch(layer.block_dtype, [&](auto type) {
    using B = typename decltype(type)::type;
    using Acc = accumulator_t<B>;
    Factors<Acc> factors;
    if constexpr (std::is_same_v<Acc, double>) {
      factors = load_struct(&prepared->wide);
    } else {
      factors = load_struct(&prepared->single);
    }
    const auto pull = static_cast<Acc>(ptx::ld_global_nc(&prepared->pull));
    constexpr int kVector = 16 / sizeof(Acc);
    if (chunk.record.wide) {
      step_chunk<kPulls, B, kVector>(layer, first_row, factors, pull, stochastic, key);
    } else {
      step_chunk<kPulls, B, 1>(layer, first_row, factors, pull, stochastic, key);
    }
  });
}

// Whether every access may be a vector of 16 bytes of moments.
static bool takes_vectors(const AdamWLayer& a) {
  const int64_t vector = a.block_dtype == DType::f64 ? 2 : 4;
  const auto aligned = [&](const void* p, DType dtype) {
    return is_aligned(p, static_cast<std::size_t>(std::min<int64_t>(16, vector * size_of(dtype))));
  };
  const DType moments = a.block_dtype == DType::f64 ? DType::f64 : DType::f32;
  return a.stride_k == 1 && a.stride_n % vector == 0 && a.K % vector == 0 && a.L % vector == 0 &&
         aligned(a.w, a.w_dtype) && aligned(a.blocks, a.block_dtype) &&
         aligned(a.grad, a.block_dtype) && aligned(a.m, moments) && aligned(a.v, moments) &&
         aligned(a.master, moments) && aligned(a.origin, a.origin_dtype);
}

std::size_t sparse_adamw_workspace_bytes(int64_t n) {
  return sizeof(Prepared) + Table<LayerRecord>::workspace_bytes(n);
}

void sparse_adamw(const AdamWLayer* layers, int64_t n, const AdamWOptions& options, void* workspace,
                  cudaStream_t stream) {
  std::vector<LayerRecord> records;
  for (const AdamWLayer* a = layers; a < layers + n; ++a) {
    grid_blocks(a->S * a->L);  // row numbers fit in 31 bits
    records.push_back({*a, takes_vectors(*a)});
  }
  const auto chunks_of = [](const LayerRecord& record) {
    const int64_t rows = rows_of_chunk(record.layer.L);
    return (record.layer.S * record.layer.L + rows - 1) / rows;
  };
  Prepared* prepared = static_cast<Prepared*>(workspace);
  const Table<LayerRecord> table(records, chunks_of, prepared + 1, stream);
  if (table.chunks() == 0) return;
  launch("sparse_adamw_prepare", prepare_kernel, dim3(1), dim3(1), 0, stream, options, prepared);
  const bool pulls = std::any_of(layers, layers + n, [](const AdamWLayer& a) { return a.origin; });
  launch("sparse_adamw", pulls ? sparse_adamw_kernel<true> : sparse_adamw_kernel<false>,
         dim3(grid_blocks(table.chunks())), dim3(kThreads), 0, stream, table, prepared,
         options.seed >= 0);
}

}  // namespace smt_ext::cuda
