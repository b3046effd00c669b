// Operators on the forward and backward path, and blocks in and out of weights.
#pragma once

#include <limits>
#include <vector>

#include "../kernels/common/block_grad.h"
#include "../kernels/common/gather_blocks.h"
#include "../kernels/common/gather_columns.h"
#include "checks.h"

namespace smt_ext {

template <typename Device>
Tensor gather_columns(const Tensor& x, const Tensor& col_blocks, int64_t block_size, int64_t width,
                      std::optional<ScalarType> dtype) {
  check_dim(x, 2, "x");
  check_block_size(block_size);
  const int64_t T = x.size(0), K = x.size(1), C = col_blocks.numel();
  const int32_t* blocks = indices(col_blocks, C, "col_blocks");
  check_device(col_blocks, x, "col_blocks");
  Device::check_columns(blocks, C, K, block_size, width);
  const ScalarType out_type = dtype.value_or(x.scalar_type());
  const Device device(x);
  Tensor out = torch::stable::new_empty(x, {T, width}, out_type);
  device.gather_columns({dtype_of(x, "x"), dtype_of(out_type, "dtype"), T, K, width, block_size,
                         x.const_data_ptr(), x.stride(0), x.stride(1), blocks,
                         out.mutable_data_ptr(), C});
  return out;
}

// Which blocks share tiles, for CUDA; the CPU kernel does without, and what it is given is checked
// all the same.
inline void set_tiles(BlockGradArgs& args, const Tensor& dy, const std::optional<Tensor>& tiles,
                      const std::optional<Tensor>& lone) {
  STD_TORCH_CHECK(tiles.has_value() == lone.has_value(),
                  "tiles, lone: expected both of them or neither");
  if (!tiles.has_value()) return;
  STD_TORCH_CHECK(shares_tiles(args.L), "tiles: expected none for blocks of ", args.L,
                  ", only those of 16, 32 and 64 share tiles");
  check_dim(*tiles, 2, "tiles");
  args.shape = tile_shape(args.L, tiles->size(1));
  STD_TORCH_CHECK(args.shape.rows > 0, "tiles: a list of no tile for blocks of ", args.L, " has ",
                  tiles->size(1), " columns, see smt_ext.nn.tiles.tiles_of");
  check_device(*tiles, dy, "tiles");
  check_device(*lone, dy, "lone");
  args.tiles = int32s(*tiles, "tiles");
  args.n_tiles = tiles->size(0);
  args.lone = indices(*lone, lone->numel(), "lone");
  args.n_lone = lone->numel();
}

// Of one dy, or of several (`name`s).
template <typename Device>
void block_grad_into(const Tensor& out, const std::vector<Tensor>& dys, const char* name,
                     const Tensor& x_cols, const Tensor& rows, const Tensor& slots, int64_t L,
                     bool accumulate, bool allow_tf32, const std::optional<Tensor>& tiles,
                     const std::optional<Tensor>& lone) {
  const Tensor& dy = dys.at(0);
  check_dim(dy, 2, name);
  check_dim(x_cols, 2, "x_cols");
  check_block_size(L);
  const int64_t T = dy.size(0), U = x_cols.size(1), S = rows.numel();
  STD_TORCH_CHECK(x_cols.size(0) == T, "x_cols: expected ", T, " rows as ", name, " has, got ",
                  x_cols.size(0));
  STD_TORCH_CHECK(x_cols.scalar_type() == dy.scalar_type(), "x_cols: expected the dtype of ", name);
  const int32_t* row = indices(rows, S, "rows");
  const int32_t* slot = indices(slots, S, "slots");
  check_blocks(out, S, L, "out");
  check_device(x_cols, dy, "x_cols");
  check_device(rows, dy, "rows");
  check_device(slots, dy, "slots");
  check_device(out, dy, "out");
  const DType dtype = dtype_of(dy, name), out_dtype = dtype_of(out, "out");
  STD_TORCH_CHECK((dtype == DType::f64) == (out_dtype == DType::f64),
                  "out: float64 gradients go with float64 operands, and only with them");
  BlockGradArgs args{
      dtype,      out_dtype, T, U, L, S, {}, operand(x_cols), row, slot, out.mutable_data_ptr(),
      accumulate, allow_tf32};
  int64_t block_rows = 0;
  for (std::size_t i = 0; i < dys.size(); ++i) {
    check_dim(dys[i], 2, name);
    STD_TORCH_CHECK(dys[i].size(0) == T, name, ": expected ", T, " rows each, got ",
                    dys[i].size(0));
    STD_TORCH_CHECK(dys[i].scalar_type() == dy.scalar_type(), name, ": expected one dtype");
    check_device(dys[i], dy, name);
    STD_TORCH_CHECK(block_rows <= std::numeric_limits<int32_t>::max(), name, ": too many columns");
    args.dys[i] = {operand(dys[i]), dys[i].size(1), static_cast<int32_t>(block_rows)};
    block_rows += ceil_div(dys[i].size(1), L);
  }
  Device::check_range(row, S, block_rows, "rows");
  Device::check_range(slot, S, ceil_div(U, L), "slots");
  set_tiles(args, dy, tiles, lone);
  Device(dy).block_grad(args);
}

template <typename Device>
Tensor block_grad(const Tensor& dy, const Tensor& x_cols, const Tensor& rows, const Tensor& slots,
                  int64_t block_size, std::optional<ScalarType> out_dtype, bool allow_tf32,
                  std::optional<Tensor> tiles, std::optional<Tensor> lone) {
  check_block_size(block_size);
  Tensor out = torch::stable::new_empty(dy, {rows.numel(), block_size, block_size},
                                        out_dtype.value_or(dy.scalar_type()));
  block_grad_into<Device>(out, {dy}, "dy", x_cols, rows, slots, block_size, /*accumulate=*/false,
                          allow_tf32, tiles, lone);
  return out;
}

template <typename Device>
Tensor block_grad_siblings(const std::vector<Tensor>& dys, const Tensor& x_cols, const Tensor& rows,
                           const Tensor& slots, int64_t block_size,
                           std::optional<ScalarType> out_dtype, bool allow_tf32,
                           std::optional<Tensor> tiles, std::optional<Tensor> lone) {
  check_block_size(block_size);
  STD_TORCH_CHECK(!dys.empty() && dys.size() <= kMaxSiblings, "dys: expected 1 to ", kMaxSiblings,
                  " tensors, got ", dys.size());
  Tensor out = torch::stable::new_empty(x_cols, {rows.numel(), block_size, block_size},
                                        out_dtype.value_or(x_cols.scalar_type()));
  block_grad_into<Device>(out, dys, "dys", x_cols, rows, slots, block_size, /*accumulate=*/false,
                          allow_tf32, tiles, lone);
  return out;
}

template <typename Device>
void block_grad_acc_(const Tensor& out, const Tensor& dy, const Tensor& x_cols, const Tensor& rows,
                     const Tensor& slots, int64_t block_size, bool allow_tf32,
                     std::optional<Tensor> tiles, std::optional<Tensor> lone) {
  block_grad_into<Device>(out, {dy}, "dy", x_cols, rows, slots, block_size, /*accumulate=*/true,
                          allow_tf32, tiles, lone);
}

template <typename Device>
BlocksArgs blocks_args(const Tensor& w, const Tensor& blocks, const Tensor& rows,
                       const Tensor& cols, int64_t L) {
  check_dim(w, 2, "w");
  check_block_size(L);
  const int64_t N = w.size(0), K = w.size(1), S = rows.numel();
  const int32_t* row = indices(rows, S, "rows");
  const int32_t* col = indices(cols, S, "cols");
  check_blocks(blocks, S, L, "blocks");
  check_device(rows, w, "rows");
  check_device(cols, w, "cols");
  check_device(blocks, w, "blocks");
  const DType w_dtype = dtype_of(w, "w"), blocks_dtype = dtype_of(blocks, "blocks");
  Device::check_range(row, S, ceil_div(N, L), "rows");
  Device::check_range(col, S, ceil_div(K, L), "cols");
  return {w_dtype,
          blocks_dtype,
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

template <typename Device>
Tensor gather_blocks(const Tensor& w, const Tensor& rows, const Tensor& cols, int64_t block_size,
                     std::optional<ScalarType> dtype) {
  check_block_size(block_size);
  Tensor out = torch::stable::new_empty(w, {rows.numel(), block_size, block_size},
                                        dtype.value_or(w.scalar_type()));
  Device(w).gather_blocks(blocks_args<Device>(w, out, rows, cols, block_size));
  return out;
}

template <typename Device>
void scatter_blocks_(const Tensor& w, const Tensor& blocks, const Tensor& rows,
                     const Tensor& cols) {
  check_dim(blocks, 3, "blocks");
  Device(w).scatter_blocks(blocks_args<Device>(w, blocks, rows, cols, blocks.size(1)));
}

}  // namespace smt_ext
