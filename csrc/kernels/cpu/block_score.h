// On the CPU: ../common/block_score.h has the formula.
//
// Lanes of float32 sums are folded into float64 every kRowsPerFold rows. Tasks are cut by shape
// alone, so the bits do not depend on the number of threads.
#pragma once

#include "../common/block_score.h"
#include "parallel.h"
#include "tile_gemm.h"

namespace smt_ext::cpu {

void block_score(const BlockScoreArgs& args, const Parallel& parallel);
void block_score_fused(const BlockScoreFusedArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
