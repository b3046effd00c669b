// Scores of all blocks of a weight from its gradient: what planning ranks (SMT paper, section 3.1).
//
//   score[r, c] = reduce over the block's entries g[n, k]; see metric.h
//
// block_score        g (N, K), any strides: one read of it
// block_score_fused  g = dy^T x with dy (T, N), x (T, K), any strides: a tile of g is reduced at
//                    once, so that no (N, K) gradient ever exists
// score              (R, C) contiguous, float (double for float64 input); means divide by the true
//                    area of a ragged block
#pragma once

#include <cstdint>

#include "dtype.h"
#include "metric.h"
#include "operand.h"

namespace smt_ext {

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
  bool tf32 = false;  // for CUDA
};

}  // namespace smt_ext
