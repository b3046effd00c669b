#include <algorithm>

#include "block_score.h"
#include "reduce.cuh"
#include "tile_product.cuh"

namespace smt_ext::cuda {

template <typename Acc>
__device__ __forceinline__ Acc term(Metric metric, Acc g) {
  if (metric == Metric::l2) return g * g;
  if (metric == Metric::mean) return g;
  return g < 0 ? -g : g;  // NaN stays NaN
}

__device__ __forceinline__ double finish(Metric metric, double sum, int64_t area) {
  if (metric == Metric::l2) return sqrt(sum);
  return metric == Metric::l1 ? sum : sum / static_cast<double>(area);
}

// One block of threads for one block of the gradient; rows go to threadIdx.y, vectors of V entries
// to threadIdx.x.
// 768 threads of a multiprocessor at least: ptxas shall take the registers that float64 wants, and
// spill none for more threads.
template <typename T, int V, int Threads>
static __global__ void __launch_bounds__(Threads, 768 / Threads)
    block_score_kernel(BlockScoreArgs a) {
  using Acc = accumulator_t<T>;
  const unsigned columns = static_cast<unsigned>((a.K + a.L - 1) / a.L);
  const int64_t n0 = blockIdx.x / columns * a.L, k0 = blockIdx.x % columns * a.L;
  const int height = static_cast<int>(n0 + a.L < a.N ? a.L : a.N - n0);
  const int width = static_cast<int>(k0 + a.L < a.K ? a.L : a.K - k0);
  const T* const g = static_cast<const T*>(a.g) + n0 * a.stride_n + k0 * a.stride_k;
  constexpr int kAcross = V > 1 ? 16 : 32, kDown = Threads / kAcross;
  const int x = static_cast<int>(threadIdx.x) % kAcross,
            y = static_cast<int>(threadIdx.x) / kAcross;
  constexpr int kUnroll = 4;  // loads in flight
  double total = 0;
  for (int j = x * V; j < width; j += kAcross * V) {
    for (int i0 = y; i0 < height; i0 += kUnroll * kDown) {
      Vector<T, V> value[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = i0 + u * kDown;
        if (i < height) value[u] = load_nc<V>(g + i * a.stride_n + j * a.stride_k);
      }
      Acc sum = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i0 + u * kDown < height) {
#pragma unroll
          for (int e = 0; e < V; ++e) sum += term<Acc>(a.metric, widen(value[u].at[e]));
        }
      }
      total += sum;
    }
  }
  total = block_sum<Threads>(total);
  if (threadIdx.x == 0) {
    const double score = finish(a.metric, total, static_cast<int64_t>(height) * width);
    ptx::st_global(static_cast<Acc*>(a.score) + blockIdx.x, static_cast<Acc>(score));
  }
}

void block_score(const BlockScoreArgs& a, cudaStream_t stream) {
  const int64_t R = (a.N + a.L - 1) / a.L, C = (a.K + a.L - 1) / a.L;
  const dim3 grid(grid_blocks(R * C));
  dispatch(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const bool wide = a.stride_k == 1 && a.stride_n % kVector == 0 && a.L % kVector == 0 &&
                      a.K % kVector == 0 && is_aligned(a.g, 16);
    // Small blocks do not fill 256 threads.
    if (a.L >= 128) {
      launch("block_score",
             wide ? block_score_kernel<T, kVector, 256> : block_score_kernel<T, 1, 256>, grid,
             dim3(256), 0, stream, a);
    } else {
      launch("block_score",
             wide ? block_score_kernel<T, kVector, 64> : block_score_kernel<T, 1, 64>, grid,
             dim3(64), 0, stream, a);
    }
  });
}

// The tile of a block of the grid.
template <int kTile>
__device__ __forceinline__ TileRange tile_of(const BlockScoreFusedArgs& a, unsigned block) {
  const unsigned tiles = static_cast<unsigned>((a.L + kTile - 1) / kTile);  // down and across
  const unsigned columns = static_cast<unsigned>((a.K + a.L - 1) / a.L);
  const unsigned s = block / (tiles * tiles), tile = block % (tiles * tiles);
  const int64_t n0 = s / columns * a.L, k0 = s % columns * a.L;
  const int64_t i0 = tile / tiles * kTile, j0 = tile % tiles * kTile;
  const auto least = [](int64_t x, int64_t y, int64_t z) {
    const int64_t xy = x < y ? x : y;
    return xy < z ? xy : z;
  };
  return {{n0 + i0, least(n0 + i0 + kTile, n0 + a.L, a.N)},
          {k0 + j0, least(k0 + j0 + kTile, k0 + a.L, a.K)},
          0,
          a.T};
}

