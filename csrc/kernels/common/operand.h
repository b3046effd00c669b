// A matrix that a product reads, on any device.
#pragma once

#include <cstdint>

namespace smt_ext {

// (T, columns), of any strides, in elements.
struct Operand {
  const void* data = nullptr;
  int64_t stride_t = 0, stride_column = 0;
};

}  // namespace smt_ext
