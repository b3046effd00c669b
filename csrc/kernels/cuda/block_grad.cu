#include <algorithm>
#include <iterator>

#include "block_grad.h"
#include "schedule.cuh"
#include "tile_product.cuh"

namespace smt_ext::cuda {

constexpr int kAddThreads = 256;
// In the time that a 16-bit element takes from L2; of an H100's data sheet, not measured.
constexpr int64_t kProductsOfAnElement = 92;

// The first `count` of values (all where it is more, none where it is negative) to neighbouring
// entries of a row, by one instruction where the row's address allows it.
template <typename Out, int Run, typename Acc>
__device__ __forceinline__ void store_run(Out* out, int count, bool wide, bool accumulate,
                                          Vector<Acc, Run> values) {
  if (wide && count >= Run) {
    if (accumulate) {
      const Vector<Out, Run> before = load<Run>(out);
#pragma unroll
      for (int e = 0; e < Run; ++e) values.at[e] += widen(before.at[e]);
    }
    store<Run>(out, convert<Out>(values));
    return;
  }
#pragma unroll
  for (int e = 0; e < Run; ++e) {
    if (e >= count) return;
    Acc value = values.at[e];
    if (accumulate) value += widen(ptx::ld_global(out + e));
    ptx::st_global(out + e, convert<Out>(value));
  }
}

// Of the tiles of one block each, or of several (Grouped).
template <int kRows, int kColumns, bool Grouped>
class Tile {
 public:
  __device__ __forceinline__ Tile(const BlockGradArgs& a, unsigned number) {
    if constexpr (Grouped) {
      shift_ = a.L == 64 ? 6 : a.L == 32 ? 5 : 4;
      down_ = kRows >> shift_;
      across_ = kColumns >> shift_;
      list_ = a.tiles + static_cast<int64_t>(number) * (down_ + across_ + down_ * across_);
      dy_ = a.dy_of(ptx::ld_global_nc(list_));
    } else {
      static_assert(kRows == kColumns);
      constexpr int kTile = kRows;
      const unsigned tiles = static_cast<unsigned>((a.L + kTile - 1) / kTile);  // down and across
      const unsigned block = number / (tiles * tiles), tile = number % (tiles * tiles);
      s_ = a.lone == nullptr ? block : ptx::ld_global_nc(a.lone + block);
      if (s_ < 0 || s_ >= a.S) __trap();
      i0_ = static_cast<int>(tile / tiles * kTile);
      j0_ = static_cast<int>(tile % tiles * kTile);
      const int32_t row = ptx::ld_global_nc(a.rows + s_);
      dy_ = a.dy_of(row);
      n0_ = static_cast<int64_t>(row - a.dys[dy_].first_row) * a.L;
      k0_ = static_cast<int64_t>(ptx::ld_global_nc(a.slots + s_)) * a.L;
      if (n0_ < 0 || n0_ >= a.dys[dy_].N || k0_ < 0 || k0_ >= a.U) __trap();
    }
  }

  __device__ __forceinline__ const Operand& dy(const BlockGradArgs& a) const {
    return a.dys[dy_].dy;
  }

  __device__ __forceinline__ TileRange range(const BlockGradArgs& a, int64_t t_begin,
                                             int64_t tokens) const {
    const int64_t t_end = t_begin + tokens < a.T ? t_begin + tokens : a.T;
    const OutputGrad& of = a.dys[dy_];
    if constexpr (Grouped) {
      check_list(a);
      return {
          {0, of.N, list_, shift_, of.first_row}, {0, a.U, list_ + down_, shift_}, t_begin, t_end};
    } else {
      constexpr int kTile = kRows;
      const auto least = [](int64_t x, int64_t y, int64_t z) {
        const int64_t xy = x < y ? x : y;
        return xy < z ? xy : z;
      };
      return {{n0_ + i0_, least(n0_ + i0_ + kTile, n0_ + a.L, of.N)},
              {k0_ + j0_, least(k0_ + j0_ + kTile, k0_ + a.L, a.U)},
              t_begin,
              t_end};
    }
  }

