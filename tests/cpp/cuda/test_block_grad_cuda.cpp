// Block gradients against float64, on every engine, split and whole; their memory traffic.
#include <algorithm>

#include "block_grad.h"
#include "elements.h"
#include "schedule.cuh"

namespace smt_ext::testing {

struct Shape {
  int64_t T, N, U, L;
  char layout = 'r';         // of dy
  int multiprocessors = 1;   // with more, tokens of a tile are split
  int64_t out_offset = 0;    // elements that out begins beyond an aligned address
  TileShape shape = {0, 0};  // of tiles of several blocks
  bool every_block = false;
  size_t shared_bytes = 0;  // of the last launch, where it is of 16 bits and known
};

constexpr TileShape kSquare = kTileShapes[0], kTall = kTileShapes[1], kNarrow = kTileShapes[2];
// Three panels of 32 tokens.
constexpr size_t kTallBytes = 3 * 32 * (256 + 64) * 2, kNarrowBytes = 3 * 32 * (256 + 32) * 2;

// Blocks of every row and slot, or of all but some.
struct Blocks {
  std::vector<int32_t> rows, slots;
  Blocks(const Shape& c) {
    const int64_t R = (c.N + c.L - 1) / c.L, C = (c.U + c.L - 1) / c.L;
    for (int64_t i = 0; i < R * C; ++i) {
      if (!c.every_block && R * C > 2 && i % 3 == 1) continue;
      rows.push_back(static_cast<int32_t>(i / C));
      slots.push_back(static_cast<int32_t>(i % C));
    }
  }
};

// Tiles of several blocks: rows and slots from both ends of the matrix, so that they are no
// neighbours; what has a tile to itself is lone.
struct Groups {
  std::vector<int32_t> tiles, lone;
  int64_t count = 0;
  Groups(const Shape& c, const Blocks& blocks) {
    if (c.shape.rows == 0) return;
    const auto down = static_cast<size_t>(c.shape.rows / c.L);
    const auto across = static_cast<size_t>(c.shape.columns / c.L);
    const auto apart = [](int64_t n, size_t g) {
      std::vector<int32_t> order;
      for (int64_t i = 0; i < n; ++i) {
        order.push_back(static_cast<int32_t>(i % 2 ? n - 1 - i / 2 : i / 2));
      }
      while (order.size() % g) order.push_back(-1);
      return order;
    };
    const auto rows = apart((c.N + c.L - 1) / c.L, down);
    const auto slots = apart((c.U + c.L - 1) / c.L, across);
    for (size_t r = 0; r < rows.size(); r += down) {
      for (size_t k = 0; k < slots.size(); k += across) {
        std::vector<int32_t> tile(rows.begin() + static_cast<std::ptrdiff_t>(r),
                                  rows.begin() + static_cast<std::ptrdiff_t>(r + down));
        tile.insert(tile.end(), slots.begin() + static_cast<std::ptrdiff_t>(k),
                    slots.begin() + static_cast<std::ptrdiff_t>(k + across));
        std::vector<int32_t> held;
        for (size_t i = 0; i < down; ++i) {
          for (size_t j = 0; j < across; ++j) {
            int32_t number = -1;
            for (size_t s = 0; s < blocks.rows.size(); ++s) {
              if (blocks.rows[s] == rows[r + i] && blocks.slots[s] == slots[k + j]) {
                number = static_cast<int32_t>(s);
              }
            }
            tile.push_back(number);
            if (number >= 0) held.push_back(number);
          }
        }
        if (held.size() > 1) {
          tiles.insert(tiles.end(), tile.begin(), tile.end());
          ++count;
        } else {
          lone.insert(lone.end(), held.begin(), held.end());
        }
      }
    }
  }
};

// Of the blocks of one dy. before: what they are added to, or null.
template <typename In, typename Out>
static void expect_formula(const Shape& c, const Blocks& blocks, const std::vector<In>& dy,
                           const std::vector<In>& x, const Out* got, const Out* before, bool tf32) {
  // tf32 rounds each operand to 11 bits; sums add T terms in float32, truncated.
  const double u = std::is_same_v<In, double> ? 0x1p-53 : 0x1p-23;
  const double u_operand = tf32 ? 0x1p-11 : 0;
  const Layout dy_TN = Layout::of(c.layout, c.T, c.N);
  for (size_t s = 0; s < blocks.rows.size(); ++s) {
    for (int64_t at = 0; at < c.L * c.L; ++at) {
      const int64_t n = blocks.rows[s] * c.L + at / c.L, k = blocks.slots[s] * c.L + at % c.L;
      const size_t i = s * static_cast<size_t>(c.L * c.L) + static_cast<size_t>(at);
      if (n >= c.N || k >= c.U) {
        ASSERT_TRUE(before != nullptr ? same_bits(got[i], before[i]) : to_double(got[i]) == 0)
            << "padding";
        continue;
      }
      double exact = before != nullptr ? to_double(before[i]) : 0, magnitude = std::abs(exact);
      for (int64_t t = 0; t < c.T; ++t) {
        const double product =
            to_double(dy[dy_TN.at(t, n)]) * to_double(x[static_cast<size_t>(t * c.U + k)]);
        exact += product;
        magnitude += std::abs(product);
      }
      const double bound = (2 * static_cast<double>(c.T + 2) * u + 2.01 * u_operand) * magnitude +
                           unit_of<Out>() * std::abs(exact) * 1.01;
      ASSERT_LE(std::abs(to_double(got[i]) - exact), bound)
          << "block " << s << " at " << n << ", " << k;
    }
  }
}

template <typename In, typename Out>
static void check_block_grad(const Shape& c, bool tf32 = false) {
  simt::config().device.multiprocessors = c.multiprocessors;
  const Blocks blocks(c);
  const auto S = static_cast<int64_t>(blocks.rows.size());
  const Layout dy_TN = Layout::of(c.layout, c.T, c.N);
  const auto dy = random_values<In>(dy_TN.reach(), 1), x = random_values<In>(c.T * c.U, 2);
  const simt::Buffer<In> dy_device(dy, "dy"), x_device(x, "x_cols");
  const simt::Buffer<int32_t> rows(blocks.rows, "rows"), slots(blocks.slots, "slots");
  const auto before = random_values<Out>(S * c.L * c.L, 3);
  const Groups groups(c, blocks);
  const simt::Buffer<int32_t> tiles(groups.tiles, "tiles"), lone(groups.lone, "lone");
  for (const bool accumulate : {false, true}) {
    SCOPED_TRACE(::testing::Message()
                 << "T " << c.T << " N " << c.N << " U " << c.U << " L " << c.L << " layout "
                 << c.layout << " out + " << c.out_offset << " accumulate " << accumulate);
    std::vector<Out> first;
    simt::for_each_seed(simt::orders, [&] {
      const auto offset = static_cast<size_t>(c.out_offset);
      simt::Buffer<Out> buffer(offset + before.size(), "out");
      std::vector<Out> held(offset, before[0]);
      if (accumulate) held.insert(held.end(), before.begin(), before.end());
      buffer.assign(held.data(), held.size());
      cuda::BlockGradArgs args{
          dtype_of<In>(),
          dtype_of<Out>(),
          c.T,
          c.U,
          c.L,
          S,
          {{{dy_device.data() + dy_TN.offset, dy_TN.stride_row, dy_TN.stride_col}, c.N, 0}},
          {x_device.data(), c.U, 1},
          rows.data(),
          slots.data(),
          buffer.data() + c.out_offset,
          accumulate,
          tf32};
      if (c.shape.rows > 0) {
        args.shape = c.shape;
        args.tiles = tiles.data(), args.n_tiles = groups.count;
        args.lone = lone.data(), args.n_lone = static_cast<int64_t>(groups.lone.size());
      }
      const size_t bytes = cuda::block_grad_workspace_bytes(args);
      ASSERT_TRUE(c.multiprocessors == 1 || bytes > 0) << "no tile is split";
      simt::Buffer<double> workspace((bytes + 7) / 8, "workspace");
      cuda::block_grad(args, workspace.data(), nullptr);
      if (simt::counts_traffic && sizeof(In) == 2 && c.shared_bytes > 0) {
        ASSERT_EQ(simt::last_stats("block_grad").smem_bytes, c.shared_bytes) << "another tile";
      }
      auto got = buffer.values();
      for (size_t i = 0; i < offset; ++i) ASSERT_TRUE(same_bits(got[i], before[0]));
      got.erase(got.begin(), got.begin() + c.out_offset);
      if (first.empty()) first = got;
      ASSERT_TRUE(same_bits(got, first)) << "depends on the order of blocks";
    });
    expect_formula<In, Out>(c, blocks, dy, x, first.data(), accumulate ? before.data() : nullptr,
                            tf32);
  }
  simt::config().device = simt::Device();
}

template <typename P>
class BlockGradTest : public ::testing::Test {};
using Pairs =
    ::testing::Types<Pair<bf16, float>, Pair<bf16, bf16>, Pair<f16, float>, Pair<f16, f16>,
                     Pair<float, float>, Pair<float, bf16>, Pair<double, double>>;
TYPED_TEST_SUITE(BlockGradTest, Pairs);

// Whole and ragged grids, the three tiles, T below, at and beyond a panel, odd everything.
TYPED_TEST(BlockGradTest, EqualsTheFormula) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  for (const Shape& c : {Shape{40, 64, 48, 16},
                         {33, 48, 72, 32},
                         {64, 72, 40, 32},
                         {1, 64, 64, 64},
                         {37, 160, 136, 64},
                         {70, 200, 168, 128},
                         {31, 104, 96, 96},
                         {20, 300, 264, 256},
                         {0, 64, 64, 32}}) {
    check_block_grad<In, Out>(c);
  }
}

