// CUDA operators on the forward and backward path, and blocks in and out of weights. Indices stay
// on the device: the kernels stop at one that is out of range.
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/block_grad.h"
#include "../kernels/cuda/gather_blocks.h"
#include "../kernels/cuda/gather_columns.h"
#include "cuda.h"

namespace smt_ext {

static Tensor gather_columns(const Tensor& x, const Tensor& col_blocks, int64_t block_size,
                             int64_t width, std::optional<ScalarType> dtype) {
  check_dim(x, 2, "x");
  check_block_size(block_size);
  const int64_t T = x.size(0), K = x.size(1), C = col_blocks.numel();
  const int32_t* blocks = indices(col_blocks, C, "col_blocks");
  check_device(col_blocks, x, "col_blocks");
  STD_TORCH_CHECK(width <= C * block_size && (C == 0 || width > (C - 1) * block_size),
                  "width: expected the columns of ", C, " blocks of ", block_size, ", got ", width);
  const ScalarType out_type = dtype.value_or(x.scalar_type());
  const OnDeviceOf device(x);
  Tensor out = torch::stable::new_empty(x, {T, width}, out_type);
  cuda::gather_columns(
      {dtype_of(x, "x"), dtype_of(out_type, "dtype"), T, K, width, block_size, x.const_data_ptr(),
       x.stride(0), x.stride(1), blocks, out.mutable_data_ptr()},
      device.stream());
  return out;
}

static void block_grad_into(const Tensor& out, const Tensor& dy, const Tensor& x_cols,
                            const Tensor& rows, const Tensor& slots, int64_t L, bool accumulate,
                            bool allow_tf32, std::optional<Tensor> tiles,
                            std::optional<Tensor> lone) {
  const GradShape c = check_block_grad(out, dy, x_cols, rows, slots, L);
  const OnDeviceOf device(dy);
  cuda::BlockGradArgs args{c.dtype,
                           c.out_dtype,
                           c.T,
                           c.N,
                           c.U,
                           L,
                           c.S,
                           dy.const_data_ptr(),
                           dy.stride(0),
                           dy.stride(1),
                           x_cols.const_data_ptr(),
                           x_cols.stride(0),
                           x_cols.stride(1),
                           c.rows,
                           c.slots,
                           out.mutable_data_ptr(),
                           accumulate,
                           allow_tf32};
  if (tiles.has_value() && lone.has_value()) {
    const int64_t group = cuda::blocks_of_a_side(L);
    check_dim(*tiles, 2, "tiles");
    STD_TORCH_CHECK(group > 1, "tiles: expected none for blocks of ", L,
                    ", only those of 16, 32 and 64 share tiles");
    STD_TORCH_CHECK(tiles->size(1) == 2 * group + group * group, "tiles: expected ",
                    2 * group + group * group, " columns, got ", tiles->size(1));
    check_device(*tiles, dy, "tiles");
    check_device(*lone, dy, "lone");
    args.tiles = indices(*tiles, tiles->numel(), "tiles");
    args.n_tiles = tiles->size(0);
    args.lone = indices(*lone, lone->numel(), "lone");
    args.n_lone = lone->numel();
  }
  const std::size_t bytes = cuda::block_grad_workspace_bytes(args);
  const Tensor memory = workspace(dy, bytes);
  cuda::block_grad(args, memory.mutable_data_ptr(), device.stream());
}

static Tensor block_grad(const Tensor& dy, const Tensor& x_cols, const Tensor& rows,
                         const Tensor& slots, int64_t block_size,
                         std::optional<ScalarType> out_dtype, bool allow_tf32,
                         std::optional<Tensor> tiles, std::optional<Tensor> lone) {
  check_block_size(block_size);
  Tensor out = torch::stable::new_empty(dy, {rows.numel(), block_size, block_size},
                                        out_dtype.value_or(dy.scalar_type()));
  block_grad_into(out, dy, x_cols, rows, slots, block_size, /*accumulate=*/false, allow_tf32, tiles,
                  lone);
  return out;
}

static void block_grad_acc_(const Tensor& out, const Tensor& dy, const Tensor& x_cols,
                            const Tensor& rows, const Tensor& slots, int64_t block_size,
                            bool allow_tf32, std::optional<Tensor> tiles,
                            std::optional<Tensor> lone) {
  block_grad_into(out, dy, x_cols, rows, slots, block_size, /*accumulate=*/true, allow_tf32, tiles,
                  lone);
}

static Tensor gather_blocks(const Tensor& w, const Tensor& rows, const Tensor& cols,
                            int64_t block_size, std::optional<ScalarType> dtype) {
  check_block_size(block_size);
  Tensor out = torch::stable::new_empty(w, {rows.numel(), block_size, block_size},
                                        dtype.value_or(w.scalar_type()));
  const auto args = check_blocks_copy<cuda::BlocksArgs>(w, out, rows, cols, block_size);
  const OnDeviceOf device(w);
  cuda::gather_blocks(args, device.stream());
  return out;
}

static void scatter_blocks_(const Tensor& w, const Tensor& blocks, const Tensor& rows,
                            const Tensor& cols) {
  check_dim(blocks, 3, "blocks");
  const auto args = check_blocks_copy<cuda::BlocksArgs>(w, blocks, rows, cols, blocks.size(1));
  const OnDeviceOf device(w);
  cuda::scatter_blocks(args, device.stream());
}

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CUDA, m) {
  m.impl("gather_columns", TORCH_BOX(&smt_ext::gather_columns));
  m.impl("block_grad", TORCH_BOX(&smt_ext::block_grad));
  m.impl("block_grad_acc_", TORCH_BOX(&smt_ext::block_grad_acc_));
  m.impl("gather_blocks", TORCH_BOX(&smt_ext::gather_blocks));
  m.impl("scatter_blocks_", TORCH_BOX(&smt_ext::scatter_blocks_));
}
