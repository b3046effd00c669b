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

#include "../kernels/common/dtype.h"
#include "../kernels/common/limits.h"
#include "../kernels/common/operand.h"

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
  STD_TORCH_CHECK(block_size >= kMinBlockSize && block_size <= kMaxBlockSize,
                  "block_size: expected ", kMinBlockSize, " to ", kMaxBlockSize, ", got ",
                  block_size);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const int32_t* int32s(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, ": expected int32");
  check_contiguous(tensor, name);
  return tensor.const_data_ptr<int32_t>();
}

// rows, cols, slots, col_blocks: (count,) int32, contiguous.
inline const int32_t* indices(const Tensor& tensor, int64_t count, const char* name) {
  const int32_t* values = int32s(tensor, name);
  check_dim(tensor, 1, name);
  STD_TORCH_CHECK(tensor.size(0) == count, name, ": expected ", count, " indices, got ",
                  tensor.size(0));
  return values;
}

inline Operand operand(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
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

}  // namespace smt_ext
