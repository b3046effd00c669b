// A tile of dW = dy^T x in the registers of a block of threads: what block_grad and
// block_score_fused are made of.
//
//   d[i][j] = sum over t in [t_begin, t_end) of dy[t, n(i)] * x[t, k(j)]
//
// n and k are neighbouring columns, or blocks of columns from several places side by side.
//
// Both operands have the reduction dimension outermost, so a panel of tokens is copied to shared
// memory as it lies, and the fragments are transposed on the way to the registers.
//
//   MmaTile<T, Rows, Columns>   bf16, f16: mma.m16n8k16, cp.async in stages, ldmatrix.trans
//   Tf32Tile<Rows, Columns>     float32 by mma.m16n8k8, tf32 operands, cp.async in stages
//   FmaTile<T, Tile>            any type, strides and address; plain multiply-adds; a square
//
// All of them: run() computes; for_each_pair(f) calls f(i, j, values) for the entries d[i][j] and
// d[i][j + 1] that this thread holds, i and j within the tile; for_each_part() has the tile pass
// through shared memory, so that threads side by side take entries side by side. Entries beyond a
// range's ends mean nothing; callers leave them out. Every entry is summed in one order, so the
// bits never change.
#pragma once

#include "../common/limits.h"
#include "../common/operand.h"
#include "convert.cuh"
#include "launch.cuh"

namespace smt_ext::cuda {

// The columns of an operand that a tile takes, at most as many as its side has entries.
struct Columns {
  int64_t begin, end;             // neighbours: [begin, end); of blocks, end is the operand's width
  const int32_t* list = nullptr;  // blocks of 2^shift columns, a side in all; -1 for none
  int shift = 0;
  int32_t first = 0;  // the number of the operand's first block in the list

  // The column that is the tile's i-th, and whether there is one. Where there is none, the column
  // of neighbours lies beyond the end.
  __device__ __forceinline__ bool at(int i, int64_t& column) const {
    if (list == nullptr) {
      column = begin + i;
      return column < end;
    }
    const int32_t block = ptx::ld_global_nc(list + (i >> shift));
    const int64_t wanted =
        static_cast<int64_t>(block - first) * (1 << shift) + (i & ((1 << shift) - 1));
    const bool there = block >= first && wanted < end;
    column = there ? wanted : 0;
    return there;
  }
};

struct TileRange {
  Columns n, k;  // of dy, of x
  int64_t t_begin, t_end;
};

// Whether rows of 16-byte pieces can be copied: columns together, every tile begins and ends at a
// piece.
inline bool takes_pieces(const Operand& a, DType dtype, int64_t columns, int64_t L) {
  const int64_t piece = 16 / size_of(dtype);
  return a.stride_column == 1 && a.stride_t % piece == 0 && columns % piece == 0 &&
         L % piece == 0 && is_aligned(a.data, 16);
}

// This thread's part of copying panels of (Tokens, Side) elements of T, 16 bytes a copy.
template <typename T, int Side, int Tokens, int Threads>
class PanelCopy {
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPieces = Side / kPiece;          // of a row
  static constexpr int kRowsAtOnce = Threads / kPieces;  // rows that one pass covers
  static constexpr int kPasses = Tokens / kRowsAtOnce;
  static_assert(Threads % kPieces == 0 && Tokens % kRowsAtOnce == 0);

 public:
  __device__ __forceinline__ PanelCopy(const Operand& a, const Columns& columns, int64_t t_begin) {
    int64_t column;
    there_ = columns.at(piece() * kPiece, column);
    row_bytes_ = a.stride_t * static_cast<int64_t>(sizeof(T));
    next_ = static_cast<const char*>(a.data) + (t_begin + row()) * row_bytes_ +
            column * static_cast<int64_t>(sizeof(T));
  }