// sums[tile]: the terms of a tile's entries; a block's tiles lie together.
template <typename Engine>
static __global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    tile_sums_kernel(BlockScoreFusedArgs a, double* sums) {
  Engine engine;
  engine.run(a.dy, a.x, tile_of<Engine::kRows>(a, blockIdx.x));

  // Computed anew, so that the main loop has the registers.
  const TileRange range = tile_of<Engine::kRows>(a, ptx::block_index_x());
  const int rows = static_cast<int>(range.n.end - range.n.begin);
  const int width = static_cast<int>(range.k.end - range.k.begin);
  using Acc = typename Engine::Acc;
  Acc sum = 0;
  engine.for_each_pair([&](int i, int j, const Vector<Acc, 2>& pair) {
    if (i >= rows) return;
    if (j < width) sum += term(a.metric, pair.at[0]);
    if (j + 1 < width) sum += term(a.metric, pair.at[1]);
  });
  __syncthreads();  // all are done with the panels, whose place the sums of warps take
  const double total =
      block_sum<Engine::kThreads>(static_cast<double>(sum), ptx::dynamic_smem<double>());
  if (threadIdx.x == 0) ptx::st_global(sums + blockIdx.x, total);
}

constexpr int kScoreThreads = 128;

template <typename Score>
static __global__ void __launch_bounds__(kScoreThreads)
    scores_of_tiles_kernel(BlockScoreFusedArgs a, const double* sums, int64_t blocks, int tiles) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kScoreThreads + threadIdx.x;
  if (s >= blocks) return;
  double sum = 0;
  for (int tile = 0; tile < tiles; ++tile) sum += ptx::ld_global_nc(sums + s * tiles + tile);
  const int64_t columns = (a.K + a.L - 1) / a.L;
  const int64_t n0 = s / columns * a.L, k0 = s % columns * a.L;
  const int64_t height = n0 + a.L < a.N ? a.L : a.N - n0, width = k0 + a.L < a.K ? a.L : a.K - k0;
  ptx::st_global(static_cast<Score*>(a.score) + s,
                 static_cast<Score>(finish(a.metric, sum, height * width)));
}

// Several blocks of 16, 32 or 64 a tile: their scores at once. A warp takes rows of the tile, a
// lane four neighbours of each row, which are of one block.
template <typename Engine>
struct Strips {  // rows of the tile that one warp takes of a part
  static constexpr int kWarps = Engine::kThreads / 32, kRows = Engine::kPartRows / kWarps;
  static constexpr int kMost = Engine::kRows / 16;  // blocks of a row of the tile
  static constexpr int kPartEntries = Engine::kPartRows * Engine::kPartStride;
  static constexpr std::size_t kBytes =
      kPartEntries * sizeof(float) + Engine::kRows / kRows * kMost * sizeof(double);
  static constexpr std::size_t kSharedBytes =
      kBytes > Engine::kSharedBytes ? kBytes : Engine::kSharedBytes;
  static_assert(Engine::kRows == kGroupTile && 16 % kRows == 0);
  static_assert(std::is_same_v<typename Engine::Acc, float>);
};

