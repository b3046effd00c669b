// AdamW over blocks against a float64 trajectory, its stochastic rounding, and the gradient norm.
#include "grad_norm.h"
#include "sparse_adamw.h"
#include "testing.h"

namespace smt_ext::cpu::testing {

constexpr int64_t kN = 90, kK = 70, kL = 32, kS = 3;
static const std::vector<int32_t> kRows = {0, 1, 2}, kCols = {1, 2, 0};  // ragged: (1, 2), (2, 0)

static bool inside(int64_t i) {
  const int64_t s = i / (kL * kL);
  return kRows[s] * kL + i / kL % kL < kN && kCols[s] * kL + i % kL < kK;
}

struct State {
  Buffer w, blocks, grad, m, v, master, origin;
  bool has_master, has_origin;

  State(DType w_dtype, DType dtype, bool with_master, bool with_origin = false)
      : w(Buffer::random(w_dtype, kN * kK, 1)),
        blocks(Buffer::random(dtype, kS * kL * kL, 2)),
        grad(Buffer::random(dtype, kS * kL * kL, 3)),
        m(dtype == DType::f64 ? DType::f64 : DType::f32, kS * kL * kL),
        v(m.dtype(), kS * kL * kL),
        master(DType::f32, kS * kL * kL),
        origin(Buffer::random(w_dtype == DType::f64 ? m.dtype() : w_dtype, kS * kL * kL, 4)),
        has_master(with_master),
        has_origin(with_origin) {
    for (int64_t i = 0; i < kS * kL * kL; ++i) master.set(i, blocks[i]);
  }

  void step(const AdamWOptions& options, const Parallel& parallel) {
    const AdamWLayer layer{w.dtype(),
                           blocks.dtype(),
                           kN,
                           kK,
                           kL,
                           kS,
                           w.data(),
                           kK,
                           1,
                           kRows.data(),
                           kCols.data(),
                           blocks.data(),
                           grad.data(),
                           m.data(),
                           v.data(),
                           has_master ? static_cast<float*>(master.data()) : nullptr,
                           has_origin ? origin.data() : nullptr,
                           origin.dtype()};
    sparse_adamw(&layer, 1, options, parallel);
  }
};

static AdamWOptions options_of(double step) { return {1e-2, 0.9, 0.99, 1e-8, 0.1, 0.5, step, -1}; }

class AdamWTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, AdamWTest, ::testing::ValuesIn(kDTypes), DTypeName());

TEST_P(AdamWTest, FollowsTheFloat64Trajectory) {
  const DType dtype = GetParam();
  for (const DType w_dtype : kDTypes) {
    const bool low = dtype == DType::bf16 || dtype == DType::f16;
    for (const int kind : {0, 1, 2, 3}) {
      const bool with_master = kind % 2 == 1, with_origin = kind / 2 == 1;
      if (with_master && !low) continue;
      State state(w_dtype, dtype, with_master, with_origin);
      const Buffer w_before = state.w.copy(), blocks_before = state.blocks.copy();
      const int64_t size = kS * kL * kL;
      std::vector<double> p(size), m(size), v(size);
      for (int64_t i = 0; i < size; ++i) p[i] = state.blocks[i];
      const double unit = unit_of(with_master ? DType::f32 : dtype);
      for (int step = 1; step <= 3; ++step) {
        state.grad = Buffer::random(dtype, size, 10 + static_cast<unsigned>(step));
        const AdamWOptions o = options_of(step);
        state.step(o, ShuffledThreads(3, static_cast<unsigned>(step)));
        for (int64_t i = 0; i < size; ++i) {
          const double g = state.grad[i] * o.grad_scale;
          m[i] = o.beta1 * m[i] + (1 - o.beta1) * g;
          v[i] = o.beta2 * v[i] + (1 - o.beta2) * g * g;
          p[i] = p[i] - o.lr * o.weight_decay * (p[i] - (with_origin ? state.origin[i] : 0)) -
                 o.lr / (1 - std::pow(o.beta1, step)) * m[i] /
                     (std::sqrt(v[i]) / std::sqrt(1 - std::pow(o.beta2, step)) + o.eps);
        }
      }
      int64_t moved = 0;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t s = i / (kL * kL), n = kRows[s] * kL + i / kL % kL,
                      k = kCols[s] * kL + i % kL;
        if (!inside(i)) {
          ASSERT_EQ(state.blocks[i], blocks_before[i]) << "padding";
          continue;
        }
        const double sums = state.m.dtype() == DType::f64 ? 0x1p-53 : 0x1p-24;
        // Each of 3 steps rounds p once, its moments a few times; |update| <= about lr.
        const double bound = 3 * (unit + 8 * sums) * (std::abs(p[i]) + 0.1);
        ASSERT_LE(std::abs((with_master ? state.master[i] : state.blocks[i]) - p[i]), bound) << i;
        ASSERT_LE(std::abs(state.m[i] - m[i]), 20 * sums * (std::abs(m[i]) + 1));
        moved += state.blocks[i] != blocks_before[i];
        // The weight holds the trained value, rounded once.
        Buffer rounded(w_dtype, 1);
        rounded.set(0, with_master ? state.master[i] : state.blocks[i]);
        ASSERT_EQ(state.w[n * kK + k], rounded[0]);
      }
      EXPECT_GT(moved, size / 2);
      for (int64_t at = 0; at < kN * kK; ++at) {
        bool selected = false;
        for (int64_t s = 0; s < kS; ++s) {
          selected |= at / kK / kL == kRows[s] && at % kK / kL == kCols[s];
        }
        if (!selected) {
          ASSERT_EQ(state.w[at], w_before[at]) << "outside the blocks";
        }
      }
    }
  }
}