  // Copies the next panel; rows at and beyond `tokens`, and columns beyond the end, become zero:
  // their addresses are not read. address(row, piece) is where a piece goes.
  template <typename Address>
  __device__ __forceinline__ void copy(int tokens, const Address& address) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      ptx::cp_async_16(address(row() + pass * kRowsAtOnce, piece()),
                       next_ + pass * kRowsAtOnce * row_bytes_,
                       there_ && row() + pass * kRowsAtOnce < tokens);
    }
    next_ += Tokens * row_bytes_;
  }

 private:
  static __device__ __forceinline__ int piece() { return static_cast<int>(threadIdx.x) % kPieces; }
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kPieces; }

  const char* next_;  // of the first pass
  int64_t row_bytes_;
  bool there_;  // this thread's columns
};

// Stages of panels in flight, each used in two steps of half its tokens: copy(stage, tokens) fills
// one, load(step, stage) reads the fragments of a step and multiply(step) uses them. Fragments are
// read before the products of the step before theirs, the next panel's too, so that tensor cores
// wait neither for shared memory nor for the barrier.
template <int Stages, int Tokens, typename Copy, typename Load, typename Multiply>
__device__ __forceinline__ void pipeline(int64_t tokens, const Copy& copy, const Load& load,
                                         const Multiply& multiply) {
  if (tokens == 0) return;
  // Of the panel that is copied next; at the end panels of no tokens, which nothing reads.
  const auto tokens_of = [&](int64_t before) {
    const int64_t rest = tokens - before;
    return static_cast<int>(rest < Tokens ? rest : Tokens);
  };
#pragma unroll
  for (int stage = 0; stage < Stages - 1; ++stage) {
    copy(stage, tokens_of(stage * Tokens));
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<Stages - 2>();
  __syncthreads();
  const std::integral_constant<int, 0> first;
  const std::integral_constant<int, 1> second;
  load(first, 0);
  int reads = 0, fills = Stages - 1;
  for (int64_t done = 0; done < tokens; done += Tokens) {
    load(second, reads);
    // Into the stage of the panel before, which all are done with since the last barrier.
    copy(fills, tokens_of(done + (Stages - 1) * Tokens));
    ptx::cp_async_commit();
    multiply(first);
    if (++reads == Stages) reads = 0;
    if (++fills == Stages) fills = 0;
    ptx::cp_async_wait<Stages - 2>();
    __syncthreads();  // the next panel is there for all
    load(first, reads);
    multiply(second);
  }
  ptx::cp_async_wait<0>();  // nothing is written once the shared memory is someone else's
}

__device__ __forceinline__ void mma(Type<bf16>, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_bf16(d, a, b);
}
__device__ __forceinline__ void mma(Type<f16>, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_f16(d, a, b);
}

// How the warps of a block share a tile, and which entries an mma leaves in a lane. Those of a tall
// tile have 64 x 32: with 64 x 64 the addresses of 256 rows would not fit into the registers.
template <int Rows, int Columns>
struct WarpGrid {
  static constexpr int kDown = Rows > Columns ? 4 : Rows >= 64 ? 2 : 1;
  static constexpr int kAcross = Rows > Columns ? Columns / 32 : kDown;
  static constexpr int kThreads = 32 * kDown * kAcross;
  static constexpr int kWarpRows = Rows / kDown, kWarpColumns = Columns / kAcross;
  static constexpr int kMs = kWarpRows / 16, kNs = kWarpColumns / 8;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / kAcross * kWarpRows;
  }
  static __device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 % kAcross * kWarpColumns;
  }

  // row(m, half): the row, of the warp's part, of a lane's upper and lower pair of the m-th mma.
  template <typename Row, typename F>
  static __device__ __forceinline__ void for_each_pair(const float (&d)[kMs][kNs][4],
                                                       const Row& row, const F& f) {
#pragma unroll
    for (int m = 0; m < kMs; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kNs; ++n) {
          f(warp_row() + row(m, half), warp_column() + n * 8 + lane() % 4 * 2,
            Vector<float, 2>{{d[m][n][half * 2], d[m][n][half * 2 + 1]}});
        }
      }
    }
  }

  // A part of the tile is 32 rows of each warp's.
  static constexpr int kParts = kWarpRows / 32, kPartRows = Rows / kParts;
  static __device__ __forceinline__ int row_of(int part, int r) {
    return r / 32 * kWarpRows + part * 32 + r % 32;
  }

  // row: as above.
  template <int Part, int Stride, typename Row>
  static __device__ __forceinline__ void stage(float* to, const float (&d)[kMs][kNs][4],
                                               const Row& row) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const line = to + (warp_row() / kParts + row(m, half)) * Stride + warp_column();
