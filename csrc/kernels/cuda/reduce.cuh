// Sums over a warp and over a block, in an order that never changes.
#pragma once

#include "ptx.cuh"

namespace smt_ext::cuda {

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// Of a block of Threads threads; the sum is thread 0's. of_warps: shared memory for Threads / 32
// sums.
template <int Threads>
__device__ __forceinline__ double block_sum(double x, double* of_warps) {
  static_assert(Threads % 32 == 0);
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) ptx::st_shared(of_warps + threadIdx.x / 32, x);
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 0; w < Threads / 32; ++w) sum += ptx::ld_shared(of_warps + w);
  }
  return sum;
}

// The same in shared memory of its own, once a kernel.
template <int Threads>
__device__ __forceinline__ double block_sum(double x) {
  SMT_EXT_SHARED(double, of_warps, Threads / 32);
  return block_sum<Threads>(x, of_warps);
}

}  // namespace smt_ext::cuda
