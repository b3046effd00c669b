#include "block_score.h"
#include "testing.h"

namespace smt_ext::cpu::testing {

constexpr Metric kMetrics[] = {Metric::mean_abs, Metric::mean, Metric::l1, Metric::l2};

// The score of block (r, c) and the bound of its error, relative to the sum of magnitudes.
template <typename G>
static double reference(const G& g, int64_t N, int64_t K, int64_t L, int64_t r, int64_t c,
                        Metric metric, double* magnitude) {
  double sum = 0, area = 0;
  *magnitude = 0;
  for (int64_t n = r * L; n < std::min(N, (r + 1) * L); ++n) {
    for (int64_t k = c * L; k < std::min(K, (c + 1) * L); ++k, ++area) {
      const double x = g(n, k);
      sum += metric == Metric::mean ? x : metric == Metric::l2 ? x * x : std::abs(x);
      *magnitude += metric == Metric::l2 ? x * x : std::abs(x);
    }
  }
  if (metric == Metric::l2) {
    *magnitude = std::sqrt(*magnitude);
    return std::sqrt(sum);
  }
  if (metric != Metric::l1) {
    *magnitude /= area;
    return sum / area;
  }
  return sum;
}

class BlockScoreTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, BlockScoreTest, ::testing::ValuesIn(kDTypes), DTypeName());

TEST_P(BlockScoreTest, OfAGivenGradient) {
  const DType dtype = GetParam();
  const DType sums = dtype == DType::f64 ? DType::f64 : DType::f32;
  for (const Product& c : kProducts) {
    const int64_t R = (c.N + c.L - 1) / c.L, C = (c.K + c.L - 1) / c.L;
    for (const char layout : {'r', 'c'}) {
      const Matrix g = Matrix::random(dtype, c.N, c.K, layout, 1);
      for (const Metric metric : kMetrics) {
        Buffer score(sums, R * C);
        block_score({dtype, metric, c.N, c.K, c.L, g.buffer.data(), g.stride_row, g.stride_col,
                     score.data()},
                    ShuffledThreads(3, 1));
        for (int64_t i = 0; i < R * C; ++i) {
          double magnitude;
          const double exact = reference(g, c.N, c.K, c.L, i / C, i % C, metric, &magnitude);
          // Lanes hold at most kRowsPerFold * L / 16 = 512 terms before they are folded into
          // float64.
          ASSERT_LE(std::abs(score[i] - exact), 600 * unit_of_sums(dtype) * magnitude)
              << "L=" << c.L << " block " << i;
          ASSERT_GT(magnitude, 0);
        }
      }
    }
  }
}

TEST_P(BlockScoreTest, FusedEqualsTheScoreOfTheProduct) {
  const DType dtype = GetParam();
  const DType sums = dtype == DType::f64 ? DType::f64 : DType::f32;
  for (const Product& c : kProducts) {
    const int64_t R = (c.N + c.L - 1) / c.L, C = (c.K + c.L - 1) / c.L;
    for (const char* layouts : {"rr", "cs"}) {
      const Matrix dy = Matrix::random(dtype, c.T, c.N, layouts[0], 1);
      const Matrix x = Matrix::random(dtype, c.T, c.K, layouts[1], 2);
      Buffer dense(DType::f64, c.N * c.K);
      double error = 0;  // largest rounding error of an entry of the product
      for (int64_t n = 0; n < c.N; ++n) {
        for (int64_t k = 0; k < c.K; ++k) {
          double sum = 0, magnitude = 0;
          for (int64_t t = 0; t < c.T; ++t) {
            sum += dy(t, n) * x(t, k);
            magnitude += std::abs(dy(t, n) * x(t, k));
          }
          dense.set(n * c.K + k, sum);
          error = std::max(error, 2 * (c.T + 1) * unit_of_sums(dtype) * magnitude);
        }
      }
      const auto g = [&](int64_t n, int64_t k) { return dense[n * c.K + k]; };
      for (const Metric metric : kMetrics) {
        Buffer score(sums, R * C);
        score.fill(-1);
        block_score_fused(
            {dtype, metric, c.T, c.N, c.K, c.L, dy.operand(), x.operand(), score.data()},
            ShuffledThreads(3, 1));
        for (int64_t i = 0; i < R * C; ++i) {
          double magnitude;
          const double exact = reference(g, c.N, c.K, c.L, i / C, i % C, metric, &magnitude);
          const double entries = metric == Metric::l1   ? static_cast<double>(c.L * c.L)
                                 : metric == Metric::l2 ? static_cast<double>(c.L)
                                                        : 1.0;
          ASSERT_LE(std::abs(score[i] - exact),
                    error * entries + 600 * unit_of_sums(dtype) * magnitude)
              << "T=" << c.T << " L=" << c.L << " block " << i;
        }
      }
    }
  }
}

TEST_P(BlockScoreTest, BitsDoNotDependOnThreads) {
  const DType dtype = GetParam();
  const int64_t T = 40, N = 300, K = 270, L = 64, blocks = 5 * 5;
  const Matrix dy = Matrix::random(dtype, T, N, 'r', 1), x = Matrix::random(dtype, T, K, 'r', 2);
  const Matrix g = Matrix::random(dtype, N, K, 'r', 3);
  const DType sums = dtype == DType::f64 ? DType::f64 : DType::f32;
  Buffer first(sums, blocks), first_fused(sums, blocks);
  for (int threads = 1; threads < 5; ++threads) {
    Buffer score(sums, blocks), fused(sums, blocks);
    const ShuffledThreads parallel(threads, static_cast<unsigned>(threads));
    block_score({dtype, Metric::mean_abs, N, K, L, g.buffer.data(), K, 1, score.data()}, parallel);
    block_score_fused(
        {dtype, Metric::mean_abs, T, N, K, L, dy.operand(), x.operand(), fused.data()}, parallel);
    if (threads == 1) {
      first = score.copy();
      first_fused = fused.copy();
    }
    EXPECT_TRUE(score.same_bits(first));
    EXPECT_TRUE(fused.same_bits(first_fused));
  }
}

}  // namespace smt_ext::cpu::testing
