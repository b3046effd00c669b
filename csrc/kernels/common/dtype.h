// Element types of the kernels of all devices.
#pragma once

#include <cstdint>

namespace smt_ext {

enum class DType : int8_t { f32, bf16, f16, f64 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

}  // namespace smt_ext
