// Working memory of one thread, kept from call to call.
//
// On the heap and not thread_local arrays: those of every dtype and instruction set would add up to
// megabytes that each thread's stack must hold.
#pragma once

#include <cstdint>

namespace smt_ext::cpu {

enum class Scratch : int8_t { panels, tile };

// At least `bytes` of memory, aligned to a cache line, with unspecified content; valid until the
// same thread asks for the same kind again.
void* thread_scratch(Scratch kind, int64_t bytes);

}  // namespace smt_ext::cpu