  // Writes entries (i, j) ... (i, j + Run - 1) of the tile to out, or adds them. wide: as of
  // store_run.
  template <typename Out, int Run, typename Acc>
  __device__ __forceinline__ void write(const BlockGradArgs& a, int i, int j, bool wide,
                                        Vector<Acc, Run> values) const {
    const int L = static_cast<int>(a.L);
    int64_t s, n, k;  // block, and what its first row and column are in the weight
    if constexpr (Grouped) {
      const int down = i >> shift_, across = j >> shift_;
      s = ptx::ld_global_nc(list_ + down_ + across_ + down * across_ + across);
      if (s < 0) return;
      if (s >= a.S) __trap();
      n = static_cast<int64_t>(ptx::ld_global_nc(list_ + down) - a.dys[dy_].first_row) * a.L;
      k = ptx::ld_global_nc(list_ + down_ + across) * a.L;
      i &= L - 1;
      j &= L - 1;
    } else {
      s = s_, n = n0_, k = k0_;
      i += i0_;
      j += j0_;
      if (i >= L) return;
    }
    // What the tile holds beyond a ragged edge means nothing: zero takes its place.
    const bool filled_row = n + i < a.dys[dy_].N;
    const int filled = static_cast<int>(a.U - k < a.L ? a.U - k : a.L) - j;
    Out* const to = static_cast<Out*>(a.out) + (s * L + i) * L + j;
    if (a.accumulate) {
      if (filled_row) store_run(to, filled, wide, true, values);
      return;
    }
#pragma unroll
    for (int e = 0; e < Run; ++e) {
      if (!filled_row || e >= filled) values.at[e] = Acc(0);
    }
    store_run(to, L - j, wide, false, values);
  }

 private:
  // Stops the kernel where an index lies beyond the matrices, or a row in another dy than the
  // first.
  __device__ __forceinline__ void check_list(const BlockGradArgs& a) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= down_ + across_) return;
    const int32_t block = ptx::ld_global_nc(list_ + i);
    const int32_t first = i < down_ ? a.dys[dy_].first_row : 0;
    const int64_t end = i < down_ ? a.dys[dy_].N : a.U;
    if (block != -1 && (block < first || (block - first) * a.L >= end)) __trap();
  }

  int dy_;                     // which of a.dys
  const int32_t* list_;        // rows, slots, numbers of blocks
  int shift_, down_, across_;  // L = 2^shift; blocks of the sides
  int64_t s_, n0_, k0_;
  int i0_, j0_;  // of the tile in the block
};

// Block b of the grid: split `part` of a tile.
struct Work {
  unsigned tile;
  int64_t t_begin, tokens;
  int64_t part;  // number of the part that is written; -1 for a whole tile
};

// A level of the schedule, and what comes before it.
struct Level {
  int64_t tiles, splits, tokens;
  unsigned tiles_before, blocks_before;
  int64_t parts_before;
};

// The level that `number` lies in, of which `count(split)` are counted.
template <typename Count>
__device__ __forceinline__ Level level_of(const Schedule& s, unsigned number, const Count& count) {
  Level level{s.levels[0].tiles, s.levels[0].splits, s.levels[0].tokens, 0, 0, 0};
  unsigned tiles = 0, blocks = 0, counted = 0;
  int64_t parts = 0;
#pragma unroll
  for (int i = 1; i < Schedule::kLevels; ++i) {
    tiles += static_cast<unsigned>(s.levels[i - 1].tiles);
    blocks += static_cast<unsigned>(s.levels[i - 1].blocks());
    parts += s.levels[i - 1].parts();
    counted += static_cast<unsigned>(count(s.levels[i - 1]));
    if (number >= counted && s.levels[i].tiles > 0) {
      level = {s.levels[i].tiles, s.levels[i].splits, s.levels[i].tokens, tiles, blocks, parts};
    }
  }
  return level;
}

__device__ __forceinline__ Work work_of(const Schedule& s, unsigned block) {
  const Level level = level_of(s, block, [](const Split& split) { return split.blocks(); });
  const unsigned tiles = static_cast<unsigned>(level.tiles), at = block - level.blocks_before;
  return {level.tiles_before + at % tiles, at / tiles * level.tokens, level.tokens,
          level.splits > 1 ? level.parts_before + at : -1};
}

// f(Type<Out>{}) for the type of the gradient: float64 goes with float64 alone.
template <typename Acc, typename F>
__device__ __forceinline__ void with_out(DType dtype, const F& f) {
  if constexpr (std::is_same_v<Acc, double>) {
    f(Type<double>{});
  } else if (dtype == DType::f32) {
    f(Type<float>{});
  } else if (dtype == DType::bf16) {
    f(Type<bf16>{});
  } else {
    f(Type<f16>{});
  }
}

