// A quantised weight as numbers, with selected blocks in their places.
//
//   4 bits   out[i] = code[q] * absmax[i / group],  i = n * K + k,  q = nibble i of packed
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
// Products are float32, rounded once (nearest even) to out_dtype: the bits of bitsandbytes. Bytes a
// value: reads 0.5 + 4 / group (or 1), writes out_dtype.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace smt_ext {

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

}  // namespace smt_ext