TYPED_TEST(BlockGradTest, TakesAnyStrideAddressAndSize) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  for (const Shape& c : {Shape{33, 50, 37, 17},
                         {18, 64, 64, 32, 'c'},
                         {19, 64, 64, 32, 's'},
                         {20, 64, 64, 32, 'o'},
                         {35, 64, 64, 64, 'p'},
                         {9, 70, 45, 64},
                         {9, 70, 46, 34},
                         {9, 66, 47, 64}}) {
    check_block_grad<In, Out>(c);
  }
}

// Gradients that lie in a larger buffer, as those of a DDP bucket do.
TYPED_TEST(BlockGradTest, TakesAnyAddressOfTheGradient) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  for (const int64_t offset : {1, 2, 3}) {
    check_block_grad<In, Out>({33, 72, 40, 32, 'r', 1, offset});
    check_block_grad<In, Out>({20, 136, 72, 128, 'r', 1, offset});
    check_block_grad<In, Out>({1600, 32, 32, 32, 'r', 16, offset});
  }
}

TYPED_TEST(BlockGradTest, SplitsTokensWhereBlocksAreFew) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  check_block_grad<In, Out>({1600, 32, 32, 32, 'r', 16});
  check_block_grad<In, Out>({1601, 17, 17, 17, 'r', 16});
  check_block_grad<In, Out>({1600, 72, 40, 64, 'r', 64});
  // Two tiles whole, and the third, of a corner, by parts. float64 has no tile of 128.
  if (!std::is_same_v<In, double>) check_block_grad<In, Out>({2304, 136, 136, 128, 'r', 2});
}

