// The random bits of stochastic rounding: those of ../cpu/sparse_adamw.h, bit for bit.
#pragma once

#include <cstdint>

#include "convert.cuh"

namespace smt_ext::cuda {

__host__ __device__ __forceinline__ uint32_t mix32(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}

// The key of a step; that of a layer is mix32(key + layer).
__host__ __device__ __forceinline__ uint32_t step_key(int64_t seed, int64_t step) {
  uint32_t h = mix32(static_cast<uint32_t>(seed) + 0x9e3779b9u);
  h = mix32(h ^ static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  return mix32(h ^ static_cast<uint32_t>(step));
}

__host__ __device__ __forceinline__ uint32_t random_bits(uint32_t key, int64_t element) {
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32);
  return mix32((static_cast<uint32_t>(element) ^ key) + high * 0x85ebca6bu);
}

// Rounds up with the probability of the distance to the value below; inf and NaN as always.
__device__ __forceinline__ bf16 to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return __float2bfloat16_rn(x);
  return __ushort_as_bfloat16(static_cast<unsigned short>((u + (random & 0xffffu)) >> 16));
}

}  // namespace smt_ext::cuda
