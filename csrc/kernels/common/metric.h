// How a block of a gradient becomes its score; for the kernels of all devices.
#pragma once

#include <cstdint>

namespace smt_ext {

// mean_abs: mean |g|    mean: mean g    l1: sum |g|    l2: sqrt(sum g^2)
enum class Metric : int8_t { mean_abs, mean, l1, l2 };

}  // namespace smt_ext
