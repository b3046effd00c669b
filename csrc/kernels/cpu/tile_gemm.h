// C[m, n] = sum_t a[t, m] * b[t, n]: one tile of a weight gradient, on one thread.
//
// Both operands have the reduction dimension outermost (dy is (T, N), x is (T, K)), so packing a
// panel copies short contiguous runs, and no operand is transposed. Sums are kept in float32
// (float64 for float64). The result depends on the shape alone, never on threads.
//
// Tile: at most kTile x kTile, cut into kMR x kNR register tiles; T in chunks of kChunk. The larger
// the tile, the less packing for each product: at 256 x 256, float32, 2 % of the time. The two
// packed panels (2 x 128 x 256 elements, 128 KB in bfloat16) and the sums (256 KB) stay in L2, and
// one register tile's stream in L1. Where rows lie 4 KB apart, those of a longer chunk would fall
// into the same few sets of L2 and drive each other out before they are packed.
#pragma once

#include <cstdint>

#include "../common/operand.h"
#include "convert.h"

namespace smt_ext::cpu {

constexpr int64_t kTile = 256;
constexpr int64_t kChunk = 128;

// What the caller multiplies after this tile, of the same dtype and T.
struct NextTile {
  Operand a, b;
  int64_t m, n;
};

// Writes c[i * ldc + j] for i < m, j < n; c is float, or double for float64 operands.
// m, n <= kTile; T = 0 gives zeros. The first rows of `next`, if any, are fetched into the cache.
void tile_gemm(DType dtype, const Operand& a, const Operand& b, int64_t T, int64_t m, int64_t n,
               void* c, int64_t ldc, const NextTile* next = nullptr);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "generic".
const char* cpu_capability();

}  // namespace smt_ext::cpu