#pragma unroll
        for (int n = 0; n < kNs; ++n) {
          const auto& from = d[Part * 2 + m][n];
          ptx::st_shared(reinterpret_cast<Vector<float, 2>*>(line + n * 8 + lane() % 4 * 2),
                         Vector<float, 2>{{from[half * 2], from[half * 2 + 1]}});
        }
      }
    }
  }
};

// Has the tile pass through shared memory, kPartRows rows at a time: f(part, staged) finds the rows
// row_of(part, 0), row_of(part, 1), ... at staged, kPartStride entries apart. All threads call it
// together, once the engine has run.
template <typename Engine, typename F>
__device__ __forceinline__ void for_each_part(const Engine& engine, const F& f) {
  static_assert(Engine::kParts <= 2);
  static_assert(Engine::kPartRows * Engine::kPartStride * sizeof(typename Engine::Acc) <=
                Engine::kSharedBytes);
  auto* const staged = ptx::dynamic_smem<typename Engine::Acc>();
#pragma unroll 1
  for (int part = 0; part < Engine::kParts; ++part) {
    __syncthreads();  // all are done with the panels, or with the part before
    if (part == 0) {
      engine.template stage<0>(staged);
    } else {
      engine.template stage<Engine::kParts - 1>(staged);
    }
    __syncthreads();
    f(part, staged);
  }
}

// That a multiprocessor holds at least: in 100 KB of shared memory, 1 KB of each is the driver's.
constexpr int blocks_of_mma(int rows, int columns) {
  if (rows > columns) return 1;
  return rows == 128 ? 2 : rows == 64 ? 4 : 7;
}

template <typename T, int Rows, int Columns = Rows>
class MmaTile {
  using Warps = WarpGrid<Rows, Columns>;
  static constexpr int kStages = 3, kTokens = 32;  // of a panel: two steps of 16
  static constexpr int kDyBytes = kTokens * Rows * 2, kXBytes = kTokens * Columns * 2;  // a panel's
  static constexpr int kStageBytes = kDyBytes + kXBytes;

 public:
  static constexpr int kRows = Rows, kColumns = Columns, kThreads = Warps::kThreads;
  static constexpr int kBlocks = blocks_of_mma(Rows, Columns);
  static constexpr std::size_t kSharedBytes = kStages * kStageBytes;
  using Acc = float;

