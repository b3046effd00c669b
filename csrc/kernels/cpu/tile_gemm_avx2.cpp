// tile_gemm for AVX2 with FMA: 4 x 3 accumulators, 3 columns and a broadcast fill the 16 registers.
#if defined(__x86_64__)
#include <cstdint>

#include "scratch.h"
#include "tile_gemm.h"

#pragma GCC target("avx2,fma,f16c")
#define SMT_ISA avx2
#define SMT_VECTOR 32
#define SMT_MR 4
#define SMT_NV 3
#include "tile_gemm_impl.h"
#endif