TEST(AdamW, BitsDoNotDependOnThreads) {
  for (const DType dtype : kDTypes) {
    State one(dtype, dtype, false), many(dtype, dtype, false);
    AdamWOptions o = options_of(1);
    o.seed = 5;
    one.step(o, ShuffledThreads(1));
    many.step(o, ShuffledThreads(4, 9));
    EXPECT_TRUE(one.blocks.same_bits(many.blocks));
    EXPECT_TRUE(one.w.same_bits(many.w));
  }
}

TEST(StochasticRounding, IsUnbiasedAndReproducible) {
  // 1 + 1/4 of the way to the next bfloat16 must round up a quarter of the time.
  const float x = 1.0f + 0x1p-9f;
  int up = 0;
  const int count = 100000;
  const uint32_t key = layer_key(step_key(3, 1), 0);
  for (int i = 0; i < count; ++i) {
    const float rounded = to_float(to_bf16_stochastic(x, random_bits(key, i)));
    ASSERT_TRUE(rounded == 1.0f || rounded == 1.0f + 0x1p-7f);
    up += rounded > 1.0f;
    ASSERT_EQ(random_bits(key, i), random_bits(layer_key(step_key(3, 1), 0), i));
  }
  // Standard deviation 137; six of them.
  EXPECT_NEAR(up, count / 4, 822);
  EXPECT_NE(layer_key(step_key(3, 1), 0), layer_key(step_key(3, 2), 0));
  EXPECT_NE(layer_key(step_key(3, 1), 0), layer_key(step_key(3, 1), 1));
  EXPECT_NE(layer_key(step_key(3, 1), 0), layer_key(step_key(4, 1), 0));
}

TEST(StochasticRounding, MovesBlocksThatRoundToNearestWouldHold) {
  // Updates of lr = 1e-4 vanish in bfloat16 values near 1 when rounded to nearest.
  for (const int64_t seed : {int64_t{-1}, int64_t{7}}) {
    State state(DType::bf16, DType::bf16, false);
    state.blocks.fill(1);
    state.grad.fill(1);
    for (int step = 1; step <= 100; ++step) {
      state.step({1e-4, 0.9, 0.99, 1e-8, 0, 1, static_cast<double>(step), seed},
                 ShuffledThreads(2));
    }
    double mean = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < kS * kL * kL; ++i) {
      if (!inside(i)) continue;
      mean += state.blocks[i];
      ++count;
    }
    mean /= static_cast<double>(count);
    if (seed < 0) {
      EXPECT_EQ(mean, 1.0);
    } else {
      EXPECT_NEAR(mean, 0.99, 0.001);  // 100 steps of 1e-4
    }
  }
}

TEST(GradNorm, OfSeveralGradientsAndDtypes) {
  std::vector<Buffer> buffers;
  double sum = 0;
  for (const DType dtype : kDTypes) {
    for (const int64_t size : {0, 1, 17, 40000}) {
      buffers.push_back(Buffer::random(dtype, size, static_cast<unsigned>(size)));
      for (int64_t i = 0; i < size; ++i) sum += buffers.back()[i] * buffers.back()[i];
    }
  }
  std::vector<Gradient> grads;
  for (const Buffer& b : buffers) grads.push_back({b.data(), b.size(), b.dtype()});
  const auto norm = [&](int threads) {
    return grad_norm(grads.data(), static_cast<int64_t>(grads.size()),
                     ShuffledThreads(threads, static_cast<unsigned>(threads)));
  };
  EXPECT_NEAR(norm(1), std::sqrt(sum), 1e-11 * std::sqrt(sum));
  EXPECT_EQ(norm(1), norm(4));
}

TEST(GradNorm, SeesEveryInfAndNan) {
  for (const DType dtype : kDTypes) {
    for (const int64_t at : {0, 15, 16, 99}) {
      for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
        Buffer grad = Buffer::random(dtype, 100, 1);
        grad.set(at, bad);
        const Gradient g{grad.data(), 100, dtype};
        EXPECT_FALSE(std::isfinite(grad_norm(&g, 1, ShuffledThreads(2))));
      }
    }
  }
  // Large float32 values do not overflow the sum.
  Buffer grad(DType::f32, 4);
  grad.fill(3e38);
  const Gradient g{grad.data(), 4, DType::f32};
  EXPECT_NEAR(grad_norm(&g, 1, ShuffledThreads(1)) / 6e38, 1, 1e-6);
}

}  // namespace smt_ext::cpu::testing