  __device__ __forceinline__ void run(const Operand& dy, const Operand& x, const TileRange& r) {
    unsigned char* const smem = ptx::dynamic_smem();
    PanelCopy<T, Rows, kTokens, kThreads> a(dy, r.n, r.t_begin);
    PanelCopy<T, Columns, kTokens, kThreads> b(x, r.k, r.t_begin);
    // Lanes 8 i ... 8 i + 7 name the rows (tokens) of matrix i. Of A, matrices 1 and 3 are 8
    // columns on, 2 and 3 are 8 tokens on; of B the other way round.
    const int lane = Warps::lane();
    const int a_token = lane % 8 + lane / 16 * 8, b_token = lane % 8 + lane / 8 % 2 * 8;
    int a_at[Warps::kMs], b_at[Warps::kNs / 2];
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) {
      a_at[m] = offset<Rows>(a_token, Warps::warp_row() / 8 + m * 2 + lane / 8 % 2);
    }
#pragma unroll
    for (int n = 0; n < Warps::kNs / 2; ++n) {
      b_at[n] = kDyBytes + offset<Columns>(b_token, Warps::warp_column() / 8 + n * 2 + lane / 16);
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
        [&](int stage, int tokens) {
          unsigned char* const panel = smem + stage * kStageBytes;
          a.copy(tokens, [&](int row, int piece) { return panel + offset<Rows>(row, piece); });
          b.copy(tokens, [&](int row, int piece) {
            return panel + kDyBytes + offset<Columns>(row, piece);
          });
        },
        [&](auto step, int stage) {
          const unsigned char* const panel = smem + stage * kStageBytes;
#pragma unroll
          for (int m = 0; m < Warps::kMs; ++m) {
            ptx::ldmatrix_x4_trans(a_[step][m], panel + step * (kDyBytes / 2) + a_at[m]);
          }
#pragma unroll
          for (int n = 0; n < Warps::kNs / 2; ++n) {
            ptx::ldmatrix_x4_trans(b_[step][n], panel + step * (kXBytes / 2) + b_at[n]);
          }
        },
        [&](auto step) { multiply(a_[step], b_[step]); });
  }

  template <typename F>
  __device__ __forceinline__ void for_each_pair(const F& f) const {
    Warps::for_each_pair(d_, row, f);
  }

  // Rows 8 words apart in the banks: the 4 rows x 4 pairs that half a warp stages are all 32.
  static constexpr int kParts = Warps::kParts, kPartRows = Warps::kPartRows;
  static constexpr int kPartStride = Columns + 8;
  static __device__ __forceinline__ int row_of(int part, int r) { return Warps::row_of(part, r); }
  template <int Part>
  __device__ __forceinline__ void stage(float* to) const {
    Warps::template stage<Part, kPartStride>(to, d_, row);
  }

 private:
  static __device__ __forceinline__ int row(int m, int half) {
    return m * 16 + half * 8 + Warps::lane() / 4;
  }

  // Pieces of a row change places with the row's number, so that the 8 rows of a matrix (and the 8
  // pieces that a quarter warp copies) lie in different banks. The same for rows 8 apart.
  template <int Side>
  static __device__ __forceinline__ int offset(int row, int piece) {
    constexpr int kRowBytes = Side * 2, kPieces = Side / 8;  // of 16 bytes
    constexpr int kRowsOfLine = kRowBytes < 128 ? 128 / kRowBytes : 1;
    constexpr int kMask = kPieces < 8 ? kPieces - 1 : 7;
    return row * kRowBytes + (piece ^ (row / kRowsOfLine & kMask)) * 16;
  }

  __device__ __forceinline__ void multiply(const uint32_t (&a)[Warps::kMs][4],
                                           const uint32_t (&b)[Warps::kNs / 2][4]) {
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
  uint32_t a_[2][Warps::kMs][4], b_[2][Warps::kNs / 2][4];
};

template <int Rows, int Columns = Rows>
class Tf32Tile {
  using Warps = WarpGrid<Rows, Columns>;
  static constexpr int kStages = 3, kTokens = 16;  // of a panel: two steps of 8
  static constexpr int kDy = kTokens * Rows, kStage = kDy + kTokens * Columns;

 public:
  static constexpr int kRows = Rows, kColumns = Columns, kThreads = Warps::kThreads;
  static constexpr int kBlocks = blocks_of_mma(Rows, Columns);
  static constexpr std::size_t kSharedBytes = kStages * kStage * sizeof(float);
  using Acc = float;

