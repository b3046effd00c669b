// AdamW over blocks against its formula in float64, its random bits against the CPU's, and the
// gradient norm.
#include <algorithm>
#include <memory>

#include "../../../csrc/kernels/cpu/sparse_adamw.h"
#include "elements.h"
#include "grad_norm.h"
#include "sparse_adamw.h"

namespace smt_ext::testing {

using Wide = simt::Buffer<double>;

// One layer on the device, and its values before the step on the host.
template <typename B, typename W>
struct Layer {
  using Acc = std::conditional_t<std::is_same_v<B, double>, double, float>;
  using Origin = std::conditional_t<sizeof(W) <= sizeof(Acc), W, Acc>;
  int64_t N, K, L, S;
  std::vector<int32_t> rows, cols;
  Layout w_NK;
  bool has_master, has_origin;
  std::vector<W> w;
  std::vector<B> blocks, grad;
  std::vector<Acc> m, v;
  std::vector<float> master;
  std::vector<Origin> origin;
  simt::Buffer<int32_t> rows_device, cols_device;
  simt::Buffer<W> w_device;
  simt::Buffer<B> blocks_device, grad_device;
  simt::Buffer<Acc> m_device, v_device;
  simt::Buffer<float> master_device;
  simt::Buffer<Origin> origin_device;

  Layer(int64_t N, int64_t K, int64_t L, std::vector<int32_t> rows_, std::vector<int32_t> cols_,
        char layout, bool has_master, unsigned seed, bool has_origin = false)
      : N(N),
        K(K),
        L(L),
        S(static_cast<int64_t>(rows_.size())),
        rows(std::move(rows_)),
        cols(std::move(cols_)),
        w_NK(Layout::of(layout, N, K)),
        has_master(has_master),
        has_origin(has_origin),
        w(random_values<W>(w_NK.reach(), seed)),
        blocks(random_values<B>(S * L * L, seed + 1)),
        grad(random_values<B>(S * L * L, seed + 2)),
        m(random_values<Acc>(S * L * L, seed + 3)),
        v(random_values<Acc>(S * L * L, seed + 4)),
        origin(random_values<Origin>(has_origin ? S * L * L : 0, seed + 5)),
        rows_device(rows, "rows"),
        cols_device(cols, "cols"),
        w_device(w, "w"),
        blocks_device(blocks, "blocks"),
        grad_device(grad, "grad"),
        m_device(m, "m"),
        v_device(absolute(v), "v"),
        master_device(has_master ? blocks.size() : 0, "master"),
        origin_device(origin, "origin") {
    v = absolute(v);
    if (has_master) {
      // Not representable in half precision, so that reading the block instead is seen.
      for (const B& b : blocks) master.push_back(static_cast<float>(to_double(b) * 1.0003));
      master_device.assign(master.data(), master.size());
    }
  }

  static std::vector<Acc> absolute(std::vector<Acc> values) {
    for (Acc& x : values) x = std::abs(x);
    return values;
  }

