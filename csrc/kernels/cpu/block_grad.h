// Gradients of the selected blocks of a weight (SMT paper, section 3.2).
//
//   out[s, i, j] (=, +=) sum_t dy[t, rows[s] * L + i] * x_cols[t, slots[s] * L + j]
//
// dy      (T, N), any strides, of dtype
// x_cols  (T, U), any strides, of dtype: the gathered input columns
// out     (S, L, L) contiguous, of out_dtype; entries beyond a ragged edge are set to zero (=) or
//         left alone (+=)
//
// Sums are kept in float32 (float64 for float64) and rounded once. A task is one product of at most
// kTile x kTile: a block, neighbouring blocks of a row, or a part of a larger block. Each entry is
// summed over t in the same order in all of them, so the bits do not depend on the number of
// threads. Reads S * T * 2 * L elements, mostly from cache; writes S * L * L.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"
#include "tile_gemm.h"

namespace smt_ext::cpu {

struct BlockGradArgs {
  DType dtype, out_dtype;
  int64_t T, N, U, L, S;
  Operand dy, x_cols;
  const int32_t* rows;
  const int32_t* slots;
  void* out;
  bool accumulate;
};

void block_grad(const BlockGradArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
