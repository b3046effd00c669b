// CUDA operators on quantised weights. Indices stay on the device: the kernels stop at one that is
// out of range.
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/dequantize.h"
#include "cuda.h"
#include "quantized.h"

namespace smt_ext {

static Tensor dequantize_4bit_with_blocks(const Tensor& packed, const Tensor& absmax,
                                          const Tensor& code, int64_t group, int64_t N, int64_t K,
                                          const Tensor& blocks, const Tensor& rows,
                                          const Tensor& cols, ScalarType dtype) {
  check_4bit_shape(packed, N, K);
  const OnDeviceOf device(packed);
  Tensor out = torch::stable::new_empty(packed, {N, K}, dtype);
  cuda::dequantize_with_blocks(
      check_4bit<cuda::DequantizeArgs>(packed, absmax, code, group, blocks, rows, cols, out),
      device.stream());
  return out;
}

static Tensor dequantize_int8_with_blocks(const Tensor& q, const Tensor& absmax,
                                          const Tensor& blocks, const Tensor& rows,
                                          const Tensor& cols, ScalarType dtype) {
  check_dim(q, 2, "q");
  const OnDeviceOf device(q);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1)}, dtype);
  cuda::dequantize_with_blocks(check_int8<cuda::DequantizeArgs>(q, absmax, blocks, rows, cols, out),
                               device.stream());
  return out;
}

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CUDA, m) {
  m.impl("dequantize_4bit_with_blocks", TORCH_BOX(&smt_ext::dequantize_4bit_with_blocks));
  m.impl("dequantize_int8_with_blocks", TORCH_BOX(&smt_ext::dequantize_int8_with_blocks));
}
