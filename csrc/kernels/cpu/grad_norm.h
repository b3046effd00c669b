// On the CPU: ../common/grad_norm.h has the formula.
//
// Chunks of fixed size are summed on their own and then in order: the same bits on any number of
// threads.
#pragma once

#include "../common/grad_norm.h"
#include "convert.h"
#include "parallel.h"

namespace smt_ext::cpu {

double grad_norm(const Gradient* grads, int64_t n, const Parallel& parallel);

}  // namespace smt_ext::cpu
