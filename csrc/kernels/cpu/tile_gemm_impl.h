// The body of tile_gemm, compiled once for each instruction set. The including file opens the
// target, and defines
//   SMT_ISA          namespace of this build
//   SMT_VECTOR       bytes of a vector register
//   SMT_MR, SMT_NV   register tile: SMT_MR rows x SMT_NV vectors of accumulators; what is left of a
//                    tile's columns takes SMT_NV - 1, so that 16, 32 and 64 columns need no padding
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
  // 32 columns of two rows in pairs, into panels of P columns that lie `stride` apart.
  template <int64_t P>
  static void pack32(const bf16* even, const bf16* odd, Packed* out, int64_t stride) {
    static_assert(P == 8 || P == 16 || P == 32);
    alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                        37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                        11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(kFirst);
    const __m512i last = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const __m512i e = _mm512_loadu_si512(even), o = _mm512_loadu_si512(odd);
    const __m512i low = _mm512_permutex2var_epi16(e, first, o);
    const __m512i high = _mm512_permutex2var_epi16(e, last, o);
    if constexpr (P == 8) {
      store256(out, _mm512_castsi512_si256(low));
      store256(out + stride, _mm512_extracti64x4_epi64(low, 1));
      store256(out + 2 * stride, _mm512_castsi512_si256(high));
      store256(out + 3 * stride, _mm512_extracti64x4_epi64(high, 1));
    } else {
      _mm512_storeu_si512(out, low);
      _mm512_storeu_si512(P == 16 ? out + stride : out + 16, high);
    }
  }
  static void store256(Packed* out, __m256i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x);
  }
};
#endif

// Elements from one packed panel to the next. One cache line more than a panel has: panels of a
// power-of-two size would all begin in the same cache set, and evict each other while they are
// written side by side.
template <typename M>
constexpr int64_t panel_stride(int64_t steps, int64_t P) {
  return (steps + M::kStep - 1) / M::kStep * P +
         64 / static_cast<int64_t>(sizeof(typename M::Packed));
}

// Packs `width` columns of `steps` rows into panels of P columns, out[panel][t][P], zero padded.
// Rows outermost: with a power-of-two row stride all rows fall into the same few cache sets, so
// each row must be read once, whole, and asked for ahead of time.
template <typename M, int64_t P, typename S>
void pack_panels(const S* src, int64_t stride_t, int64_t stride_i, int64_t steps, int64_t width,
                 typename M::Packed* out) {
  if (width == 0) return;
  using Packed = typename M::Packed;
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(S);
  const int64_t stride = panel_stride<M>(steps, P);
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
#ifdef SMT_DOT_BF16
    if constexpr (M::kStep == 2) {
      for (; odd && begin + 32 <= whole; begin += 32, row += 32 / P * stride) {
        M::template pack32<P>(even + begin, odd + begin, row, stride);
      }
    }
#endif
    if (M::kStep == 1 || odd) {
      for (; begin < whole; begin += P, row += stride) {
        if constexpr (__is_same(S, Packed)) {
          __builtin_memcpy(row, even + begin, P * sizeof(Packed));
        } else {
          const S* next = M::kStep > 1 ? odd + begin : even + begin;
#pragma GCC unroll 4
          for (int64_t i = 0; i < P; ++i) row[i] = M::pack(even + begin + i, next + i);
        }
      }
    }
    for (; begin < width; begin += P, row += stride) {
      for (int64_t i = 0; i < P; ++i) {
        const int64_t at = (begin + i) * stride_i;
        row[i] = begin + i < width ? M::pack(even + at, odd ? odd + at : nullptr) : Packed{};
      }
    }
  }
}

// Asks for the rows of the next chunk (of this tile, or of the one after it), one cache line a
// reduction step, while this chunk is computed: packing reads short runs of rows far apart, which
// no hardware prefetcher follows, and waiting for them would cost a quarter of the time of small
// tiles.
template <typename S>
class NextChunk {
 public:
  NextChunk(const Operand& a, int64_t m, const Operand& b, int64_t n, int64_t begin, int64_t end,
            int64_t calls)
      : now_(rows_of(a, m, begin, end)), then_(rows_of(b, n, begin, end)) {
    const int64_t lines = now_.rows * now_.lines + then_.rows * then_.lines;
    lines_a_call_ = (lines + calls - 1) / calls;
    if (now_.rows == 0) finish_operand();
  }

  // Lines to ask for during one register tile.
  int64_t lines_a_call() const { return lines_a_call_; }

  void prefetch() {
    __builtin_prefetch(now_.row + line_ * 64, 0, 2);
    if (++line_ < now_.lines) return;
    line_ = 0;
    now_.row += now_.stride;
    if (--now_.rows == 0) finish_operand();
  }

 private:
  struct Rows {
    const char* row;
    int64_t stride, lines, rows;  // bytes; cache lines of a row; rows left
  };

  void finish_operand() {
    now_ = then_;
    then_.rows = 0;
    if (now_.rows == 0) lines_a_call_ = 0;
  }

  static Rows rows_of(const Operand& x, int64_t width, int64_t begin, int64_t end) {
    constexpr int64_t kSize = sizeof(S);
    const bool follow = x.stride_column == 1 && end > begin;
    return {static_cast<const char*>(x.data) + begin * x.stride_t * kSize, x.stride_t * kSize,
            (width * kSize + 63) / 64, follow ? end - begin : 0};
  }

  Rows now_, then_;
  int64_t lines_a_call_, line_ = 0;
};

