#include <algorithm>

#include "block_grad.h"
#include "tile_product.cuh"

namespace smt_ext::cuda {

constexpr int64_t kLeastTokens = 512;  // of a split: below, its sums cost more than they save
constexpr int kAddThreads = 256;

// How often the tokens are split, and how many each split takes.
struct Split {
  int64_t count, tokens;
};

// The first `count` of values (all where it is more, none where it is negative) to neighbouring
// entries of a row, by one instruction where the row's address allows it.
template <typename Out, int Run, typename Acc>
__device__ __forceinline__ void store_run(Out* out, int count, bool wide, bool accumulate,
                                          const Acc (&values)[Run]) {
  if (wide && count >= Run) {
    Vector<Acc, Run> run;
#pragma unroll
    for (int e = 0; e < Run; ++e) run.at[e] = values[e];
    if (accumulate) {
      const Vector<Out, Run> before = load<Run>(out);
#pragma unroll
      for (int e = 0; e < Run; ++e) run.at[e] += widen(before.at[e]);
    }
    store<Run>(out, convert<Out>(run));
    return;
  }
#pragma unroll
  for (int e = 0; e < Run; ++e) {
    if (e >= count) return;
    Acc value = values[e];
    if (accumulate) value += widen(ptx::ld_global(out + e));
    ptx::st_global(out + e, convert<Out>(value));
  }
}

// The tile of a block of the grid: entries (i0, j0) and on of block s of the gradient.
struct Tile {
  unsigned s;
  int64_t i0, j0;
  TileRange range;
};

template <int kTile>
__device__ __forceinline__ Tile tile_of(const BlockGradArgs& a, unsigned block,
                                        int64_t tokens_of_split) {
  const unsigned tiles = static_cast<unsigned>((a.L + kTile - 1) / kTile);  // down and across
  const unsigned s = block / (tiles * tiles), tile = block % (tiles * tiles);
  const int64_t n0 = static_cast<int64_t>(ptx::ld_global_nc(a.rows + s)) * a.L;
  const int64_t k0 = static_cast<int64_t>(ptx::ld_global_nc(a.slots + s)) * a.L;
  if (n0 < 0 || n0 >= a.N || k0 < 0 || k0 >= a.U) __trap();
  const int64_t i0 = tile / tiles * kTile, j0 = tile % tiles * kTile;
  const auto least = [](int64_t x, int64_t y, int64_t z) {
    const int64_t xy = x < y ? x : y;
    return xy < z ? xy : z;
  };
  const int64_t t_begin = blockIdx.y * tokens_of_split;
  return {
      s,
      i0,
      j0,
      {n0 + i0, least(n0 + i0 + kTile, n0 + a.L, a.N), k0 + j0,
       least(k0 + j0 + kTile, k0 + a.L, a.U), t_begin, least(t_begin + tokens_of_split, a.T, a.T)}};
}

// out: of a.out_dtype, or, for split tokens, the sums of this split in the workspace.
template <typename Engine, typename Out>
static __global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    block_grad_kernel(BlockGradArgs a, int64_t tokens_of_split) {
  constexpr int kTile = Engine::kTile;
  Engine engine;
  engine.run({a.dy, a.dy_stride_t, a.dy_stride_n}, {a.x_cols, a.x_stride_t, a.x_stride_u},
             tile_of<kTile>(a, blockIdx.x, tokens_of_split).range);

  // Computed anew, so that the main loop has the registers.
  const Tile tile = tile_of<kTile>(a, ptx::block_index_x(), tokens_of_split);
  Out* const out = static_cast<Out*>(a.out) +
                   (static_cast<int64_t>(blockIdx.y) * a.S + tile.s) * a.L * a.L + tile.i0 * a.L +
                   tile.j0;
  const int rows = static_cast<int>(a.L - tile.i0), columns = static_cast<int>(a.L - tile.j0);
  const int filled_rows = static_cast<int>(tile.range.n_end - tile.range.n_begin);
  const int filled_columns = static_cast<int>(tile.range.k_end - tile.range.k_begin);
  constexpr int kRun = Engine::template kRun<Out>;
  const bool wide = a.L % kRun == 0 && is_aligned(a.out, kRun * sizeof(Out));
  using Acc = typename Engine::Acc;
  engine.template for_each<kRun>([&](int i, int j, Acc(&values)[kRun]) {
    if (i >= rows) return;
    Out* const to = out + i * a.L + j;
    if (a.accumulate) {
      if (i < filled_rows) store_run(to, filled_columns - j, wide, true, values);
      return;
    }
    // What the tile holds beyond a ragged edge means nothing: zero takes its place.
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (i >= filled_rows || j + e >= filled_columns) values[e] = Acc(0);
    }
    store_run(to, columns - j, wide, false, values);
  });
}

