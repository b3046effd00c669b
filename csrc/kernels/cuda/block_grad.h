// On CUDA: ../common/block_grad.h has the formula.
//
// rows, slots are on the device; an index beyond N or U stops the kernel (trap).
//
// bfloat16, float16: tensor cores with float32 sums, where all operands have unit stride along
// their columns and L, widths, strides and addresses are multiples of 16 bytes; float32 likewise if
// tf32 is set. Else plain multiply-adds, float32 sums (float64 for float64).
//
// A block of the grid computes a tile of at most 128 x 128 entries. It is a part of one block of
// the gradient, or, for L = 16, 32 and 64, takes several blocks at once: rows of blocks by columns
// of blocks, from any places, so that a panel of dy or x is read once for all of them. Tiles of 256
// x 64 and 256 x 32 are for whole block columns of which squares would stay half empty. Which, the
// caller says:
//
// shape  of the tiles, one of kTileShapes
// tiles  (n_tiles, r + c + r * c) on the device, r = rows / L, c = columns / L: r rows, c slots,
//        and for each of their pairs the number s of the block in out; -1 for none. All rows of a
//        tile are of one dy, that of the first, which is not -1 where there are several dys
// lone   (n_lone,) the numbers of the blocks that are in no tile
//
// Without them, for float64, 16 bits at odd places, tall tiles of float32 without tf32, and where
// tall tiles are too few to be worth it, every block is by itself.
//
// Where tiles do not spread evenly over the multiprocessors, the tokens of all or of the last tiles
// are split: each part writes float32 sums to the workspace, and a second kernel adds them in
// order. Several dys make one launch, so that they have one such end in place of one each. What is
// split depends on the shapes and on the device (multiprocessors, how many blocks one holds),
// nothing on the order of blocks, so the bits are the same at every run on one kind of device.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../common/block_grad.h"

namespace smt_ext::cuda {

using smt_ext::BlockGradArgs;

// Bytes of device memory, 16-byte aligned, that a call works in; 0 where tokens are not split.
std::size_t block_grad_workspace_bytes(const BlockGradArgs& args);

void block_grad(const BlockGradArgs& args, void* workspace, cudaStream_t stream);

}  // namespace smt_ext::cuda
