// What this build holds and uses; `smt-ext env` prints it.
#include <torch/csrc/stable/library.h>

#include <string>

#include "../kernels/cpu/tile_gemm.h"
#include "checks.h"

#ifndef SMT_EXT_CUDA_ARCHS
#define SMT_EXT_CUDA_ARCHS ""
#endif

namespace smt_ext {

static std::string cpu_capability() { return cpu::cpu_capability(); }

static std::string cuda_archs() { return SMT_EXT_CUDA_ARCHS; }

}  // namespace smt_ext

STABLE_TORCH_LIBRARY_IMPL(smt_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&smt_ext::cpu_capability));
  m.impl("cuda_archs", TORCH_BOX(&smt_ext::cuda_archs));
}