// parts: (parts, kRows, kColumns) sums of the tiles whose tokens are split.
template <typename Engine, bool Grouped>
static __global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    block_grad_kernel(BlockGradArgs a, Schedule schedule, typename Engine::Acc* parts) {
  constexpr int kRows = Engine::kRows, kColumns = Engine::kColumns;
  using Acc = typename Engine::Acc;
  using TileOf = Tile<kRows, kColumns, Grouped>;
  Engine engine;
  {
    const Work work = work_of(schedule, blockIdx.x);
    const TileOf tile(a, work.tile);
    engine.run(tile.dy(a), a.x_cols, tile.range(a, work.t_begin, work.tokens));
  }
  // Computed anew, so that the main loop has the registers.
  const Work work = work_of(schedule, ptx::block_index_x());
  const TileOf tile(a, work.tile);
  constexpr int kRun = 16 / static_cast<int>(sizeof(Acc)), kRuns = kColumns / kRun;
  for_each_part(engine, [&](int part, const Acc* staged) {
    const auto for_each_run = [&](const auto& f) {
#pragma unroll 2
      for (int at = static_cast<int>(threadIdx.x); at < Engine::kPartRows * kRuns;
           at += Engine::kThreads) {
        const int r = at / kRuns, j = at % kRuns * kRun;
        f(Engine::row_of(part, r), j,
          ptx::ld_shared(
              reinterpret_cast<const Vector<Acc, kRun>*>(staged + r * Engine::kPartStride + j)));
      }
    };
    if (work.part >= 0) {
      Acc* const to = parts + work.part * kRows * kColumns;
      for_each_run([&](int i, int j, const Vector<Acc, kRun>& values) {
        store(to + i * kColumns + j, values);
      });
      return;
    }
    with_out<Acc>(a.out_dtype, [&](auto type) {
      using Out = typename decltype(type)::type;
      const bool wide = a.L % kRun == 0 && is_aligned(a.out, kRun * sizeof(Out));
      for_each_run([&](int i, int j, const Vector<Acc, kRun>& values) {
        tile.template write<Out>(a, i, j, wide, values);
      });
    });
  });
}

// Tiles whose tokens are split: the sum over their parts, in order. blockIdx.x counts pieces of
// kAddThreads * kRun entries of all of them.
template <int kRows, int kColumns, bool Grouped, typename Acc>
static __global__ void __launch_bounds__(kAddThreads, 4)
    add_parts_kernel(BlockGradArgs a, Schedule schedule, const Acc* parts) {
  constexpr int kRun = 16 / static_cast<int>(sizeof(Acc));
  constexpr int kEntries = kRows * kColumns;
  constexpr unsigned kPieces = kEntries / (kAddThreads * kRun);
  const unsigned whole =  // tiles, all of the first level
      schedule.levels[0].splits > 1 ? 0 : static_cast<unsigned>(schedule.levels[0].tiles);
  const unsigned number = whole + blockIdx.x / kPieces;
  const unsigned at = (blockIdx.x % kPieces * kAddThreads + threadIdx.x) * kRun;
  const Level level = level_of(schedule, number, [](const Split& split) { return split.tiles; });
  const Acc* const from =
      parts + (level.parts_before + number - level.tiles_before) * kEntries + at;
  Vector<Acc, kRun> sum = load_nc<kRun>(from);
  for (int64_t part = 1; part < level.splits; ++part) {
    const auto more = load_nc<kRun>(from + part * level.tiles * kEntries);
#pragma unroll
    for (int e = 0; e < kRun; ++e) sum.at[e] += more.at[e];
  }
  const Tile<kRows, kColumns, Grouped> tile(a, number);
  with_out<Acc>(a.out_dtype, [&](auto type) {
    using Out = typename decltype(type)::type;
    const bool wide = a.L % kRun == 0 && is_aligned(a.out, kRun * sizeof(Out));
    tile.template write<Out>(a, static_cast<int>(at / kColumns), static_cast<int>(at % kColumns),
                             wide, sum);
  });
}

template <typename Engine, bool Grouped>
static int64_t resident() {
  static PerDevice known;  // a schedule asks a dozen times
  return known.get([] {
    return resident_blocks("block_grad", block_grad_kernel<Engine, Grouped>, Engine::kThreads,
                           Engine::kSharedBytes);
  });
}

template <typename Engine, bool Grouped>
static Schedule schedule_for(const BlockGradArgs& a, int64_t tiles) {
  return schedule_of(tiles, a.T, Engine::kRows * Engine::kColumns, multiprocessor_count(),
                     resident<Engine, Grouped>());
}

template <typename Engine, bool Grouped>
static void launch_tiles(const BlockGradArgs& a, int64_t tiles, void* workspace,
                         cudaStream_t stream) {
  using Acc = typename Engine::Acc;
  if (tiles == 0) return;
  const Schedule schedule = schedule_for<Engine, Grouped>(a, tiles);
  Acc* const parts = static_cast<Acc*>(workspace);
  launch("block_grad", block_grad_kernel<Engine, Grouped>, dim3(grid_blocks(schedule.blocks())),
         dim3(Engine::kThreads), Engine::kSharedBytes, stream, a, schedule, parts);
  if (schedule.parts() == 0) return;
  constexpr int64_t kPieces =
      Engine::kRows * Engine::kColumns / (kAddThreads * (16 / static_cast<int>(sizeof(Acc))));
  static_assert(kPieces > 0);
  int64_t split = 0;
  for (const Split& level : schedule.levels) split += level.splits > 1 ? level.tiles : 0;
  launch("block_grad_add", add_parts_kernel<Engine::kRows, Engine::kColumns, Grouped, Acc>,
         dim3(grid_blocks(split * kPieces)), dim3(kAddThreads), 0, stream, a, schedule,
         static_cast<const Acc*>(parts));
}