TYPED_TEST(BlockGradTest, TakesSeveralBlocksAtOnce) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  for (const Shape& c : {Shape{37, 200, 136, 64, 'r', 1, 0, kSquare},
                         {33, 136, 168, 32, 'r', 1, 0, kSquare},
                         {34, 136, 40, 16, 'r', 1, 0, kSquare},
                         {20, 136, 72, 32, 'r', 1, 1, kSquare},
                         {18, 136, 136, 64, 'c', 1, 0, kSquare},
                         {1600, 72, 72, 64, 'r', 32, 0, kSquare}}) {
    check_block_grad<In, Out>(c);
  }
}

// Plain multiply-adds take the blocks of tall tiles one by one.
TYPED_TEST(BlockGradTest, TakesTallTiles) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  check_block_grad<In, Out>({18, 232, 40, 32, 'r', 1, 0, kNarrow, true, kNarrowBytes});
  if (sizeof(In) > 2) return;
  check_block_grad<In, Out>({37, 456, 72, 64, 'r', 1, 0, kTall, true, kTallBytes});
  check_block_grad<In, Out>({37, 328, 72, 64, 'r', 1, 0, kTall});
  check_block_grad<In, Out>({18, 136, 72, 16, 'r', 1, 1, kTall});
}

TEST(BlockGrad, SplitsTheTokensOfTallTiles) {
  check_block_grad<bf16, float>({2100, 256, 32, 32, 'r', 3, 0, kNarrow, true, kNarrowBytes});
}

// Several dys of one call: strides, ragged edges, tiles, lone blocks and splits of each as by
// itself.
struct Sibling {
  int64_t N;
  char layout = 'r';
};

struct Siblings {
  int64_t T, U, L;
  std::vector<Sibling> dys;
  int multiprocessors = 1;
  TileShape shape = {0, 0};
  bool every_block = false;
};

