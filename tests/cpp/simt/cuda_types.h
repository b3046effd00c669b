// CUDA's built-in vector types, with CUDA's alignment.
#pragma once

#include <cstdint>

#define SMT_EXT_SIMT_VECTORS(name, type)                                                 \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                               \
  struct name##3 { type x, y, z; };                                                      \
  struct alignas(sizeof(type) < 4 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SMT_EXT_SIMT_VECTORS(char, signed char)
SMT_EXT_SIMT_VECTORS(uchar, unsigned char)
SMT_EXT_SIMT_VECTORS(short, short)
SMT_EXT_SIMT_VECTORS(ushort, unsigned short)
SMT_EXT_SIMT_VECTORS(int, int)
SMT_EXT_SIMT_VECTORS(uint, unsigned int)
SMT_EXT_SIMT_VECTORS(longlong, long long)
SMT_EXT_SIMT_VECTORS(ulonglong, unsigned long long)
SMT_EXT_SIMT_VECTORS(float, float)
SMT_EXT_SIMT_VECTORS(double, double)
#undef SMT_EXT_SIMT_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