  cuda::AdamWLayer args() {
    return {dtype_of<W>(),
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
            blocks_device.data(),
            grad_device.data(),
            m_device.data(),
            v_device.data(),
            has_master ? master_device.data() : nullptr,
            has_origin ? origin_device.data() : nullptr,
            dtype_of<Origin>()};
  }
};

struct Numbers {
  double step = 3, lr = 0.01, grad_scale = 0.25, found_inf = 0;
  double beta1 = 0.9, beta2 = 0.99, eps = 1e-8, weight_decay = 0.1;
  int64_t seed = -1;
};

static void run(const std::vector<cuda::AdamWLayer>& layers, const Numbers& o) {
  const Wide step({o.step}, "step"), lr({o.lr}, "lr"), grad_scale({o.grad_scale}, "grad_scale"),
      found_inf({o.found_inf}, "found_inf");
  const auto n = static_cast<int64_t>(layers.size());
  simt::Buffer<uint4> workspace(cuda::sparse_adamw_workspace_bytes(n) / 16, "workspace");
  cuda::sparse_adamw(layers.data(), n,
                     {step.data(), lr.data(), grad_scale.data(), found_inf.data(), o.beta1, o.beta2,
                      o.eps, o.weight_decay, o.seed},
                     workspace.data(), nullptr);
}

// Against the formula in float64. `index` is the layer's place in the list.
template <typename B, typename W>
static void check(const Layer<B, W>& a, const Numbers& o, int64_t index) {
  SCOPED_TRACE(::testing::Message()
               << "L " << a.L << " layer " << index << " master " << a.has_master << " origin "
               << a.has_origin << " seed " << o.seed);
  using Acc = typename Layer<B, W>::Acc;
  const auto m = a.m_device.values(), v = a.v_device.values();
  const auto blocks = a.blocks_device.values();
  const auto w = a.w_device.values();
  const auto master = a.has_master ? a.master_device.values() : std::vector<float>();
  const bool stochastic = o.seed >= 0 && std::is_same_v<B, bf16> && !a.has_master;
  const uint32_t key = layer_key(step_key(o.seed, static_cast<int64_t>(o.step)), index);
  std::vector<W> want_w = a.w;
  const double u = unit_of<Acc>();
  int64_t moved = 0, up = 0, count = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    const auto s = static_cast<size_t>(at / (a.L * a.L));
    const int64_t n = a.rows[s] * a.L + at / a.L % a.L, k = a.cols[s] * a.L + at % a.L;
    if (n >= a.N || k >= a.K) {
      ASSERT_TRUE(same_bits(blocks[i], a.blocks[i]) && same_bits(m[i], a.m[i]) &&
                  same_bits(v[i], a.v[i]))
          << "padding";
      continue;
    }
    const double g = to_double(a.grad[i]) * o.grad_scale, m0 = a.m[i], v0 = a.v[i];
    const double p0 = a.has_master ? a.master[i] : to_double(a.blocks[i]);
    const double m1 = m0 + (1 - o.beta1) * (g - m0), v1 = o.beta2 * v0 + (1 - o.beta2) * g * g;
    const double update = o.lr / (1 - std::pow(o.beta1, o.step)) * m1 /
                          (std::sqrt(v1) / std::sqrt(1 - std::pow(o.beta2, o.step)) + o.eps);
    const double to = a.has_origin ? to_double(a.origin[i]) : 0;
    const double p1 = p0 - o.lr * o.weight_decay * (p0 - to) - update;
    // m: the scaled gradient, two differences and a product round once each, as do the factors.
    const double m_error = 4 * u * (std::abs(m0) + std::abs(g));
    const double v_error = 6 * u * v1;
    // m / (sqrt(v) / c + eps): m's own error, and at most 8 roundings of the quotient; then the
    // factor of p (or of its distance), its product and the differences.
    const double p_error = std::abs(update) * (m_error / std::abs(m1) + 10 * u) +
                           4 * u * (std::abs(p0) + std::abs(to) + std::abs(update));
    ASSERT_LE(std::abs(m[i] - m1), m_error) << i;
    ASSERT_LE(std::abs(v[i] - v1), v_error) << i;
    if (a.has_master) {
      ASSERT_LE(std::abs(master[i] - p1), p_error) << i;
      ASSERT_TRUE(same_bits(blocks[i], convert<B>::from(master[i]))) << i;
    } else if (stochastic) {
      // One of the two neighbours, chosen by the CPU's random bits wherever the error of p1 does
      // not matter.
      const uint32_t random = random_bits(key, at);
      if constexpr (std::is_same_v<B, bf16>) {
        const bf16 low = cpu::to_bf16_stochastic(static_cast<float>(p1 - p_error), random);
        const bf16 high = cpu::to_bf16_stochastic(static_cast<float>(p1 + p_error), random);
        ASSERT_TRUE(same_bits(blocks[i], low) || same_bits(blocks[i], high)) << i;
        up += std::abs(to_double(blocks[i])) > std::abs(p1);
      }
    } else {
      ASSERT_LE(std::abs(to_double(blocks[i]) - p1),
                p_error + unit_of<B>() * std::max(std::abs(p1) + p_error, least_normal<B>()))
          << i;
    }
    ++count;
    moved += !same_bits(blocks[i], a.blocks[i]);
    want_w[a.w_NK.at(n, k)] =
        a.has_master ? convert<W>::from(master[i]) : convert<W>::from(blocks[i]);
  }
  EXPECT_TRUE(same_bits(w, want_w)) << "the weight holds the blocks and is else as it was";
  EXPECT_GE(moved, (count + 1) / 2);
  if (stochastic) {
    EXPECT_NEAR(static_cast<double>(up), count / 2.0, 4 * std::sqrt(count));
  }
}

template <typename P>
class AdamWTest : public ::testing::Test {};
using Pairs = ::testing::Types<Pair<float, float>, Pair<float, bf16>, Pair<bf16, bf16>,
                               Pair<f16, f16>, Pair<bf16, float>, Pair<double, double>,
                               Pair<double, bf16>, Pair<float, double>>;  // blocks, weight
