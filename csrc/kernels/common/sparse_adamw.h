// AdamW over the selected blocks of all layers, written into the weights in the same pass.
//
//   g = clip(grad * grad_scale, -G, G)         p -= lr * weight_decay * (p - origin)
//   m += (1 - beta1) * (g - m)                 v = beta2 * v + (1 - beta2) * g^2
//   p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   blocks = round(p)                          w[block] = round(p)
//
// G = 2^63 (2^511 for float64) keeps the moments finite whatever finite gradient comes: v is a mean
// of squares of at most G^2 = 2^126, a quarter of what float32 holds, so that no rounding reaches
// inf. What is rounded to float16 saturates at its largest number, unless it is inf itself. p is
// the master value where there is one, else the block itself; origin is 0, and the decay then
// computed as p *= 1 - lr * weight_decay, or what the layer gives: an entry that is there stays
// there. Computed in float32 (float64 for float64 blocks). Per layer, all (S, L, L) contiguous:
// blocks and grad of block_dtype, m, v and master of float32 (m, v float64 for float64 blocks),
// origin of origin_dtype, which is no wider than what is computed in; w is the (N, K) weight, any
// strides, of w_dtype, or nullptr where the blocks are the only copy. Entries of the padding beyond
// a ragged edge are neither read nor written.
//
// Bytes a float32 entry: reads 16 and the origin's, writes 12 and the weight's 4 (or 2).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace smt_ext {

struct AdamWLayer {
  DType w_dtype, block_dtype;
  int64_t N, K, L, S;
  void* w;  // or nullptr
  int64_t stride_n, stride_k;
  const int32_t* rows;
  const int32_t* cols;
  void* blocks;
  const void* grad;
  void* m;
  void* v;
  float* master;       // or nullptr
  const void* origin;  // or nullptr: zero
  DType origin_dtype;
};

}  // namespace smt_ext