template <typename In, typename Out>
static void check_siblings(const Siblings& c, bool tf32 = false) {
  const auto x = random_values<In>(c.T * c.U, 1);
  const simt::Buffer<In> x_device(x, "x_cols");
  std::vector<std::vector<In>> dys;
  std::vector<simt::Buffer<In>> dy_devices;
  std::vector<int32_t> rows, slots, tiles, lone;
  std::vector<std::pair<Shape, Blocks>> each;
  cuda::BlockGradArgs args{};
  args.dtype = dtype_of<In>(), args.out_dtype = dtype_of<Out>();
  args.T = c.T, args.U = c.U, args.L = c.L;
  int32_t first_row = 0;
  for (size_t i = 0; i < c.dys.size(); ++i) {
    const auto [N, layout] = c.dys[i];
    const Shape shape{c.T, N, c.U, c.L, layout, 1, 0, c.shape, c.every_block};
    const Blocks blocks(shape);
    const Groups groups(shape, blocks);
    const Layout dy_TN = Layout::of(layout, c.T, N);
    dys.push_back(random_values<In>(dy_TN.reach(), static_cast<unsigned>(2 + i)));
    dy_devices.emplace_back(dys.back(), "dy");
    args.dys[i] = {{dy_devices.back().data() + dy_TN.offset, dy_TN.stride_row, dy_TN.stride_col},
                   N,
                   first_row};
    const auto before = static_cast<int32_t>(rows.size());
    const auto append = [](std::vector<int32_t>& to, const std::vector<int32_t>& from,
                           int32_t more) {
      for (const int32_t value : from) to.push_back(value + more);
    };
    append(rows, blocks.rows, first_row);
    append(slots, blocks.slots, 0);
    append(lone, groups.lone, before);
    const auto down = static_cast<size_t>(c.shape.rows / c.L);
    const auto across = static_cast<size_t>(c.shape.columns / c.L);
    const size_t width = down + across + down * across;
    for (size_t at = 0; at < groups.tiles.size(); ++at) {
      const size_t in_tile = at % width;
      const int32_t more = in_tile < down ? first_row : in_tile < down + across ? 0 : before;
      tiles.push_back(groups.tiles[at] < 0 ? -1 : groups.tiles[at] + more);
    }
    args.n_tiles += groups.count;
    each.emplace_back(shape, blocks);
    first_row += static_cast<int32_t>((N + c.L - 1) / c.L);
  }
  const simt::Buffer<int32_t> row(rows, "rows"), slot(slots, "slots"), tile(tiles, "tiles"),
      alone(lone, "lone");
  args.S = static_cast<int64_t>(rows.size());
  args.x_cols = {x_device.data(), c.U, 1};
  args.rows = row.data(), args.slots = slot.data(), args.tf32 = tf32;
  if (c.shape.rows > 0) {
    args.shape = c.shape;
    args.tiles = tile.data(), args.lone = alone.data();
    args.n_lone = static_cast<int64_t>(lone.size());
  }
  simt::config().device.multiprocessors = c.multiprocessors;
  std::vector<Out> first;
  simt::for_each_seed(simt::orders, [&] {
    simt::Buffer<Out> out(static_cast<size_t>(args.S * c.L * c.L), "out");
    args.out = out.data();
    const size_t bytes = cuda::block_grad_workspace_bytes(args);
    ASSERT_TRUE(c.multiprocessors == 1 || bytes > 0) << "no tile is split";
    simt::Buffer<double> workspace((bytes + 7) / 8, "workspace");
    cuda::block_grad(args, workspace.data(), nullptr);
    if (first.empty()) first = out.values();
    ASSERT_TRUE(same_bits(out.values(), first)) << "depends on the order of blocks";
  });
  simt::config().device = simt::Device();
  ASSERT_FALSE(first.empty());
  const Out* got = first.data();
  for (size_t i = 0; i < each.size(); ++i) {
    SCOPED_TRACE(::testing::Message() << "T " << c.T << " L " << c.L << " dy " << i);
    const auto& [shape, blocks] = each[i];
    expect_formula<In, Out>(shape, blocks, dys[i], x, got, nullptr, tf32);
    got += static_cast<int64_t>(blocks.rows.size()) * c.L * c.L;
  }
}

TYPED_TEST(BlockGradTest, TakesSeveralDysAtOnce) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  check_siblings<In, Out>({37, 136, 128, {{200}, {72}, {136}}});
  check_siblings<In, Out>({33, 72, 32, {{48}, {40, 'p'}, {8}, {96}}});
  check_siblings<In, Out>({20, 40, 16, {{40}, {50, 'c'}, {40, 'o'}}});  // not all go by pieces
  check_siblings<In, Out>({19, 50, 17, {{50}, {1, 's'}, {35}}});
  check_siblings<In, Out>({1600, 40, 64, {{72}, {64}, {136}}, 128});
}

TYPED_TEST(BlockGradTest, TakesTilesOfSeveralDys) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  check_siblings<In, Out>({33, 136, 32, {{136}, {72, 'p'}, {264}}, 1, kSquare});
  check_siblings<In, Out>({34, 72, 64, {{200}, {64}}, 1, kSquare});
  check_siblings<In, Out>({1600, 72, 64, {{72}, {136}, {72}}, 128, kSquare});
  check_siblings<In, Out>({18, 40, 32, {{232}, {264, 'p'}}, 1, kNarrow, true});
  if (sizeof(In) == 2) check_siblings<In, Out>({18, 40, 16, {{328}, {264}}, 1, kNarrow, false});
}

TEST(BlockGradTf32, TakesSeveralDysAtOnce) {
  check_siblings<float, float>({33, 68, 32, {{72}, {40}, {136}}}, /*tf32=*/true);
  check_siblings<float, float>({33, 136, 32, {{136}, {264}}, 1, kSquare}, /*tf32=*/true);
  check_siblings<float, bf16>({1600, 32, 32, {{32}, {64}}, 16}, /*tf32=*/true);
}

// Of three launches each leaves multiprocessors idle at its end, of one the last tiles are cut up.
TEST(Schedule, OneLaunchOfSiblingsIsNotDoneLater) {
  for (const int64_t tokens : {2048, 8192, 32768}) {
    for (const int64_t blocks : {9, 34, 50, 67, 100}) {  // of 256, each four tiles
      const auto cost = [&](int64_t tiles) {
        return cuda::cost_of(cuda::schedule_of(tiles, tokens, 128 * 128, 132, 2), 128 * 128, 132,
                             2);
      };
      EXPECT_LE(cost(3 * 4 * blocks), 3 * cost(4 * blocks)) << tokens << " " << blocks;
    }
  }
}

