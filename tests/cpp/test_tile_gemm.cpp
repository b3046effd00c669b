// The register-tiled product in each instruction set that this CPU has, against float64.
#include "testing.h"

namespace smt_ext::cpu {

using TileGemm = void(DType, const Operand&, const Operand&, int64_t, int64_t, int64_t, void*,
                      int64_t, const NextTile*);
namespace generic {
TileGemm tile_gemm;
}
#if defined(__x86_64__)
namespace avx2 {
TileGemm tile_gemm;
}
namespace avx512 {
TileGemm tile_gemm;
}
namespace avx512_bf16 {
TileGemm tile_gemm;
}
#endif

namespace testing {

// The builds up to the one that cpu_capability() names; it names the best.
static std::vector<std::pair<std::string, TileGemm*>> builds() {
  std::vector<std::pair<std::string, TileGemm*>> all = {{"generic", generic::tile_gemm}};
#if defined(__x86_64__)
  all.emplace_back("avx2", avx2::tile_gemm);
  all.emplace_back("avx512", avx512::tile_gemm);
  all.emplace_back("avx512_bf16", avx512_bf16::tile_gemm);
#endif
  while (all.back().first != cpu_capability()) all.pop_back();
  return all;
}

struct Shape {
  int64_t T, m, n;
};
// Around the register tiles, kTile and kChunk, odd T for the pairs of bfloat16.
static const Shape kShapes[] = {{0, 5, 7},     {1, 1, 1},     {2, 8, 32},    {3, 7, 33},
                                {17, 16, 16},  {129, 64, 64}, {256, 31, 65}, {257, 128, 160},
                                {513, 9, 256}, {300, 255, 95}};

class TileGemmTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, TileGemmTest, ::testing::ValuesIn(kDTypes), DTypeName());

static void check(const std::string& build, TileGemm* gemm, DType dtype, const Shape& s,
                  const char* layouts) {
  const Matrix a = Matrix::random(dtype, s.T, s.m, layouts[0], 1);
  const Matrix b = Matrix::random(dtype, s.T, s.n, layouts[1], 2);
  const std::vector<double> wide_a = a.values(), wide_b = b.values();
  const DType sums = dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t ldc = s.n + 3;
  Buffer c(sums, (s.m - 1) * ldc + s.n);
  c.fill(-123);
  const NextTile next{b.operand(), a.operand(), s.n, s.m};
  gemm(dtype, a.operand(), b.operand(), s.T, s.m, s.n, c.data(), ldc, &next);
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < s.n; ++j) {
      double exact = 0, magnitude = 0;
      for (int64_t t = 0; t < s.T; ++t) {
        const double product = wide_a[t * s.m + i] * wide_b[t * s.n + j];
        exact += product;
        magnitude += std::abs(product);
      }
      // T roundings of a sum, in any order (Higham, section 3.1); float64's reference rounds too.
      const double bound = 2 * (s.T + 1) * unit_of_sums(dtype) * magnitude;
      ASSERT_LE(std::abs(c[i * ldc + j] - exact), bound)
          << build << " " << layouts << " T=" << s.T << " m=" << s.m << " n=" << s.n << " at " << i
          << ", " << j;
    }
    for (int64_t j = s.n; j < ldc && i + 1 < s.m; ++j) {
      ASSERT_EQ(c[i * ldc + j], -123) << "written between rows";
    }
  }
}

TEST_P(TileGemmTest, EveryBuildIsWithinTheErrorBound) {
  for (const auto& [build, gemm] : builds()) {
    for (const Shape& s : kShapes) {
      for (const char* layouts : {"rr", "cr", "rs", "sc"})
        check(build, gemm, GetParam(), s, layouts);
    }
  }
}

// Columns are cut into panels of two widths.
TEST_P(TileGemmTest, EveryNumberOfColumns) {
  for (const auto& [build, gemm] : builds()) {
    for (int64_t n = 1; n <= kTile; n += n < 100 ? 1 : 13) {
      for (const char* layouts : {"rr", "rs"}) check(build, gemm, GetParam(), {3, 5, n}, layouts);
    }
  }
}

TEST(TileGemm, NanAndInfReachOnlyTheirRowAndColumn) {
  for (const auto& [build, gemm] : builds()) {
    for (const DType dtype : kDTypes) {
      Matrix a = Matrix::random(dtype, 33, 20, 'r', 1), b = Matrix::random(dtype, 33, 40, 'r', 2);
      a.buffer.set(4 * 20 + 7, NAN);
      b.buffer.set(9 * 40 + 11, INFINITY);
      Buffer c(dtype == DType::f64 ? DType::f64 : DType::f32, 20 * 40);
      gemm(dtype, a.operand(), b.operand(), 33, 20, 40, c.data(), 40, nullptr);
      for (int64_t i = 0; i < 20; ++i) {
        for (int64_t j = 0; j < 40; ++j) {
          EXPECT_EQ(std::isfinite(c[i * 40 + j]), i != 7 && j != 11)
              << build << " " << name_of(dtype) << " at " << i << ", " << j;
        }
      }
    }
  }
}

}  // namespace testing
}  // namespace smt_ext::cpu
