#include "dequantize.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SMT_X86 1
#endif

#include "clones.h"

namespace smt_ext::cpu {

constexpr int64_t kPart = 1024;  // values of a row at a time, 4 KB of float32
constexpr int64_t kTaskValues = 16384;

// out[i] = code[nibble i of packed] * scale, for `count` values that start with a high nibble.
using Nibbles = void(const uint8_t* packed, int64_t count, const float* code, float scale,
                     float* out);

static void nibbles_generic(const uint8_t* packed, int64_t count, const float* code, float scale,
                            float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int q = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
    out[i] = code[q] * scale;
  }
}

#ifdef SMT_X86
// Eight bytes as 16 indices, the high nibble of each first.
__attribute__((target("sse4.1"))) static inline __m128i sixteen_nibbles(const uint8_t* packed) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return _mm_unpacklo_epi8(high, _mm_and_si128(bytes, mask));
}

__attribute__((target("avx512f"))) static void nibbles_avx512(const uint8_t* packed, int64_t count,
                                                              const float* code, float scale,
                                                              float* out) {
  constexpr __mmask16 kAll = 0xffff;  // unmasked, gcc 12 warns of what it leaves undefined itself
  const __m512 table = _mm512_loadu_ps(code), scales = _mm512_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i index = _mm512_maskz_cvtepu8_epi32(kAll, sixteen_nibbles(packed + i / 2));
    const __m512 value = _mm512_maskz_permutexvar_ps(kAll, index, table);
    _mm512_storeu_ps(out + i, _mm512_mul_ps(value, scales));
  }
  nibbles_generic(packed + i / 2, count - i, code, scale, out + i);
}

__attribute__((target("avx2"))) static void nibbles_avx2(const uint8_t* packed, int64_t count,
                                                         const float* code, float scale,
                                                         float* out) {
  const __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8);
  const __m256 scales = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = sixteen_nibbles(packed + i / 2);
    for (int half = 0; half < 2; ++half) {
      const __m256i index = _mm256_cvtepu8_epi32(half ? _mm_unpackhi_epi64(bytes, bytes) : bytes);
      // Bit 3 of an index, moved to the sign, chooses the half of the table.
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                            _mm256_permutevar8x32_ps(high, index), upper);
      _mm256_storeu_ps(out + i + 8 * half, _mm256_mul_ps(value, scales));
    }
  }
  nibbles_generic(packed + i / 2, count - i, code, scale, out + i);
}
#endif

static Nibbles* best_nibbles() {
#ifdef SMT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return nibbles_avx512;
  if (__builtin_cpu_supports("avx2")) return nibbles_avx2;
#endif
  return nibbles_generic;
}

// Values [first, first + count) of the flat weight.
static void dequantize_4bit(const DequantizeArgs& a, int64_t first, int64_t count, float* out) {
  static Nibbles* const nibbles = best_nibbles();
  const auto* packed = static_cast<const uint8_t*>(a.q);
  for (int64_t at = first, end = first + count; at < end;) {
    const float scale = a.absmax[at / a.group];
    if (at % 2) {  // rows of an odd number of values
      *out++ = a.code[packed[at / 2] & 15] * scale;
      ++at;
      continue;
    }
    const int64_t run = std::min(end, (at / a.group + 1) * a.group) - at;
    nibbles(packed + at / 2, run, a.code, scale, out);
    out += run;
    at += run;
  }
}

SMT_CLONES static void dequantize_8bit(const int8_t* q, int64_t count, float scale, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(q[i]) * scale;
}

template <typename To, typename From>
SMT_CLONES static void convert_values(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = convert<To>::from(from[i]);
}

void dequantize_with_blocks(const DequantizeArgs& a, const Parallel& parallel) {
  if (a.K == 0) return;  // N may be anything then
  // Blocks by their row of the grid.
  const int64_t grid_rows = (a.N + a.L - 1) / a.L;
  std::vector<int64_t> begin(grid_rows + 1, 0), order(a.S);
  for (int64_t s = 0; s < a.S; ++s) ++begin[a.rows[s] + 1];
  for (int64_t r = 0; r < grid_rows; ++r) begin[r + 1] += begin[r];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t s = 0; s < a.S; ++s) order[next[a.rows[s]]++] = s;

  const int64_t grain = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(1, a.K));
  parallel.run(a.N, grain, [&](int64_t first_row, int64_t last_row) {
    dispatch(a.out_dtype, [&](auto out_type) {
      dispatch(a.blocks_dtype, [&](auto block_type) {
        using Out = decltype(out_type);
        using Block = decltype(block_type);
        float wide[kPart];
        for (int64_t n = first_row; n < last_row; ++n) {
          Out* const row = static_cast<Out*>(a.out) + n * a.K;
          for (int64_t k = 0; k < a.K; k += kPart) {
            const int64_t count = std::min(kPart, a.K - k);
            float* const values =
                std::is_same<Out, float>::value ? reinterpret_cast<float*>(row + k) : wide;
            if (a.bits == 4) {
              dequantize_4bit(a, n * a.K + k, count, values);
            } else {
              const auto* q = static_cast<const int8_t*>(a.q) + n * a.K + k;
              dequantize_8bit(q, count, a.absmax[n] * static_cast<float>(1.0 / 127.0), values);
            }
            if constexpr (!std::is_same<Out, float>::value) convert_values(wide, count, row + k);
          }
          const int64_t r = n / a.L;
          for (int64_t i = begin[r]; i < begin[r + 1]; ++i) {
            const int64_t s = order[i], k = a.cols[s] * a.L;
            const Block* from = static_cast<const Block*>(a.blocks) + (s * a.L + n % a.L) * a.L;
            convert_values(from, std::min(a.L, a.K - k), row + k);
          }
        }
      });
    });
  });
}

}  // namespace smt_ext::cpu
