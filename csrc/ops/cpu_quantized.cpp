// CPU operators on quantised weights.
#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/dequantize.h"
#include "cpu.h"
#include "quantized.h"

namespace smt_ext {

static Tensor dequantize_4bit_with_blocks(const Tensor& packed, const Tensor& absmax,
                                          const Tensor& code, int64_t group, int64_t N, int64_t K,
                                          const Tensor& blocks, const Tensor& rows,
                                          const Tensor& cols, ScalarType dtype) {
  check_4bit_shape(packed, N, K);
  Tensor out = torch::stable::new_empty(packed, {N, K}, dtype);
  const auto args =
      check_4bit<cpu::DequantizeArgs>(packed, absmax, code, group, blocks, rows, cols, out);
  check_range(args.rows, args.S, ceil_div(N, args.L), "rows");
  check_range(args.cols, args.S, ceil_div(K, args.L), "cols");
  cpu::dequantize_with_blocks(args, TorchParallel());
  return out;
}

static Tensor dequantize_int8_with_blocks(const Tensor& q, const Tensor& absmax,
                                          const Tensor& blocks, const Tensor& rows,
                                          const Tensor& cols, ScalarType dtype) {
  check_dim(q, 2, "q");
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1)}, dtype);
  const auto args = check_int8<cpu::DequantizeArgs>(q, absmax, blocks, rows, cols, out);
  check_range(args.rows, args.S, ceil_div(args.N, args.L), "rows");
  check_range(args.cols, args.S, ceil_div(args.K, args.L), "cols");
  cpu::dequantize_with_blocks(args, TorchParallel());
  return out;
}

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CPU, m) {
  m.impl("dequantize_4bit_with_blocks", TORCH_BOX(&smt_ext::dequantize_4bit_with_blocks));
  m.impl("dequantize_int8_with_blocks", TORCH_BOX(&smt_ext::dequantize_int8_with_blocks));
}
