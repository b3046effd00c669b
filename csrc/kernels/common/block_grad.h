// Gradients of the selected blocks of a weight (SMT paper, section 3.2).
//
//   out[s, i, j] (=, +=) sum_t dy[t, rows[s] * L + i] * x_cols[t, slots[s] * L + j]
//
// dy      (T, N), any strides, of dtype; or up to kMaxSiblings such, of linears that read the same
//         input: rows count the block rows of the first, then those of the second, and so on
// x_cols  (T, U), any strides, of dtype: the gathered input columns
// rows    (S,) block row of each block; slots (S,) its position within x_cols
// out     (S, L, L) contiguous, of out_dtype (float64 with float64, and only then); entries beyond
//         a ragged edge are set to zero (=) or left alone (+=)
//
// Sums are kept in float32 (float64 for float64) and rounded once.
#pragma once

#include <cstdint>
#include <limits>

#include "dtype.h"
#include "limits.h"
#include "operand.h"

namespace smt_ext {

struct OutputGrad {
  Operand dy;  // (T, N)
  int64_t N = 0;
  int32_t first_row = std::numeric_limits<int32_t>::max();  // block rows of those before it
};

struct BlockGradArgs {
  DType dtype, out_dtype;
  int64_t T, U, L, S;
  OutputGrad dys[kMaxSiblings];
  Operand x_cols;
  const int32_t* rows;
  const int32_t* slots;
  void* out;
  bool accumulate;
  // For CUDA, see ../cuda/block_grad.h.
  bool tf32 = false;
  const int32_t* tiles = nullptr;
  int64_t n_tiles = 0;
  TileShape shape = {0, 0};  // of the tiles
  const int32_t* lone = nullptr;
  int64_t n_lone = 0;

  // The number of the dy that a block row is of.
  constexpr int dy_of(int32_t row) const {
    int number = 0;
    for (int i = 1; i < kMaxSiblings; ++i) number += row >= dys[i].first_row;
    return number;
  }
};

}  // namespace smt_ext
