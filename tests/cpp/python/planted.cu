// A kernel that touches one element, whichever it is told: shows what is caught of kernels that
// leave their tensor (tests/cuda/test_cuda_errors.py).
#include "launch.cuh"
#include "planted.h"
#include "ptx.cuh"

namespace smt_ext::testing {

static __global__ void touch_kernel(float* at, bool write) {
  if (write) {
    cuda::ptx::st_global(at, 1.0f);
  } else {
    cuda::ptx::ld_global(at);
  }
}

void touch(float* at, bool write) {
  cuda::launch("touch", touch_kernel, dim3(1), dim3(1), 0, nullptr, at, write);
}

}  // namespace smt_ext::testing
