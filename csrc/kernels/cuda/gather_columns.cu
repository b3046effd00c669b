#include <algorithm>

#include "gather_columns.h"
#include "rows.cuh"

namespace smt_ext::cuda {

template <typename In, typename Out, int V>
static __global__ void __launch_bounds__(kRowThreads)
    gather_columns_kernel(GatherColumnsArgs a, unsigned tiles_across) {
  const unsigned L = static_cast<unsigned>(a.L);
  const unsigned u = (blockIdx.x % tiles_across * blockDim.x + threadIdx.x) * V;
  if (u >= a.U) return;
  const unsigned slot = u / L;
  const int64_t k = static_cast<int64_t>(ptx::ld_global_nc(a.col_blocks + slot)) * L + u % L;
  if (k < 0 || k >= a.K) __trap();
  const int64_t t =
      static_cast<int64_t>(blockIdx.x / tiles_across) * blockDim.y * kRows + threadIdx.y;
  const In* x = static_cast<const In*>(a.x) + t * a.stride_t + k * a.stride_k;
  Out* out = static_cast<Out*>(a.out) + t * a.U + u;
  const auto inside = [&](int i) { return t + i * static_cast<int>(blockDim.y) < a.T; };
  const int64_t x_step = blockDim.y * a.stride_t, out_step = blockDim.y * a.U;
  copy_rows<V>([&](int i) { return inside(i) ? x + i * x_step : nullptr; },
               [&](int i) { return inside(i) ? out + i * out_step : nullptr; });
}

void gather_columns(const GatherColumnsArgs& a, cudaStream_t stream) {
  if (a.T == 0 || a.U == 0) return;
  dispatch(a.dtype, [&](auto in) {
    dispatch(a.out_dtype, [&](auto out) {
      using In = typename decltype(in)::type;
      using Out = typename decltype(out)::type;
      constexpr int kVector = 16 / static_cast<int>(std::max(sizeof(In), sizeof(Out)));
      const bool wide = a.stride_k == 1 && a.stride_t % kVector == 0 && a.L % kVector == 0 &&
                        a.U % kVector == 0 && is_aligned(a.x, kVector * sizeof(In)) &&
                        is_aligned(a.out, kVector * sizeof(Out));
      const RowTiles tiles(a.T, wide ? a.U / kVector : a.U);
      launch("gather_columns",
             wide ? gather_columns_kernel<In, Out, kVector> : gather_columns_kernel<In, Out, 1>,
             dim3(grid_blocks(tiles.down * tiles.across)), tiles.block, 0, stream, a, tiles.across);
    });
  });
}

}  // namespace smt_ext::cuda
