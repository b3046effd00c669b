// Element types of the kernels of all devices.
#pragma once

#include <cstdint>

namespace smt_ext {

enum class DType : int8_t { f32, bf16, f16, f64 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// The type that sums are kept in and formulas computed in: float32 for all but float64.
template <typename T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename accumulator<T>::type;

}  // namespace smt_ext
