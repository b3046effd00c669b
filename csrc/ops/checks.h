// Checks and conversions that the operators of all devices share.
//
// The Python wrappers (smt_ext/ops.py) check first and name the user's argument; these are the
// second line for callers that go through torch.ops, and what keeps a kernel inside its buffers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/cpu/dtype.h"
#include "../kernels/cpu/metric.h"

namespace smt_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64, got dtype ",
                      static_cast<int>(type));
  }
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  return dtype_of(tensor.scalar_type(), name);
}

inline void check_dim(const Tensor& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_block_size(int64_t block_size) {
  STD_TORCH_CHECK(block_size >= 16 && block_size <= 512, "block_size: expected 16 to 512, got ",
                  block_size);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// rows, cols, slots, col_blocks: (count,) int32, contiguous.
inline const int32_t* indices(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, ": expected int32");
  check_dim(tensor, 1, name);
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.size(0) == count, name, ": expected ", count, " indices, got ",
                  tensor.size(0));
  return tensor.const_data_ptr<int32_t>();
}

// blocks, gradients, moments: (S, L, L) contiguous.
inline void check_blocks(const Tensor& tensor, int64_t S, int64_t L, const char* name) {
  check_dim(tensor, 3, name);
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.size(0) == S && tensor.size(1) == L && tensor.size(2) == L, name,
                  ": expected shape (", S, ", ", L, ", ", L, "), got (", tensor.size(0), ", ",
                  tensor.size(1), ", ", tensor.size(2), ")");
}

// All operands of a call live where its first one does.
inline void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name,
                  ": expected on the device of the other tensors");
}

// What block_grad and block_grad_acc_ require of their arguments, whatever the device.
struct GradShape {
  DType dtype, out_dtype;
  int64_t T, N, U, S;
  const int32_t *rows, *slots;
};

inline GradShape check_block_grad(const Tensor& out, const Tensor& dy, const Tensor& x_cols,
                                  const Tensor& rows, const Tensor& slots, int64_t L) {
  check_dim(dy, 2, "dy");
  check_dim(x_cols, 2, "x_cols");
  check_block_size(L);
  const int64_t T = dy.size(0), N = dy.size(1), U = x_cols.size(1), S = rows.numel();
  STD_TORCH_CHECK(x_cols.size(0) == T, "x_cols: expected ", T, " rows as dy has, got ",
                  x_cols.size(0));
  STD_TORCH_CHECK(x_cols.scalar_type() == dy.scalar_type(), "x_cols: expected the dtype of dy");
  const int32_t* row = indices(rows, S, "rows");
  const int32_t* slot = indices(slots, S, "slots");
  check_blocks(out, S, L, "out");
  check_device(x_cols, dy, "x_cols");
  check_device(rows, dy, "rows");
  check_device(slots, dy, "slots");
  check_device(out, dy, "out");
  const DType dtype = dtype_of(dy, "dy"), out_dtype = dtype_of(out, "out");
  STD_TORCH_CHECK((dtype == DType::f64) == (out_dtype == DType::f64),
                  "out: float64 gradients go with float64 operands, and only with them");
  return {dtype, out_dtype, T, N, U, S, row, slot};
}

// What gather_blocks and scatter_blocks_ require; fills the arguments of either device's kernel.
template <typename BlocksArgs>
BlocksArgs check_blocks_copy(const Tensor& w, const Tensor& blocks, const Tensor& rows,
                             const Tensor& cols, int64_t L) {
  check_dim(w, 2, "w");
  check_block_size(L);
  const int64_t S = rows.numel();
  const int32_t* row = indices(rows, S, "rows");
  const int32_t* col = indices(cols, S, "cols");
  check_blocks(blocks, S, L, "blocks");
  check_device(rows, w, "rows");
  check_device(cols, w, "cols");
  check_device(blocks, w, "blocks");
  return {dtype_of(w, "w"),
          dtype_of(blocks, "blocks"),
          w.size(0),
          w.size(1),
          L,
          S,
          w.mutable_data_ptr(),
          w.stride(0),
          w.stride(1),
          row,
          col,
          blocks.mutable_data_ptr()};
}

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

// What sparse_adamw_step_ requires of its lists; one AdamWLayer of either device's kernel a layer.
template <typename AdamWLayer>
std::vector<AdamWLayer> check_adamw_layers(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& blocks,
    const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
    const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& masters,
    const std::vector<Tensor>& rows, const std::vector<Tensor>& cols) {
  const size_t n = blocks.size();
  check_count(weights, n, "weights");
  check_count(grads, n, "grads");
  check_count(exp_avgs, n, "exp_avgs");
  check_count(exp_avg_sqs, n, "exp_avg_sqs");
  if (!masters.empty()) check_count(masters, n, "masters");
  check_count(rows, n, "rows");
  check_count(cols, n, "cols");

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
    const int32_t* row = indices(rows[i], S, "rows");
    const int32_t* col = indices(cols[i], S, "cols");
    // Without a weight to write, no edge of one cuts a block.
    const bool has_weight = w.numel() > 0;
    const int64_t N = has_weight ? w.size(0) : kNoEdge, K = has_weight ? w.size(1) : kNoEdge;
    layers.push_back({dtype_of(w, "weights"), dtype, N, K, L, S,
                      has_weight ? w.mutable_data_ptr() : nullptr, has_weight ? w.stride(0) : 0,
                      has_weight ? w.stride(1) : 1, row, col, blocks[i].mutable_data_ptr(),
                      grads[i].const_data_ptr(), exp_avgs[i].mutable_data_ptr(),
                      exp_avg_sqs[i].mutable_data_ptr(), master});
  }
  return layers;
}

// Gradients of one grad_norm call, in either device's Gradient.
template <typename Gradient>
std::vector<Gradient> check_gradients(const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one gradient");
  std::vector<Gradient> list;
  for (const Tensor& grad : grads) {
    check_contiguous(grad, "grads");
    check_device(grad, grads[0], "grads");
    list.push_back({grad.const_data_ptr(), grad.numel(), dtype_of(grad, "grads")});
  }
  return list;
}

// (R, C) of float32, or float64 for float64.
inline Tensor new_score(const Tensor& like, int64_t N, int64_t K, int64_t L) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(like, {ceil_div(N, L), ceil_div(K, L)},
                                  wide ? ScalarType::Double : ScalarType::Float);
}

inline void check_score(const Tensor& g, int64_t block_size) {
  check_dim(g, 2, "g");
  check_block_size(block_size);
}

inline void check_score_fused(const Tensor& dy, const Tensor& x, int64_t block_size) {
  check_dim(dy, 2, "dy");
  check_dim(x, 2, "x");
  check_block_size(block_size);
  check_device(x, dy, "x");
  STD_TORCH_CHECK(x.size(0) == dy.size(0), "x: expected ", dy.size(0), " rows as dy has, got ",
                  x.size(0));
  STD_TORCH_CHECK(x.scalar_type() == dy.scalar_type(), "x: expected the dtype of dy");
}

inline Metric metric_of(const std::string& name) {
  if (name == "mean_abs") return Metric::mean_abs;
  if (name == "mean") return Metric::mean;
  if (name == "l1") return Metric::l1;
  if (name == "l2") return Metric::l2;
  STD_TORCH_CHECK(false, "metric: expected mean_abs, mean, l1 or l2, got ", name);
}

}  // namespace smt_ext
