// CPU operators of the optimizer.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../kernels/cpu/grad_norm.h"
#include "../kernels/cpu/sparse_adamw.h"
#include "cpu.h"

namespace smt_ext {

static double scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Double, name,
                  ": expected one float64 number");
  return *tensor.const_data_ptr<double>();
}

static void check_count(const std::vector<Tensor>& list, size_t count, const char* name) {
  STD_TORCH_CHECK(list.size() == count, name, ": expected ", count, " tensors, one a layer, got ",
                  list.size());
}

static void sparse_adamw_step_(const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& blocks, const std::vector<Tensor>& grads,
                               const std::vector<Tensor>& exp_avgs,
                               const std::vector<Tensor>& exp_avg_sqs,
                               const std::vector<Tensor>& masters, const std::vector<Tensor>& rows,
                               const std::vector<Tensor>& cols, const Tensor& step,
                               const Tensor& lr, const Tensor& grad_scale, const Tensor& found_inf,
                               double beta1, double beta2, double eps, double weight_decay,
                               int64_t seed) {
  const size_t n = blocks.size();
  check_count(weights, n, "weights");
  check_count(grads, n, "grads");
  check_count(exp_avgs, n, "exp_avgs");
  check_count(exp_avg_sqs, n, "exp_avg_sqs");
  if (!masters.empty()) check_count(masters, n, "masters");
  check_count(rows, n, "rows");
  check_count(cols, n, "cols");

  std::vector<cpu::AdamWLayer> layers;
  layers.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& w = weights[i];
    check_dim(w, 2, "weights");
    check_dim(blocks[i], 3, "blocks");
    const int64_t N = w.size(0), K = w.size(1), S = blocks[i].size(0), L = blocks[i].size(1);
    check_block_size(L);
    check_blocks(blocks[i], S, L, "blocks");
    check_blocks(grads[i], S, L, "grads");
    check_blocks(exp_avgs[i], S, L, "exp_avgs");
    check_blocks(exp_avg_sqs[i], S, L, "exp_avg_sqs");
    const DType dtype = dtype_of(blocks[i], "blocks");
    const ScalarType moment = dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(grads[i].scalar_type() == blocks[i].scalar_type(),
                    "grads: expected the dtype of blocks in layer ", i);
    STD_TORCH_CHECK(
        exp_avgs[i].scalar_type() == moment && exp_avg_sqs[i].scalar_type() == moment,
        "exp_avgs, exp_avg_sqs: expected float32 (float64 for float64 blocks) in layer ", i);
    float* master = nullptr;
    if (!masters.empty()) {
      check_blocks(masters[i], S, L, "masters");
      STD_TORCH_CHECK(masters[i].scalar_type() == ScalarType::Float && size_of(dtype) == 2,
                      "masters: expected float32 values of half-precision blocks in layer ", i);
      master = masters[i].mutable_data_ptr<float>();
    }
    const int32_t* row = indices(rows[i], S, "rows");
    const int32_t* col = indices(cols[i], S, "cols");
    check_range(row, S, ceil_div(N, L), "rows");
    check_range(col, S, ceil_div(K, L), "cols");
    layers.push_back({dtype_of(w, "weights"), dtype, N, K, L, S, w.mutable_data_ptr(), w.stride(0),
                      w.stride(1), row, col, blocks[i].mutable_data_ptr(),
                      grads[i].const_data_ptr(), exp_avgs[i].mutable_data_ptr(),
                      exp_avg_sqs[i].mutable_data_ptr(), master});
  }
  if (scalar(found_inf, "found_inf") != 0) return;
  cpu::sparse_adamw(layers.data(), static_cast<int64_t>(n),
                    {scalar(lr, "lr"), beta1, beta2, eps, weight_decay,
                     scalar(grad_scale, "grad_scale"), scalar(step, "step"), seed},
                    TorchParallel());
}

static Tensor grad_norm(const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one gradient");
  std::vector<cpu::Gradient> list;
  for (const Tensor& grad : grads) {
    check_contiguous(grad, "grads");
    list.push_back({grad.const_data_ptr(), grad.numel(), dtype_of(grad, "grads")});
  }
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
