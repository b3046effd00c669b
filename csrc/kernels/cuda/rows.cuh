// How the copying kernels share out a matrix: threadIdx.x along a row, in vectors of V elements,
// threadIdx.y over rows; a thread keeps its columns and moves kRows rows, all loads before the
// first store, so that enough bytes are in flight. A warp reads 512 bytes of a row (all of it, and
// several rows, where rows are shorter).
#pragma once

#include "convert.cuh"
#include "launch.cuh"

namespace smt_ext::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kRows = 4;  // of a thread: 256 threads x 4 x 16 bytes = 16 KB of a block

struct RowTiles {
  dim3 block;
  unsigned across;  // tiles along a row
  int64_t down;     // tiles of block.y * kRows rows

  RowTiles(int64_t rows, int64_t vectors) {
    unsigned x = 1;
    while (x < 32 && x < vectors) x *= 2;
    block = dim3(x, kRowThreads / x);
    across = static_cast<unsigned>((vectors + x - 1) / x);
    const int64_t height = static_cast<int64_t>(block.y) * kRows;
    down = (rows + height - 1) / height;
  }
};

// to[i] = from[i] for the thread's rows i of the given number, both pointers at the thread's first.
// `step` rows lie between two of a thread; strides are in elements.
template <int V, typename To, typename From>
__device__ __forceinline__ void copy_rows(To* to, int64_t to_stride, const From* from,
                                          int64_t from_stride, int64_t rows, unsigned step) {
  Vector<From, V> value[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i * step < rows) value[i] = load_nc<V>(from + i * step * from_stride);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i * step < rows) store<V>(to + i * step * to_stride, convert<To>(value[i]));
  }
}

}  // namespace smt_ext::cuda
