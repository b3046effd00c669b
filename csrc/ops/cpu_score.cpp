// CPU operators of planning.
#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/block_score.h"
#include "cpu.h"

namespace smt_ext {

static Tensor new_score(const Tensor& like, int64_t N, int64_t K, int64_t L) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(like, {ceil_div(N, L), ceil_div(K, L)},
                                  wide ? ScalarType::Double : ScalarType::Float);
}

static Tensor block_score(const Tensor& g, int64_t block_size, const std::string& metric) {
  check_dim(g, 2, "g");
  check_block_size(block_size);
  const int64_t N = g.size(0), K = g.size(1);
  Tensor score = new_score(g, N, K, block_size);
  cpu::block_score({dtype_of(g, "g"), metric_of(metric), N, K, block_size, g.const_data_ptr(),
                    g.stride(0), g.stride(1), score.mutable_data_ptr()},
                   TorchParallel());
  return score;
}

static Tensor block_score_fused(const Tensor& dy, const Tensor& x, int64_t block_size,
                                const std::string& metric) {
  check_dim(dy, 2, "dy");
  check_dim(x, 2, "x");
  check_block_size(block_size);
  const int64_t T = dy.size(0), N = dy.size(1), K = x.size(1);
  STD_TORCH_CHECK(x.size(0) == T, "x: expected ", T, " rows as dy has, got ", x.size(0));
  STD_TORCH_CHECK(x.scalar_type() == dy.scalar_type(), "x: expected the dtype of dy");
  Tensor score = new_score(dy, N, K, block_size);
  cpu::block_score_fused({dtype_of(dy, "dy"), metric_of(metric), T, N, K, block_size, operand(dy),
                          operand(x), score.mutable_data_ptr()},
                         TorchParallel());
  return score;
}

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CPU, m) {
  m.impl("block_score", TORCH_BOX(&smt_ext::block_score));
  m.impl("block_score_fused", TORCH_BOX(&smt_ext::block_score_fused));
}