template <typename Engine>
static __global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    group_scores_kernel(BlockScoreFusedArgs a) {
  using Strip = Strips<Engine>;
  constexpr int kTile = Engine::kRows, kRows = Strip::kRows;
  const auto range_of = [&](unsigned tile) {
    const unsigned across = static_cast<unsigned>((a.K + kTile - 1) / kTile);
    const int64_t n0 = int64_t{tile / across} * kTile, k0 = int64_t{tile % across} * kTile;
    return TileRange{{n0, n0 + kTile < a.N ? n0 + kTile : a.N},
                     {k0, k0 + kTile < a.K ? k0 + kTile : a.K},
                     0,
                     a.T};
  };
  Engine engine;
  engine.run(a.dy, a.x, range_of(blockIdx.x));
  // Computed anew, so that the main loop has the registers.
  const TileRange range = range_of(ptx::block_index_x());
  const int height = static_cast<int>(range.n.end - range.n.begin);
  const int width = static_cast<int>(range.k.end - range.k.begin);
  const int L = static_cast<int>(a.L), group = kTile / L;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  double* const strips = reinterpret_cast<double*>(ptx::dynamic_smem<float>() +
                                                   Strip::kPartEntries);  // (strips, group)
  for_each_part(engine, [&](int part, const float* staged) {
    const int first = Engine::row_of(part, warp * kRows);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const auto values = ptx::ld_shared(reinterpret_cast<const Vector<float, 4>*>(
          staged + (warp * kRows + i) * Engine::kPartStride + lane * 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (first + i < height && lane * 4 + e < width) sum += term(a.metric, values.at[e]);
      }
    }
    double total = sum;
    for (int lanes = 1; lanes < L / 4; lanes *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, lanes);
    }
    if (lane % (L / 4) == 0) {
      ptx::st_shared(strips + first / kRows * group + lane / (L / 4), total);
    }
  });
  __syncthreads();
  const int down = static_cast<int>(threadIdx.x) / group;
  const int across = static_cast<int>(threadIdx.x) % group;
  if (down >= group || down * L >= height || across * L >= width) return;
  double sum = 0;
  for (int strip = 0; strip < L / kRows; ++strip) {
    sum += ptx::ld_shared(strips + (down * (L / kRows) + strip) * group + across);
  }
  const int rows = height - down * L, columns = width - across * L;
  const int64_t area = int64_t{rows < L ? rows : L} * (columns < L ? columns : L);
  const int64_t row = range.n.begin / L + down, column = range.k.begin / L + across;
  ptx::st_global(static_cast<float*>(a.score) + row * ((a.K + L - 1) / L) + column,
                 static_cast<float>(finish(a.metric, sum, area)));
}

static int64_t blocks_of(const BlockScoreFusedArgs& a) {
  return (a.N + a.L - 1) / a.L * ((a.K + a.L - 1) / a.L);
}

static bool takes_pieces(const BlockScoreFusedArgs& a) {
  return takes_pieces(a.dy, a.dtype, a.N, a.L) && takes_pieces(a.x, a.dtype, a.K, a.L);
}

// with_group_engine where L has tiles of several blocks; whether it was called.
template <typename F>
static bool grouped(const BlockScoreFusedArgs& a, const F& f) {
  bool found = false;
  if (shares_tiles(a.L)) {
    with_group_engine<kGroupTile, kGroupTile>(a.dtype, takes_pieces(a), a.tf32, [&](auto engine) {
      f(engine);
      found = true;
    });
  }
  return found;
}

std::size_t block_score_fused_workspace_bytes(const BlockScoreFusedArgs& a) {
  std::size_t bytes = 0;
  if (grouped(a, [](auto) {})) return bytes;
  with_engine(a.dtype, takes_pieces(a), a.L, a.tf32, [&](auto engine) {
    const int64_t tiles = (a.L + decltype(engine)::type::kRows - 1) / decltype(engine)::type::kRows;
    bytes = static_cast<std::size_t>(blocks_of(a) * tiles * tiles) * sizeof(double);
  });
  return bytes;
}

void block_score_fused(const BlockScoreFusedArgs& a, void* workspace, cudaStream_t stream) {
  const bool done = grouped(a, [&](auto type) {
    using Engine = typename decltype(type)::type;
    constexpr int kTile = Engine::kRows;
    launch("block_score_fused", group_scores_kernel<Engine>,
           dim3(grid_blocks((a.N + kTile - 1) / kTile * ((a.K + kTile - 1) / kTile))),
           dim3(Engine::kThreads), Strips<Engine>::kSharedBytes, stream, a);
  });
  if (done) return;
  with_engine(a.dtype, takes_pieces(a), a.L, a.tf32, [&](auto type) {
    using Engine = typename decltype(type)::type;
    const int64_t side = (a.L + Engine::kRows - 1) / Engine::kRows, tiles = side * side;
    double* const sums = static_cast<double*>(workspace);
    launch("block_score_fused", tile_sums_kernel<Engine>, dim3(grid_blocks(blocks_of(a) * tiles)),
           dim3(Engine::kThreads), Engine::kSharedBytes, stream, a, sums);
    launch("block_score_of_tiles", scores_of_tiles_kernel<typename Engine::Acc>,
           dim3(grid_blocks((blocks_of(a) + kScoreThreads - 1) / kScoreThreads)),
           dim3(kScoreThreads), 0, stream, a, static_cast<const double*>(sums), blocks_of(a),
           static_cast<int>(tiles));
  });
}

}  // namespace smt_ext::cuda
