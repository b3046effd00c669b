// Threads are the caller's: torch's pool in the extension, std::thread in the kernel checks.
#pragma once

#include <cstdint>
#include <functional>

namespace smt_ext::cpu {

class Parallel {
 public:
  virtual ~Parallel() = default;
  // Runs body over disjoint ranges that cover [0, n), in any order, on any threads, and waits.
  // A range has at least `grain` tasks unless it is the last. Kernels cut their work into tasks by
  // shape alone, so that results do not depend on how ranges are formed.
  virtual void run(int64_t n, int64_t grain,
                   const std::function<void(int64_t begin, int64_t end)>& body) const = 0;
};

}  // namespace smt_ext::cpu
