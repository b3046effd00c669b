// A quantised weight as numbers, with selected blocks in their places, in one pass.
//
//   4 bits   out[n, k] = code[q] * absmax[(n * K + k) / group],  q = nibble n * K + k of packed
//   8 bits   out[n, k] = q[n, k] * (absmax[n] * (1 / 127))
//   both     out[rows[s] * L + i, cols[s] * L + j] = blocks[s, i, j], inside the weight only
//
// packed  (N * K + 1) / 2 bytes; the first of two neighbours is in the high nibble
// q       (N, K) int8
// absmax  4 bits: one of every `group` values of the flat weight; 8 bits: (N,); float32
// code    (16,) float32
// blocks  (S, L, L) contiguous, of blocks_dtype
// out     (N, K) contiguous, of out_dtype
//
// Products are float32, rounded once (nearest even) to out_dtype: the bits of bitsandbytes. A row
// is dequantised in parts that stay in the first-level cache until the blocks lie on them. Bytes a
// value: reads 0.5 + 4 / group (or 1), writes out_dtype. The same bits on any number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace smt_ext::cpu {

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

void dequantize_with_blocks(const DequantizeArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