  __device__ __forceinline__ void run(const Operand& dy, const Operand& x, const TileRange& r) {
    float* const smem = ptx::dynamic_smem<float>();
    PanelCopy<float, Rows, kTokens, kThreads> a(dy, r.n, r.t_begin);
    PanelCopy<float, Columns, kTokens, kThreads> b(x, r.k, r.t_begin);
    const int token = Warps::lane() % 4, group = Warps::lane() / 4;
    // Of mma 2 and on, 32 columns and on, the addresses differ by a constant.
    int a_at[2], b_at[4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      a_at[m] = offset<Rows>(token, Warps::warp_row() + m * 16 + group * 2);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      b_at[n] = kDy + offset<Columns>(token, Warps::warp_column() + n * 8 + group);
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
        [&](int stage, int tokens) {
          float* const panel = smem + stage * kStage;
          a.copy(tokens, [&](int row, int piece) { return panel + offset<Rows>(row, piece * 4); });
          b.copy(tokens,
                 [&](int row, int piece) { return panel + kDy + offset<Columns>(row, piece * 4); });
        },
        [&](auto step, int stage) {
          const float* const panel = smem + stage * kStage;
#pragma unroll
          for (int k = 0; k < 2; ++k) {
#pragma unroll
            for (int m = 0; m < Warps::kMs; ++m) {
              const auto rows = ptx::ld_shared(reinterpret_cast<const Vector<float, 2>*>(
                  panel + (step * 8 + k * 4) * Rows + a_at[m % 2] + m / 2 * 32));
              a_[step][m][k * 2] = rows.at[0];
              a_[step][m][k * 2 + 1] = rows.at[1];
            }
#pragma unroll
            for (int n = 0; n < Warps::kNs; ++n) {
              b_[step][n][k] =
                  ptx::ld_shared(panel + (step * 8 + k * 4) * Columns + b_at[n % 4] + n / 4 * 32);
            }
          }
        },
        [&](auto step) { multiply(a_[step], b_[step]); });
  }

  template <typename F>
  __device__ __forceinline__ void for_each_pair(const F& f) const {
    Warps::for_each_pair(d_, row, f);
  }

  // As of MmaTile, of which rows here every second one is staged at once.
  static constexpr int kParts = Warps::kParts, kPartRows = Warps::kPartRows;
  static constexpr int kPartStride = Columns + 4;
  static __device__ __forceinline__ int row_of(int part, int r) { return Warps::row_of(part, r); }
  template <int Part>
  __device__ __forceinline__ void stage(float* to) const {
    Warps::template stage<Part, kPartStride>(to, d_, row);
  }

 private:
  // Which row of the tile is which row of an mma is free: rows 2 g and 2 g + 1 of 16 are rows g and
  // g + 8 of the mma, so that one load reads both.
  static __device__ __forceinline__ int row(int m, int half) {
    return m * 16 + Warps::lane() / 4 * 2 + half;
  }

  // Pairs of 16-byte pieces change places with the row's number, so that the 4 rows (tokens) x 8
  // columns that a load reads lie in different banks. The same for rows 4 apart.
  template <int Side>
  static __device__ __forceinline__ int offset(int row, int column) {
    return row * Side + (column ^ row % 4 * 8);
  }

  __device__ __forceinline__ void multiply(const float (&a)[Warps::kMs][4],
                                           const float (&b)[Warps::kNs][2]) {
    uint32_t b_rounded[Warps::kNs][2];
#pragma unroll
    for (int n = 0; n < Warps::kNs; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) b_rounded[n][i] = ptx::cvt_rna_tf32(b[n][i]);
    }
#pragma unroll
    for (int m = 0; m < Warps::kMs; ++m) {
      uint32_t a_rounded[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a_rounded[i] = ptx::cvt_rna_tf32(a[m][i]);
#pragma unroll
      for (int n = 0; n < Warps::kNs; ++n) {
        ptx::mma_m16n8k8_tf32(d_[m][n], a_rounded, b_rounded[n]);
      }
    }
  }

  float d_[Warps::kMs][Warps::kNs][4];
  float a_[2][Warps::kMs][4], b_[2][Warps::kNs][2];
};

// This thread's part of reading panels of (Tokens, Tile) elements of T at any strides into
// registers, while the panel before is multiplied, and of writing them to shared memory as Acc.
template <typename T, typename Acc, int Tile, int Tokens, int Threads>
class PanelRead {
  static constexpr int kRowsAtOnce = Threads / Tile;  // rows that one pass covers
  static constexpr int kPasses = Tokens / kRowsAtOnce;
  static_assert(Threads % Tile == 0 && Tokens % kRowsAtOnce == 0);

