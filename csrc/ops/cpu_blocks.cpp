// CPU operators on the forward and backward path, and blocks in and out of weights.
#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/block_grad.h"
#include "../kernels/cpu/gather_blocks.h"
#include "../kernels/cpu/gather_columns.h"
#include "cpu.h"

namespace smt_ext {

static Tensor gather_columns(const Tensor& x, const Tensor& col_blocks, int64_t block_size,
                             int64_t width, std::optional<ScalarType> dtype) {
  check_dim(x, 2, "x");
  check_block_size(block_size);
  const int64_t T = x.size(0), K = x.size(1), C = col_blocks.numel();
  const int32_t* blocks = indices(col_blocks, C, "col_blocks");
  check_range(blocks, C, ceil_div(K, block_size), "col_blocks");
  int64_t expected = 0;
  for (int64_t s = 0; s < C; ++s) {
    STD_TORCH_CHECK(s == 0 || blocks[s - 1] < blocks[s],
                    "col_blocks: expected strictly increasing indices, got ", blocks[s],
                    " at position ", s);
    expected += std::min(block_size, K - blocks[s] * block_size);
  }
  STD_TORCH_CHECK(width == expected, "width: expected ", expected, " columns, got ", width);
  const ScalarType out_type = dtype.value_or(x.scalar_type());
  Tensor out = torch::stable::new_empty(x, {T, width}, out_type);
  cpu::gather_columns(
      {dtype_of(x, "x"), dtype_of(out_type, "dtype"), T, K, width, block_size, C,
       x.const_data_ptr(), x.stride(0), x.stride(1), blocks, out.mutable_data_ptr()},
      TorchParallel());
  return out;
}

static void block_grad_into(const Tensor& out, const Tensor& dy, const Tensor& x_cols,
                            const Tensor& rows, const Tensor& slots, int64_t L, bool accumulate) {
  const GradShape c = check_block_grad(out, dy, x_cols, rows, slots, L);
  check_range(c.rows, c.S, ceil_div(c.N, L), "rows");
  check_range(c.slots, c.S, ceil_div(c.U, L), "slots");
  cpu::block_grad({c.dtype, c.out_dtype, c.T, c.N, c.U, L, c.S, operand(dy), operand(x_cols),
                   c.rows, c.slots, out.mutable_data_ptr(), accumulate},
                  TorchParallel());
}

static Tensor block_grad(const Tensor& dy, const Tensor& x_cols, const Tensor& rows,
                         const Tensor& slots, int64_t block_size,
                         std::optional<ScalarType> out_dtype, bool /*allow_tf32*/,
                         std::optional<Tensor> /*tiles*/, std::optional<Tensor> /*lone*/) {
  check_block_size(block_size);
  Tensor out = torch::stable::new_empty(dy, {rows.numel(), block_size, block_size},
                                        out_dtype.value_or(dy.scalar_type()));
  block_grad_into(out, dy, x_cols, rows, slots, block_size, /*accumulate=*/false);
  return out;
}

static void block_grad_acc_(const Tensor& out, const Tensor& dy, const Tensor& x_cols,
                            const Tensor& rows, const Tensor& slots, int64_t block_size,
                            bool /*allow_tf32*/, std::optional<Tensor> /*tiles*/,
                            std::optional<Tensor> /*lone*/) {
  block_grad_into(out, dy, x_cols, rows, slots, block_size, /*accumulate=*/true);
}

static cpu::BlocksArgs blocks_args(const Tensor& w, const Tensor& blocks, const Tensor& rows,
                                   const Tensor& cols, int64_t L) {
  const auto args = check_blocks_copy<cpu::BlocksArgs>(w, blocks, rows, cols, L);
  check_range(args.rows, args.S, ceil_div(args.N, L), "rows");
  check_range(args.cols, args.S, ceil_div(args.K, L), "cols");
  return args;
}

static Tensor gather_blocks(const Tensor& w, const Tensor& rows, const Tensor& cols,
                            int64_t block_size, std::optional<ScalarType> dtype) {
  check_block_size(block_size);
  Tensor out = torch::stable::new_empty(w, {rows.numel(), block_size, block_size},
                                        dtype.value_or(w.scalar_type()));
  cpu::gather_blocks(blocks_args(w, out, rows, cols, block_size), TorchParallel());
  return out;
}

static void scatter_blocks_(const Tensor& w, const Tensor& blocks, const Tensor& rows,
                            const Tensor& cols) {
  check_dim(blocks, 3, "blocks");
  cpu::scatter_blocks(blocks_args(w, blocks, rows, cols, blocks.size(1)), TorchParallel());
}

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CPU, m) {
  m.impl("gather_columns", TORCH_BOX(&smt_ext::gather_columns));
  m.impl("block_grad", TORCH_BOX(&smt_ext::block_grad));
  m.impl("block_grad_acc_", TORCH_BOX(&smt_ext::block_grad_acc_));
  m.impl("gather_blocks", TORCH_BOX(&smt_ext::gather_blocks));
  m.impl("scatter_blocks_", TORCH_BOX(&smt_ext::scatter_blocks_));
}
