// Scores of all blocks of a weight from its gradient: what planning ranks (SMT paper, section 3.1).
//
//   score[r, c] = reduce over the block's entries g[n, k]; see ../cpu/metric.h
//
// block_score        g (N, K), any strides: one read of it, 16 bytes an access where it has unit
//                    stride along K and L, K, the strides and the address are multiples
// block_score_fused  g = dy^T x with dy (T, N), x (T, K), any strides: a tile of g is computed in
//                    registers, as in block_grad.h, and reduced at once; no (N, K) gradient exists.
//                    A tile of 128 x 128 takes several blocks of 16, 32 or 64 at once
// score              (R, C) contiguous, float (double for float64); means divide by the true area
//                    of a ragged block
//
// A thread sums in float32 (float64 for float64), threads and tiles are added in float64, all in a
// fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../cpu/dtype.h"
#include "../cpu/metric.h"

namespace smt_ext::cuda {

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
  const void* dy;
  int64_t dy_stride_t, dy_stride_n;
  const void* x;
  int64_t x_stride_t, x_stride_k;
  void* score;
  bool tf32;
};

void block_score(const BlockScoreArgs& args, cudaStream_t stream);

// Bytes of device memory, 16-byte aligned, that a call works in.
std::size_t block_score_fused_workspace_bytes(const BlockScoreFusedArgs& args);
void block_score_fused(const BlockScoreFusedArgs& args, void* workspace, cudaStream_t stream);

}  // namespace smt_ext::cuda
