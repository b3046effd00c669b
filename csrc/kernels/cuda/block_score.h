// On CUDA: ../common/block_score.h has the formula.
//
// block_score        16 bytes an access where g has unit stride along K and L, K, the strides and
// the
//                    address are multiples
// block_score_fused  a tile of g is computed in registers, as in block_grad.h, and reduced at once.
// A
//                    tile of 128 x 128 takes several blocks of 16, 32 or 64 at once
//
// A thread sums in float32 (float64 for float64), threads and tiles are added in float64, all in a
// fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../common/block_score.h"

namespace smt_ext::cuda {

using smt_ext::BlockScoreArgs;
using smt_ext::BlockScoreFusedArgs;

void block_score(const BlockScoreArgs& args, cudaStream_t stream);

// Bytes of device memory, 16-byte aligned, that a call works in.
std::size_t block_score_fused_workspace_bytes(const BlockScoreFusedArgs& args);
void block_score_fused(const BlockScoreFusedArgs& args, void* workspace, cudaStream_t stream);

}  // namespace smt_ext::cuda
