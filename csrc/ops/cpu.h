// What the CPU operators share: torch's thread pool, and indices checked on the host.
#pragma once

#include "../kernels/cpu/parallel.h"
#include "../kernels/cpu/tile_gemm.h"
#include "checks.h"

namespace smt_ext {

class TorchParallel final : public cpu::Parallel {
 public:
  void run(int64_t n, int64_t grain,
           const std::function<void(int64_t, int64_t)>& body) const override {
    torch::stable::parallel_for(0, n, grain, body);
  }
};

inline void check_range(const int32_t* index, int64_t count, int64_t limit, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < limit, name, ": expected indices in [0, ", limit,
                    "), got ", index[i], " at position ", i);
  }
}

inline cpu::Operand operand(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

}  // namespace smt_ext
