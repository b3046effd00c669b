// On the CPU: ../common/block_grad.h has the formula.
//
// A task is one product of at most kTile x kTile: a block, neighbouring blocks of a row, or a part
// of a larger block. Each entry is summed over t in the same order in all of them, so the bits do
// not depend on the number of threads. Reads 2 * S * T * L elements, mostly from cache, and writes
// the blocks.
#pragma once

#include "../common/block_grad.h"
#include "parallel.h"
#include "tile_gemm.h"

namespace smt_ext::cpu {

void block_grad(const BlockGradArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
