// L2 norm over all elements of several gradients, for clipping and for the inf/NaN guard.
//
// Squares are summed in float64, so that float32 gradients cannot overflow: the norm is inf or NaN
// only if an element is (or, for float64, beyond 1e154). Chunks of fixed size are summed on their
// own and then in order: the same bits on any number of threads. Reads each element once.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace smt_ext::cpu {

struct Gradient {
  const void* data;  // contiguous
  int64_t numel;
  DType dtype;
};

double grad_norm(const Gradient* grads, int64_t n, const Parallel& parallel);

}  // namespace smt_ext::cpu
