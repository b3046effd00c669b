// Operators of the optimizer.
#pragma once

#include <vector>

#include "../kernels/common/grad_norm.h"
#include "../kernels/common/sparse_adamw.h"
#include "checks.h"

namespace smt_ext {

// One number each, on the device of the blocks.
struct AdamWNumbers {
  const double *step, *lr, *grad_scale, *found_inf;
};

struct AdamWConstants {
  double beta1, beta2, eps, weight_decay;
  int64_t seed;
};

inline void check_count(const std::vector<Tensor>& list, size_t count, const char* name) {
  STD_TORCH_CHECK(list.size() == count, name, ": expected ", count, " tensors, one a layer, got ",
                  list.size());
}

// One float64 number.
inline const double* scalar(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Double, name,
                  ": expected one float64 number");
  return tensor.const_data_ptr<double>();
}

// Where blocks of at most 512 with 32-bit indices end at the latest, and more.
constexpr int64_t kNoEdge = int64_t{1} << 45;

// What sparse_adamw_step_ requires of its lists; and the kernel's arguments.
template <typename Device>
std::vector<AdamWLayer> check_adamw_layers(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& blocks,
    const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
    const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& masters,
    const std::vector<Tensor>& rows, const std::vector<Tensor>& cols,
    const std::vector<Tensor>& origins) {
  const size_t n = blocks.size();
  check_count(weights, n, "weights");
  check_count(grads, n, "grads");
  check_count(exp_avgs, n, "exp_avgs");
  check_count(exp_avg_sqs, n, "exp_avg_sqs");
  if (!masters.empty()) check_count(masters, n, "masters");
  check_count(rows, n, "rows");
  check_count(cols, n, "cols");
  if (!origins.empty()) check_count(origins, n, "origins");

  std::vector<AdamWLayer> layers;
  layers.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& w = weights[i];
    check_dim(w, 2, "weights");
    check_dim(blocks[i], 3, "blocks");
    const int64_t S = blocks[i].size(0), L = blocks[i].size(1);
    check_block_size(L);
    check_blocks(blocks[i], S, L, "blocks");
    check_blocks(grads[i], S, L, "grads");
    check_blocks(exp_avgs[i], S, L, "exp_avgs");
    check_blocks(exp_avg_sqs[i], S, L, "exp_avg_sqs");
    for (const auto* list : {&weights, &blocks, &grads, &exp_avgs, &exp_avg_sqs, &rows, &cols}) {
      check_device((*list)[i], blocks[0], "a tensor of sparse_adamw_step_");
    }
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
      check_device(masters[i], blocks[0], "masters");
      STD_TORCH_CHECK(masters[i].scalar_type() == ScalarType::Float && size_of(dtype) == 2,
                      "masters: expected float32 values of half-precision blocks in layer ", i);
      master = masters[i].mutable_data_ptr<float>();
    }
    const void* origin = nullptr;
    DType origin_dtype = dtype;
    if (!origins.empty()) {
      check_blocks(origins[i], S, L, "origins");
      check_device(origins[i], blocks[0], "origins");
      origin_dtype = dtype_of(origins[i], "origins");
      STD_TORCH_CHECK(origin_dtype != DType::f64 || dtype == DType::f64,
                      "origins: expected at most float32 where blocks are not float64, in layer ",
                      i);
      origin = origins[i].const_data_ptr();
    }
    const int32_t* row = indices(rows[i], S, "rows");
    const int32_t* col = indices(cols[i], S, "cols");
    // Without a weight to write, no edge of one cuts a block.
    const bool has_weight = w.numel() > 0;
    const int64_t N = has_weight ? w.size(0) : kNoEdge, K = has_weight ? w.size(1) : kNoEdge;
    Device::check_range(row, S, ceil_div(N, L), "rows");
    Device::check_range(col, S, ceil_div(K, L), "cols");
    layers.push_back({dtype_of(w, "weights"), dtype, N, K, L, S,
                      has_weight ? w.mutable_data_ptr() : nullptr, has_weight ? w.stride(0) : 0,
                      has_weight ? w.stride(1) : 1, row, col, blocks[i].mutable_data_ptr(),
                      grads[i].const_data_ptr(), exp_avgs[i].mutable_data_ptr(),
                      exp_avg_sqs[i].mutable_data_ptr(), master, origin, origin_dtype});
  }
  return layers;
}

template <typename Device>
void sparse_adamw_step_(const std::vector<Tensor>& weights, const std::vector<Tensor>& blocks,
                        const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
                        const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& masters,
                        const std::vector<Tensor>& rows, const std::vector<Tensor>& cols,
                        const Tensor& step, const Tensor& lr, const Tensor& grad_scale,
                        const Tensor& found_inf, double beta1, double beta2, double eps,
                        double weight_decay, int64_t seed, const std::vector<Tensor>& origins) {
  const auto layers = check_adamw_layers<Device>(weights, blocks, grads, exp_avgs, exp_avg_sqs,
                                                 masters, rows, cols, origins);
  const AdamWNumbers numbers{scalar(step, "step"), scalar(lr, "lr"),
                             scalar(grad_scale, "grad_scale"), scalar(found_inf, "found_inf")};
  if (layers.empty()) return;
  check_device(step, blocks[0], "step");
  check_device(lr, blocks[0], "lr");
  check_device(grad_scale, blocks[0], "grad_scale");
  check_device(found_inf, blocks[0], "found_inf");
  Device(blocks[0]).sparse_adamw(layers, numbers, {beta1, beta2, eps, weight_decay, seed});
}

template <typename Device>
Tensor grad_norm(const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one gradient");
  std::vector<Gradient> list;
  for (const Tensor& grad : grads) {
    check_contiguous(grad, "grads");
    check_device(grad, grads[0], "grads");
    list.push_back({grad.const_data_ptr(), grad.numel(), dtype_of(grad, "grads")});
  }
  const Device device(grads[0]);
  Tensor out = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
  device.grad_norm(list, out.mutable_data_ptr<double>());
  return out;
}

}  // namespace smt_ext
