// tile_gemm for any CPU, and the choice of the best build for this one.
#include "tile_gemm.h"

#include <cstdlib>
#include <cstring>

#include "scratch.h"

// 16-byte vectors exist on every 64-bit target: SSE2, NEON (where 8 x 2 accumulators fit as well).
#define SMT_ISA generic
#define SMT_VECTOR 16
#define SMT_MR 4
#define SMT_NV 2
#include "tile_gemm_impl.h"

namespace smt_ext::cpu {

using TileGemm = void(DType, const Operand&, const Operand&, int64_t, int64_t, int64_t, void*,
                      int64_t, const NextTile*);

#if defined(__x86_64__)
namespace avx512 {
TileGemm tile_gemm;
}
namespace avx512_bf16 {
TileGemm tile_gemm;
}
namespace avx2 {
TileGemm tile_gemm;
}
#endif

struct Build {
  const char* name;
  TileGemm* gemm;
};

// The best build for this CPU that SMT_EXT_CPU allows: it names one, and that one or a lesser is
// taken.
static Build best_build() {
#if defined(__x86_64__)
  const char* cap = std::getenv("SMT_EXT_CPU");
  bool allowed = cap == nullptr || *cap == '\0';
  const auto may_use = [&](const char* name) {
    return allowed = allowed || std::strcmp(cap, name) == 0;
  };
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (may_use("avx512_bf16") && avx512 && __builtin_cpu_supports("avx512bf16")) {
    return {"avx512_bf16", avx512_bf16::tile_gemm};
  }
  if (may_use("avx512") && avx512) return {"avx512", avx512::tile_gemm};
  if (may_use("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", avx2::tile_gemm};
  }
#endif
  return {"generic", generic::tile_gemm};
}

static const Build& build() {
  static const Build best = best_build();
  return best;
}

void tile_gemm(DType dtype, const Operand& a, const Operand& b, int64_t T, int64_t m, int64_t n,
               void* c, int64_t ldc, const NextTile* next) {
  build().gemm(dtype, a, b, T, m, n, c, ldc, next);
}

const char* cpu_capability() { return build().name; }

}  // namespace smt_ext::cpu
