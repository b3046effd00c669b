// A quantised weight as numbers, with selected blocks in their places.
//
//   4 bits   out[i] = code[q] * absmax[i / group],  i = n * K + k,  q = nibble i of packed
//   8 bits   out[i] = q[i] * (absmax[n] * (1 / 127))
//   both     out[rows[s] * L + i, cols[s] * L + j] = blocks[s, i, j], inside the weight only
//
// packed  (N * K + 1) / 2 bytes; the first of two neighbours is in the high nibble
// q       (N, K) int8
// absmax  4 bits: one of every `group` values of the flat weight; 8 bits: (N,); float32
// code    (16,) float32
// blocks  (S, L, L) contiguous, of blocks_dtype; rows, cols (S,) on the device, see gather_blocks.h
// out     (N, K) contiguous, of out_dtype
//
// Products are float32, rounded once (nearest even) to out_dtype: the bits of bitsandbytes. Two
// launches: all values in their order, then the blocks over them (scatter_blocks), which writes
// S * L * L of N * K values a second time: about one in a hundred.
//
// A thread makes kRows vectors of 8 values where 8 divides the group (4 bits) or K (8 bits) and N *
// K, and packed or q and out are aligned; else single values. Bytes a value: reads 0.5 + 4 / group
// (or 1), writes out_dtype. The table lies in shared memory, 64 bytes: sixteen banks, so that lanes
// that want different entries wait for no other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../cpu/dtype.h"

namespace smt_ext::cuda {

struct DequantizeArgs {
  DType out_dtype, blocks_dtype;
  int bits;  // 4 or 8
  int64_t N, K, L, S, group;
  const void* q;  // packed, or q
  const float* absmax;
  const float* code;  // of 4 bits
  const void* blocks;
  const int32_t* rows;
  const int32_t* cols;
  void* out;
};

void dequantize_with_blocks(const DequantizeArgs& args, cudaStream_t stream);

}  // namespace smt_ext::cuda
