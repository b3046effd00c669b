// On the CPU: ../common/gather_blocks.h has the formula.
//
// A task is a run of block rows.
#pragma once

#include "../common/gather_blocks.h"
#include "convert.h"
#include "parallel.h"

namespace smt_ext::cpu {

void gather_blocks(const BlocksArgs& args, const Parallel& parallel);
void scatter_blocks(const BlocksArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