// One register tile: MR x (NV vectors); `first` starts from zero, else from what c holds.
template <typename M, int MR, int NV, typename Next>
void register_tile(const typename M::Packed* a, const typename M::Packed* b, int64_t steps,
                   bool first, typename M::Acc* c, int64_t ldc, Next& next) {
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
    if (t < next.lines_a_call()) next.prefetch();
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

// All register tiles of `panels` panels of b, side by side in c.
template <typename M, int NV, typename Next>
void panel_tiles(const typename M::Packed* a, int64_t rows, const typename M::Packed* b,
                 int64_t panels, int64_t chunk, bool first, typename M::Acc* c, int64_t ldc,
                 Next& next) {
  constexpr int64_t kCols = NV * M::kLanes;
  const int64_t steps = (chunk + M::kStep - 1) / M::kStep;
  for (int64_t j = 0; j < panels; ++j) {
    for (int64_t i = 0; i < rows; i += SMT_MR) {
      register_tile<M, SMT_MR, NV>(a + i / SMT_MR * panel_stride<M>(chunk, SMT_MR),
                                   b + j * panel_stride<M>(chunk, kCols), steps, first,
                                   c + i * ldc + j * kCols, ldc, next);
    }
  }
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename M, typename S>
void tile_gemm(const Operand& a, const Operand& b, int64_t T, int64_t m, int64_t n, void* out,
               int64_t ldc, const NextTile* following) {
  using Packed = typename M::Packed;
  using Acc = typename M::Acc;
  constexpr int64_t kMR = SMT_MR;
  constexpr int64_t kNR = SMT_NV * M::kLanes;
  constexpr int64_t kRows = round_up(kTile, kMR);
  constexpr int64_t kCols = round_up(kTile, kNR);
  // Padded to whole register tiles.
  constexpr int64_t kPanelsA = kRows / kMR * panel_stride<M>(kChunk, kMR);
  constexpr int64_t kPanelsB = kCols / kNR * panel_stride<M>(kChunk, kNR);
  constexpr int64_t kPacked = sizeof(Packed), kSum = sizeof(Acc);
  constexpr int64_t kBytes = (kPanelsA + kPanelsB) * kPacked + kRows * kCols * kSum;
  Packed* const a_panels = static_cast<Packed*>(thread_scratch(Scratch::panels, kBytes));
  Packed* const b_panels = a_panels + kPanelsA;
  Acc* const sums = reinterpret_cast<Acc*>(b_panels + kPanelsB);
  const int64_t rows = round_up(m, kMR);
  // Panels of SMT_NV vectors, and one or two of SMT_NV - 1 where that is what makes up n.
  constexpr int64_t kNarrow = kNR - M::kLanes;
  const int64_t vectors = (n + M::kLanes - 1) / M::kLanes, over = vectors % SMT_NV;
  const bool two = over > 0 && over < SMT_NV - 1 && vectors > SMT_NV;
  const int64_t wide = vectors / SMT_NV - two, narrow = two ? 2 : over > 0;
  const int64_t wide_cols = wide * kNR < n ? wide * kNR : n;
  for (int64_t t0 = 0; t0 < T; t0 += kChunk) {
    const int64_t chunk = T - t0 < kChunk ? T - t0 : kChunk;
    Packed* const b_narrow = b_panels + wide * panel_stride<M>(chunk, kNR);
    const S* const b_data = static_cast<const S*>(b.data) + t0 * b.stride_t;
    pack_panels<M, kMR>(static_cast<const S*>(a.data) + t0 * a.stride_t, a.stride_t,
                        a.stride_column, chunk, m, a_panels);
    pack_panels<M, kNR>(b_data, b.stride_t, b.stride_column, chunk, wide_cols, b_panels);
    pack_panels<M, kNarrow>(b_data + wide_cols * b.stride_column, b.stride_t, b.stride_column,
                            chunk, n - wide_cols, b_narrow);
    const int64_t next = t0 + chunk, next_end = next + kChunk < T ? next + kChunk : T;
    const int64_t calls = rows / kMR * (wide + narrow);
    NextChunk<S> ahead(a, m, b, n, next, next_end, calls);
    if (next == T && following) {
      ahead = NextChunk<S>(following->a, following->m, following->b, following->n, 0,
                           kChunk < T ? kChunk : T, calls);
    }
    panel_tiles<M, SMT_NV>(a_panels, rows, b_panels, wide, chunk, t0 == 0, sums, kCols, ahead);
    panel_tiles<M, SMT_NV - 1>(a_panels, rows, b_narrow, narrow, chunk, t0 == 0, sums + wide * kNR,
                               kCols, ahead);
  }
  Acc* c = static_cast<Acc*>(out);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = T > 0 ? sums[i * kCols + j] : Acc{};
  }
}

void tile_gemm(DType dtype, const Operand& a, const Operand& b, int64_t T, int64_t m, int64_t n,
               void* c, int64_t ldc, const NextTile* next) {
  switch (dtype) {
    case DType::f64:
      return tile_gemm<Plain<double>, double>(a, b, T, m, n, c, ldc, next);
    case DType::f16:
      return tile_gemm<Plain<float>, f16>(a, b, T, m, n, c, ldc, next);
    case DType::bf16:
#ifdef SMT_DOT_BF16
      return tile_gemm<PairsBf16, bf16>(a, b, T, m, n, c, ldc, next);
#else
      return tile_gemm<Plain<float>, bf16>(a, b, T, m, n, c, ldc, next);
#endif
    default:
      return tile_gemm<Plain<float>, float>(a, b, T, m, n, c, ldc, next);
  }
}

}  // namespace smt_ext::cpu::SMT_ISA
