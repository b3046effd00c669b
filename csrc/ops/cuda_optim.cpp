// CUDA operators of the optimizer. Every number stays on the device: nothing waits for the host.
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/grad_norm.h"
#include "../kernels/cuda/sparse_adamw.h"
#include "cuda.h"

namespace smt_ext {

static void sparse_adamw_step_(const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& blocks, const std::vector<Tensor>& grads,
                               const std::vector<Tensor>& exp_avgs,
                               const std::vector<Tensor>& exp_avg_sqs,
                               const std::vector<Tensor>& masters, const std::vector<Tensor>& rows,
                               const std::vector<Tensor>& cols, const Tensor& step,
                               const Tensor& lr, const Tensor& grad_scale, const Tensor& found_inf,
                               double beta1, double beta2, double eps, double weight_decay,
                               int64_t seed) {
  if (blocks.empty()) return;
  const auto layers = check_adamw_layers<cuda::AdamWLayer>(weights, blocks, grads, exp_avgs,
                                                           exp_avg_sqs, masters, rows, cols);
  check_device(step, blocks[0], "step");
  check_device(lr, blocks[0], "lr");
  check_device(grad_scale, blocks[0], "grad_scale");
  check_device(found_inf, blocks[0], "found_inf");
  const OnDeviceOf device(blocks[0]);
  const auto n = static_cast<int64_t>(layers.size());
  const Tensor memory = workspace(blocks[0], cuda::sparse_adamw_workspace_bytes(n));
  cuda::sparse_adamw(layers.data(), n,
                     {scalar(step, "step"), scalar(lr, "lr"), scalar(grad_scale, "grad_scale"),
                      scalar(found_inf, "found_inf"), beta1, beta2, eps, weight_decay, seed},
                     memory.mutable_data_ptr(), device.stream());
}

static Tensor grad_norm(const std::vector<Tensor>& grads) {
  const auto list = check_gradients<cuda::Gradient>(grads);
  const OnDeviceOf device(grads[0]);
  const auto n = static_cast<int64_t>(list.size());
  const Tensor memory = workspace(grads[0], cuda::grad_norm_workspace_bytes(list.data(), n));
  Tensor out = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
  cuda::grad_norm(list.data(), n, out.mutable_data_ptr<double>(), memory.mutable_data_ptr(),
                  device.stream());
  return out;
}

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CUDA, m) {
  m.impl("sparse_adamw_step_", TORCH_BOX(&smt_ext::sparse_adamw_step_));
  m.impl("grad_norm", TORCH_BOX(&smt_ext::grad_norm));
}
