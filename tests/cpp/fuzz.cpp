// Random calls of every CPU kernel, for AddressSanitizer and UndefinedBehaviorSanitizer to watch:
//
//   fuzz_kernels [SECONDS [SEED]]
//
// Buffers end where their last element does. Beside what sanitizers see: a kernel leaves its inputs
// as they are, writes nothing outside of its blocks, and gives the same bits on any threads.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "block_grad.h"
#include "block_score.h"
#include "gather_blocks.h"
#include "gather_columns.h"
#include "grad_norm.h"
#include "sparse_adamw.h"
#include "testing.h"

namespace smt_ext::cpu::testing {

static uint64_t seed_of_run, number_of_case;

#define REQUIRE(condition)                                                        \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s is false in case %llu of seed %llu\n", #condition, \
                   static_cast<unsigned long long>(number_of_case),               \
                   static_cast<unsigned long long>(seed_of_run));                 \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

struct Random {
  std::mt19937_64 generator;
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
  }
  template <typename T>
  T of(std::initializer_list<T> list) {
    return list.begin()[between(0, static_cast<int64_t>(list.size()) - 1)];
  }
  DType dtype() { return of({DType::f32, DType::bf16, DType::f16, DType::f64}); }
  char layout() { return of({'r', 'c', 's'}); }
  ShuffledThreads threads() {
    return ShuffledThreads(static_cast<int>(between(1, 4)), static_cast<unsigned>(generator()));
  }
  // Mostly ordinary numbers, and now and then what breaks arithmetic.
  void spoil(Buffer& buffer) {
    if (between(0, 3) || !buffer.size()) return;
    for (int i = 0; i < 4; ++i) {
      buffer.set(between(0, buffer.size() - 1),
                 of({0.0, -0.0, 1e-45, 1e20, -3e38, 1e300, HUGE_VAL, -HUGE_VAL, double(NAN)}));
    }
  }
  Matrix matrix(DType dtype, int64_t rows, int64_t cols) {
    Matrix m = Matrix::random(dtype, rows, cols, layout(), static_cast<unsigned>(generator()));
    spoil(m.buffer);
    return m;
  }
  Buffer buffer(DType dtype, int64_t size) {
    Buffer b = Buffer::random(dtype, size, static_cast<unsigned>(generator()));
    spoil(b);
    return b;
  }
};

// A grid of blocks over (N, K), and a random choice of them in order.
struct Grid {
  int64_t N, K, L, S;
  std::vector<int32_t> rows, cols;

  explicit Grid(Random& r) : L(r.of<int64_t>({16, 17, 32, 48, 64, 100, 128, 200, 256})) {
    N = r.between(1, 3 * L), K = r.between(1, 3 * L);
    for (int64_t row = 0; row * L < N; ++row) {
      for (int64_t col = 0; col * L < K; ++col) {
        if (r.between(0, 1)) {
          rows.push_back(static_cast<int32_t>(row));
          cols.push_back(static_cast<int32_t>(col));
        }
      }
    }
    S = static_cast<int64_t>(rows.size());
  }
  bool selected(int64_t n, int64_t k) const {
    for (int64_t s = 0; s < S; ++s) {
      if (rows[s] == n / L && cols[s] == k / L) return true;
    }
    return false;
  }
};

static void copies(Random& r) {
  const Grid g(r);
  const DType dtype = r.dtype(), other = r.dtype();
  Matrix w = r.matrix(dtype, g.N, g.K);
  const Buffer before = w.buffer.copy();
  Buffer blocks(other, g.S * g.L * g.L), again(other, g.S * g.L * g.L);
  BlocksArgs args{dtype,         other,           g.N,          g.K,          g.L,
                  g.S,           w.buffer.data(), w.stride_row, w.stride_col, g.rows.data(),
                  g.cols.data(), blocks.data()};
  gather_blocks(args, r.threads());
  args.blocks = again.data();
  gather_blocks(args, r.threads());
  REQUIRE(blocks.same_bits(again));
  REQUIRE(w.buffer.same_bits(before));
  Buffer values = r.buffer(other, g.S * g.L * g.L);
  args.blocks = values.data();
  scatter_blocks(args, r.threads());
  for (int64_t i = 0; i < 200; ++i) {
    const int64_t n = r.between(0, g.N - 1), k = r.between(0, g.K - 1);
    const int64_t at = n * w.stride_row + k * w.stride_col;
    const bool same = w.buffer[at] == before[at] || std::isnan(before[at]);
    REQUIRE(g.selected(n, k) || same);
  }
}

