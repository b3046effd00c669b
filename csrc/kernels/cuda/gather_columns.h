// On CUDA: ../common/gather_columns.h has the formula.
//
// An index beyond K stops the kernel (trap). Accesses of 16 bytes (of the wider dtype) where x has
// unit stride along K and L, U, the strides and both addresses are multiples; else one element,
// still coalesced for unit stride.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../common/gather_columns.h"

namespace smt_ext::cuda {

using smt_ext::GatherColumnsArgs;

void gather_columns(const GatherColumnsArgs& args, cudaStream_t stream);

}  // namespace smt_ext::cuda
