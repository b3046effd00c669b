// __half for the SIMT checker: shadows CUDA's header. Arithmetic rounds once, as the hardware's f16
// instructions do: float has so many bits that rounding twice changes nothing.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
  __half() = default;
  __half(float x) : bits(simt::f16_bits(x)) {}
  __half(double x) : bits(simt::f16_bits(x)) {}
  operator float() const { return simt::f16_value(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __double2half(double x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