TYPED_TEST_SUITE(AdamWTest, Pairs);

TYPED_TEST(AdamWTest, FollowsTheFormula) {
  using B = typename TypeParam::From;
  using W = typename TypeParam::To;
  simt::for_each_seed(simt::orders, [] {
    for (const bool with_master : {false, true}) {
      if (with_master && sizeof(B) != 2) continue;
      for (const char layout : {'r', 'c', 's', 'o', 'p'}) {
        Layer<B, W> ragged(90, 72, 32, {0, 1, 2, 2}, {1, 2, 0, 2}, layout, with_master, 1, true);
        Layer<B, W> small(20, 48, 16, {0, 1}, {2, 0}, layout, with_master, 2);
        Layer<B, W> none(16, 16, 16, {}, {}, layout, with_master, 3);
        Layer<B, W> odd(37, 41, 19, {0, 1}, {2, 1}, layout, with_master, 4, layout != 'r');
        Layer<B, W> large(128, 256, 128, {0}, {1}, layout, with_master, 5);
        Numbers o;
        o.seed = layout == 'o' ? -1 : 12345678901;
        run({ragged.args(), small.args(), none.args(), odd.args(), large.args()}, o);
        check(ragged, o, 0);
        check(small, o, 1);
        check(odd, o, 3);
        check(large, o, 4);
      }
    }
  });
}

TYPED_TEST(AdamWTest, MovesTheFewestSectors) {
  using B = typename TypeParam::From;
  using W = typename TypeParam::To;
  using Acc = typename Layer<B, W>::Acc;
  for (const int64_t L : {16, 64, 256}) {
    for (const bool with_master : {false, true}) {
      if (with_master && sizeof(B) != 2) continue;
      Layer<B, W> layer(2 * L, 3 * L, L, {0, 1, 1}, {2, 0, 1}, 'r', with_master, 1, L == 64);
      run({layer.args()}, {});
      check(layer, {}, 0);
      if (!simt::counts_traffic) continue;
      const simt::Stats& stats = simt::last_stats("sparse_adamw");
      EXPECT_EQ(stats.global_load.excess(), 0u) << stats.report();
      EXPECT_EQ(stats.plain_global, 0u);
      if (sizeof(W) <= sizeof(Acc)) {
        EXPECT_EQ(stats.global_store.excess(), 0u) << stats.report();
        const size_t bytes = 2 * sizeof(Acc) + sizeof(B) + sizeof(W) + (with_master ? 4 : 0);
        EXPECT_EQ(stats.global_store.sectors, static_cast<uint64_t>(3 * L * L) * bytes / 32);
      }
    }
  }
}

TYPED_TEST(AdamWTest, WritesNothingAfterAnInf) {
  using B = typename TypeParam::From;
  using W = typename TypeParam::To;
  Layer<B, W> layer(40, 72, 32, {0, 1}, {1, 2}, 'r', sizeof(B) == 2, 1);
  Numbers o;
  o.found_inf = 1;
  run({layer.args()}, o);
  EXPECT_TRUE(same_bits(layer.w_device.values(), layer.w));
  EXPECT_TRUE(same_bits(layer.blocks_device.values(), layer.blocks));
  EXPECT_TRUE(same_bits(layer.m_device.values(), layer.m));
  EXPECT_TRUE(same_bits(layer.v_device.values(), layer.v));
  if (layer.has_master) {
    EXPECT_TRUE(same_bits(layer.master_device.values(), layer.master));
  }
}

TEST(AdamW, LayersOfAllTypesInOneLaunch) {
  Layer<float, bf16> a(64, 64, 32, {0, 1}, {1, 0}, 'r', false, 1);
  Layer<bf16, bf16> b(64, 64, 16, {0, 3}, {1, 2}, 'r', true, 2);
  Layer<double, double> c(64, 64, 64, {0}, {0}, 'r', false, 3);
  Layer<bf16, f16> d(64, 64, 32, {1}, {1}, 'r', false, 4);
  Numbers o;
  o.seed = 7;
  run({a.args(), b.args(), c.args(), d.args()}, o);
  check(a, o, 0);
  check(b, o, 1);
  check(c, o, 2);
  check(d, o, 3);
}