// A tile is of the dy of its first row.
TEST(BlockGrad, ATileOfTwoDysStopsTheKernel) {
  const simt::Buffer<float> dy(random_values<float>(4 * 64, 1)), x(random_values<float>(4 * 64, 2));
  const simt::Buffer<int32_t> rows({0, 1}), slots({0, 0}), lone({0});
  simt::Buffer<float> out(2 * 64 * 64);
  for (const bool mixed : {false, true}) {
    const simt::Buffer<int32_t> tile({mixed ? 0 : 1, mixed ? 1 : -1, 0, -1, 1, -1, -1, -1});
    cuda::BlockGradArgs args{};
    args.dtype = args.out_dtype = DType::f32;
    args.T = 4, args.U = args.L = 64, args.S = 2;
    args.dys[0] = {{dy.data(), 64, 1}, 64, 0}, args.dys[1] = {{dy.data(), 64, 1}, 64, 1};
    args.x_cols = {x.data(), 64, 1};
    args.rows = rows.data(), args.slots = slots.data(), args.out = out.data();
    args.tiles = tile.data(), args.n_tiles = 1, args.shape = kSquare, args.lone = lone.data();
    const auto run = [&] { cuda::block_grad(args, nullptr, nullptr); };
    if (mixed) {
      EXPECT_STOPS(run());
    } else {
      EXPECT_NO_THROW(run());
    }
  }
}

// How many blocks a multiprocessor holds is asked once for each device.
TEST(BlockGrad, AsksADeviceOnce) {
  const auto workspace = [](int number, int resident) {
    simt::Device& device = simt::config().device;
    device.multiprocessors = 16, device.number = number;
    device.max_blocks_per_multiprocessor = resident;
    cuda::BlockGradArgs args{};
    args.dtype = DType::bf16, args.out_dtype = DType::f32;
    args.T = 32768, args.U = args.L = 128, args.S = 16;
    args.dys[0] = {{nullptr, 128, 1}, 128, 0}, args.x_cols = {nullptr, 128, 1};
    const size_t bytes = cuda::block_grad_workspace_bytes(args);
    simt::config().device = simt::Device();
    return bytes;
  };
  const size_t four = workspace(40, 4);
  EXPECT_GT(four, 0u);
  EXPECT_EQ(workspace(40, 1), four);
  EXPECT_EQ(workspace(41, 1), 0u);
}

TEST(BlockGradTf32, EqualsTheFormulaOnRoundedOperands) {
  for (const Shape& c : {Shape{40, 64, 48, 16},
                         {33, 72, 68, 32},
                         {37, 160, 132, 64},
                         {21, 200, 168, 128},
                         {1600, 32, 32, 32, 'r', 16},
                         {33, 136, 168, 32, 'r', 1, 0, kSquare},
                         {33, 264, 96, 32, 'r', 1, 0, kTall},
                         {33, 264, 40, 32, 'r', 1, 0, kNarrow}}) {
    check_block_grad<float, float>(c, /*tf32=*/true);
    check_block_grad<float, bf16>(c, /*tf32=*/true);
  }
  check_block_grad<float, float>({33, 72, 68, 32, 'r', 1, 1}, /*tf32=*/true);
  check_block_grad<float, bf16>({33, 72, 68, 32, 'r', 1, 1}, /*tf32=*/true);
}

// The schedule does every token of every tile once, and never costs more than whole tiles.
TEST(Schedule, CoversEveryTokenOnceAtNoHigherCost) {
  for (const int tile : {32 * 32, 64 * 64, 256 * 32, 128 * 128}) {
    for (const int64_t resident : {1, 2, 4, 16}) {
      for (const int64_t processors : {1, 7, 108, 132}) {
        for (const int64_t tiles : {1, 2, 9, 36, 131, 132, 133, 136, 160, 268, 400, 1024}) {
          for (const int64_t T : {0, 1, 100, 512, 1000, 4096, 32768}) {
            const cuda::Schedule s = cuda::schedule_of(tiles, T, tile, processors, resident);
            const cuda::Schedule whole{{{tiles, 1, T}, {}, {}}};
            int64_t done = 0, splits = 0;
            for (const cuda::Split& level : s.levels) {
              done += level.tiles;
              if (level.tiles == 0) continue;
              ASSERT_GE(level.splits * level.tokens, T);
              ASSERT_TRUE(level.splits == 1 || (level.splits - 1) * level.tokens < T);
              ASSERT_GT(level.splits, splits);  // whole tiles are of the first level alone
              splits = level.splits;
            }
            ASSERT_EQ(done, tiles);
            ASSERT_LE(s.parts(), processors * resident);
            ASSERT_LE(cuda::cost_of(s, tile, processors, resident),
                      cuda::cost_of(whole, tile, processors, resident))
                << tile << " " << resident << " " << processors << " " << tiles << " " << T;
          }
        }
      }
    }
  }
}

TEST(Schedule, SplitsTheTailAlone) {
  // Of 136 tiles on 132 multiprocessors, 132 stay whole.
  const cuda::Schedule s = cuda::schedule_of(136, 32768, 128 * 128, 132, 2);
  EXPECT_EQ(s.levels[0].tiles, 132);
  EXPECT_EQ(s.levels[0].splits, 1);
  EXPECT_EQ(s.levels[1].tiles, 4);
  EXPECT_GE(s.levels[1].splits, 16);
  const cuda::Schedule whole{{{136, 1, 32768}, {}, {}}};
  EXPECT_LT(1.3 * static_cast<double>(cuda::cost_of(s, 128 * 128, 132, 2)),
            static_cast<double>(cuda::cost_of(whole, 128 * 128, 132, 2)));
}

