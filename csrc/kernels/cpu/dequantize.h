// On the CPU: ../common/dequantize.h has the formula.
//
// One pass: a row is dequantised in parts that stay in the first-level cache until the blocks lie
// on them. The same bits on any number of threads.
#pragma once

#include "../common/dequantize.h"
#include "convert.h"
#include "parallel.h"

namespace smt_ext::cpu {

void dequantize_with_blocks(const DequantizeArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
