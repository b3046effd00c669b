// The random bits of stochastic rounding, the same on all devices.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SMT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SMT_HOST_DEVICE inline
#endif

namespace smt_ext {

// A counter-based hash, so that a step can be repeated exactly: lowbias32, by Chris Wellons (public
// domain).
SMT_HOST_DEVICE uint32_t mix32(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}

SMT_HOST_DEVICE uint32_t step_key(int64_t seed, int64_t step) {
  uint32_t h = mix32(static_cast<uint32_t>(seed) + 0x9e3779b9u);
  h = mix32(h ^ static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  return mix32(h ^ static_cast<uint32_t>(step));
}

SMT_HOST_DEVICE uint32_t layer_key(uint32_t step_key, int64_t layer) {
  return mix32(step_key + static_cast<uint32_t>(layer));
}

// The 32 bits of one element, by the key of its layer in a step.
SMT_HOST_DEVICE uint32_t random_bits(uint32_t key, int64_t element) {
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32);
  return mix32((static_cast<uint32_t>(element) ^ key) + high * 0x85ebca6bu);
}

}  // namespace smt_ext
