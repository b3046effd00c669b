// The body of tile_gemm, compiled once for each instruction set. The including file opens the
// target, and defines
//   SMT_ISA          namespace of this build
//   SMT_VECTOR       bytes of a vector register
//   SMT_MR, SMT_NV   register tile: SMT_MR rows x SMT_NV vectors of accumulators
//   SMT_DOT_BF16     (optional) the target has vdpbf16ps
// No std templates in here: a function that the linker shares with other files must not be one that
// was compiled for this target.

namespace smt_ext::cpu::SMT_ISA {

template <typename T>
struct vector_of;
template <>
struct vector_of<float> {
  typedef float type __attribute__((vector_size(SMT_VECTOR), aligned(4), may_alias));
};
template <>
struct vector_of<double> {
  typedef double type __attribute__((vector_size(SMT_VECTOR), aligned(8), may_alias));
};

// Multiply-accumulate over plain numbers: one reduction step an element.
template <typename T>
struct Plain {
  using Packed = T;
  using Acc = T;
  using Vec = typename vector_of<T>::type;
  static constexpr int64_t kStep = 1;  // reduction steps in one packed element
  static constexpr int64_t kLanes = SMT_VECTOR / sizeof(T);

  static Vec load(const Packed* p) { return *reinterpret_cast<const Vec*>(p); }
  static Vec fma(Vec acc, Packed a, Vec b) { return acc + a * b; }
  static Packed pack(const T* p, const T*) { return *p; }
  template <typename S>
  static Packed pack(const S* p, const S*) {
    return to_float(*p);
  }
};

#ifdef SMT_DOT_BF16
// vdpbf16ps: a packed element is a pair (t, t + 1).
struct PairsBf16 {
  using Packed = uint32_t;
  using Acc = float;
  using Vec = __m512;
  static constexpr int64_t kStep = 2;
  static constexpr int64_t kLanes = 16;