TEST(BlockGrad, ExactWhereNothingRounds) {
  // Integers: any element in a wrong place would show.
  const int64_t T = 48, N = 128, U = 128, L = 128;
  std::vector<bf16> dy, x;
  std::mt19937 random(1);
  for (int64_t i = 0; i < T * N; ++i) {
    dy.push_back(cpu::to_bf16(static_cast<float>(random() % 17) - 8));
    x.push_back(cpu::to_bf16(static_cast<float>(random() % 17) - 8));
  }
  const simt::Buffer<bf16> dy_device(dy), x_device(x);
  const simt::Buffer<int32_t> zero({0});
  simt::Buffer<float> out(static_cast<size_t>(L * L));
  cuda::block_grad({DType::bf16,
                    DType::f32,
                    T,
                    U,
                    L,
                    1,
                    {{{dy_device.data(), N, 1}, N, 0}},
                    {x_device.data(), U, 1},
                    zero.data(),
                    zero.data(),
                    out.data(),
                    false,
                    false},
                   nullptr, nullptr);
  const auto got = out.values();
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < U; ++k) {
      double want = 0;
      for (int64_t t = 0; t < T; ++t) {
        want += to_double(dy[static_cast<size_t>(t * N + n)]) *
                to_double(x[static_cast<size_t>(t * U + k)]);
      }
      ASSERT_EQ(got[static_cast<size_t>(n * L + k)], want) << n << ", " << k;
    }
  }
}

TYPED_TEST(BlockGradTest, NanStaysOutOfThePadding) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  const simt::Buffer<In> dy(std::vector<In>(32 * 40, convert<In>::from(NAN))),
      x(std::vector<In>(32 * 40, convert<In>::from(1.0)));
  const simt::Buffer<int32_t> one({1});
  for (const bool accumulate : {false, true}) {
    simt::Buffer<Out> out(std::vector<Out>(32 * 32, convert<Out>::from(accumulate ? 3.0 : 7.0)));
    cuda::block_grad({dtype_of<In>(),
                      dtype_of<Out>(),
                      32,
                      40,
                      32,
                      1,
                      {{{dy.data(), 40, 1}, 40, 0}},
                      {x.data(), 40, 1},
                      one.data(),
                      one.data(),
                      out.data(),
                      accumulate,
                      false},
                     nullptr, nullptr);
    const auto got = out.values();
    for (size_t i = 0; i < got.size(); ++i) {
      if (i / 32 < 8 && i % 32 < 8) {
        ASSERT_TRUE(std::isnan(to_double(got[i])));
      } else {
        ASSERT_EQ(to_double(got[i]), accumulate ? 3 : 0);
      }
    }
  }
}

// Of one whole block of size L, T = 128. Transposed dy takes the multiply-adds at any type.
template <typename In, typename Out>
static const simt::Stats& stats_of_block_grad(int64_t L, bool accumulate, bool tf32,
                                              bool transposed = false) {
  const int64_t T = 128;
  const simt::Buffer<In> dy(random_values<In>(T * L, 1)), x(random_values<In>(T * L, 2));
  const simt::Buffer<int32_t> zero({0});
  simt::Buffer<Out> out(random_values<Out>(L * L, 3));
  simt::config().device.multiprocessors = 1;
  cuda::block_grad({dtype_of<In>(),
                    dtype_of<Out>(),
                    T,
                    L,
                    L,
                    1,
                    {{{dy.data(), transposed ? 1 : L, transposed ? T : 1}, L, 0}},
                    {x.data(), L, 1},
                    zero.data(),
                    zero.data(),
                    out.data(),
                    accumulate,
                    tf32},
                   nullptr, nullptr);
  simt::config().device = simt::Device();
  return simt::last_stats("block_grad");
}

// f(stats, L) at every tile, with and without accumulation.
template <typename In, typename Out, typename F>
static void for_each_stats(bool tf32, bool transposed, const F& f) {
  if (!simt::counts_traffic) return;
  for (const int64_t L : {256, 128, 64, 32, 16}) {
    for (const bool accumulate : {false, true}) {
      SCOPED_TRACE(::testing::Message() << "L " << L << " accumulate " << accumulate << " bytes of "
                                        << sizeof(In) << " to " << sizeof(Out));
      f(stats_of_block_grad<In, Out>(L, accumulate, tf32, transposed), L);
    }
  }
}

// No bank conflict, no access of a warp that touches more sectors than its bytes fit in, and none
// that the checker does not see the width of. list_sectors: that lists of blocks may touch beyond
// theirs, since those of tall tiles begin anywhere.
static void expect_no_waste(const simt::Stats& stats, uint64_t list_sectors = 0) {
  EXPECT_EQ(stats.ldmatrix.conflicts(), 0u) << stats.report();
  EXPECT_EQ(stats.async_store.conflicts(), 0u) << stats.report();
  EXPECT_EQ(stats.shared_load.conflicts(), 0u) << stats.report();
  EXPECT_EQ(stats.shared_store.conflicts(), 0u) << stats.report();
  EXPECT_EQ(stats.async_load.excess(), 0u) << stats.report();
  EXPECT_LE(stats.global_load.excess(), list_sectors) << stats.report();
  EXPECT_EQ(stats.global_store.excess(), 0u) << stats.report();
  EXPECT_EQ(stats.plain_global + stats.plain_shared, 0u) << stats.report();
}

