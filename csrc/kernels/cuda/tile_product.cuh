// A tile of dW = dy^T x in the registers of a block of threads: what block_grad and
// block_score_fused are made of.
//
//   d[i][j] = sum over t in [t_begin, t_end) of dy[t, n_begin + i] * x[t, k_begin + j]
//
// Both operands have the reduction dimension outermost, so a panel of tokens is copied to shared
// memory as it lies, and the fragments are transposed on the way to the registers.
//
//   MmaTile<T, Tile>   bf16, f16: mma.m16n8k16, cp.async in stages, ldmatrix.trans
//   Tf32Tile<Tile>     float32 by mma.m16n8k8 with tf32 operands, cp.async in stages
//   FmaTile<T>         any type, strides and address; plain multiply-adds
//
// All of them: run() computes, for_each(f) calls f(i, j, d[i][j], d[i][j + 1]) for the pairs of
// entries that this thread holds, i and j within the tile. Entries beyond a range's ends are zero
// or the product of zeros with what is there; callers leave them out. Every entry is summed in one
// order, so the bits never change.
#pragma once

#include "convert.cuh"
#include "launch.cuh"

namespace smt_ext::cuda {

struct Operand {  // (T, columns)
  const void* data;
  int64_t stride_t, stride_column;
};

struct TileRange {
  int64_t n_begin, n_end;  // columns of dy, at most Tile
  int64_t k_begin, k_end;  // columns of x
  int64_t t_begin, t_end;
};

// Whether rows of 16-byte pieces can be copied: columns together, every tile begins at a piece.
inline bool takes_pieces(const Operand& a, std::size_t element_bytes, int64_t L) {
  const int64_t piece = static_cast<int64_t>(16 / element_bytes);
  return a.stride_column == 1 && a.stride_t % piece == 0 && L % piece == 0 &&
         is_aligned(a.data, 16);
}

// This thread's part of copying panels of (Tokens, Tile) elements of T, 16 bytes a copy, to rows of
// RowBytes in shared memory.
template <typename T, int Tile, int Tokens, int Threads>
class PanelCopy {
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPieces = Tile / kPiece;          // of a row
  static constexpr int kRowsAtOnce = Threads / kPieces;  // rows that one pass covers
  static constexpr int kPasses = Tokens / kRowsAtOnce;
  static_assert(Threads % kPieces == 0 && Tokens % kRowsAtOnce == 0);

 public:
  __device__ __forceinline__ PanelCopy(const Operand& a, int64_t column_begin, int64_t column_end,
                                       int64_t t_begin) {
    const int64_t column = column_begin + piece() * kPiece;
    const int64_t left = (column_end - column) * static_cast<int64_t>(sizeof(T));
    bytes_ = static_cast<int>(left < 0 ? 0 : left > 16 ? 16 : left);
    base_ = static_cast<const char*>(a.data);
    // A thread whose columns lie beyond the end copies no bytes, from an address that is valid.
    row_bytes_ = bytes_ ? a.stride_t * static_cast<int64_t>(sizeof(T)) : 0;
    next_ = bytes_
                ? base_ + (t_begin + row()) * row_bytes_ + column * static_cast<int64_t>(sizeof(T))
                : base_;
  }

  // Copies the next panel; rows at and beyond `tokens` become zero. address(row, piece) is where a
  // piece goes.
  template <typename Address>
  __device__ __forceinline__ void copy(int64_t tokens, const Address& address) {
    if (tokens >= Tokens) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        ptx::cp_async<16>(address(row() + pass * kRowsAtOnce, piece()),
                          next_ + pass * kRowsAtOnce * row_bytes_, bytes_);
      }
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const bool there = row() + pass * kRowsAtOnce < tokens;
        ptx::cp_async<16>(address(row() + pass * kRowsAtOnce, piece()),
                          there ? next_ + pass * kRowsAtOnce * row_bytes_ : base_,
                          there ? bytes_ : 0);
      }
    }
    next_ += Tokens * row_bytes_;
  }

 private:
  static __device__ __forceinline__ int piece() { return static_cast<int>(threadIdx.x) % kPieces; }
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kPieces; }

  const char* base_;
  const char* next_;  // of the first pass
  int64_t row_bytes_;
  int bytes_;
};

