// Element types on the CPU, and conversions with the rounding of the hardware.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

namespace smt_ext::cpu {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// Exact: every float16 is a float32. Scaling by a power of two lets the FPU handle subnormals.
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // inf and NaN keep payload
  const float scaled = float_of(magnitude << 13) * float_of(0x77800000u);  // 2^112
  return float_of(bits_of(scaled) | special | sign);
}

inline double to_double(double x) { return x; }
template <typename T>
inline double to_double(T x) {
  return static_cast<double>(to_float(x));
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40u;
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
}

inline f16 to_f16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to inf
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at the right bit
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

template <typename To>
struct convert;
template <>
struct convert<float> {
  template <typename From>
  static float from(From x) {
    return to_float(x);
  }
};
template <>
struct convert<double> {
  template <typename From>
  static double from(From x) {
    return to_double(x);
  }
};
template <>
struct convert<bf16> {
  template <typename From>
  static bf16 from(From x) {
    return to_bf16(to_float(x));
  }
  static bf16 from(bf16 x) { return x; }
};
template <>
struct convert<f16> {
  template <typename From>
  static f16 from(From x) {
    return to_f16(to_float(x));
  }
  static f16 from(f16 x) { return x; }
};

// Calls f with a value of the C++ type that stands for dtype.
template <typename F>
auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    case DType::f64:
      return f(double{});
    default:
      return f(float{});
  }
}

}  // namespace smt_ext::cpu