static void gradient(Random& r) {
  const Grid g(r);
  const DType dtype = r.dtype();
  const DType out_dtype = dtype == DType::f64 ? dtype : r.of({DType::f32, DType::bf16, DType::f16});
  const int64_t T = r.of<int64_t>({0, 1, r.between(1, 70), r.between(1, 300)});
  std::vector<int32_t> chosen(g.cols), slots;
  std::sort(chosen.begin(), chosen.end());
  chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
  int64_t U = 0;
  for (const int32_t col : chosen) U += std::min(g.L, g.K - col * g.L);
  for (const int32_t col : g.cols) {
    slots.push_back(
        static_cast<int32_t>(std::lower_bound(chosen.begin(), chosen.end(), col) - chosen.begin()));
  }
  const Matrix x = r.matrix(dtype, T, g.K), dy = r.matrix(dtype, T, g.N);
  Buffer x_cols(dtype, T * U);
  gather_columns({dtype, dtype, T, g.K, U, g.L, x.buffer.data(), x.stride_row, x.stride_col,
                  chosen.data(), x_cols.data(), static_cast<int64_t>(chosen.size())},
                 r.threads());
  Buffer out(out_dtype, g.S * g.L * g.L), again = out.copy();
  BlockGradArgs args{dtype,
                     out_dtype,
                     T,
                     U,
                     g.L,
                     g.S,
                     {{dy.operand(), g.N, 0}},
                     {x_cols.data(), U, 1},
                     g.rows.data(),
                     slots.data(),
                     out.data(),
                     r.between(0, 1) == 1};
  block_grad(args, r.threads());
  args.out = again.data();
  block_grad(args, r.threads());
  REQUIRE(out.same_bits(again));
  const Gradient list{out.data(), out.size(), out_dtype};
  const double norm = grad_norm(&list, 1, r.threads());
  REQUIRE(norm >= 0 || std::isnan(norm));
}

static void score(Random& r) {
  const Grid g(r);
  const DType dtype = r.dtype(), out = dtype == DType::f64 ? dtype : DType::f32;
  const Metric metric = r.of({Metric::mean_abs, Metric::mean, Metric::l1, Metric::l2});
  const int64_t T = r.between(0, 100);
  const int64_t count = ((g.N + g.L - 1) / g.L) * ((g.K + g.L - 1) / g.L);
  const Matrix dw = r.matrix(dtype, g.N, g.K), dy = r.matrix(dtype, T, g.N),
               x = r.matrix(dtype, T, g.K);
  Buffer scores[4] = {Buffer(out, count), Buffer(out, count), Buffer(out, count),
                      Buffer(out, count)};
  for (int i = 0; i < 2; ++i) {
    block_score({dtype, metric, g.N, g.K, g.L, dw.buffer.data(), dw.stride_row, dw.stride_col,
                 scores[i].data()},
                r.threads());
    block_score_fused(
        {dtype, metric, T, g.N, g.K, g.L, dy.operand(), x.operand(), scores[2 + i].data()},
        r.threads());
  }
  REQUIRE(scores[0].same_bits(scores[1]) && scores[2].same_bits(scores[3]));
}

static void step(Random& r) {
  const Grid g(r);
  const DType dtype = r.dtype(), moments = dtype == DType::f64 ? dtype : DType::f32;
  const int64_t size = g.S * g.L * g.L;
  Matrix w = r.matrix(r.dtype(), g.N, g.K);
  const Buffer before = w.buffer.copy();
  Buffer blocks = r.buffer(dtype, size), grad = r.buffer(dtype, size), m(moments, size),
         v(moments, size), master = r.buffer(DType::f32, size),
         origin = r.buffer(r.of({DType::bf16, DType::f16, moments}), size);
  const bool has_master = (dtype == DType::bf16 || dtype == DType::f16) && r.between(0, 1) == 1;
  // Finite gradients, as the step is skipped otherwise; of any size.
  for (int64_t i = 0; i < size; ++i) {
    if (!std::isfinite(grad[i])) grad.set(i, 1);
  }
  const AdamWLayer layer{w.buffer.dtype(),
                         dtype,
                         g.N,
                         g.K,
                         g.L,
                         g.S,
                         w.buffer.data(),
                         w.stride_row,
                         w.stride_col,
                         g.rows.data(),
                         g.cols.data(),
                         blocks.data(),
                         grad.data(),
                         m.data(),
                         v.data(),
                         has_master ? static_cast<float*>(master.data()) : nullptr,
                         r.between(0, 1) == 1 ? origin.data() : nullptr,
                         origin.dtype()};
  sparse_adamw(&layer, 1,
               {1e-2, 0.9, 0.99, 1e-8, 0.1, r.of({1.0, 0.5, 1e10}), double(r.between(1, 9)),
                r.between(-1, 3)},
               r.threads());
  for (int64_t i = 0; i < size; ++i) REQUIRE(std::isfinite(m[i]) && std::isfinite(v[i]));
  for (int64_t i = 0; i < 200; ++i) {
    const int64_t n = r.between(0, g.N - 1), k = r.between(0, g.K - 1);
    const int64_t at = n * w.stride_row + k * w.stride_col;
    REQUIRE(g.selected(n, k) || w.buffer[at] == before[at] || std::isnan(before[at]));
  }
}

static int fuzz(double seconds, uint64_t seed) {
  seed_of_run = seed;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
         seconds) {
    Random r{std::mt19937_64(seed + number_of_case)};
    void (*const all[])(Random&) = {copies, gradient, score, step};
    all[number_of_case % 4](r);
    ++number_of_case;
  }
  std::printf("%llu cases, clean\n", static_cast<unsigned long long>(number_of_case));
  return 0;
}

}  // namespace smt_ext::cpu::testing

int main(int count, char** values) {
  const double seconds = count > 1 ? std::atof(values[1]) : 60;
  const uint64_t seed = count > 2 ? std::strtoull(values[2], nullptr, 10) : std::random_device()();
  return smt_ext::cpu::testing::fuzz(seconds, seed);
}
