// On the CPU: ../common/sparse_adamw.h has the formula.
//
// A task is a run of block rows, cut by shape alone: the same bits on any number of threads.
#pragma once

#include "../common/limits.h"
#include "../common/random.h"
#include "../common/sparse_adamw.h"
#include "convert.h"
#include "parallel.h"

namespace smt_ext::cpu {

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
  double step;   // of this update; the first one is 1
  int64_t seed;  // >= 0: bfloat16 blocks without master are rounded stochastically
};

void sparse_adamw(const AdamWLayer* layers, int64_t n, const AdamWOptions& options,
                  const Parallel& parallel);

// Rounds up with the probability of the distance to the value below; inf and NaN as always.
inline bf16 to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return to_bf16(x);
  return {static_cast<uint16_t>((u + (random & 0xffffu)) >> 16)};
}

}  // namespace smt_ext::cpu
