#include "grad_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"

namespace smt_ext::cpu {

constexpr int64_t kChunkElements = 16384;
constexpr int64_t kLanes = 16;

template <typename T>
SMT_CLONES double sum_of_squares(const T* x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const double v = to_double(x[i + l]);
      lanes[l] += v * v;
    }
  }
  for (; i < n; ++i) lanes[i % kLanes] += to_double(x[i]) * to_double(x[i]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

double grad_norm(const Gradient* grads, int64_t n, const Parallel& parallel) {
  struct Chunk {
    const Gradient* grad;
    int64_t begin;
  };
  std::vector<Chunk> chunks;
  for (const Gradient* grad = grads; grad < grads + n; ++grad) {
    for (int64_t begin = 0; begin < grad->numel; begin += kChunkElements) {
      chunks.push_back({grad, begin});
    }
  }
  std::vector<double> sums(chunks.size());
  parallel.run(static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Gradient& grad = *chunks[i].grad;
      const int64_t count = std::min(kChunkElements, grad.numel - chunks[i].begin);
      sums[i] = dispatch(grad.dtype, [&](auto type) {
        using T = decltype(type);
        return sum_of_squares(static_cast<const T*>(grad.data) + chunks[i].begin, count);
      });
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace smt_ext::cpu
