// Conversions, over every bit pattern where that is possible.
#include "testing.h"

namespace smt_ext::cpu::testing {

TEST(Bf16, EveryValueSurvivesTheWayThroughFloat) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const bf16 value{static_cast<uint16_t>(bits)};
    const float wide = to_float(value);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(to_float(to_bf16(wide))));
    } else {
      EXPECT_EQ(to_bf16(wide).bits, bits);
    }
  }
}

TEST(F16, EveryValueSurvivesTheWayThroughFloat) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const f16 value{static_cast<uint16_t>(bits)};
    const float wide = to_float(value);
    const uint32_t exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
    if (exponent == 0x1f && mantissa) {
      EXPECT_TRUE(std::isnan(wide));
      EXPECT_TRUE(std::isnan(to_float(to_f16(wide))));
      continue;
    }
    const double magnitude = exponent == 0x1f ? INFINITY
                             : exponent       ? std::ldexp(1024.0 + mantissa, int(exponent) - 25)
                                              : std::ldexp(double(mantissa), -24);
    EXPECT_EQ(wide, bits & 0x8000 ? -magnitude : magnitude);
    EXPECT_EQ(to_f16(wide).bits, bits);
  }
}

// Nearest value of T by search over all of them: ties go to the even mantissa.
template <typename T>
uint16_t nearest(float x, float limit) {
  uint16_t best = 0;
  double distance = INFINITY;
  for (uint32_t bits = 0; bits < 0x8000; ++bits) {
    T candidate{static_cast<uint16_t>(bits)};
    const double value = to_float(candidate);
    if (!(value <= limit)) continue;
    const double d = std::abs(value - static_cast<double>(std::abs(x)));
    if (d < distance || (d == distance && bits % 2 == 0)) {
      best = static_cast<uint16_t>(bits);
      distance = d;
    }
  }
  return best | (x < 0 ? 0x8000 : 0);
}

TEST(Rounding, IsToNearestEven) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<float> mantissa(-2, 2);
  for (int i = 0; i < 200; ++i) {
    const float x = std::ldexp(mantissa(generator), static_cast<int>(generator() % 24) - 12);
    EXPECT_EQ(to_bf16(x).bits, nearest<bf16>(x, 3.4e38f)) << x;
    EXPECT_EQ(to_f16(x).bits, nearest<f16>(x, 65504)) << x;
  }
  // Ties.
  EXPECT_EQ(to_bf16(1.0f + 0x1p-8f).bits, to_bf16(1.0f).bits);
  EXPECT_EQ(to_bf16(1.0f + 3 * 0x1p-8f).bits, to_bf16(1.0f + 4 * 0x1p-8f).bits);
  EXPECT_EQ(to_f16(1.0f + 0x1p-11f).bits, to_f16(1.0f).bits);
  EXPECT_EQ(to_f16(0x1p-25f).bits, 0);         // half of the smallest subnormal
  EXPECT_EQ(to_f16(1.5f * 0x1p-24f).bits, 2);  // a tie between subnormals
  EXPECT_EQ(to_f16(65519.0f).bits, 0x7bff);
  EXPECT_EQ(to_f16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(to_bf16(INFINITY).bits, 0x7f80);
  EXPECT_TRUE(std::isnan(to_float(to_bf16(float_of(0x7f800001u)))));  // NaN must not round to inf
}

}  // namespace smt_ext::cpu::testing
