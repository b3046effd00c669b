// Block scores against float64, of a gradient and of its factors.
#include <algorithm>

#include "block_score.h"
#include "elements.h"

namespace smt_ext::testing {

static const Metric kMetrics[] = {Metric::mean_abs, Metric::mean, Metric::l1, Metric::l2};

// Of g (N, K) given as float64; error[i] bounds each entry's own error.
static void expect_scores(Metric metric, const std::vector<double>& got, int64_t N, int64_t K,
                          int64_t L, const std::vector<double>& g, const std::vector<double>& error,
                          double u) {
  const int64_t R = (N + L - 1) / L, C = (K + L - 1) / L;
  ASSERT_EQ(got.size(), static_cast<size_t>(R * C));
  for (int64_t s = 0; s < R * C; ++s) {
    double sum = 0, magnitude = 0, own = 0, area = 0;
    for (int64_t n = s / C * L; n < std::min(N, (s / C + 1) * L); ++n) {
      for (int64_t k = s % C * L; k < std::min(K, (s % C + 1) * L); ++k) {
        const auto i = static_cast<size_t>(n * K + k);
        const double e = error.empty() ? 0 : error[i], x = g[i];
        if (metric == Metric::l2) {
          sum += x * x;
          magnitude += x * x;
          own += e * (2 * std::abs(x) + e);
        } else {
          sum += metric == Metric::mean ? x : std::abs(x);
          magnitude += std::abs(x);
          own += e;
        }
        ++area;
      }
    }
    // A thread adds at most 128 terms in float32 before it goes on in float64.
    double bound = 130 * u * magnitude + own, want = sum;
    if (metric == Metric::l2) {
      bound = std::sqrt(sum + bound) - std::sqrt(sum) + 1e-300;
      want = std::sqrt(sum);
    } else if (metric != Metric::l1) {
      bound /= area;
      want /= area;
    }
    ASSERT_LE(std::abs(got[static_cast<size_t>(s)] - want), bound + 2 * u * std::abs(want))
        << "block " << s << " metric " << static_cast<int>(metric);
  }
}

template <typename T>
class BlockScoreTest : public ::testing::Test {};
TYPED_TEST_SUITE(BlockScoreTest, Elements);

template <typename T>
static std::vector<double> doubles(const std::vector<T>& values) {
  std::vector<double> out;
  for (const T& v : values) out.push_back(to_double(v));
  return out;
}

TYPED_TEST(BlockScoreTest, OfAGradient) {
  using T = TypeParam;
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  struct Case {
    int64_t N, K, L;
    char layout;
  };
  for (const Case& c : {Case{64, 96, 32, 'r'},
                        {50, 37, 17, 'r'},
                        {40, 64, 16, 'c'},
                        {40, 64, 64, 'o'},
                        {150, 264, 128, 'p'},
                        {270, 256, 256, 'r'},
                        {30, 40, 32, 's'}}) {
    const Layout layout = Layout::of(c.layout, c.N, c.K);
    const auto g = random_values<T>(layout.reach(), 5);
    std::vector<double> dense;
    for (int64_t n = 0; n < c.N; ++n) {
      for (int64_t k = 0; k < c.K; ++k) dense.push_back(to_double(g[layout.at(n, k)]));
    }
    const simt::Buffer<T> device(g, "g");
    const auto count = static_cast<size_t>((c.N + c.L - 1) / c.L * ((c.K + c.L - 1) / c.L));
    for (const Metric metric : kMetrics) {
      simt::Buffer<Acc> score(count, "score");
      cuda::block_score({dtype_of<T>(), metric, c.N, c.K, c.L, device.data() + layout.offset,
                         layout.stride_row, layout.stride_col, score.data()},
                        nullptr);
      expect_scores(metric, doubles(score.values()), c.N, c.K, c.L, dense, {}, unit_of<Acc>());
    }
  }
}

TYPED_TEST(BlockScoreTest, ReadsTheFewestSectors) {
  using T = TypeParam;
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const simt::Buffer<T> g(random_values<T>(256 * 512, 1), "g");
  simt::Buffer<Acc> score(2, "score");
  cuda::block_score(
      {dtype_of<T>(), Metric::mean_abs, 256, 512, 256, g.data(), 512, 1, score.data()}, nullptr);
  expect_minimal_sectors("block_score");
}

TYPED_TEST(BlockScoreTest, OfTheFactorsOfAGradient) {
  using T = TypeParam;
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  struct Case {
    int64_t T, N, K, L;
    char layout;
    bool tf32;
  };
  for (const Case& c : {Case{40, 64, 48, 16, 'r', false},
                        {33, 72, 104, 32, 'r', false},
                        {35, 160, 136, 64, 'p', false},
                        {20, 264, 144, 256, 'r', false},
                        {21, 50, 37, 17, 'r', false},
                        {18, 64, 64, 32, 'c', false},
                        {33, 160, 132, 64, 'r', true},
                        {0, 32, 32, 32, 'r', false}}) {
    const bool tf32 = c.tf32 && std::is_same_v<T, float>;
    const Layout layout = Layout::of(c.layout, c.T, c.N);
    const auto dy = random_values<T>(layout.reach(), 5), x = random_values<T>(c.T * c.K, 6);
    const double u = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-23;
    std::vector<double> dense, error;
    for (int64_t n = 0; n < c.N; ++n) {
      for (int64_t k = 0; k < c.K; ++k) {
        double sum = 0, magnitude = 0;
        for (int64_t t = 0; t < c.T; ++t) {
          const double product =
              to_double(dy[layout.at(t, n)]) * to_double(x[static_cast<size_t>(t * c.K + k)]);
          sum += product;
          magnitude += std::abs(product);
        }
        dense.push_back(sum);
        error.push_back((2 * static_cast<double>(c.T + 2) * u + (tf32 ? 2.01 * 0x1p-11 : 0)) *
                        magnitude);
      }
    }
    const simt::Buffer<T> dy_device(dy, "dy"), x_device(x, "x");
    const auto count = static_cast<size_t>((c.N + c.L - 1) / c.L * ((c.K + c.L - 1) / c.L));
    for (const Metric metric : kMetrics) {
      std::vector<double> first;
      simt::for_each_seed(simt::orders, [&] {
        simt::Buffer<Acc> score(count, "score");
        const cuda::BlockScoreFusedArgs args{dtype_of<T>(),
                                             metric,
                                             c.T,
                                             c.N,
                                             c.K,
                                             c.L,
                                             dy_device.data() + layout.offset,
                                             layout.stride_row,
                                             layout.stride_col,
                                             x_device.data(),
                                             c.K,
                                             1,
                                             score.data(),
                                             tf32};
        simt::Buffer<double> workspace(cuda::block_score_fused_workspace_bytes(args) / 8,
                                       "workspace");
        cuda::block_score_fused(args, workspace.data(), nullptr);
        if (first.empty()) first = doubles(score.values());
        EXPECT_EQ(doubles(score.values()), first) << "depends on the order of blocks";
      });
      expect_scores(metric, first, c.N, c.K, c.L, dense, error, unit_of<Acc>());
    }
  }
}

// Tiles of 128 whatever the block: no operand is read more often for small blocks.
TEST(BlockScore, SmallBlocksReadWhatLargeOnesRead) {
  if (!simt::counts_traffic) return;
  const int64_t T = 64, N = 256, K = 256;
  const simt::Buffer<bf16> dy(random_values<bf16>(T * N, 1)), x(random_values<bf16>(T * K, 2));
  for (const int64_t L : {128, 64, 32, 16}) {
    simt::Buffer<float> score(static_cast<size_t>(N / L * (K / L)));
    const cuda::BlockScoreFusedArgs args{
        DType::bf16, Metric::mean_abs, T,    N, K, L, dy.data(), N, 1, x.data(), K,
        1,           score.data(),     false};
    simt::Buffer<double> workspace(cuda::block_score_fused_workspace_bytes(args) / 8);
    cuda::block_score_fused(args, workspace.data(), nullptr);
    const simt::Stats& stats = simt::last_stats("block_score_fused");
    EXPECT_EQ(stats.async_load.bytes, 4u * 64 * (128 + 128) * 2) << L;
    EXPECT_GE(static_cast<double>(stats.mma), 2.5 * static_cast<double>(stats.ldmatrix.requests));
    EXPECT_EQ(stats.ldmatrix.conflicts() + stats.async_store.conflicts(), 0u) << stats.report();
    EXPECT_LE(stats.shared_load.conflicts(), 16u) << L << stats.report();  // of the last sums
  }
}

TEST(BlockScore, SeesNan) {
  std::vector<float> g(64 * 64, 1.0f);
  g[70] = NAN;
  const simt::Buffer<float> device(g);
  for (const Metric metric : kMetrics) {
    simt::Buffer<float> score(4);
    cuda::block_score({DType::f32, metric, 64, 64, 32, device.data(), 64, 1, score.data()},
                      nullptr);
    const auto got = score.values();
    EXPECT_TRUE(std::isnan(got[0]));
    EXPECT_FALSE(std::isnan(got[1]));
  }
}

}  // namespace smt_ext::testing
