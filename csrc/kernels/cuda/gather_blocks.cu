#include <algorithm>

#include "gather_blocks.h"
#include "rows.cuh"

namespace smt_ext::cuda {

template <bool Gather, typename W, typename B, int V>
static __global__ void __launch_bounds__(kRowThreads)
    blocks_kernel(BlocksArgs a, unsigned tiles_across) {
  const unsigned L = static_cast<unsigned>(a.L);
  const unsigned j = (blockIdx.x % tiles_across * blockDim.x + threadIdx.x) * V;
  if (j >= L) return;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x / tiles_across) * blockDim.y * kRows + threadIdx.y;
  W* in_w[kRows];       // nullptr beyond the weight
  B* in_blocks[kRows];  // nullptr beyond the last block
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first + i * static_cast<int>(blockDim.y);
    in_w[i] = nullptr;
    in_blocks[i] = nullptr;
    if (row >= a.S * L) continue;
    const unsigned s = static_cast<unsigned>(row) / L;
    const int64_t n0 = static_cast<int64_t>(ptx::ld_global_nc(a.rows + s)) * L;
    const int64_t k0 = static_cast<int64_t>(ptx::ld_global_nc(a.cols + s)) * L;
    if (n0 < 0 || n0 >= a.N || k0 < 0 || k0 >= a.K) __trap();
    const int64_t n = n0 + (static_cast<unsigned>(row) - s * L), k = k0 + j;
    in_blocks[i] = static_cast<B*>(a.blocks) + row * L + j;
    if (n < a.N && k < a.K) in_w[i] = static_cast<W*>(a.w) + n * a.stride_n + k * a.stride_k;
  }
  if constexpr (Gather) {
    copy_rows<V>([&](int i) { return in_w[i]; }, [&](int i) { return in_blocks[i]; });
  } else {
    copy_rows<V>([&](int i) { return in_w[i] ? in_blocks[i] : nullptr; },
                 [&](int i) { return in_w[i]; });
  }
}

template <bool Gather>
static void copy_blocks(const char* name, const BlocksArgs& a, cudaStream_t stream) {
  if (a.S == 0) return;
  grid_blocks(a.S * a.L);  // row numbers fit in 31 bits
  dispatch(a.w_dtype, [&](auto w) {
    dispatch(a.blocks_dtype, [&](auto blocks) {
      using W = typename decltype(w)::type;
      using B = typename decltype(blocks)::type;
      constexpr int kVector = 16 / static_cast<int>(std::max(sizeof(W), sizeof(B)));
      const bool wide = a.stride_k == 1 && a.stride_n % kVector == 0 && a.L % kVector == 0 &&
                        a.K % kVector == 0 && is_aligned(a.w, kVector * sizeof(W)) &&
                        is_aligned(a.blocks, kVector * sizeof(B));
      const RowTiles tiles(a.S * a.L, wide ? a.L / kVector : a.L);
      launch(name, wide ? blocks_kernel<Gather, W, B, kVector> : blocks_kernel<Gather, W, B, 1>,
             dim3(grid_blocks(tiles.down * tiles.across)), tiles.block, 0, stream, a, tiles.across);
    });
  });
}

void gather_blocks(const BlocksArgs& args, cudaStream_t stream) {
  copy_blocks<true>("gather_blocks", args, stream);
}

void scatter_blocks(const BlocksArgs& args, cudaStream_t stream) {
  copy_blocks<false>("scatter_blocks", args, stream);
}

}  // namespace smt_ext::cuda
