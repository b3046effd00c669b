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

// *target(i) = *source(i) for i < kRows, one vector each. No target: nothing. No source: zeros.
template <int V, typename Source, typename Target>
__device__ __forceinline__ void copy_rows(const Source& source, const Target& target) {
  using From = std::remove_const_t<std::remove_pointer_t<decltype(source(0))>>;
  using To = std::remove_pointer_t<decltype(target(0))>;
  Vector<From, V> value[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const From* from = source(i);
#pragma unroll
    for (int j = 0; j < V; ++j) value[i].at[j] = From(0.0f);
    if (from) value[i] = load_nc<V>(from);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    To* to = target(i);
    if (to) store<V>(to, convert<To>(value[i]));
  }
}

}  // namespace smt_ext::cuda
