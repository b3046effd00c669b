// L2 norm over all elements of several gradients, for clipping and for the inf/NaN guard.
//
// Squares are summed in float64, so that float32 gradients cannot overflow: the norm is inf or NaN
// only if an element is (or, for float64, beyond 1e154). Reads each element once.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace smt_ext {

struct Gradient {
  const void* data;  // contiguous
  int64_t numel;
  DType dtype;
};

}  // namespace smt_ext
