// CPU operators of planning.
#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/block_score.h"
#include "cpu.h"

namespace smt_ext {

static Tensor block_score(const Tensor& g, int64_t block_size, const std::string& metric) {
  check_score(g, block_size);
  const int64_t N = g.size(0), K = g.size(1);
  Tensor score = new_score(g, N, K, block_size);
  cpu::block_score({dtype_of(g, "g"), metric_of(metric), N, K, block_size, g.const_data_ptr(),
                    g.stride(0), g.stride(1), score.mutable_data_ptr()},
                   TorchParallel());
  return score;
}

static Tensor block_score_fused(const Tensor& dy, const Tensor& x, int64_t block_size,
                                const std::string& metric, bool /*allow_tf32*/) {
  check_score_fused(dy, x, block_size);
  const int64_t T = dy.size(0), N = dy.size(1), K = x.size(1);
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
