// Quantised weights as numbers: each value is the float32 product of the formula, rounded once, on
// any number of threads; blocks lie where they belong, whatever their dtype, and nowhere else.
#include "dequantize.h"
#include "testing.h"

namespace smt_ext::cpu::testing {

class DequantizeTest : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(All, DequantizeTest, ::testing::ValuesIn(kDTypes), DTypeName());

// A random quantised weight in memory of exactly its size, and the numbers that it stands for.
struct Quantized {
  int bits;
  int64_t N, K, group;
  std::vector<uint8_t> q;
  std::vector<float> absmax, code;

  Quantized(int bits, int64_t N, int64_t K, int64_t group) : bits(bits), N(N), K(K), group(group) {
    std::mt19937 generator(7);
    std::normal_distribution<float> normal;
    q.resize(bits == 4 ? (N * K + 1) / 2 : N * K);
    for (uint8_t& byte : q) byte = static_cast<uint8_t>(generator());
    absmax.resize(bits == 4 ? (N * K + group - 1) / group : N);
    for (float& value : absmax) value = std::abs(normal(generator)) + 0.01f;
    code.resize(16);
    for (float& value : code) value = normal(generator);
  }
  float value(int64_t n, int64_t k) const {
    if (bits == 8) {
      return static_cast<float>(static_cast<int8_t>(q[n * K + k])) * (absmax[n] * (1.0f / 127));
    }
    const int64_t i = n * K + k;
    const int nibble = i % 2 ? q[i / 2] & 15 : q[i / 2] >> 4;
    return code[nibble] * absmax[i / group];
  }
  DequantizeArgs args(Buffer& out, int64_t L, const Buffer& blocks,
                      const std::vector<int32_t>& rows, const std::vector<int32_t>& cols) const {
    return {out.dtype(),
            blocks.dtype(),
            bits,
            N,
            K,
            L,
            static_cast<int64_t>(rows.size()),
            group,
            q.data(),
            absmax.data(),
            code.data(),
            blocks.data(),
            rows.data(),
            cols.data(),
            out.data()};
  }
};

static double rounded(double value, DType dtype) {
  Buffer one(dtype, 1);
  one.set(0, value);
  return one[0];
}

TEST_P(DequantizeTest, ValuesAreThoseOfTheFormula) {
  const Buffer none(DType::f32, 0);
  // Groups of 2 to 4096 values that end within rows; rows of an odd number of values, longer than a
  // part of the loop, of fewer values than a vector.
  for (const int bits : {4, 8}) {
    for (const int64_t K : {1, 15, 96, 1027, 2200}) {
      for (const int64_t group : {2, 24, 64, 4096}) {
        const Quantized weight(bits, 5, K, group);
        Buffer out(GetParam(), 5 * K);
        dequantize_with_blocks(weight.args(out, 32, none, {}, {}), ShuffledThreads(1));
        for (int64_t i = 0; i < 5 * K; ++i) {
          ASSERT_EQ(out[i], rounded(weight.value(i / K, i % K), GetParam())) << bits << " " << i;
        }
      }
    }
  }
}

TEST_P(DequantizeTest, BlocksLieInTheirPlacesAndNowhereElse) {
  const int64_t N = 70, K = 90, L = 32;
  const std::vector<int32_t> rows = {2, 0, 0, 1}, cols = {2, 0, 2, 1};  // two at ragged edges
  for (const int bits : {4, 8}) {
    for (const DType blocks_dtype : kDTypes) {
      const Quantized weight(bits, N, K, 64);
      const Buffer blocks = Buffer::random(blocks_dtype, 4 * L * L, 3);
      Buffer out(GetParam(), N * K);
      dequantize_with_blocks(weight.args(out, L, blocks, rows, cols), ShuffledThreads(3, 5));
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
          double expected = weight.value(n, k);
          for (size_t s = 0; s < rows.size(); ++s) {
            if (rows[s] == n / L && cols[s] == k / L) {
              expected = blocks[(s * L + n % L) * L + k % L];
            }
          }
          ASSERT_EQ(out[n * K + k], rounded(expected, GetParam())) << n << " " << k;
        }
      }
    }
  }
}

TEST_P(DequantizeTest, AnyNumberOfThreadsGivesTheSameBits) {
  const Quantized weight(4, 300, 515, 64);
  const Buffer blocks = Buffer::random(DType::f32, 2 * 64 * 64, 3);
  Buffer one(GetParam(), 300 * 515);
  dequantize_with_blocks(weight.args(one, 64, blocks, {1, 4}, {0, 8}), ShuffledThreads(1));
  for (const int threads : {2, 5}) {
    Buffer out(GetParam(), 300 * 515);
    dequantize_with_blocks(weight.args(out, 64, blocks, {1, 4}, {0, 8}),
                           ShuffledThreads(threads, threads));
    EXPECT_TRUE(out.same_bits(one));
  }
}

TEST_P(DequantizeTest, NoRowsAndNoColumnsAreNothing) {
  const Buffer none(DType::f32, 0);
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{0, 64}, {64, 0}}) {
    const Quantized weight(4, N, K, 64);
    Buffer out(GetParam(), 0);
    dequantize_with_blocks(weight.args(out, 32, none, {}, {}), ShuffledThreads(2));
  }
}

}  // namespace smt_ext::cpu::testing
