// On the CPU: ../common/gather_columns.h has the formula.
//
// Neighbouring blocks are one run; a task is a run of rows.
#pragma once

#include "../common/gather_columns.h"
#include "convert.h"
#include "parallel.h"

namespace smt_ext::cpu {

void gather_columns(const GatherColumnsArgs& args, const Parallel& parallel);

}  // namespace smt_ext::cpu
