// Copy blocks out of a weight, and write them back.
//
//   gather:   blocks[s, i, j] = w[rows[s] * L + i, cols[s] * L + j], zero beyond a ragged edge
//   scatter:  w[rows[s] * L + i, cols[s] * L + j] = blocks[s, i, j], inside the weight only
//
// w           (N, K), any strides, of w_dtype
// rows, cols  (S,) on the device; an index beyond the weight stops the kernel (trap)
// blocks      (S, L, L) contiguous, of blocks_dtype
//
// The S * L rows of all blocks are shared out as one matrix. Accesses of 16 bytes (of the wider
// dtype) where w has unit stride along K and L, K, stride_n and both addresses are multiples; else
// one element. Reads and writes S * L * L elements once; conversion rounds to nearest even. A
// scatter with a repeated block would race: plans hold each block once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../cpu/dtype.h"

namespace smt_ext::cuda {

struct BlocksArgs {
  DType w_dtype, blocks_dtype;
  int64_t N, K, L, S;
  void* w;  // read only in gather_blocks
  int64_t stride_n, stride_k;
  const int32_t* rows;
  const int32_t* cols;
  void* blocks;  // read only in scatter_blocks
};

void gather_blocks(const BlocksArgs& args, cudaStream_t stream);
void scatter_blocks(const BlocksArgs& args, cudaStream_t stream);

}  // namespace smt_ext::cuda
