// A matrix that a product reads, on any device.
#pragma once

#include <cstdint>

namespace smt_ext {

// (T, columns), of any strides, in elements.
struct Operand {
  const void* data;
  int64_t stride_t, stride_column;
};

}  // namespace smt_ext
