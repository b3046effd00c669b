// What the kernels of all devices take.
#pragma once

#include <cstdint>

namespace smt_ext {

// Of a block's side, L; smt_ext/ops.py has the same two.
constexpr int64_t kMinBlockSize = 16, kMaxBlockSize = 512;

}  // namespace smt_ext
