// Copies of columns and blocks, exact, from and to every layout and dtype.
#include <algorithm>

#include "elements.h"
#include "gather_blocks.h"
#include "gather_columns.h"

namespace smt_ext::testing {

template <typename P>
class GatherTest : public ::testing::Test {};
using Pairs =
    ::testing::Types<Pair<float, float>, Pair<bf16, bf16>, Pair<f16, f16>, Pair<double, double>,
                     Pair<float, bf16>, Pair<bf16, float>, Pair<float, f16>, Pair<f16, bf16>,
                     Pair<double, float>, Pair<double, bf16>, Pair<f16, double>>;
TYPED_TEST_SUITE(GatherTest, Pairs);

// x (T, K) -> out, against the formula; every element written, none beside the buffers touched.
template <typename In, typename Out>
static void check_columns(int64_t T, int64_t K, int64_t L, const std::vector<int32_t>& cols,
                          char layout, unsigned seed) {
  SCOPED_TRACE(::testing::Message() << "T " << T << " K " << K << " L " << L << " " << layout);
  const Layout x_TK = Layout::of(layout, T, K);
  const bool same = std::is_same_v<In, Out>;
  const std::vector<In> x =
      same ? random_bits_of<In>(x_TK.reach(), seed) : random_values<In>(x_TK.reach(), seed);
  int64_t U = 0;
  for (const int32_t c : cols) U += std::min(L, K - c * L);
  const simt::Buffer<In> x_device(x, "x");
  const simt::Buffer<int32_t> cols_device(cols, "col_blocks");
  simt::Buffer<Out> out(static_cast<size_t>(T * U), "out");
  cuda::gather_columns({dtype_of<In>(), dtype_of<Out>(), T, K, U, L, x_device.data() + x_TK.offset,
                        x_TK.stride_row, x_TK.stride_col, cols_device.data(), out.data()},
                       nullptr);
  const std::vector<Out> got = out.values();
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t u = 0; u < U; ++u) {
      const Out want =
          convert<Out>::from(x[x_TK.at(t, cols[static_cast<size_t>(u / L)] * L + u % L)]);
      ASSERT_TRUE(same_bits(got[static_cast<size_t>(t * U + u)], want)) << t << ", " << u;
    }
  }
}

TYPED_TEST(GatherTest, ColumnsOfEveryShapeAndLayout) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  simt::for_each_seed(simt::orders, [] {
    for (const char layout : {'r', 'c', 's', 'o', 'p'}) {
      check_columns<In, Out>(37, 160, 32, {0, 2, 4}, layout, 1);
      check_columns<In, Out>(5, 150, 16, {1, 2, 9}, layout, 2);   // the last one is ragged
      check_columns<In, Out>(3, 100, 48, {0, 2}, layout, 3);      // 48 + 4 columns
      check_columns<In, Out>(1, 61, 20, {1, 3}, layout, 4);       // one column of a block
      check_columns<In, Out>(130, 40, 17, {0, 1, 2}, layout, 5);  // L odd
      check_columns<In, Out>(0, 64, 32, {0}, layout, 6);
    }
    check_columns<In, Out>(4, 64, 32, {}, 'r', 7);
    check_columns<In, Out>(3, 1536, 512, {0, 2}, 'r', 8);
    check_columns<In, Out>(2, 1024, 256, {1, 2, 3}, 'p', 9);
  });
}

TYPED_TEST(GatherTest, ColumnsMoveTheFewestSectors) {
  using In = typename TypeParam::From;
  using Out = typename TypeParam::To;
  for (const int64_t L : {16, 32, 64, 256}) {
    check_columns<In, Out>(128, 4 * L, L, {0, 1, 3}, 'r', 1);
    if (!simt::counts_traffic) continue;
    expect_minimal_sectors("gather_columns");
    const uint64_t elements = static_cast<uint64_t>(128 * 3 * L);
    EXPECT_EQ(simt::last_stats().global_store.sectors, elements * sizeof(Out) / 32);
    EXPECT_GE(simt::last_stats().global_store.bytes, simt::last_stats().global_store.requests * 32 *
                                                         16 * sizeof(Out) /
                                                         std::max(sizeof(In), sizeof(Out)) / 2)
        << "16 bytes a lane";
  }
}

TEST(GatherColumns, AnIndexBeyondTheInputStopsTheKernel) {
  for (const int32_t bad : {-1, 4, 1 << 30}) {
    const simt::Buffer<float> x(random_values<float>(2 * 64, 1), "x");
    const simt::Buffer<int32_t> cols({bad}, "col_blocks");
    simt::Buffer<float> out(2 * 16, "out");
    EXPECT_STOPS(cuda::gather_columns(
        {DType::f32, DType::f32, 2, 64, 16, 16, x.data(), 64, 1, cols.data(), out.data()},
        nullptr));
  }
}

TEST(GatherColumns, OffsetsOf64Bits) {
  // Column 2^32 of an input that is said to begin 2^32 elements before the memory there is.
  const int64_t far = int64_t{1} << 32;
  const std::vector<float> x = random_values<float>(3 * 16, 1);
  const simt::Buffer<float> x_device(x, "x");
  const simt::Buffer<int32_t> cols({static_cast<int32_t>(far / 16)}, "col_blocks");
  simt::Buffer<float> out(x.size(), "out");
  const auto base = reinterpret_cast<uintptr_t>(x_device.data()) - sizeof(float) * far;
  cuda::gather_columns({DType::f32, DType::f32, 3, far + 16, 16, 16,
                        reinterpret_cast<const float*>(base), 16, 1, cols.data(), out.data()},
                       nullptr);
  EXPECT_TRUE(same_bits(out.values(), x));
}

