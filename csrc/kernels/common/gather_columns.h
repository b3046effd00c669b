// Owned copy of selected column blocks of a layer's input: what SMT saves for backward.
//
//   out[t, s * L + j] = x[t, col_blocks[s] * L + j]
//
// x           (T, K), any strides, of dtype
// col_blocks  (C,) strictly increasing, so that only the last block can be narrower
// out         (T, U) contiguous, of out_dtype; (C - 1) * L < U <= C * L
//
// Also for the union of columns that an input group selects: one pass for all its layers. Reads and
// writes T * U elements once.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace smt_ext {

struct GatherColumnsArgs {
  DType dtype, out_dtype;
  int64_t T, K, U, L;
  const void* x;
  int64_t stride_t, stride_k;
  const int32_t* col_blocks;
  void* out;
  int64_t C = 0;  // CUDA goes by U and L
};

}  // namespace smt_ext
