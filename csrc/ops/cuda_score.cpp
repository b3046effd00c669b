// CUDA operators of planning.
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/block_score.h"
#include "cuda.h"

namespace smt_ext {

static Tensor block_score(const Tensor& g, int64_t block_size, const std::string& metric) {
  check_score(g, block_size);
  const OnDeviceOf device(g);
  Tensor score = new_score(g, g.size(0), g.size(1), block_size);
  cuda::block_score({dtype_of(g, "g"), metric_of(metric), g.size(0), g.size(1), block_size,
                     g.const_data_ptr(), g.stride(0), g.stride(1), score.mutable_data_ptr()},
                    device.stream());
  return score;
}

static Tensor block_score_fused(const Tensor& dy, const Tensor& x, int64_t block_size,
                                const std::string& metric, bool allow_tf32) {
  check_score_fused(dy, x, block_size);
  const OnDeviceOf device(dy);
  const int64_t T = dy.size(0), N = dy.size(1), K = x.size(1);
  Tensor score = new_score(dy, N, K, block_size);
  const cuda::BlockScoreFusedArgs args{dtype_of(dy, "dy"),
                                       metric_of(metric),
                                       T,
                                       N,
                                       K,
                                       block_size,
                                       dy.const_data_ptr(),
                                       dy.stride(0),
                                       dy.stride(1),
                                       x.const_data_ptr(),
                                       x.stride(0),
                                       x.stride(1),
                                       score.mutable_data_ptr(),
                                       allow_tf32};
  const Tensor memory = workspace(dy, cuda::block_score_fused_workspace_bytes(args));
  cuda::block_score_fused(args, memory.mutable_data_ptr(), device.stream());
  return score;
}

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CUDA, m) {
  m.impl("block_score", TORCH_BOX(&smt_ext::block_score));
  m.impl("block_score_fused", TORCH_BOX(&smt_ext::block_score_fused));
}
