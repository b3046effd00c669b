// Scores of all blocks of a weight from its gradient: what planning ranks (SMT paper, section 3.1).
//
//   score[r, c] = reduce over the block's entries g[n, k] of
//     mean_abs: mean |g|    mean: mean g    l1: sum |g|    l2: sqrt(sum g^2)
//
// block_score        g (N, K), any strides: one read of it
// block_score_fused  g = dy^T x with dy (T, N), x (T, K): a tile of g lives in cache and is reduced
//                    at once, so that no (N, K) gradient ever exists
// score              (R, C) contiguous, float (double for float64 input); means divide by the true
//                    area of a ragged block
//
// Lanes of float32 sums are folded into float64 every kRowsPerFold rows. Tasks are cut by shape
// alone, so the bits do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "metric.h"
#include "parallel.h"
#include "tile_gemm.h"

namespace smt_ext::cpu {

struct BlockScoreArgs {
  DType dtype;
  Metric metric;
  int64_t N, K, L;
  const void* g;
  int64_t stride_n, stride_k;
  void* score;
};

struct BlockScoreFusedArgs {
  DType dtype;
  Metric metric;
  int64_t T, N, K, L;
  Operand dy, x;
  void* score;
};

void block_score(const BlockScoreArgs& args, const Parallel& parallel);
void block_score_fused(const BlockScoreFusedArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