 public:
  // A thread without a column reads another one: its products are left out.
  __device__ __forceinline__ PanelRead(const Operand& a, const Columns& columns, int64_t t_begin)
      : stride_t_(a.stride_t) {
    int64_t there;
    if (!columns.at(column(), there) && columns.list == nullptr) there = columns.end - 1;
    next_ = static_cast<const T*>(a.data) + (t_begin + row()) * stride_t_ + there * a.stride_column;
  }

  // Reads the next panel; rows at and beyond `tokens` become zero.
  __device__ __forceinline__ void read(int tokens) {
    if (tokens >= Tokens) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        value_[pass] = ptx::ld_global_nc(next_ + pass * kRowsAtOnce * stride_t_);
      }
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        value_[pass] = convert<T>(0.0f);
        if (row() + pass * kRowsAtOnce < tokens) {
          value_[pass] = ptx::ld_global_nc(next_ + pass * kRowsAtOnce * stride_t_);
        }
      }
    }
    next_ += Tokens * stride_t_;
  }

  __device__ __forceinline__ void write(Acc* panel) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      ptx::st_shared(panel + (row() + pass * kRowsAtOnce) * Tile + column(), widen(value_[pass]));
    }
  }

 private:
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % Tile; }
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / Tile; }

  const T* next_;  // of the first pass
  int64_t stride_t_;
  T value_[kPasses];
};

template <typename T, int Tile>
class FmaTile {
 public:
  using Acc = accumulator_t<T>;

 private:
  // A thread holds kSide x kSide entries: as many multiply-adds as can be had for 2 kSide loads
  // from shared memory. Along both sides they are groups of kVector neighbours, kStep apart: 8
  // lanes across read 128 bytes together, and the 4 down the same 16 bytes.
  static constexpr int kSide = Tile >= 64 && sizeof(Acc) == 4 ? 8 : 4;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Acc));
  static constexpr int kAcross = Tile / kSide;  // threads across and down
  static constexpr int kStep = kAcross * kVector;
  static constexpr int kTokens = Tile * sizeof(Acc) > 128 ? 8 : 16;
  static constexpr int kPanel = kTokens * Tile;

 public:
  static constexpr int kRows = Tile, kColumns = Tile, kThreads = kAcross * kAcross;
  static constexpr int kBlocks = 512 / kThreads;  // 128 registers a thread
  // Two stages of a panel of dy and one of x; afterwards a part of the tile.
  static constexpr int kParts = kSide / kVector, kPartRows = kStep, kPartStride = Tile;
  static constexpr std::size_t kSharedBytes =
      sizeof(Acc) * (4 * kPanel > kPartRows * kPartStride ? 4 * kPanel : kPartRows * kPartStride);

  __device__ __forceinline__ void run(const Operand& dy, const Operand& x, const TileRange& r) {
    Acc* const smem = ptx::dynamic_smem<Acc>();
    Read a(dy, r.n, r.t_begin), b(x, r.k, r.t_begin);
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) d_[i][j] = 0;
    }
    const int64_t tokens = r.t_end - r.t_begin;
    unsigned panels = static_cast<unsigned>((tokens + kTokens - 1) / kTokens);  // 32 bits: T < 2^35
    if (panels == 0) return;
    const int last = static_cast<int>(tokens - (panels - 1) * int64_t{kTokens});
    int stage = 0;
    a.read(panels == 1 ? last : kTokens);
    b.read(panels == 1 ? last : kTokens);
    do {
      Acc* const panel = smem + stage * 2 * kPanel;
      a.write(panel);
      b.write(panel + kPanel);
      __syncthreads();  // the panel is there for all, and all are done with the one before it
      if (--panels > 0) {
        a.read(panels == 1 ? last : kTokens);
        b.read(panels == 1 ? last : kTokens);
      }
      multiply(panel);
      stage ^= 1;
    } while (panels > 0);
  }

  template <typename F>
  __device__ __forceinline__ void for_each_pair(const F& f) const {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; j += 2) {
        f(first_row() + i / kVector * kStep + i % kVector,
          first_column() + j / kVector * kStep + j % kVector,
          Vector<Acc, 2>{{d_[i][j], d_[i][j + 1]}});
      }
    }
  }

  static __device__ __forceinline__ int row_of(int part, int r) { return part * kStep + r; }

  template <int Part>
  __device__ __forceinline__ void stage(Acc* to) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; j += kVector) {
        Vector<Acc, kVector> run;
#pragma unroll
        for (int e = 0; e < kVector; ++e) run.at[e] = d_[Part * kVector + i][j + e];
        ptx::st_shared(
            reinterpret_cast<Vector<Acc, kVector>*>(to + (first_row() + i) * kPartStride +
                                                    first_column() + j / kVector * kStep),
            run);
      }
    }
  }

 private:
  using Read = PanelRead<T, Acc, Tile, kTokens, kThreads>;
  static constexpr int kWarpsAcross = kAcross / 8;  // a warp is 4 threads down, 8 across

  static __device__ __forceinline__ int first_row() {
    const int thread = static_cast<int>(threadIdx.x);
    return (thread / 32 / kWarpsAcross * 4 + thread % 32 / 8) * kVector;
  }
  static __device__ __forceinline__ int first_column() {
    const int thread = static_cast<int>(threadIdx.x);
    return (thread / 32 % kWarpsAcross * 8 + thread % 8) * kVector;
  }

  __device__ __forceinline__ void multiply(const Acc* panel) {
    const Acc* const a = panel + first_row();
    const Acc* const b = panel + kPanel + first_column();
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      Acc row[kSide], column[kSide];
      load(a + k * Tile, row);
      load(b + k * Tile, column);
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) d_[i][j] += row[i] * column[j];
      }
    }
  }

  static __device__ __forceinline__ void load(const Acc* from, Acc (&to)[kSide]) {
#pragma unroll
    for (int i = 0; i < kSide; i += kVector) {
      const auto part =
          ptx::ld_shared(reinterpret_cast<const Vector<Acc, kVector>*>(from + i / kVector * kStep));
#pragma unroll
      for (int e = 0; e < kVector; ++e) to[i + e] = part.at[e];
    }
  }

  Acc d_[kSide][kSide];
};

