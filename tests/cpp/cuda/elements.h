// What the checks of the memory-bound CUDA kernels share: values of any dtype on the device, and
// float64 views of them.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/kernels/cpu/convert.h"
#include "simt.h"

namespace smt_ext::testing {

using cpu::bf16;
using cpu::convert;
using cpu::f16;
using cpu::to_double;

template <typename T>
constexpr DType dtype_of() {
  if (std::is_same_v<T, bf16>) return DType::bf16;
  if (std::is_same_v<T, f16>) return DType::f16;
  return std::is_same_v<T, double> ? DType::f64 : DType::f32;
}

// Unit roundoff of a stored value.
template <typename T>
constexpr double unit_of() {
  if (std::is_same_v<T, bf16>) return 0x1p-8;
  if (std::is_same_v<T, f16>) return 0x1p-11;
  return std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
}

// Below it, rounding moves a value as far as at it.
template <typename T>
constexpr double least_normal() {
  if (std::is_same_v<T, f16>) return 0x1p-14;
  return std::is_same_v<T, double> ? 0x1p-1022 : 0x1p-126;
}

template <typename T>
std::vector<T> random_values(int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<size_t>(size));
  for (T& value : values) value = convert<T>::from(normal(generator));
  return values;
}

template <typename T>
std::vector<T> random_bits_of(int64_t size, unsigned seed) {  // NaN payloads and infinities too
  std::mt19937_64 generator(seed);
  std::vector<T> values(static_cast<size_t>(size));
  for (T& value : values) {
    const uint64_t bits = generator();
    std::memcpy(&value, &bits, sizeof(T));
  }
  return values;
}

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Strides of a (rows, cols) matrix in memory of exactly the reach of its last element, `offset`
// elements after an aligned address.
struct Layout {
  int64_t rows, cols, stride_row, stride_col, offset;

  // 'r' rows together, 'c' columns together (transposed), 's' every third element, 'o' rows
  // together at an odd address, 'p' rows padded by 16 elements
  static Layout of(char kind, int64_t rows, int64_t cols) {
    if (kind == 'c') return {rows, cols, 1, rows, 0};
    if (kind == 's') return {rows, cols, 3 * cols, 3, 0};
    if (kind == 'p') return {rows, cols, cols + 16, 1, 0};
    return {rows, cols, cols, 1, kind == 'o' ? 1 : 0};
  }
  int64_t reach() const {
    if (rows == 0 || cols == 0) return 0;
    return offset + (rows - 1) * stride_row + (cols - 1) * stride_col + 1;
  }
  size_t at(int64_t i, int64_t j) const {
    return static_cast<size_t>(offset + i * stride_row + j * stride_col);
  }
};

// Every access of the latest launch of `kernel` went through the wrappers and moved no sector that
// it could do without.
inline void expect_minimal_sectors(const std::string& kernel) {
  if (!simt::counts_traffic) return;
  const simt::Stats& stats = simt::last_stats(kernel);
  EXPECT_EQ(stats.global_load.excess(), 0u) << stats.report();
  EXPECT_EQ(stats.global_store.excess(), 0u) << stats.report();
  EXPECT_EQ(stats.plain_global, 0u) << stats.report();
}

template <typename A, typename B>
struct Pair {
  using From = A;
  using To = B;
};

using Elements = ::testing::Types<float, bf16, f16, double>;

}  // namespace smt_ext::testing
