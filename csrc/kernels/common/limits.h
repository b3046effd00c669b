// What the kernels of all devices take.
#pragma once

#include <cstdint>

namespace smt_ext {

// Linears with one input whose block gradients one call computes; smt_ext/ops.py has the same.
constexpr int kMaxSiblings = 4;

// Of a block's side, L; smt_ext/plan.py has the same two.
constexpr int64_t kMinBlockSize = 16, kMaxBlockSize = 512;

// CUDA's products take several small blocks in one tile of one of these shapes, in entries; the
// tall ones are for a whole block column or two. smt_ext/ops.py has the same list.
struct TileShape {
  int rows, columns;

  // A tile in a list: its block rows, its block columns and, for each pair of them, a block.
  constexpr int64_t list_entries(int64_t L) const {
    return rows / L + columns / L + rows / L * (columns / L);
  }
};

constexpr int kGroupTile = 128;
constexpr TileShape kTileShapes[] = {{kGroupTile, kGroupTile}, {256, 64}, {256, 32}};

constexpr bool shares_tiles(int64_t L) { return L == 16 || L == 32 || L == 64; }

// The shape whose lists have so many entries a tile; no rows where none has. No two shapes that
// hold a block of L have as many.
constexpr TileShape tile_shape(int64_t L, int64_t list_entries) {
  for (const TileShape& shape : kTileShapes) {
    if (shares_tiles(L) && shape.columns >= L && shape.list_entries(L) == list_entries) {
      return shape;
    }
  }
  return {0, 0};
}

}  // namespace smt_ext
