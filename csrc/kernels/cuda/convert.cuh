// Element types on the device, conversions with one rounding from float32, and vectors of elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../common/dtype.h"
#include "ptx.cuh"

namespace smt_ext::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

// To nearest, ties to even; by way of float32 for half precision. A value of the same type keeps
// its bits, NaN payloads included.
template <typename To, typename From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, bf16>) {
    return __float2bfloat16_rn(static_cast<float>(widen(x)));
  } else if constexpr (std::is_same_v<To, f16>) {
    return __float2half_rn(static_cast<float>(widen(x)));
  } else {
    return static_cast<To>(widen(x));
  }
}

// V elements that one instruction moves.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  static_assert(sizeof(T) * V <= 16, "an access moves at most 16 bytes");
  T at[V];
};

template <int V, typename T>
__device__ __forceinline__ Vector<T, V> load(const T* p) {
  return ptx::ld_global(reinterpret_cast<const Vector<T, V>*>(p));
}
// Only for memory that nothing writes while the kernel runs.
template <int V, typename T>
__device__ __forceinline__ Vector<T, V> load_nc(const T* p) {
  return ptx::ld_global_nc(reinterpret_cast<const Vector<T, V>*>(p));
}
template <int V, typename T>
__device__ __forceinline__ void store(T* p, const Vector<T, V>& value) {
  ptx::st_global(reinterpret_cast<Vector<T, V>*>(p), value);
}

template <typename To, int V, typename From>
__device__ __forceinline__ Vector<To, V> convert(const Vector<From, V>& from) {
  Vector<To, V> to;
#pragma unroll
  for (int i = 0; i < V; ++i) to.at[i] = convert<To>(from.at[i]);
  return to;
}

// Stands for a type in dispatch, on the host and in kernels: f(Type<bf16>{}).
template <typename T>
struct Type {
  using type = T;
};

#pragma nv_exec_check_disable
template <typename F>
__host__ __device__ __forceinline__ void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(Type<bf16>{});
    case DType::f16:
      return f(Type<f16>{});
    case DType::f64:
      return f(Type<double>{});
    default:
      return f(Type<float>{});
  }
}

__host__ __device__ __forceinline__ bool is_aligned(const void* p, std::size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Rounds up with the probability of the distance to the value below; inf and NaN as always.
__device__ __forceinline__ bf16 to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return __float2bfloat16_rn(x);
  return __ushort_as_bfloat16(static_cast<unsigned short>((u + (random & 0xffffu)) >> 16));
}

}  // namespace smt_ext::cuda
