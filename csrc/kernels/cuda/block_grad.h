// On CUDA: ../common/block_grad.h has the formula.
//
// rows, slots are on the device; an index beyond N or U stops the kernel (trap).
//
// bfloat16, float16: tensor cores with float32 sums, where both operands have unit stride along
// their columns and L, widths, strides and addresses are multiples of 16 bytes; float32 likewise if
// tf32 is set. Else plain multiply-adds, float32 sums (float64 for float64).
//
// A block of the grid computes a tile of at most 128 x 128 entries. It is a part of one block of
// the gradient, or, for L = 16, 32 and 64, takes several blocks at once: 128 / L rows of blocks by
// as many columns, from any places, so that a panel of dy or x is read once for all of them. Which,
// the caller says:
//
// tiles  (n_tiles, 2 g + g * g) on the device, g = 128 / L: g rows, g slots, and for each of their
//        pairs the number s of the block in out; -1 for none
// lone   (n_lone,) the numbers of the blocks that are in no tile
//
// Without them, and for float64 and 16 bits at odd places, every block is by itself.
//
// Where tiles do not spread evenly over the multiprocessors, the tokens of all or of the last tiles
// are split: each part writes float32 sums to the workspace, and a second kernel adds them in
// order. What is split depends on the shapes and on the device (multiprocessors, how many blocks
// one holds), nothing on the order of blocks, so the bits are the same at every run on one kind of
// device.
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