// Stages of panels in flight: copy(stage, tokens left) fills one, multiply(stage) uses it.
template <int Stages, int Tokens, typename Copy, typename Multiply>
__device__ __forceinline__ void pipeline(int64_t tokens, const Copy& copy,
                                         const Multiply& multiply) {
  const int64_t panels = (tokens + Tokens - 1) / Tokens;
#pragma unroll
  for (int stage = 0; stage < Stages - 1; ++stage) {
    if (stage < panels) copy(stage, tokens - stage * Tokens);
    ptx::cp_async_commit();
  }
  int reads = 0, fills = Stages - 1;
  int64_t left = tokens - (Stages - 1) * Tokens;  // of the panel that is copied next
  for (int64_t panel = 0; panel < panels; ++panel) {
    ptx::cp_async_wait<Stages - 2>();
    __syncthreads();  // the panel is there for all, and all are done with the one before it
    if (left > 0) copy(fills, left);
    ptx::cp_async_commit();
    left -= Tokens;
    multiply(reads);
    if (++reads == Stages) reads = 0;
    if (++fills == Stages) fills = 0;
  }
}

__device__ __forceinline__ void mma(Type<bf16>, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_bf16(d, a, b);
}
__device__ __forceinline__ void mma(Type<f16>, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_f16(d, a, b);
}

// How the warps of a block share a Tile x Tile tile, and which entries an mma leaves in a lane.
template <int Tile>
struct WarpGrid {
  static constexpr int kWarps = Tile >= 64 ? 2 : 1;  // down and across
  static constexpr int kThreads = 32 * kWarps * kWarps;
  static constexpr int kSide = Tile / kWarps;  // of a warp's part
  static constexpr int kMs = kSide / 16, kNs = kSide / 8;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarps * kSide;
  }
  static __device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 % kWarps * kSide;
  }

  template <typename F>
  static __device__ __forceinline__ void for_each(const float (&d)[kMs][kNs][4], const F& f) {
    const int row = warp_row() + lane() / 4, column = warp_column() + lane() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kMs; ++m) {
#pragma unroll
      for (int n = 0; n < kNs; ++n) {
        f(row + m * 16, column + n * 8, d[m][n][0], d[m][n][1]);
        f(row + m * 16 + 8, column + n * 8, d[m][n][2], d[m][n][3]);
      }
    }
  }
};

template <typename T, int Tile>
class MmaTile {
  using Warps = WarpGrid<Tile>;
  static constexpr int kStages = 3, kTokens = 32;
  static constexpr int kPieces = Tile / 8;  // of 16 bytes in a row of a panel
  static constexpr int kRowBytes = Tile * 2;
  static constexpr int kPanelBytes = kTokens * kRowBytes;

 public:
  static constexpr int kTile = Tile, kThreads = Warps::kThreads;
  static constexpr int kBlocks = Tile == 128 ? 2 : Tile == 64 ? 4 : 16;  // of a multiprocessor
  static constexpr std::size_t kSharedBytes = kStages * 2 * kPanelBytes;
  using Acc = float;

