// Copies: exact where the dtype stays, rounded once where it changes, nothing outside the blocks.
#include "gather_blocks.h"
#include "gather_columns.h"
#include "testing.h"

namespace smt_ext::cpu::testing {

// value as it is stored in a dtype
static double stored(double value, DType dtype) {
  Buffer one(dtype, 1);
  one.set(0, value);
  return one[0];
}

class GatherTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, GatherTest, ::testing::ValuesIn(kDTypes), DTypeName());

TEST_P(GatherTest, ColumnsAreCopiedInOrder) {
  const DType dtype = GetParam();
  for (const char layout : {'r', 'c', 's'}) {
    for (const DType out_dtype : kDTypes) {
      for (const int64_t T : {0, 1, 300}) {
        const int64_t K = 150, L = 32;
        const std::vector<int32_t> col_blocks = {0, 2, 4};  // the last one is 22 wide
        const int64_t U = 2 * L + 22;
        const Matrix x = Matrix::random(dtype, T, K, layout, 1);
        Buffer out(out_dtype, T * U);
        gather_columns({dtype, out_dtype, T, K, U, L, x.buffer.data(), x.stride_row, x.stride_col,
                        col_blocks.data(), out.data(), 3},
                       ShuffledThreads(3, 7));
        for (int64_t t = 0; t < T; ++t) {
          for (int64_t u = 0; u < U; ++u) {
            ASSERT_EQ(out[t * U + u], stored(x(t, col_blocks[u / L] * L + u % L), out_dtype));
          }
        }
      }
    }
  }
}

TEST_P(GatherTest, BlocksComeOutAndGoBack) {
  const DType dtype = GetParam();
  const int64_t N = 90, K = 70, L = 32, S = 4;
  const std::vector<int32_t> rows = {0, 1, 2, 2}, cols = {1, 0, 1, 2};
  for (const char layout : {'r', 'c', 's'}) {
    for (const DType blocks_dtype : kDTypes) {
      Matrix w = Matrix::random(dtype, N, K, layout, 1);
      const Buffer before = w.buffer.copy();
      Buffer blocks = Buffer::random(blocks_dtype, S * L * L, 2);
      BlocksArgs args{dtype,
                      blocks_dtype,
                      N,
                      K,
                      L,
                      S,
                      w.buffer.data(),
                      w.stride_row,
                      w.stride_col,
                      rows.data(),
                      cols.data(),
                      blocks.data()};
      gather_blocks(args, ShuffledThreads(3, 1));
      EXPECT_TRUE(w.buffer.same_bits(before));
      for (int64_t i = 0; i < S * L * L; ++i) {
        const int64_t n = rows[i / L / L] * L + i / L % L, k = cols[i / L / L] * L + i % L;
        ASSERT_EQ(blocks[i], n < N && k < K ? stored(w(n, k), blocks_dtype) : 0);
      }
      for (int64_t i = 0; i < S * L * L; ++i) blocks.set(i, 1000.0 + static_cast<double>(i % 7));
      scatter_blocks(args, ShuffledThreads(3, 2));
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
          const int64_t at = n * w.stride_row + k * w.stride_col;
          double expected = before[at];
          for (int64_t s = 0; s < S; ++s) {
            if (n / L == rows[s] && k / L == cols[s]) {
              expected = stored(blocks[(s * L + n % L) * L + k % L], dtype);
            }
          }
          ASSERT_EQ(w.buffer[at], expected) << n << ", " << k;
        }
      }
    }
  }
}

}  // namespace smt_ext::cpu::testing
