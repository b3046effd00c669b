// On CUDA: ../common/gather_blocks.h has the formula.
//
// rows, cols are on the device; an index beyond the weight stops the kernel (trap). The S * L rows
// of all blocks are shared out as one matrix. Accesses of 16 bytes (of the wider dtype) where w has
// unit stride along K and L, K, stride_n and both addresses are multiples; else one element.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../common/gather_blocks.h"

namespace smt_ext::cuda {

using smt_ext::BlocksArgs;

void gather_blocks(const BlocksArgs& args, cudaStream_t stream);
void scatter_blocks(const BlocksArgs& args, cudaStream_t stream);

}  // namespace smt_ext::cuda
