// The checker's buffers and errors (../simt/simt.h) for a real GPU; what tests find as "simt.h"
// when they are built with SMT_EXT_GPU. device.cpp implements them.
#pragma once

#include <functional>

#include "../simt/simt.h"

namespace simt {

// Runs f, waits for the GPU and ends this process: status kStopped if a kernel stopped.
[[noreturn]] void exit_with_outcome(const std::function<void()>& f);
inline constexpr int kStopped = 86;

}  // namespace simt

// A kernel that stops takes its process's CUDA context with it: a process of its own runs it.
#define EXPECT_STOPS(statement)                              \
  EXPECT_EXIT(::simt::exit_with_outcome([&] { statement; }), \
              ::testing::ExitedWithCode(::simt::kStopped), "")
