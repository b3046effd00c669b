// Copy blocks out of a weight, and write them back.
//
//   gather:   blocks[s, i, j] = w[rows[s] * L + i, cols[s] * L + j], zero beyond a ragged edge
//   scatter:  w[rows[s] * L + i, cols[s] * L + j] = blocks[s, i, j], inside the weight only
//
// w       (N, K), any strides, of w_dtype
// rows    (S,) block row of each block; cols (S,) its block column
// blocks  (S, L, L) contiguous, of blocks_dtype
//
// Reads and writes S * L * L elements once; conversion rounds to nearest even. A scatter with a
// repeated block would race: plans hold each block once.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace smt_ext {

struct BlocksArgs {
  DType w_dtype, blocks_dtype;
  int64_t N, K, L, S;
  void* w;  // read only in gather_blocks
  int64_t stride_n, stride_k;
  const int32_t* rows;
  const int32_t* cols;
  void* blocks;  // read only in scatter_blocks
};

}  // namespace smt_ext
