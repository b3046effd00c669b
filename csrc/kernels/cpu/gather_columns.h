// Owned copy of selected column blocks of a layer's input: what SMT saves for backward.
//
//   out[t, s * L + j] = x[t, col_blocks[s] * L + j]
//
// x    (T, K), any strides, of dtype
// out  (T, U) contiguous, of out_dtype; U = C * L, less where the last column block is ragged
//
// col_blocks is strictly increasing, so only the last block can be narrower. Reads and writes T * U
// elements once.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace smt_ext::cpu {

struct GatherColumnsArgs {
  DType dtype, out_dtype;
  int64_t T, K, U, L, C;
  const void* x;
  int64_t stride_t, stride_k;
  const int32_t* col_blocks;
  void* out;
};

void gather_columns(const GatherColumnsArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
