// Operators on quantised weights.
#pragma once

#include "../kernels/common/dequantize.h"
#include "checks.h"

namespace smt_ext {

inline const float* float32(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == count, name, ": expected ", count, " elements, got ",
                  tensor.numel());
  return tensor.const_data_ptr<float>();
}

template <typename Device>
DequantizeArgs check_overlay(int bits, const Tensor& q, const Tensor& blocks, const Tensor& rows,
                             const Tensor& cols, const Tensor& out) {
  check_dim(blocks, 3, "blocks");
  check_contiguous(q, bits == 4 ? "packed" : "q");
  const int64_t S = blocks.size(0), L = blocks.size(1);
  check_block_size(L);
  check_blocks(blocks, S, L, "blocks");
  const int32_t* row = indices(rows, S, "rows");
  const int32_t* col = indices(cols, S, "cols");
  for (const Tensor* tensor : {&blocks, &rows, &cols}) {
    check_device(*tensor, q, "blocks, rows, cols");
  }
  Device::check_range(row, S, ceil_div(out.size(0), L), "rows");
  Device::check_range(col, S, ceil_div(out.size(1), L), "cols");
  return {dtype_of(out, "dtype"),
          dtype_of(blocks, "blocks"),
          bits,
          out.size(0),
          out.size(1),
          L,
          S,
          out.size(1),
          q.const_data_ptr(),
          nullptr,
          nullptr,
          blocks.const_data_ptr(),
          row,
          col,
          out.mutable_data_ptr()};
}

// That two values a byte make up (N, K), before anything of that size is allocated.
inline void check_4bit_shape(const Tensor& packed, int64_t N, int64_t K) {
  const int64_t values = 2 * packed.numel() * packed.element_size();
  STD_TORCH_CHECK(N >= 0 && K >= 0 && (K == 0 || N <= values / K),
                  "packed: expected values for n = ", N, " times k = ", K, ", got ", values);
}

// packed may be of any dtype: bitsandbytes stores nibbles in tensors of the model's dtype for FSDP.
template <typename Device>
Tensor dequantize_4bit_with_blocks(const Tensor& packed, const Tensor& absmax, const Tensor& code,
                                   int64_t group, int64_t N, int64_t K, const Tensor& blocks,
                                   const Tensor& rows, const Tensor& cols, ScalarType dtype) {
  check_4bit_shape(packed, N, K);
  STD_TORCH_CHECK(group >= 2 && group % 2 == 0, "group: expected an even number, got ", group);
  check_device(absmax, packed, "absmax");
  check_device(code, packed, "code");
  const Device device(packed);
  Tensor out = torch::stable::new_empty(packed, {N, K}, dtype);
  auto args = check_overlay<Device>(4, packed, blocks, rows, cols, out);
  args.group = group;
  args.absmax = float32(absmax, ceil_div(N * K, group), "absmax");
  args.code = float32(code, 16, "code");
  device.dequantize_with_blocks(args);
  return out;
}

template <typename Device>
Tensor dequantize_int8_with_blocks(const Tensor& q, const Tensor& absmax, const Tensor& blocks,
                                   const Tensor& rows, const Tensor& cols, ScalarType dtype) {
  check_dim(q, 2, "q");
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Char, "q: expected int8");
  check_device(absmax, q, "absmax");
  const Device device(q);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1)}, dtype);
  auto args = check_overlay<Device>(8, q, blocks, rows, cols, out);
  args.absmax = float32(absmax, q.size(0), "absmax");
  device.dequantize_with_blocks(args);
  return out;
}

}  // namespace smt_ext