  __device__ __forceinline__ void run(const Operand& dy, const Operand& x, const TileRange& r) {
    unsigned char* const smem = ptx::dynamic_smem();
    Copy a(dy, r.n_begin, r.n_end, r.t_begin), b(x, r.k_begin, r.k_end, r.t_begin);
    // Lanes 8 i ... 8 i + 7 name the rows (tokens) of matrix i. Of A, matrices 1 and 3 are 8
    // columns on, 2 and 3 are 8 tokens on; of B the other way round.
    const int lane = Warps::lane();
    const int a_token = lane % 8 + lane / 16 * 8, b_token = lane % 8 + lane / 8 % 2 * 8;
    int a_at[Warps::kMs], b_at[Warps::kNs / 2];
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) {
      a_at[m] = offset(a_token, Warps::warp_row() / 8 + m * 2 + lane / 8 % 2);
    }
#pragma unroll
    for (int n = 0; n < Warps::kNs / 2; ++n) {
      b_at[n] = kPanelBytes + offset(b_token, Warps::warp_column() / 8 + n * 2 + lane / 16);
    }
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) {
#pragma unroll
      for (int n = 0; n < Warps::kNs; ++n) {
#pragma unroll
        for (float& d : d_[m][n]) d = 0;
      }
    }
    pipeline<kStages, kTokens>(
        r.t_end - r.t_begin,
        [&](int stage, int64_t tokens) {
          unsigned char* const panel = smem + stage * 2 * kPanelBytes;
          a.copy(tokens, [&](int row, int piece) { return panel + offset(row, piece); });
          b.copy(tokens,
                 [&](int row, int piece) { return panel + kPanelBytes + offset(row, piece); });
        },
        [&](int stage) {
          const unsigned char* const panel = smem + stage * 2 * kPanelBytes;
#pragma unroll
          for (int k = 0; k < kTokens; k += 16) multiply(panel + k * kRowBytes, a_at, b_at);
        });
  }

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    Warps::for_each(d_, f);
  }

 private:
  using Copy = PanelCopy<T, Tile, kTokens, kThreads>;

  // Pieces of a row change places with the row's number, so that the 8 rows of a matrix (and the 8
  // pieces that a quarter warp copies) lie in different banks. The same for rows 8 apart.
  static __device__ __forceinline__ int offset(int row, int piece) {
    constexpr int kRowsOfLine = kRowBytes < 128 ? 128 / kRowBytes : 1;
    constexpr int kMask = kPieces < 8 ? kPieces - 1 : 7;
    return row * kRowBytes + (piece ^ (row / kRowsOfLine & kMask)) * 16;
  }

  __device__ __forceinline__ void multiply(const unsigned char* panel,
                                           const int (&a_at)[Warps::kMs],
                                           const int (&b_at)[Warps::kNs / 2]) {
    uint32_t a[Warps::kMs][4], b[Warps::kNs / 2][4];
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) ptx::ldmatrix_x4_trans(a[m], panel + a_at[m]);
#pragma unroll
    for (int n = 0; n < Warps::kNs / 2; ++n) ptx::ldmatrix_x4_trans(b[n], panel + b_at[n]);
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) {
#pragma unroll
      for (int n = 0; n < Warps::kNs; ++n) {
        const uint32_t part[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        mma(Type<T>{}, d_[m][n], a[m], part);
      }
    }
  }

  float d_[Warps::kMs][Warps::kNs][4];
};

template <int Tile>
class Tf32Tile {
  using Warps = WarpGrid<Tile>;
  static constexpr int kStages = 3, kTokens = 16;
  // 8 more than a multiple of 32: the 4 tokens x 8 columns of a fragment's load hit 32 banks.
  static constexpr int kRow = Tile + 8;
  static constexpr int kPanel = kTokens * kRow;

 public:
  static constexpr int kTile = Tile, kThreads = Warps::kThreads;
  static constexpr int kBlocks = Tile == 128 ? 2 : Tile == 64 ? 4 : 16;
  static constexpr std::size_t kSharedBytes = kStages * 2 * kPanel * sizeof(float);
  using Acc = float;

  __device__ __forceinline__ void run(const Operand& dy, const Operand& x, const TileRange& r) {
    float* const smem = ptx::dynamic_smem<float>();
    Copy a(dy, r.n_begin, r.n_end, r.t_begin), b(x, r.k_begin, r.k_end, r.t_begin);
    const int at = Warps::lane() % 4 * kRow + Warps::lane() / 4;
    const int a_at = at + Warps::warp_row(), b_at = at + Warps::warp_column() + kPanel;
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) {
#pragma unroll
      for (int n = 0; n < Warps::kNs; ++n) {
#pragma unroll
        for (float& d : d_[m][n]) d = 0;
      }
    }
    pipeline<kStages, kTokens>(
        r.t_end - r.t_begin,
        [&](int stage, int64_t tokens) {
          float* const panel = smem + stage * 2 * kPanel;
          a.copy(tokens, [&](int row, int piece) { return panel + row * kRow + piece * 4; });
          b.copy(tokens,
                 [&](int row, int piece) { return panel + kPanel + row * kRow + piece * 4; });
        },
        [&](int stage) {
          const float* const panel = smem + stage * 2 * kPanel;
#pragma unroll
          for (int k = 0; k < kTokens; k += 8) {
            multiply(panel + a_at + k * kRow, panel + b_at + k * kRow);
          }
        });
  }

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    Warps::for_each(d_, f);
  }

 private:
  using Copy = PanelCopy<float, Tile, kTokens, kThreads>;

  static __device__ __forceinline__ uint32_t operand(const float* p) {
    return ptx::cvt_rna_tf32(ptx::ld_shared(p));
  }

  __device__ __forceinline__ void multiply(const float* a_panel, const float* b_panel) {
    uint32_t a[Warps::kMs][4], b[Warps::kNs][2];
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) {
      a[m][0] = operand(a_panel + m * 16);
      a[m][1] = operand(a_panel + m * 16 + 8);
      a[m][2] = operand(a_panel + m * 16 + 4 * kRow);
      a[m][3] = operand(a_panel + m * 16 + 8 + 4 * kRow);
    }