// out[i] (=, +=) sum over splits of sums[split][i], in order.
template <typename Acc, typename Out>
static __global__ void __launch_bounds__(kAddThreads, 4)
    add_splits_kernel(BlockGradArgs a, const Acc* sums, int64_t splits) {
  const int64_t size = a.S * a.L * a.L;
  constexpr int kVector = 16 / sizeof(Acc);
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x) * kVector;
  if (at >= size) return;
  // L * L is a multiple of 4 only for even L; the rest is taken one by one.
  if (size % kVector == 0 && is_aligned(a.out, kVector * sizeof(Out))) {
    Vector<Acc, kVector> sum = load_nc<kVector>(sums + at);
    for (int64_t split = 1; split < splits; ++split) {
      const auto more = load_nc<kVector>(sums + split * size + at);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum.at[i] += more.at[i];
    }
    Out* const out = static_cast<Out*>(a.out) + at;
    if (a.accumulate) {
      const auto before = load<kVector>(out);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum.at[i] += widen(before.at[i]);
    }
    store<kVector>(out, convert<Out>(sum));
    return;
  }
  for (int64_t i = at; i < at + kVector && i < size; ++i) {
    Acc sum = ptx::ld_global_nc(sums + i);
    for (int64_t split = 1; split < splits; ++split) {
      sum += ptx::ld_global_nc(sums + split * size + i);
    }
    Out* const out = static_cast<Out*>(a.out) + i;
    if (a.accumulate) sum += widen(ptx::ld_global(out));
    ptx::st_global(out, convert<Out>(sum));
  }
}

template <typename Engine>
static Split split_of(const BlockGradArgs& a) {
  const int64_t tiles = (a.L + Engine::kTile - 1) / Engine::kTile;
  const int64_t blocks = a.S * tiles * tiles;
  const int64_t room = static_cast<int64_t>(multiprocessor_count()) * Engine::kBlocks;
  // As many as fit at once; a last wave that is almost empty would cost as much as a full one.
  const int64_t most = std::max<int64_t>(1, a.T / kLeastTokens);
  const int64_t count = std::clamp<int64_t>(room / std::max<int64_t>(1, blocks), 1, most);
  const int64_t tokens = ((a.T + count - 1) / count + 63) / 64 * 64;
  return {std::max<int64_t>(1, (a.T + tokens - 1) / std::max<int64_t>(1, tokens)), tokens};
}

static Operand dy_of(const BlockGradArgs& a) { return {a.dy, a.dy_stride_t, a.dy_stride_n}; }
static Operand x_of(const BlockGradArgs& a) { return {a.x_cols, a.x_stride_t, a.x_stride_u}; }

std::size_t block_grad_workspace_bytes(const BlockGradArgs& a) {
  std::size_t bytes = 0;
  with_engine(a.dtype, dy_of(a), a.N, x_of(a), a.U, a.L, a.tf32, [&](auto engine) {
    using Engine = typename decltype(engine)::type;
    const int64_t count = split_of<Engine>(a).count;
    if (count > 1) {
      bytes = static_cast<std::size_t>(count * a.S * a.L * a.L) * sizeof(typename Engine::Acc);
    }
  });
  return bytes;
}

void block_grad(const BlockGradArgs& a, void* workspace, cudaStream_t stream) {
  if (a.S == 0) return;
  with_engine(a.dtype, dy_of(a), a.N, x_of(a), a.U, a.L, a.tf32, [&](auto engine) {
    using Engine = typename decltype(engine)::type;
    using Acc = typename Engine::Acc;
    const Split split = split_of<Engine>(a);
    const int64_t tiles = (a.L + Engine::kTile - 1) / Engine::kTile;
    const dim3 grid(grid_blocks(a.S * tiles * tiles), static_cast<unsigned>(split.count));
    if (split.count == 1) {
      dispatch(a.out_dtype, [&](auto type) {
        using Out = typename decltype(type)::type;
        // float64 goes with float64 alone: the other pairs are not compiled.
        if constexpr (std::is_same_v<Acc, double> == std::is_same_v<Out, double>) {
          launch("block_grad", block_grad_kernel<Engine, Out>, grid, dim3(Engine::kThreads),
                 Engine::kSharedBytes, stream, a, split.tokens);
        }
      });
      return;
    }
    BlockGradArgs sums = a;
    sums.out = workspace;
    sums.accumulate = false;
    launch("block_grad", block_grad_kernel<Engine, Acc>, grid, dim3(Engine::kThreads),
           Engine::kSharedBytes, stream, sums, split.tokens);
    constexpr int64_t kEach = kAddThreads * (16 / sizeof(Acc));
    dispatch(a.out_dtype, [&](auto type) {
      using Out = typename decltype(type)::type;
      if constexpr (std::is_same_v<Acc, double> == std::is_same_v<Out, double>) {
        launch("block_grad_add", add_splits_kernel<Acc, Out>,
               dim3(grid_blocks((a.S * a.L * a.L + kEach - 1) / kEach)), dim3(kAddThreads), 0,
               stream, a, static_cast<const Acc*>(workspace), split.count);
      }
    });
  });
}

}  // namespace smt_ext::cuda
