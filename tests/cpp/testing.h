// What the checks of the CPU kernels share: shapes, exact-size buffers, float64 references, threads
// that take their work in shuffled order.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "convert.h"
#include "parallel.h"
#include "tile_gemm.h"

namespace smt_ext::cpu::testing {

struct Product {
  int64_t T, N, K, L;
};
constexpr Product kProducts[] = {
#include "../products.inc"
};

// Runs the ranges on several threads, in an order that changes with the seed.
class ShuffledThreads final : public Parallel {
 public:
  explicit ShuffledThreads(int threads, unsigned seed = 0) : threads_(threads), seed_(seed) {}

  void run(int64_t n, int64_t grain,
           const std::function<void(int64_t, int64_t)>& body) const override {
    std::vector<std::pair<int64_t, int64_t>> ranges;
    // Ranges of one and of several grains, as a pool may form them.
    for (int64_t begin = 0, i = 0; begin < n; ++i) {
      const int64_t end = std::min(n, begin + grain * (threads_ == 1 ? n : 1 + i % 3));
      ranges.emplace_back(begin, end);
      begin = end;
    }
    std::shuffle(ranges.begin(), ranges.end(), std::mt19937(seed_));
    std::vector<std::thread> pool;
    for (int t = 0; t < threads_; ++t) {
      pool.emplace_back([&, t] {
        for (size_t i = t; i < ranges.size(); i += threads_)
          body(ranges[i].first, ranges[i].second);
      });
    }
    for (std::thread& thread : pool) thread.join();
  }

 private:
  int threads_;
  unsigned seed_;
};

// Elements of one dtype on the heap, of exactly the size asked for, so that AddressSanitizer sees
// every access beyond them; with conversions to and from double.
class Buffer {
 public:
  Buffer(DType dtype, int64_t size)
      : dtype_(dtype), size_(size), bytes_(new char[size * size_of(dtype) + (size == 0)]) {
    for (int64_t i = 0; i < size; ++i) set(i, 0);
  }
  static Buffer random(DType dtype, int64_t size, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    Buffer buffer(dtype, size);
    for (int64_t i = 0; i < size; ++i) buffer.set(i, normal(generator));
    return buffer;
  }

  void* data() { return bytes_.get(); }
  const void* data() const { return bytes_.get(); }
  int64_t size() const { return size_; }
  DType dtype() const { return dtype_; }

  double operator[](int64_t i) const {
    return dispatch(dtype_, [&](auto type) {
      return to_double(static_cast<const decltype(type)*>(data())[i]);
    });
  }
  void set(int64_t i, double value) {
    dispatch(dtype_, [&](auto type) {
      using T = decltype(type);
      static_cast<T*>(data())[i] = convert<T>::from(value);
    });
  }
  void fill(double value) {
    for (int64_t i = 0; i < size_; ++i) set(i, value);
  }
  bool same_bits(const Buffer& other) const {
    return size_ == other.size_ && dtype_ == other.dtype_ &&
           std::equal(bytes_.get(), bytes_.get() + size_ * size_of(dtype_), other.bytes_.get());
  }
  Buffer copy() const {
    Buffer result(dtype_, size_);
    std::copy(bytes_.get(), bytes_.get() + size_ * size_of(dtype_), result.bytes_.get());
    return result;
  }

 private:
  DType dtype_;
  int64_t size_;
  std::unique_ptr<char[]> bytes_;
};

// A (rows, cols) matrix of any strides inside a buffer of exactly the reach of its last element.
struct Matrix {
  Buffer buffer;
  int64_t rows, cols, stride_row, stride_col;

  // layout: 'r' rows together, 'c' columns together (transposed), 's' every third element
  static Matrix random(DType dtype, int64_t rows, int64_t cols, char layout, unsigned seed) {
    const int64_t step = layout == 's' ? 3 : 1;
    const int64_t stride_row = layout == 'c' ? 1 : cols * step;
    const int64_t stride_col = layout == 'c' ? rows : step;
    const int64_t reach = rows && cols ? (rows - 1) * stride_row + (cols - 1) * stride_col + 1 : 0;
    return {Buffer::random(dtype, reach, seed), rows, cols, stride_row, stride_col};
  }
  double operator()(int64_t i, int64_t j) const { return buffer[i * stride_row + j * stride_col]; }
  // Row by row, for references that read each element many times.
  std::vector<double> values() const {
    std::vector<double> out;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) out.push_back((*this)(i, j));
    }
    return out;
  }
  Operand operand() const { return {buffer.data(), stride_row, stride_col}; }
};

// Unit roundoff of what sums are kept in, and of a stored value.
inline double unit_of_sums(DType dtype) { return dtype == DType::f64 ? 0x1p-53 : 0x1p-24; }
inline double unit_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 0x1p-53;
    case DType::f32:
      return 0x1p-24;
    case DType::bf16:
      return 0x1p-8;
    default:
      return 0x1p-11;
  }
}

inline std::string name_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return "f64";
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    default:
      return "f16";
  }
}

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

// Every dtype as a parameterised suite's name.
struct DTypeName {
  template <typename Info>
  std::string operator()(const Info& info) const {
    return name_of(info.param);
  }
};

}  // namespace smt_ext::cpu::testing
