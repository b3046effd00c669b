// AdamW over the selected blocks of all layers, written into the weights in the same pass.
//
//   g = grad * grad_scale                      p *= 1 - lr * weight_decay
//   m += (1 - beta1) * (g - m)                 v = beta2 * v + (1 - beta2) * g^2
//   p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//   blocks = round(p)                          w[block] = round(p)
//
// p is the master value where there is one, else the block itself. Computed in float32 (float64
// for float64 blocks). Per layer, all (S, L, L) contiguous: blocks and grad of block_dtype, m, v
// and master of float32 (m, v float64 for float64 blocks); w is the (N, K) weight, any strides, of
// w_dtype, or nullptr where the blocks are the only copy. Entries of the padding beyond a ragged edge are neither read nor written.
//
// Bytes a float32 entry: reads 16, writes 12 and the weight's 4 (or 2). A task is a run of block
// rows, cut by shape alone: the same bits on any number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace smt_ext::cpu {

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
  float* master;  // or nullptr
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
  double step;   // of this update; the first one is 1
  int64_t seed;  // >= 0: bfloat16 blocks without master are rounded stochastically
};

void sparse_adamw(const AdamWLayer* layers, int64_t n, const AdamWOptions& options,
                  const Parallel& parallel);

// The 32 random bits of one element: a counter-based hash, so that a step can be repeated exactly
// and the GPU draws the same. key = stochastic_key(seed, step, layer).
inline uint32_t mix32(uint32_t h) {  // lowbias32, by Chris Wellons (public domain)
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}
inline uint32_t stochastic_key(int64_t seed, int64_t step, int64_t layer) {
  uint32_t h = mix32(static_cast<uint32_t>(seed) + 0x9e3779b9u);
  h = mix32(h ^ static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  h = mix32(h ^ static_cast<uint32_t>(step));
  return mix32(h + static_cast<uint32_t>(layer));
}
inline uint32_t random_bits(uint32_t key, int64_t element) {
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32);
  return mix32((static_cast<uint32_t>(element) ^ key) + high * 0x85ebca6bu);
}

// Rounds up with the probability of the distance to the value below; inf and NaN as always.
inline bf16 to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return to_bf16(x);
  return {static_cast<uint16_t>((u + (random & 0xffffu)) >> 16)};
}

}  // namespace smt_ext::cpu
