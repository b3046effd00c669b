#include <algorithm>

#include "dequantize.h"
#include "gather_blocks.h"
#include "rows.cuh"

namespace smt_ext::cuda {

// V values that start at i, in one or two accesses of at most 16 bytes.
template <int V, typename Out>
__device__ __forceinline__ void store_values(Out* out, const float* values) {
  constexpr int kPart = V * sizeof(Out) <= 16 ? V : 16 / static_cast<int>(sizeof(Out));
#pragma unroll
  for (int first = 0; first < V; first += kPart) {
    Vector<Out, kPart> part;
#pragma unroll
    for (int j = 0; j < kPart; ++j) part.at[j] = convert<Out>(values[first + j]);
    store<kPart>(out + first, part);
  }
}

template <int Bits, typename Out, int V>
static __global__ void __launch_bounds__(kRowThreads) dequantize_kernel(DequantizeArgs a) {
  SMT_EXT_SHARED(float, code, 16);
  if constexpr (Bits == 4) {
    if (threadIdx.x < 16) code[threadIdx.x] = ptx::ld_global_nc(a.code + threadIdx.x);
    __syncthreads();
  }
  constexpr int kBytes = V == 1 ? 1 : V * Bits / 8;
  const uint8_t* q = static_cast<const uint8_t*>(a.q);
  const int64_t values = a.N * a.K, step = static_cast<int64_t>(kRowThreads) * V;
  const int64_t first = blockIdx.x * step * kRows + static_cast<int64_t>(threadIdx.x) * V;
  // Divisions of 64 bits are calls: two in all, before values fill the registers.
  const int64_t run = Bits == 4 ? a.group : a.K;  // values that share a scale
  const int64_t runs = step / run, rest = step % run;
  int64_t which = first / run, within = first % run;
  float scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r * step < values) {
      const float absmax = ptx::ld_global_nc(a.absmax + which);
      scale[r] = Bits == 4 ? absmax : absmax * static_cast<float>(1.0 / 127.0);
    }
    which += runs;
    within += rest;
    if (within >= run) {
      within -= run;
      ++which;
    }
  }
  Vector<uint8_t, kBytes> bytes[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = first + r * step;
    if (i < values) bytes[r] = load_nc<kBytes>(q + i * Bits / 8);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = first + r * step;
    if (i >= values) continue;
    float value[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if constexpr (Bits == 4) {
        const unsigned pair = bytes[r].at[V == 1 ? 0 : j / 2];
        value[j] = code[(V == 1 ? i : j) % 2 ? pair & 15 : pair >> 4] * scale[r];
      } else {
        value[j] = static_cast<float>(static_cast<int8_t>(bytes[r].at[j])) * scale[r];
      }
    }
    store_values<V>(static_cast<Out*>(a.out) + i, value);
  }
}

template <int Bits>
static void dequantize(const DequantizeArgs& a, cudaStream_t stream) {
  constexpr int kVector = 8;
  const int64_t values = a.N * a.K, run = Bits == 4 ? a.group : a.K;
  if (values == 0) return;
  dispatch(a.out_dtype, [&](auto out) {
    using Out = typename decltype(out)::type;
    const bool wide = run % kVector == 0 && values % kVector == 0 &&
                      is_aligned(a.q, kVector * Bits / 8) &&
                      is_aligned(a.out, std::min<std::size_t>(16, kVector * sizeof(Out)));
    const int64_t tile = static_cast<int64_t>(kRowThreads) * kRows * (wide ? kVector : 1);
    launch("dequantize",
           wide ? dequantize_kernel<Bits, Out, kVector> : dequantize_kernel<Bits, Out, 1>,
           dim3(grid_blocks((values + tile - 1) / tile)), dim3(kRowThreads), 0, stream, a);
  });
}

void dequantize_with_blocks(const DequantizeArgs& a, cudaStream_t stream) {
  a.bits == 4 ? dequantize<4>(a, stream) : dequantize<8>(a, stream);
  scatter_blocks({a.out_dtype, a.blocks_dtype, a.N, a.K, a.L, a.S, a.out, a.K, 1, a.rows, a.cols,
                  const_cast<void*>(a.blocks)},
                 stream);
}

}  // namespace smt_ext::cuda
