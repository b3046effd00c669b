// On CUDA: ../common/dequantize.h has the formula.
//
// rows, cols are on the device, see gather_blocks.h. Two launches: all values in their order, then
// the blocks over them (scatter_blocks), which writes S * L * L of N * K values a second time:
// about one in a hundred.
//
// A thread makes kRows vectors of 8 values where 8 divides the group (4 bits) or K (8 bits) and N *
// K, and packed or q and out are aligned; else single values. The table lies in shared memory, 64
// bytes: sixteen banks, so that lanes that want different entries wait for no other.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../common/dequantize.h"

namespace smt_ext::cuda {

using smt_ext::DequantizeArgs;

void dequantize_with_blocks(const DequantizeArgs& args, cudaStream_t stream);

}  // namespace smt_ext::cuda