// f(Type<Engine>{}) for the fastest engine that takes operands of a dtype. pieces: takes_pieces of
// all of them. L decides on the tile: the smallest that holds a block, at most 128.
template <typename F>
void with_engine(DType dtype, bool pieces, int64_t L, bool tf32, F&& f) {
  const auto by_size = [&](auto engine_of) {
    if (L > 64) return f(engine_of(std::integral_constant<int, 128>{}));
    if (L > 32) return f(engine_of(std::integral_constant<int, 64>{}));
    return f(engine_of(std::integral_constant<int, 32>{}));
  };
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (std::is_same_v<T, float>) {
      if (pieces && tf32) {
        return by_size([](auto tile) { return Type<Tf32Tile<decltype(tile)::value>>{}; });
      }
      by_size([](auto tile) { return Type<FmaTile<T, decltype(tile)::value>>{}; });
    } else {
      if constexpr (sizeof(T) == 2) {
        if (pieces) {
          return by_size([](auto tile) { return Type<MmaTile<T, decltype(tile)::value>>{}; });
        }
      }
      f(Type<FmaTile<T, 64>>{});  // float64, and 16 bits at odd places: one tile for all will do
    }
  });
}

// f(Type<Engine>{}) for the engine whose tile, of this shape, takes several blocks; not called for
// float64, for 16 bits at odd places, and for tall tiles of plain multiply-adds, which
// smt_ext.nn.tiles does not ask for.
template <int Rows, int Columns, typename F>
void with_group_engine(DType dtype, bool pieces, bool tf32, F&& f) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (std::is_same_v<T, float>) {
      if (pieces && tf32) return f(Type<Tf32Tile<Rows, Columns>>{});
      if constexpr (Rows == Columns) f(Type<FmaTile<T, Rows>>{});
    } else if constexpr (sizeof(T) == 2) {
      if (pieces) f(Type<MmaTile<T, Rows, Columns>>{});
    }
  });
}

}  // namespace smt_ext::cuda