TEST(AdamW, HundredsOfLayers) {  // more than one page of the table
  std::vector<std::unique_ptr<Layer<float, float>>> layers;
  std::vector<cuda::AdamWLayer> args;
  for (unsigned i = 0; i < 130; ++i) {
    const int32_t at = static_cast<int32_t>(i % 3);
    const std::vector<int32_t> index(i % 4 == 3 ? 0 : 1, at);
    layers.push_back(
        std::make_unique<Layer<float, float>>(48, 48, 16, index, index, 'r', false, i));
    args.push_back(layers.back()->args());
  }
  run(args, {});
  for (size_t i = 0; i < layers.size(); ++i) check(*layers[i], {}, static_cast<int64_t>(i));
}

TEST(AdamW, NoLayers) {
  run({}, {});
  Layer<float, float> none(16, 16, 16, {}, {}, 'r', false, 1);
  run({none.args()}, {});
}

TEST(AdamW, AnIndexBeyondTheWeightStopsTheKernel) {
  Layer<float, float> layer(32, 32, 16, {2}, {0}, 'r', false, 1);
  EXPECT_STOPS(run({layer.args()}, {}));
}

template <typename T>
class GradNormTest : public ::testing::Test {};
TYPED_TEST_SUITE(GradNormTest, Elements);

static double norm_of(const std::vector<cuda::Gradient>& grads) {
  const auto n = static_cast<int64_t>(grads.size());
  simt::Buffer<uint4> workspace((cuda::grad_norm_workspace_bytes(grads.data(), n) + 15) / 16,
                                "workspace");
  simt::Buffer<double> norm(1, "norm");
  cuda::grad_norm(grads.data(), n, norm.data(), workspace.data(), nullptr);
  return norm.values()[0];
}

TYPED_TEST(GradNormTest, OfSeveralGradients) {
  std::vector<simt::Buffer<TypeParam>> buffers;
  std::vector<cuda::Gradient> grads;
  double sum = 0, terms = 0;
  for (const int64_t size : {0, 1, 7, 1000, 16384, 16385, 40003}) {
    for (const int64_t offset : {0, 1}) {  // of an address that is no multiple of 16 bytes
      const auto values = random_values<TypeParam>(size + offset, static_cast<unsigned>(size));
      buffers.emplace_back(values, "grad");
      grads.push_back({buffers.back().data() + offset, size, dtype_of<TypeParam>()});
      for (size_t i = static_cast<size_t>(offset); i < values.size(); ++i) {
        sum += to_double(values[i]) * to_double(values[i]);
        ++terms;
      }
    }
  }
  const double want = norm_of(grads);
  // Both sums are of float64; each rounds at most once a term.
  EXPECT_NEAR(want, std::sqrt(sum), terms * 0x1p-53 * std::sqrt(sum));
  simt::for_each_seed(3, [&] { EXPECT_EQ(norm_of(grads), want); });
}

TYPED_TEST(GradNormTest, MovesTheFewestSectors) {
  const simt::Buffer<TypeParam> grad(random_values<TypeParam>(40000, 1), "grad");
  norm_of({{grad.data(), 40000, dtype_of<TypeParam>()}});
  expect_minimal_sectors("grad_norm_sums");
  expect_minimal_sectors("grad_norm");
}

TYPED_TEST(GradNormTest, SeesEveryInfAndNan) {
  for (const size_t at : {0, 15, 16, 2047, 16384, 16999}) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      auto values = random_values<TypeParam>(17000, 1);
      values[at] = convert<TypeParam>::from(bad);
      const simt::Buffer<TypeParam> grad(values, "grad");
      EXPECT_FALSE(std::isfinite(norm_of({{grad.data(), 17000, dtype_of<TypeParam>()}})));
    }
  }
}

TEST(GradNorm, OfAllTypesAndOfNone) {
  const simt::Buffer<float> a(std::vector<float>(1000, 3e38f), "a");  // squares beyond float32
  const simt::Buffer<bf16> b(std::vector<bf16>(3, cpu::to_bf16(2)), "b");
  const double root = std::sqrt(1000.0);
  EXPECT_NEAR(norm_of({{a.data(), 1000, DType::f32}, {b.data(), 3, DType::bf16}}),
              static_cast<double>(3e38f) * root, 1e-12 * 3e38 * root);
  EXPECT_EQ(norm_of({{b.data(), 3, DType::bf16}}), std::sqrt(12.0));
  EXPECT_EQ(norm_of({}), 0);
  EXPECT_EQ(norm_of({{a.data(), 0, DType::f32}}), 0);
}

}  // namespace smt_ext::testing