template <typename In, typename Out>
static void expect_no_waste_of_mma() {
  constexpr bool tf32 = std::is_same_v<In, float>;
  for_each_stats<In, Out>(tf32, /*transposed=*/false, [](const simt::Stats& stats, int64_t L) {
    EXPECT_GT(stats.mma, 0u);
    expect_no_waste(stats);
    // At least 2.5 mma an ldmatrix where the tile has room for it.
    if (!tf32 && L >= 128) {
      EXPECT_GE(static_cast<double>(stats.mma), 2.5 * static_cast<double>(stats.ldmatrix.requests));
    }
  });
}

TEST(BlockGrad, MmaHasNoBankConflictAndNoWastedSector) {
  expect_no_waste_of_mma<bf16, float>();
  expect_no_waste_of_mma<bf16, bf16>();
  expect_no_waste_of_mma<f16, f16>();
  expect_no_waste_of_mma<float, float>();
  expect_no_waste_of_mma<float, bf16>();
}

template <typename In, typename Out>
static void expect_no_waste_of_multiply_adds() {
  for_each_stats<In, Out>(/*tf32=*/false, /*transposed=*/false,
                          [](const simt::Stats& stats, int64_t) {
                            EXPECT_GT(stats.shared_load.requests, 0u);
                            expect_no_waste(stats);
                          });
}

TEST(BlockGrad, MultiplyAddsHaveNoBankConflictAndNoWastedSector) {
  expect_no_waste_of_multiply_adds<float, float>();
  expect_no_waste_of_multiply_adds<float, bf16>();
  expect_no_waste_of_multiply_adds<double, double>();
}

TEST(BlockGrad, HalfPrecisionAtOddPlacesStoresWholeSectors) {
  const auto stores_whole_sectors = [](const simt::Stats& stats, int64_t) {
    EXPECT_EQ(stats.mma, 0u);
    EXPECT_EQ(stats.global_store.excess(), 0u) << stats.report();
  };
  for_each_stats<bf16, bf16>(/*tf32=*/false, /*transposed=*/true, stores_whole_sectors);
  for_each_stats<bf16, float>(/*tf32=*/false, /*transposed=*/true, stores_whole_sectors);
}

// Whole block columns, by tiles of this shape (each block alone for kAlone): (T, N) by (T, U).
constexpr TileShape kAlone = {0, 0};
constexpr int64_t kColumnTokens = 256, kColumnRows = 512;
static simt::Stats stats_of_block_columns(int64_t L, int64_t U, TileShape shape,
                                          int multiprocessors = 1) {
  const int64_t T = kColumnTokens, N = kColumnRows, C = U / L;
  std::vector<int32_t> rows, slots, tiles;
  for (int64_t s = 0; s < N / L * C; ++s) {
    rows.push_back(static_cast<int32_t>(s / C));
    slots.push_back(static_cast<int32_t>(s % C));
  }
  const int64_t down = shape.rows / L, across = shape.columns / L;
  const int64_t n_tiles = shape.rows > 0 ? N / shape.rows * (U / shape.columns) : 0;
  for (int64_t tile = 0; tile < n_tiles; ++tile) {
    const int64_t row = tile / (U / shape.columns) * down,
                  slot = tile % (U / shape.columns) * across;
    for (int64_t i = 0; i < down; ++i) tiles.push_back(static_cast<int32_t>(row + i));
    for (int64_t j = 0; j < across; ++j) tiles.push_back(static_cast<int32_t>(slot + j));
    for (int64_t i = 0; i < down; ++i) {
      for (int64_t j = 0; j < across; ++j) {
        tiles.push_back(static_cast<int32_t>((row + i) * C + slot + j));
      }
    }
  }
  const simt::Buffer<bf16> dy(random_values<bf16>(T * N, 1)), x(random_values<bf16>(T * U, 2));
  const simt::Buffer<int32_t> row(rows), slot(slots), tile(tiles), lone({0});
  simt::Buffer<float> out(static_cast<size_t>(N * U));
  cuda::BlockGradArgs args{DType::bf16,
                           DType::f32,
                           T,
                           U,
                           L,
                           N / L * C,
                           {{{dy.data(), N, 1}, N, 0}},
                           {x.data(), U, 1},
                           row.data(),
                           slot.data(),
                           out.data(),
                           false,
                           false};
  args.tiles = tile.data(), args.n_tiles = n_tiles, args.shape = shape, args.lone = lone.data();
  simt::config().device.multiprocessors = multiprocessors;
  simt::Buffer<float> workspace(cuda::block_grad_workspace_bytes(args) / sizeof(float),
                                "workspace");
  cuda::block_grad(args, workspace.data(), nullptr);
  simt::config().device = simt::Device();
  return simt::last_stats("block_grad");
}

