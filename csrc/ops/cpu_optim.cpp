// CPU operators of the optimizer.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../kernels/cpu/grad_norm.h"
#include "../kernels/cpu/sparse_adamw.h"
#include "cpu.h"

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
  const auto layers = check_adamw_layers<cpu::AdamWLayer>(weights, blocks, grads, exp_avgs,
                                                          exp_avg_sqs, masters, rows, cols);
  for (const cpu::AdamWLayer& a : layers) {
    check_range(a.rows, a.S, ceil_div(a.N, a.L), "rows");
    check_range(a.cols, a.S, ceil_div(a.K, a.L), "cols");
  }
  const cpu::AdamWOptions args{
      *scalar(lr, "lr"),     beta1, beta2, eps, weight_decay, *scalar(grad_scale, "grad_scale"),
      *scalar(step, "step"), seed};
  if (*scalar(found_inf, "found_inf") != 0) return;
  cpu::sparse_adamw(layers.data(), static_cast<int64_t>(layers.size()), args, TorchParallel());
}

static Tensor grad_norm(const std::vector<Tensor>& grads) {
  const auto list = check_gradients<cpu::Gradient>(grads);
  Tensor out = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
  *out.mutable_data_ptr<double>() =
      cpu::grad_norm(list.data(), static_cast<int64_t>(list.size()), TorchParallel());
  return out;
}

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CPU, m) {
  m.impl("sparse_adamw_step_", TORCH_BOX(&smt_ext::sparse_adamw_step_));
  m.impl("grad_norm", TORCH_BOX(&smt_ext::grad_norm));
}
