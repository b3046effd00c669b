// What the kernels of all devices take.
#pragma once

#include <cstdint>

namespace smt_ext {

// Of a block's side, L; smt_ext/plan.py has the same two.
constexpr int64_t kMinBlockSize = 16, kMaxBlockSize = 512;

// CUDA's products take several small blocks in one tile: how many along its side; 1 where L does
// not fit.
constexpr int kGroupTile = 128;
constexpr int64_t blocks_of_a_side(int64_t L) {
  return L == 16 || L == 32 || L == 64 ? kGroupTile / L : 1;
}

}  // namespace smt_ext
