// tile_gemm for AVX-512 with vdpbf16ps. 8 x 2 accumulators keep one FMA a cycle busy (latency 4)
// with 10 loads for 16 FMAs, and 8 and 32 divide every usual block size.
#if defined(__x86_64__)
// GCC 12 takes the undefined registers in its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "scratch.h"
#include "tile_gemm.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#define SMT_ISA avx512_bf16
#define SMT_VECTOR 64
#define SMT_MR 8
#define SMT_NV 2
#define SMT_DOT_BF16
#include "tile_gemm_impl.h"
#endif