#pragma unroll
    for (int n = 0; n < Warps::kNs; ++n) {
      b[n][0] = operand(b_panel + n * 8);
      b[n][1] = operand(b_panel + n * 8 + 4 * kRow);
    }
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) {
#pragma unroll
      for (int n = 0; n < Warps::kNs; ++n) ptx::mma_m16n8k8_tf32(d_[m][n], a[m], b[n]);
    }
  }

  float d_[Warps::kMs][Warps::kNs][4];
};

template <typename T>
class FmaTile {
  static constexpr int kTokens = 16, kSide = 4;  // a thread holds kSide x kSide entries

 public:
  static constexpr int kTile = 64, kThreads = 256, kBlocks = 4;
  static constexpr std::size_t kSharedBytes = 0;
  using Acc = AccumulatorOf<T>;

  __device__ __forceinline__ void run(const Operand& dy, const Operand& x, const TileRange& r) {
    SMT_EXT_SHARED(Acc, a, kTokens * kTile);
    SMT_EXT_SHARED(Acc, b, kTokens * kTile);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) d_[i][j] = 0;
    }
    for (int64_t t = r.t_begin; t < r.t_end; t += kTokens) {
      copy(dy, r.n_begin, r.n_end, t, r.t_end, a);
      copy(x, r.k_begin, r.k_end, t, r.t_end, b);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        Acc row[kSide], column[kSide];
        read(a + k * kTile + first_row(), row);
        read(b + k * kTile + first_column(), column);
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
#pragma unroll
          for (int j = 0; j < kSide; ++j) d_[i][j] += row[i] * column[j];
        }
      }
      __syncthreads();
    }
  }

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; j += 2) {
        f(first_row() + i, first_column() + j, d_[i][j], d_[i][j + 1]);
      }
    }
  }

 private:
  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / 16 * kSide;
  }
  static __device__ __forceinline__ int first_column() {
    return static_cast<int>(threadIdx.x) % 16 * kSide;
  }

  static __device__ __forceinline__ void copy(const Operand& from, int64_t column_begin,
                                              int64_t column_end, int64_t t, int64_t t_end,
                                              Acc* to) {
    const int column = static_cast<int>(threadIdx.x) % kTile;
#pragma unroll
    for (int row = static_cast<int>(threadIdx.x) / kTile; row < kTokens; row += kThreads / kTile) {
      Acc value = 0;
      if (t + row < t_end && column_begin + column < column_end) {
        value =
            widen(ptx::ld_global_nc(static_cast<const T*>(from.data) + (t + row) * from.stride_t +
                                    (column_begin + column) * from.stride_column));
      }
      ptx::st_shared(to + row * kTile + column, value);
    }
  }

  static __device__ __forceinline__ void read(const Acc* from, Acc (&to)[kSide]) {
    constexpr int kVector = 16 / sizeof(Acc);
#pragma unroll
    for (int i = 0; i < kSide; i += kVector) {
      const auto part = ptx::ld_shared(reinterpret_cast<const Vector<Acc, kVector>*>(from + i));
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[i + j] = part.at[j];
    }
  }

  Acc d_[kSide][kSide];
};

// f(Type<Engine>{}) for the fastest engine that takes these operands. L decides on the tile: the
// smallest that holds a block, at most 128.
template <typename F>
void with_engine(DType dtype, const Operand& dy, const Operand& x, int64_t L, bool tf32, F&& f) {
  const auto by_size = [&](auto engine_of) {
    if (L > 64) return f(engine_of(std::integral_constant<int, 128>{}));
    if (L > 32) return f(engine_of(std::integral_constant<int, 64>{}));
    return f(engine_of(std::integral_constant<int, 32>{}));
  };
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool pieces = takes_pieces(dy, sizeof(T), L) && takes_pieces(x, sizeof(T), L);
    if constexpr (sizeof(T) == 2) {
      if (pieces) {
        return by_size([](auto tile) { return Type<MmaTile<T, decltype(tile)::value>>{}; });
      }
    } else if constexpr (std::is_same_v<T, float>) {
      if (pieces && tf32) {
        return by_size([](auto tile) { return Type<Tf32Tile<decltype(tile)::value>>{}; });
      }
    }
    f(Type<FmaTile<T>>{});
  });
}

}  // namespace smt_ext::cuda