  static __m512i load(const Packed* p) { return _mm512_loadu_si512(p); }
  static Vec fma(Vec acc, Packed a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
  static Packed pack(const bf16* even, const bf16* odd) {
    return even->bits | (odd ? static_cast<uint32_t>(odd->bits) << 16 : 0u);
  }
};
#endif

// Packs `width` columns of `steps` rows into panels of P columns, out[panel][t][P], zero padded.
// Rows outermost: with a power-of-two row stride all rows fall into the same few cache sets, so
// each row must be read once, whole, and asked for ahead of time.
template <typename M, int64_t P, typename S>
void pack_panels(const S* src, int64_t stride_t, int64_t stride_i, int64_t steps, int64_t width,
                 typename M::Packed* out) {
  using Packed = typename M::Packed;
  constexpr int64_t kAhead = 16, kLine = 64 / sizeof(S);
  const int64_t panel_size = (steps + M::kStep - 1) / M::kStep * P;
  const int64_t whole = stride_i == 1 ? width / P * P : 0;
  for (int64_t t = 0; t < steps; t += M::kStep) {
    const S* even = src + t * stride_t;
    const S* odd = t + 1 < steps ? even + stride_t : nullptr;
    Packed* row = out + t / M::kStep * P;
    if (stride_i == 1 && t + kAhead < steps) {
      for (int64_t r = 0; r < M::kStep; ++r) {
        const S* ahead = even + (kAhead + r) * stride_t;
        for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(ahead + i);
      }
    }
    int64_t begin = 0;
    if (M::kStep == 1 || odd) {
      for (; begin < whole; begin += P, row += panel_size) {
        const S* next = M::kStep > 1 ? odd + begin : even + begin;
#pragma GCC unroll 4
        for (int64_t i = 0; i < P; ++i) row[i] = M::pack(even + begin + i, next + i);
      }
    }
    for (; begin < width; begin += P, row += panel_size) {
      for (int64_t i = 0; i < P; ++i) {
        const int64_t at = (begin + i) * stride_i;
        row[i] = begin + i < width ? M::pack(even + at, odd ? odd + at : nullptr) : Packed{};
      }
    }
  }
}

// One register tile: MR x (NV vectors); `first` starts from zero, else from what c holds.
template <typename M, int MR, int NV>
void register_tile(const typename M::Packed* a, const typename M::Packed* b, int64_t steps,
                   bool first, typename M::Acc* c, int64_t ldc) {
  using Vec = typename M::Vec;
  using Acc = typename M::Acc;
  using AccVec = typename vector_of<Acc>::type;
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      acc[i][v] = first ? Vec{} : (Vec) * reinterpret_cast<AccVec*>(c + i * ldc + v * M::kLanes);
    }
  }
  for (int64_t t = 0; t < steps; ++t, a += MR, b += NV * M::kLanes) {
    decltype(M::load(b)) x[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) x[v] = M::load(b + v * M::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = M::fma(acc[i][v], a[i], x[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      *reinterpret_cast<AccVec*>(c + i * ldc + v * M::kLanes) = (AccVec)acc[i][v];
    }
  }
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename M, typename S>
void tile_gemm(const Operand& a, const Operand& b, int64_t T, int64_t m, int64_t n, void* out,
               int64_t ldc) {
  using Packed = typename M::Packed;
  using Acc = typename M::Acc;
  constexpr int64_t kMR = SMT_MR;
  constexpr int64_t kNR = SMT_NV * M::kLanes;
  constexpr int64_t kRows = round_up(kTile, kMR);
  constexpr int64_t kCols = round_up(kTile, kNR);
  // Padded to whole register tiles; one set a thread, since a task runs on one thread.
  alignas(64) static thread_local Packed a_panels[kRows * kChunk];
  alignas(64) static thread_local Packed b_panels[kCols * kChunk];
  alignas(64) static thread_local Acc sums[kRows * kCols];

  const int64_t rows = round_up(m, kMR), cols = round_up(n, kNR);
  for (int64_t t0 = 0; t0 < T; t0 += kChunk) {
    const int64_t chunk = T - t0 < kChunk ? T - t0 : kChunk;
    const int64_t steps = (chunk + M::kStep - 1) / M::kStep;
    pack_panels<M, kMR>(static_cast<const S*>(a.data) + t0 * a.stride_t, a.stride_t, a.stride_i,
                        chunk, m, a_panels);
    pack_panels<M, kNR>(static_cast<const S*>(b.data) + t0 * b.stride_t, b.stride_t, b.stride_i,
                        chunk, n, b_panels);
    for (int64_t j = 0; j < cols; j += kNR) {
      for (int64_t i = 0; i < rows; i += kMR) {
        register_tile<M, kMR, SMT_NV>(a_panels + i * steps, b_panels + j * steps, steps, t0 == 0,
                                      sums + i * kCols + j, kCols);
      }
    }
  }
  Acc* c = static_cast<Acc*>(out);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = T > 0 ? sums[i * kCols + j] : Acc{};
  }
}

void tile_gemm(DType dtype, const Operand& a, const Operand& b, int64_t T, int64_t m, int64_t n,
               void* c, int64_t ldc) {
  switch (dtype) {
    case DType::f64:
      return tile_gemm<Plain<double>, double>(a, b, T, m, n, c, ldc);
    case DType::f16:
      return tile_gemm<Plain<float>, f16>(a, b, T, m, n, c, ldc);
    case DType::bf16:
#ifdef SMT_DOT_BF16
      return tile_gemm<PairsBf16, bf16>(a, b, T, m, n, c, ldc);
#else
      return tile_gemm<Plain<float>, bf16>(a, b, T, m, n, c, ldc);
#endif
    default:
      return tile_gemm<Plain<float>, float>(a, b, T, m, n, c, ldc);
  }
}

}  // namespace smt_ext::cpu::SMT_ISA
