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
  check_dim(dy, 2, "dy");
  check_dim(x_cols, 2, "x_cols");
  check_block_size(L);
  const int64_t T = dy.size(0), N = dy.size(1), U = x_cols.size(1), S = rows.numel();
  STD_TORCH_CHECK(x_cols.size(0) == T, "x_cols: expected ", T, " rows as dy has, got ",
                  x_cols.size(0));
  STD_TORCH_CHECK(x_cols.scalar_type() == dy.scalar_type(), "x_cols: expected the dtype of dy");
  const int32_t* row = indices(rows, S, "rows");
  const int32_t* slot = indices(slots, S, "slots");
  check_range(row, S, ceil_div(N, L), "rows");
  check_range(slot, S, ceil_div(U, L), "slots");
  check_blocks(out, S, L, "out");
  const DType dtype = dtype_of(dy, "dy"), out_dtype = dtype_of(out, "out");
  STD_TORCH_CHECK((dtype == DType::f64) == (out_dtype == DType::f64),
                  "out: float64 gradients go with float64 operands, and only with them");
  cpu::block_grad({dtype, out_dtype, T, N, U, L, S, operand(dy), operand(x_cols), row, slot,
                   out.mutable_data_ptr(), accumulate},
                  TorchParallel());
}

static Tensor block_grad(const Tensor& dy, const Tensor& x_cols, const Tensor& rows,
                         const Tensor& slots, int64_t block_size,
                         std::optional<ScalarType> out_dtype) {
  Tensor out = torch::stable::new_empty(dy, {rows.numel(), block_size, block_size},
                                        out_dtype.value_or(dy.scalar_type()));
  block_grad_into(out, dy, x_cols, rows, slots, block_size, /*accumulate=*/false);
  return out;
}

static void block_grad_acc_(const Tensor& out, const Tensor& dy, const Tensor& x_cols,
                            const Tensor& rows, const Tensor& slots, int64_t block_size) {
  block_grad_into(out, dy, x_cols, rows, slots, block_size, /*accumulate=*/true);
}

static cpu::BlocksArgs blocks_args(const Tensor& w, const Tensor& blocks, const Tensor& rows,
                                   const Tensor& cols, int64_t L) {
  check_dim(w, 2, "w");
  check_block_size(L);
  const int64_t N = w.size(0), K = w.size(1), S = rows.numel();
  const int32_t* row = indices(rows, S, "rows");
  const int32_t* col = indices(cols, S, "cols");
  check_range(row, S, ceil_div(N, L), "rows");
  check_range(col, S, ceil_div(K, L), "cols");
  check_blocks(blocks, S, L, "blocks");
  return {dtype_of(w, "w"),
          dtype_of(blocks, "blocks"),
          N,
          K,
          L,
          S,
          w.mutable_data_ptr(),
          w.stride(0),
          w.stride(1),
          row,
          col,
          blocks.mutable_data_ptr()};
}

static Tensor gather_blocks(const Tensor& w, const Tensor& rows, const Tensor& cols,
                            int64_t block_size, std::optional<ScalarType> dtype) {
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