// Every column of dy is read once, those of x once for each tile that lies below another.
TEST(BlockGrad, WholeBlockColumnsAreReadAsOneProduct) {
  if (!simt::counts_traffic) return;
  struct Case {
    int64_t L, U;
    TileShape shape;
  };
  for (const Case& c :
       {Case{64, 128, kSquare}, Case{32, 128, kSquare}, Case{16, 128, kSquare}, Case{64, 64, kTall},
        Case{32, 64, kTall}, Case{16, 64, kTall}, Case{32, 32, kNarrow}, Case{16, 32, kNarrow}}) {
    SCOPED_TRACE(::testing::Message() << "L " << c.L << " columns " << c.U);
    const simt::Stats together = stats_of_block_columns(c.L, c.U, c.shape);
    const simt::Stats alone = stats_of_block_columns(c.L, c.U, kAlone);
    const int64_t below = kColumnRows / c.shape.rows;
    expect_no_waste(together, static_cast<uint64_t>(below) * (c.shape.rows > 128 ? 4 : 0));
    EXPECT_EQ(together.mma,
              static_cast<uint64_t>(kColumnTokens / 16 * (kColumnRows / 16) * (c.U / 8)));
    EXPECT_GE(static_cast<double>(together.mma),
              2.5 * static_cast<double>(together.ldmatrix.requests));
    const int64_t read = kColumnRows + below * c.U;
    EXPECT_EQ(together.async_load.bytes, static_cast<uint64_t>(kColumnTokens * read * 2));
    if (c.shape.rows > c.shape.columns) {
      EXPECT_LE(static_cast<double>(read), 1.3 * static_cast<double>(kColumnRows + c.U));
    }
    // A block by itself reads L columns of both.
    EXPECT_EQ(alone.async_load.bytes,
              static_cast<uint64_t>(kColumnTokens * (kColumnRows / c.L * c.U) * 2 * 2));
  }
}

// Two tall tiles would leave most of many multiprocessors idle, or cost a second launch.
TEST(BlockGrad, TallTilesGiveWayWhereTheyAreTooFew) {
  if (!simt::counts_traffic) return;
  constexpr size_t kLoneBytes = 3 * 32 * (64 + 64) * 2;
  EXPECT_EQ(stats_of_block_columns(64, 64, kTall, 2).smem_bytes, kTallBytes);
  EXPECT_EQ(stats_of_block_columns(64, 64, kTall, 132).smem_bytes, kLoneBytes);
}

TEST(BlockGrad, AnIndexBeyondTheMatricesStopsTheKernel) {
  const simt::Buffer<float> dy(random_values<float>(4 * 32, 1)), x(random_values<float>(4 * 32, 2));
  const simt::Buffer<int32_t> zero({0});
  simt::Buffer<float> out(32 * 32);
  for (const int32_t wrong : {1, -1}) {
    const simt::Buffer<int32_t> index({wrong});
    for (const bool row : {true, false}) {
      EXPECT_STOPS(cuda::block_grad({DType::f32,
                                     DType::f32,
                                     4,
                                     32,
                                     32,
                                     1,
                                     {{{dy.data(), 32, 1}, 32, 0}},
                                     {x.data(), 32, 1},
                                     row ? index.data() : zero.data(),
                                     row ? zero.data() : index.data(),
                                     out.data(),
                                     false,
                                     false},
                                    nullptr, nullptr));
    }
  }
}

TEST(BlockGrad, AnIndexOfATileBeyondTheMatricesStopsTheKernel) {
  const simt::Buffer<float> dy(random_values<float>(4 * 64, 1)), x(random_values<float>(4 * 64, 2));
  const simt::Buffer<int32_t> zero({0});
  simt::Buffer<float> out(64 * 64);
  for (const size_t wrong : {0, 2, 4}) {  // row, slot, number
    std::vector<int32_t> list{0, -1, 0, -1, 0, -1, -1, -1};
    list[wrong] = 1;
    const simt::Buffer<int32_t> tile(list);
    cuda::BlockGradArgs args{DType::f32,
                             DType::f32,
                             4,
                             64,
                             64,
                             1,
                             {{{dy.data(), 64, 1}, 64, 0}},
                             {x.data(), 64, 1},
                             zero.data(),
                             zero.data(),
                             out.data(),
                             false,
                             false};
    args.tiles = tile.data(), args.n_tiles = 1, args.shape = kSquare, args.lone = zero.data();
    EXPECT_STOPS(cuda::block_grad(args, nullptr, nullptr));
  }
}

TEST(BlockGrad, NoBlocks) {
  EXPECT_NO_THROW(cuda::block_grad({DType::f32,
                                    DType::f32,
                                    4,
                                    32,
                                    32,
                                    0,
                                    {{{nullptr, 32, 1}, 32, 0}},
                                    {nullptr, 32, 1},
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    false,
                                    false},
                                   nullptr, nullptr));
}

}  // namespace smt_ext::testing
