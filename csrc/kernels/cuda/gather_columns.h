// Owned copy of selected column blocks of a layer's input: what SMT saves for backward.
//
//   out[t, s * L + j] = x[t, col_blocks[s] * L + j]
//
// x           (T, K), any strides, of dtype
// col_blocks  (C,) strictly increasing, on the device; an index beyond K stops the kernel (trap)
// out         (T, U) contiguous, of out_dtype; (C - 1) * L < U <= C * L
//
// Also for the union of columns that an input group selects: one pass for all its layers.
// Accesses of 16 bytes (of the wider dtype) where x has unit stride along K and L, U, the strides
// and both addresses are multiples; else one element, still coalesced for unit stride. Reads and
// writes T * U elements once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../cpu/dtype.h"

namespace smt_ext::cuda {

struct GatherColumnsArgs {
  DType dtype, out_dtype;
  int64_t T, K, U, L;
  const void* x;
  int64_t stride_t, stride_k;
  const int32_t* col_blocks;
  void* out;
};

void gather_columns(const GatherColumnsArgs& args, cudaStream_t stream);

}  // namespace smt_ext::cuda