// What a launch takes: four times the products that the busiest multiprocessor works off, or that
// it could while its share of what the tiles read comes from L2.
template <typename Engine, bool Grouped>
static int64_t work_for(const BlockGradArgs& a, int64_t tiles) {
  constexpr int kEntries = Engine::kRows * Engine::kColumns;
  const int64_t multiprocessors = multiprocessor_count();
  const int64_t products = kEntries * cost_of(schedule_for<Engine, Grouped>(a, tiles), kEntries,
                                              multiprocessors, resident<Engine, Grouped>());
  const int64_t panels = tiles * a.T * (Engine::kRows + Engine::kColumns);
  return std::max(products, 4 * kProductsOfAnElement * panels / multiprocessors);
}

static bool takes_pieces(const BlockGradArgs& a) {
  bool pieces = takes_pieces(a.x_cols, a.dtype, a.U, a.L);
  for (const OutputGrad& of : a.dys) {
    pieces &= of.N == 0 || takes_pieces(of.dy, a.dtype, of.N, a.L);
  }
  return pieces;
}

// f(Type<Engine>{}, tiles) for `blocks` blocks by themselves.
template <typename F>
static void with_lone_blocks(const BlockGradArgs& a, int64_t blocks, const F& f) {
  with_engine(a.dtype, takes_pieces(a), a.L, a.tf32, [&](auto engine) {
    constexpr int kTile = decltype(engine)::type::kRows;
    const int64_t side = (a.L + kTile - 1) / kTile;
    f(engine, blocks * side * side);
  });
}

// Whether tall tiles, which are few, leave so many multiprocessors idle that blocks by themselves
// are done sooner, by a fifth at least.
template <typename Engine>
static bool too_few(const BlockGradArgs& a) {
  const auto alone = [&](int64_t blocks) {
    int64_t work = 0;
    with_lone_blocks(a, blocks, [&](auto engine, int64_t tiles) {
      work = work_for<typename decltype(engine)::type, false>(a, tiles);
    });
    return work;
  };
  return 5 * alone(a.S) < 4 * (work_for<Engine, true>(a, a.n_tiles) + alone(a.n_lone));
}

// f for the tiles of kTileShapes[Number], if the blocks have such; whether it was called.
template <int Number, typename F>
static bool with_shape(const BlockGradArgs& a, const F& f) {
  constexpr int kRows = kTileShapes[Number].rows, kColumns = kTileShapes[Number].columns;
  if (a.shape.rows != kRows || a.shape.columns != kColumns) return false;
  bool called = false;
  with_group_engine<kRows, kColumns>(a.dtype, takes_pieces(a), a.tf32, [&](auto engine) {
    if (kRows > kColumns && too_few<typename decltype(engine)::type>(a)) return;
    f(engine, std::true_type{}, a, a.n_tiles);
    called = true;
  });
  return called;
}

// f(Type<Engine>{}, std::bool_constant<Grouped>{}, args, tiles) for each launch.
template <typename F>
static void for_each_launch(const BlockGradArgs& a, const F& f) {
  if (a.S == 0) return;
  static_assert(std::size(kTileShapes) == 3);
  const bool grouped =
      a.n_tiles > 0 && (with_shape<0>(a, f) || with_shape<1>(a, f) || with_shape<2>(a, f));
  BlockGradArgs rest = a;
  if (!grouped) rest.lone = nullptr;
  with_lone_blocks(a, grouped ? a.n_lone : a.S,
                   [&](auto engine, int64_t tiles) { f(engine, std::false_type{}, rest, tiles); });
}

std::size_t block_grad_workspace_bytes(const BlockGradArgs& a) {
  std::size_t bytes = 0;
  for_each_launch(a, [&](auto type, auto grouped, const BlockGradArgs& args, int64_t tiles) {
    using Engine = typename decltype(type)::type;
    const Schedule schedule = schedule_for<Engine, decltype(grouped)::value>(args, tiles);
    bytes = std::max(bytes, static_cast<std::size_t>(schedule.parts()) * Engine::kRows *
                                Engine::kColumns * sizeof(typename Engine::Acc));
  });
  return bytes;
}

void block_grad(const BlockGradArgs& a, void* workspace, cudaStream_t stream) {
  for_each_launch(a, [&](auto type, auto grouped, const BlockGradArgs& args, int64_t tiles) {
    launch_tiles<typename decltype(type)::type, decltype(grouped)::value>(args, tiles, workspace,
                                                                          stream);
  });
}

}  // namespace smt_ext::cuda
