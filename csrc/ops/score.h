// Operators of planning.
#pragma once

#include "../kernels/common/block_score.h"
#include "checks.h"

namespace smt_ext {

inline Metric metric_of(const std::string& name) {
  if (name == "mean_abs") return Metric::mean_abs;
  if (name == "mean") return Metric::mean;
  if (name == "l1") return Metric::l1;
  if (name == "l2") return Metric::l2;
  STD_TORCH_CHECK(false, "metric: expected mean_abs, mean, l1 or l2, got ", name);
}

// (R, C) of float32, or float64 for float64.
inline Tensor new_score(const Tensor& like, int64_t N, int64_t K, int64_t L) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(like, {ceil_div(N, L), ceil_div(K, L)},
                                  wide ? ScalarType::Double : ScalarType::Float);
}

template <typename Device>
Tensor block_score(const Tensor& g, int64_t block_size, const std::string& metric) {
  check_dim(g, 2, "g");
  check_block_size(block_size);
  const Device device(g);
  const int64_t N = g.size(0), K = g.size(1);
  Tensor score = new_score(g, N, K, block_size);
  device.block_score({dtype_of(g, "g"), metric_of(metric), N, K, block_size, g.const_data_ptr(),
                      g.stride(0), g.stride(1), score.mutable_data_ptr()});
  return score;
}

template <typename Device>
Tensor block_score_fused(const Tensor& dy, const Tensor& x, int64_t block_size,
                         const std::string& metric, bool allow_tf32) {
  check_dim(dy, 2, "dy");
  check_dim(x, 2, "x");
  check_block_size(block_size);
  check_device(x, dy, "x");
  STD_TORCH_CHECK(x.size(0) == dy.size(0), "x: expected ", dy.size(0), " rows as dy has, got ",
                  x.size(0));
  STD_TORCH_CHECK(x.scalar_type() == dy.scalar_type(), "x: expected the dtype of dy");
  const Device device(dy);
  const int64_t T = dy.size(0), N = dy.size(1), K = x.size(1);
  Tensor score = new_score(dy, N, K, block_size);
  device.block_score_fused({dtype_of(dy, "dy"), metric_of(metric), T, N, K, block_size, operand(dy),
                            operand(x), score.mutable_data_ptr(), allow_tf32});
  return score;
}

}  // namespace smt_ext
