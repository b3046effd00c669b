#include "block_grad.h"

#include <algorithm>
#include <vector>

#include "scratch.h"

namespace smt_ext::cpu {

// Blocks are joined only as long as this many tasks are left for the threads.
constexpr int64_t kMinTasks = 32;

// A tile of one product: blocks side by side in dW and in x_cols, or a part of a large block.
struct Tile {
  int64_t block, count;  // blocks [block, block + count)
  int64_t i0, j0;        // of the tile within a block; zero for whole blocks
};

static Operand columns(const Operand& x, DType dtype, int64_t begin) {
  return {static_cast<const char*>(x.data) + begin * x.stride_column * size_of(dtype), x.stride_t,
          x.stride_column};
}

// Neighbours in a block row whose columns are neighbours in x_cols share the packing of dy.
static std::vector<Tile> cut(const BlockGradArgs& a) {
  std::vector<Tile> tiles;
  if (a.L > kTile) {
    for (int64_t block = 0; block < a.S; ++block) {
      for (int64_t i = 0; i < a.L; i += kTile) {
        for (int64_t j = 0; j < a.L; j += kTile) tiles.push_back({block, 1, i, j});
      }
    }
    return tiles;
  }
  const int64_t longest = std::clamp<int64_t>(a.S / kMinTasks, 1, kTile / a.L);
  for (int64_t block = 0; block < a.S; ++block) {
    if (!tiles.empty() && tiles.back().count < longest && a.rows[block] == a.rows[block - 1] &&
        a.slots[block] == a.slots[block - 1] + 1) {
      ++tiles.back().count;
    } else {
      tiles.push_back({block, 1, 0, 0});
    }
  }
  return tiles;
}

// Copies or adds the (m, n) sums into rows x cols entries of a block; zeros beyond (m, n).
template <typename Out, typename Acc>
static void store(const Acc* sums, int64_t m, int64_t n, int64_t rows, int64_t cols, int64_t L,
                  bool accumulate, Out* out) {
  for (int64_t i = 0; i < rows; ++i, out += L, sums += kTile) {
    const int64_t inside = i < m ? n : 0;
    if (accumulate) {
      for (int64_t j = 0; j < inside; ++j) {
        out[j] = convert<Out>::from(convert<Acc>::from(out[j]) + sums[j]);
      }
    } else {
      for (int64_t j = 0; j < inside; ++j) out[j] = convert<Out>::from(sums[j]);
      std::fill(out + inside, out + cols, Out{});
    }
  }
}

// The operands of a tile: the columns of dy and of x_cols that are inside the weight.
static NextTile operands(const BlockGradArgs& a, const Tile& tile) {
  const int32_t row = a.rows[tile.block];
  const OutputGrad& of = a.dys[a.dy_of(row)];
  const int64_t n0 = (row - of.first_row) * a.L + tile.i0;
  const int64_t k0 = a.slots[tile.block] * a.L + tile.j0;
  const int64_t rows = std::min(kTile, a.L - tile.i0), cols = std::min(kTile, a.L - tile.j0);
  return {columns(of.dy, a.dtype, n0), columns(a.x_cols, a.dtype, k0),
          std::clamp<int64_t>(of.N - n0, 0, rows),
          std::clamp<int64_t>(a.U - k0, 0, tile.count * cols)};
}

template <typename Out>
static void compute(const BlockGradArgs& a, const Tile& tile, const Tile* following) {
  using Acc = accumulator_t<Out>;
  Acc* sums = static_cast<Acc*>(thread_scratch(Scratch::tile, kTile * kTile * sizeof(Acc)));
  const auto [dy, x_cols, m, n] = operands(a, tile);
  if (m > 0 && n > 0) {
    const NextTile next = following ? operands(a, *following) : NextTile{};
    tile_gemm(a.dtype, dy, x_cols, a.T, m, n, sums, kTile,
              next.m > 0 && next.n > 0 ? &next : nullptr);
  }
  // Of each block, padding included.
  const int64_t rows = std::min(kTile, a.L - tile.i0), cols = std::min(kTile, a.L - tile.j0);
  for (int64_t b = 0; b < tile.count; ++b) {
    Out* out = static_cast<Out*>(a.out) + ((tile.block + b) * a.L + tile.i0) * a.L + tile.j0;
    store(sums + b * cols, m, std::clamp<int64_t>(n - b * cols, 0, cols), rows, cols, a.L,
          a.accumulate, out);
  }
}

void block_grad(const BlockGradArgs& args, const Parallel& parallel) {
  const std::vector<Tile> tiles = cut(args);
  parallel.run(static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
    dispatch(args.out_dtype, [&](auto out) {
      for (int64_t i = begin; i < end; ++i) {
        compute<decltype(out)>(args, tiles[i], i + 1 < end ? &tiles[i + 1] : nullptr);
      }
    });
  });
}

}  // namespace smt_ext::cpu
