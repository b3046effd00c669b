#include "sparse_adamw.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "clones.h"

namespace smt_ext::cpu {

constexpr int64_t kTaskElements = 16384;
template <typename Acc>
constexpr Acc kLargestGradient =
    std::is_same<Acc, double>::value ? static_cast<Acc>(0x1p511) : static_cast<Acc>(0x1p63);
constexpr float kLargestHalf = 65504;

template <typename Acc>
struct Coefficients {
  Acc grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;
  Acc pull;

  explicit Coefficients(const AdamWOptions& o)
      : grad_scale(static_cast<Acc>(o.grad_scale)),
        decay(static_cast<Acc>(1 - o.lr * o.weight_decay)),
        one_minus_beta1(static_cast<Acc>(1 - o.beta1)),
        beta2(static_cast<Acc>(o.beta2)),
        one_minus_beta2(static_cast<Acc>(1 - o.beta2)),
        step_size(static_cast<Acc>(o.lr / (1 - std::pow(o.beta1, o.step)))),
        root_correction(static_cast<Acc>(std::sqrt(1 - std::pow(o.beta2, o.step)))),
        eps(static_cast<Acc>(o.eps)),
        pull(static_cast<Acc>(o.lr * o.weight_decay)) {}
};

template <typename Acc>
SMT_CLONES void update_row(Acc* p, const Acc* grad, Acc* m, Acc* v, int64_t n,
                           const Coefficients<Acc>& coefficients) {
  const Coefficients<Acc> c = coefficients;
  for (int64_t j = 0; j < n; ++j) {
    const Acc g =
        std::min(std::max(grad[j] * c.grad_scale, -kLargestGradient<Acc>), kLargestGradient<Acc>);
    const Acc mj = m[j] + c.one_minus_beta1 * (g - m[j]);
    const Acc vj = c.beta2 * v[j] + c.one_minus_beta2 * (g * g);
    m[j] = mj;
    v[j] = vj;
    p[j] = p[j] * c.decay - c.step_size * (mj / (std::sqrt(vj) / c.root_correction + c.eps));
  }
}

template <typename Acc>
SMT_CLONES void pull_row(Acc* p, const Acc* origin, int64_t n, Acc pull) {
  for (int64_t j = 0; j < n; ++j) p[j] -= pull * (p[j] - origin[j]);
}

template <typename To, typename From>
SMT_CLONES void convert_row(const From* from, int64_t n, To* to, int64_t stride) {
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) to[j] = convert<To>::from(from[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) to[j * stride] = convert<To>::from(from[j]);
  }
}

// convert_row, but a finite number too large for float16 becomes the largest that it has.
template <typename To, typename Acc>
static void convert_saturated(const Acc* from, int64_t n, To* to, int64_t stride) {
  if constexpr (std::is_same<To, f16>::value &&
                (std::is_same<Acc, float>::value || std::is_same<Acc, double>::value)) {
    const Acc limit = static_cast<Acc>(kLargestHalf);
    Acc fit[kMaxBlockSize];
    for (int64_t j = 0; j < n; ++j) {
      fit[j] = std::isinf(from[j]) ? from[j] : std::min(std::max(from[j], -limit), limit);
    }
    convert_row(static_cast<const Acc*>(fit), n, to, stride);
  } else {
    convert_row(from, n, to, stride);
  }
}

template <typename B>
static void step_row(const AdamWLayer& a, int64_t row, uint32_t key, bool stochastic,
                     const Coefficients<accumulator_t<B>>& coefficients) {
  using Acc = accumulator_t<B>;
  const int64_t s = row / a.L, n = a.rows[s] * a.L + row % a.L, k = a.cols[s] * a.L;
  if (n >= a.N) return;
  const int64_t width = std::min(a.L, a.K - k), at = row * a.L;
  B* blocks = static_cast<B*>(a.blocks) + at;
  const B* grad = static_cast<const B*>(a.grad) + at;

  Acc wide_grad[kMaxBlockSize], wide_p[kMaxBlockSize];
  const Acc* g;
  Acc* p;
  if constexpr (std::is_same<B, Acc>::value) {
    g = grad;
    p = blocks;
  } else {
    convert_row(grad, width, wide_grad, 1);
    g = wide_grad;
    p = wide_p;
    if (a.master) {
      p = a.master + at;
    } else {
      convert_row(blocks, width, wide_p, 1);
    }
  }
  Coefficients<Acc> c = coefficients;
  if (a.origin) {
    Acc origin[kMaxBlockSize];
    dispatch(a.origin_dtype, [&](auto type) {
      convert_row(static_cast<const decltype(type)*>(a.origin) + at, width, origin, 1);
    });
    pull_row(p, static_cast<const Acc*>(origin), width, c.pull);
    c.decay = 1;
  }
  update_row(p, g, static_cast<Acc*>(a.m) + at, static_cast<Acc*>(a.v) + at, width, c);
  if constexpr (std::is_same<B, bf16>::value) {
    if (stochastic && !a.master) {
      for (int64_t j = 0; j < width; ++j) {
        blocks[j] = to_bf16_stochastic(p[j], random_bits(key, at + j));
      }
    } else {
      convert_row(p, width, blocks, 1);
    }
  } else if constexpr (!std::is_same<B, Acc>::value) {
    convert_saturated(static_cast<const Acc*>(p), width, blocks, 1);
  }
  if (!a.w) return;
  // From p where that is a float32 value, so that the weight is rounded once; after stochastic
  // rounding from the block, which is what the model trains.
  dispatch(a.w_dtype, [&](auto type) {
    using W = decltype(type);
    W* w = static_cast<W*>(a.w) + n * a.stride_n + k * a.stride_k;
    if (std::is_same<B, Acc>::value || a.master) {
      convert_saturated(static_cast<const Acc*>(p), width, w, a.stride_k);
    } else {
      convert_row(blocks, width, w, a.stride_k);
    }
  });
}

void sparse_adamw(const AdamWLayer* layers, int64_t n, const AdamWOptions& options,
                  const Parallel& parallel) {
  struct Task {
    const AdamWLayer* layer;
    int64_t begin, end;  // rows of all blocks, S * L
  };
  std::vector<Task> tasks;
  for (const AdamWLayer* layer = layers; layer < layers + n; ++layer) {
    const int64_t rows = layer->S * layer->L;
    const int64_t size = std::max<int64_t>(1, kTaskElements / layer->L);
    for (int64_t begin = 0; begin < rows; begin += size) {
      tasks.push_back({layer, begin, std::min(rows, begin + size)});
    }
  }
  const bool stochastic = options.seed >= 0;
  const uint32_t step = step_key(options.seed, static_cast<int64_t>(options.step));
  const Coefficients<float> single(options);
  const Coefficients<double> wide(options);
  parallel.run(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const AdamWLayer& layer = *tasks[i].layer;
      const uint32_t key = layer_key(step, tasks[i].layer - layers);
      dispatch(layer.block_dtype, [&](auto type) {
        using B = decltype(type);
        for (int64_t row = tasks[i].begin; row < tasks[i].end; ++row) {
          if constexpr (std::is_same<B, double>::value) {
            step_row<B>(layer, row, key, stochastic, wide);
          } else {
            step_row<B>(layer, row, key, stochastic, single);
          }
        }
      });
    }
  });
}

}  // namespace smt_ext::cpu
