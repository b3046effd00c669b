#include "block_grad.h"

#include <algorithm>

namespace smt_ext::cpu {

static Operand columns(const Operand& x, DType dtype, int64_t begin) {
  return {static_cast<const char*>(x.data) + begin * x.stride_i * size_of(dtype), x.stride_t,
          x.stride_i};
}

template <typename Out>
static void block_grad_tile(const BlockGradArgs& a, int64_t block, int64_t ti, int64_t tj) {
  using Acc = accumulator_t<Out>;
  alignas(64) static thread_local char scratch[kTile * kTile * sizeof(double)];
  Acc* tile = reinterpret_cast<Acc*>(scratch);
  const int64_t n0 = a.rows[block] * a.L + ti, k0 = a.slots[block] * a.L + tj;
  // Size of this tile within the padded block, and of its part inside the weight.
  const int64_t rows = std::min(kTile, a.L - ti), cols = std::min(kTile, a.L - tj);
  const int64_t m = std::clamp<int64_t>(a.N - n0, 0, rows),
                n = std::clamp<int64_t>(a.U - k0, 0, cols);
  if (m > 0 && n > 0) {
    tile_gemm(a.dtype, columns(a.dy, a.dtype, n0), columns(a.x_cols, a.dtype, k0), a.T, m, n, tile,
              kTile);
  }
  Out* out = static_cast<Out*>(a.out) + (block * a.L + ti) * a.L + tj;
  for (int64_t i = 0; i < rows; ++i, out += a.L) {
    const int64_t inside = i < m ? n : 0;
    const Acc* sums = tile + i * kTile;
    if (a.accumulate) {
      for (int64_t j = 0; j < inside; ++j) {
        out[j] = convert<Out>::from(convert<Acc>::from(out[j]) + sums[j]);
      }
    } else {
      for (int64_t j = 0; j < inside; ++j) out[j] = convert<Out>::from(sums[j]);
      std::fill(out + inside, out + cols, Out{});
    }
  }
}

void block_grad(const BlockGradArgs& args, const Parallel& parallel) {
  const int64_t tiles = (args.L + kTile - 1) / kTile;
  parallel.run(args.S * tiles * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / (tiles * tiles), tile = task % (tiles * tiles);
      dispatch(args.out_dtype, [&](auto out) {
        block_grad_tile<decltype(out)>(args, block, tile / tiles * kTile, tile % tiles * kTile);
      });
    }
  });
}

}  // namespace smt_ext::cpu