// Gathers blocks of w (N, K), then scatters other values into the same places.
template <typename W, typename B>
static void check_blocks(int64_t N, int64_t K, int64_t L, const std::vector<int32_t>& rows,
                         const std::vector<int32_t>& cols, char layout, unsigned seed) {
  SCOPED_TRACE(::testing::Message() << "N " << N << " K " << K << " L " << L << " " << layout);
  const Layout w_NK = Layout::of(layout, N, K);
  const bool same = std::is_same_v<W, B>;
  const int64_t S = static_cast<int64_t>(rows.size()), size = S * L * L;
  const std::vector<W> w =
      same ? random_bits_of<W>(w_NK.reach(), seed) : random_values<W>(w_NK.reach(), seed);
  simt::Buffer<W> w_device(w, "w");
  const simt::Buffer<int32_t> rows_device(rows, "rows"), cols_device(cols, "cols");
  simt::Buffer<B> out(static_cast<size_t>(size), "blocks");
  cuda::BlocksArgs args{dtype_of<W>(),
                        dtype_of<B>(),
                        N,
                        K,
                        L,
                        S,
                        w_device.data() + w_NK.offset,
                        w_NK.stride_row,
                        w_NK.stride_col,
                        rows_device.data(),
                        cols_device.data(),
                        out.data()};
  cuda::gather_blocks(args, nullptr);
  const auto for_each = [&](auto&& f) {
    for (int64_t i = 0; i < size; ++i) {
      const auto s = static_cast<size_t>(i / (L * L));
      const int64_t n = rows[s] * L + i / L % L, k = cols[s] * L + i % L;
      ASSERT_NO_FATAL_FAILURE(f(static_cast<size_t>(i), n, k, n < N && k < K)) << i;
    }
  };
  const std::vector<B> got = out.values();
  for_each([&](size_t i, int64_t n, int64_t k, bool inside) {
    const B want = inside ? convert<B>::from(w[w_NK.at(n, k)]) : convert<B>::from(0.0f);
    ASSERT_TRUE(same_bits(got[i], want));
  });

  const std::vector<B> values =
      same ? random_bits_of<B>(size, seed + 1) : random_values<B>(size, seed + 1);
  out.assign(values.data(), values.size());
  cuda::scatter_blocks(args, nullptr);
  std::vector<W> want = w;
  for_each([&](size_t i, int64_t n, int64_t k, bool inside) {
    if (inside) want[w_NK.at(n, k)] = convert<W>::from(values[i]);
  });
  EXPECT_TRUE(same_bits(w_device.values(), want)) << "values, or entries beside the blocks";
}

TYPED_TEST(GatherTest, BlocksOfEveryShapeAndLayout) {
  using W = typename TypeParam::From;
  using B = typename TypeParam::To;
  simt::for_each_seed(simt::orders, [] {
    for (const char layout : {'r', 'c', 's', 'o', 'p'}) {
      check_blocks<W, B>(96, 64, 32, {0, 1, 2}, {1, 0, 1}, layout, 1);
      check_blocks<W, B>(90, 72, 16, {0, 5, 5, 2}, {4, 0, 4, 1}, layout, 2);  // ragged both ways
      check_blocks<W, B>(50, 61, 20, {2, 0, 1}, {3, 3, 0}, layout, 3);        // one column
      check_blocks<W, B>(40, 40, 17, {1, 2}, {0, 2}, layout, 4);
      check_blocks<W, B>(5, 7, 64, {0}, {0}, layout, 5);  // the block exceeds the weight
    }
    check_blocks<W, B>(32, 32, 16, {}, {}, 'r', 6);
    check_blocks<W, B>(512, 1024, 512, {0}, {1}, 'r', 7);
  });
}

TYPED_TEST(GatherTest, BlocksMoveTheFewestSectors) {
  using W = typename TypeParam::From;
  using B = typename TypeParam::To;
  for (const int64_t L : {16, 32, 64, 256}) {
    check_blocks<W, B>(2 * L, 3 * L, L, {0, 1, 1}, {2, 0, 1}, 'r', 1);
    if (!simt::counts_traffic) continue;
    for (const char* kernel : {"gather_blocks", "scatter_blocks"}) {
      expect_minimal_sectors(kernel);
      const uint64_t written = kernel[0] == 'g' ? sizeof(B) : sizeof(W);
      EXPECT_EQ(simt::last_stats(kernel).global_store.sectors,
                static_cast<uint64_t>(3 * L * L) * written / 32);
    }
  }
}

TEST(GatherBlocks, AnIndexBeyondTheWeightStopsTheKernel) {
  for (const auto& [row, col] : {std::pair{2, 0}, {0, 2}, {-1, 0}, {0, -1}}) {
    simt::Buffer<float> w(random_values<float>(32 * 32, 1), "w");
    simt::Buffer<float> blocks(random_values<float>(16 * 16, 2), "blocks");
    const simt::Buffer<int32_t> rows({row}, "rows"), cols({col}, "cols");
    const cuda::BlocksArgs args{DType::f32,  DType::f32,  32,           32, 16, 1, w.data(), 32, 1,
                                rows.data(), cols.data(), blocks.data()};
    EXPECT_STOPS(cuda::gather_blocks(args, nullptr));
    EXPECT_STOPS(cuda::scatter_blocks(args, nullptr));
  }
}

}  // namespace smt_ext::testing
