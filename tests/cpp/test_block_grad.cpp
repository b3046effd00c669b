#include "block_grad.h"
#include "testing.h"

namespace smt_ext::cpu::testing {

// All blocks of the grid but every third, and the compact columns of those that are left.
struct Problem {
  std::vector<int32_t> rows, cols, slots;
  Matrix dy, x;
  Buffer x_cols;
  int64_t U = 0;

  Problem(DType dtype, const Product& c, char dy_layout)
      : dy(Matrix::random(dtype, c.T, c.N, dy_layout, 1)),
        x(Matrix::random(dtype, c.T, c.K, 'r', 2)),
        x_cols(dtype, 0) {
    const int64_t R = (c.N + c.L - 1) / c.L, C = (c.K + c.L - 1) / c.L;
    std::vector<int32_t> slot_of(C, -1), chosen;
    for (int64_t r = 0, i = 0; r < R; ++r) {
      for (int64_t col = 0; col < C; ++col, ++i) {
        if (R * C > 2 && i % 3 == 1) continue;
        rows.push_back(static_cast<int32_t>(r));
        cols.push_back(static_cast<int32_t>(col));
      }
    }
    for (int64_t col = 0; col < C; ++col) {
      if (std::count(cols.begin(), cols.end(), col)) {
        slot_of[col] = static_cast<int32_t>(chosen.size());
        chosen.push_back(static_cast<int32_t>(col));
        U += std::min(c.L, c.K - col * c.L);
      }
    }
    for (const int32_t col : cols) slots.push_back(slot_of[col]);
    x_cols = Buffer(dtype, c.T * U);
    for (int64_t t = 0; t < c.T; ++t) {
      for (size_t s = 0; s < chosen.size(); ++s) {
        const int64_t begin = chosen[s] * c.L, width = std::min(c.L, c.K - begin);
        for (int64_t j = 0; j < width; ++j) {
          x_cols.set(t * U + static_cast<int64_t>(s) * c.L + j, x(t, begin + j));
        }
      }
    }
  }

  BlockGradArgs args(const Product& c, Buffer& out, bool accumulate) const {
    const int64_t S = static_cast<int64_t>(rows.size());
    return {dy.buffer.dtype(),
            out.dtype(),
            c.T,
            U,
            c.L,
            S,
            {{dy.operand(), c.N, 0}},
            Operand{x_cols.data(), U, 1},
            rows.data(),
            slots.data(),
            out.data(),
            accumulate};
  }
};

class BlockGradTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, BlockGradTest, ::testing::ValuesIn(kDTypes), DTypeName());

TEST_P(BlockGradTest, EqualsSlicesOfTheDenseGradient) {
  const DType dtype = GetParam();
  for (const Product& c : kProducts) {
    for (const char layout : {'r', 'c'}) {
      const Problem p(dtype, c, layout);
      std::vector<DType> out_dtypes = {dtype};
      if (dtype != DType::f64 && dtype != DType::f32) out_dtypes.push_back(DType::f32);
      for (const DType out_dtype : out_dtypes) {
        for (const bool accumulate : {false, true}) {
          const int64_t S = static_cast<int64_t>(p.rows.size());
          Buffer out = Buffer::random(out_dtype, S * c.L * c.L, 3);
          const Buffer before = out.copy();
          const std::vector<double> dy = p.dy.values(), x = p.x.values();
          block_grad(p.args(c, out, accumulate), ShuffledThreads(3, 5));
          for (int64_t s = 0; s < S; ++s) {
            for (int64_t i = 0; i < c.L; ++i) {
              for (int64_t j = 0; j < c.L; ++j) {
                const int64_t at = (s * c.L + i) * c.L + j;
                const int64_t n = p.rows[s] * c.L + i, k = p.cols[s] * c.L + j;
                if (n >= c.N || k >= c.K) {
                  ASSERT_EQ(out[at], accumulate ? before[at] : 0) << "padding";
                  continue;
                }
                double exact = accumulate ? before[at] : 0, magnitude = std::abs(exact);
                for (int64_t t = 0; t < c.T; ++t) {
                  const double product = dy[t * c.N + n] * x[t * c.K + k];
                  exact += product;
                  magnitude += std::abs(product);
                }
                const double bound = 2 * (c.T + 2) * unit_of_sums(dtype) * magnitude +
                                     unit_of(out_dtype) * std::abs(exact) * 1.01;
                ASSERT_LE(std::abs(out[at] - exact), bound)
                    << name_of(dtype) << " -> " << name_of(out_dtype) << " T=" << c.T
                    << " L=" << c.L << " block " << s << " at " << i << ", " << j;
              }
            }
          }
        }
      }
    }
  }
}

TEST_P(BlockGradTest, BitsDoNotDependOnThreads) {
  const Product c{70, 300, 270, 64};
  const Problem p(GetParam(), c, 'r');
  const int64_t size = static_cast<int64_t>(p.rows.size()) * c.L * c.L;
  Buffer one(GetParam(), size);
  block_grad(p.args(c, one, false), ShuffledThreads(1));
  for (unsigned seed = 0; seed < 4; ++seed) {
    Buffer many(GetParam(), size);
    block_grad(p.args(c, many, false), ShuffledThreads(2 + seed, seed));
    EXPECT_TRUE(many.same_bits(one));
  }
}

TEST(BlockGrad, NoBlocks) {
  const Product c{5, 32, 32, 16};
  const Problem p(DType::f32, c, 'r');
  Buffer out(DType::f32, 0);
  BlockGradArgs args = p.args(c, out, false);
  args.S = 0;
  block_grad(args, ShuffledThreads(2));
}

}  // namespace smt_ext::cpu::testing
