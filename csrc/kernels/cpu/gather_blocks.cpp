#include "gather_blocks.h"

#include <algorithm>

namespace smt_ext::cpu {

// Calls row(w, blocks, width) for each row of each block; width < L beyond a ragged edge.
template <typename Row>
static void for_each_row(const BlocksArgs& a, const Parallel& parallel, const Row& row) {
  const int64_t grain = std::max<int64_t>(1, 16384 / a.L);
  parallel.run(a.S * a.L, grain, [&](int64_t begin, int64_t end) {
    dispatch(a.w_dtype, [&](auto w_type) {
      dispatch(a.blocks_dtype, [&](auto block_type) {
        using W = decltype(w_type);
        using B = decltype(block_type);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t s = task / a.L, n = a.rows[s] * a.L + task % a.L, k = a.cols[s] * a.L;
          const int64_t width = n < a.N ? std::min(a.L, a.K - k) : 0;
          row(static_cast<W*>(a.w) + n * a.stride_n + k * a.stride_k,
              static_cast<B*>(a.blocks) + task * a.L, width);
        }
      });
    });
  });
}

void gather_blocks(const BlocksArgs& args, const Parallel& parallel) {
  for_each_row(args, parallel, [&](const auto* w, auto* blocks, int64_t width) {
    using B = std::remove_pointer_t<decltype(blocks)>;
    for (int64_t j = 0; j < width; ++j) blocks[j] = convert<B>::from(w[j * args.stride_k]);
    std::fill(blocks + width, blocks + args.L, B{});
  });
}

void scatter_blocks(const BlocksArgs& args, const Parallel& parallel) {
  for_each_row(args, parallel, [&](auto* w, const auto* blocks, int64_t width) {
    using W = std::remove_pointer_t<decltype(w)>;
    for (int64_t j = 0; j < width; ++j) w[j * args.stride_k] = convert<W>::from(blocks[j]);
  });
}

}  // namespace smt_ext::cpu
