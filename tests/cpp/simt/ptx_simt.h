// ptx.cuh for the SIMT checker: the same functions, by their definition in the PTX ISA (9.7.9.25 cp.async, 9.7.14.5
// ldmatrix and mma with their fragment tables).
//
// An mma adds its products in double, rounds once and toward zero, as the tensor cores' f32 accumulation does; their order
// and alignment of the addends is not modelled, so a result may differ from the hardware's in the last bits.
#pragma once

#include "cuda_runtime.h"

#define SMT_EXT_SHARED(type, name, count)                                                                      \
  static char name##_key;                                                                                      \
  type(&name)[count] = *static_cast<type(*)[count]>(                                                           \
      ::simt::detail::static_shared(&name##_key, sizeof(type) * (count), sizeof(type), #name))

namespace smt_ext::cuda::ptx {

using simt::Site;

template <typename T = unsigned char>
inline T* dynamic_smem() {
  return static_cast<T*>(simt::detail::dynamic_shared());
}

inline uint32_t smem_address(const void* smem, Site site = Site::current()) {
  return simt::detail::shared_address(smem, site);
}

// ---- cp.async --------------------------------------------------------------------------------------------------------

template <int Bytes>
inline void cp_async(void* smem, const void* gmem, int src_bytes = Bytes, Site site = Site::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::detail::cp_async(smem, gmem, Bytes, src_bytes, site);
}

inline void cp_async_16(void* smem, const void* gmem, bool pred = true, Site site = Site::current()) {
  simt::detail::cp_async(smem, gmem, 16, pred ? 16 : 0, site);
}

inline void cp_async_commit() { simt::detail::cp_async_commit(); }

template <int Pending>
inline void cp_async_wait(Site site = Site::current()) {
  simt::detail::cp_async_wait(Pending, site);
}

// ---- ldmatrix --------------------------------------------------------------------------------------------------------

namespace detail {

template <int Matrices>
struct Fragment {
  uint32_t r[Matrices];
};

struct Row {
  const void* address;
  Site site;
};

template <int Matrices, bool Trans>
inline void ldmatrix(uint32_t (&r)[Matrices], const char* what, const void* smem_row, Site site) {
  if (simt::detail::lane() < 8 * Matrices) simt::detail::ldmatrix_row(smem_row, site);
  const auto fragment = simt::warp_exchange<Fragment<Matrices>>(
      what, 0xffffffffu, Row{smem_row, site},
      [](auto get, auto set, unsigned) {
        const void* rows[8 * Matrices];
        uint16_t m[Matrices][8][8];
        for (unsigned l = 0; l < 8 * Matrices; ++l) {
          rows[l] = get(l).address;
          simt::detail::copy_raw(m[l / 8][l % 8], rows[l], 16);
        }
        simt::detail::count_ldmatrix(rows, Matrices, get(0).site);
        for (unsigned l = 0; l < 32; ++l) {
          const unsigned g = l / 4, q = l % 4;
          for (int i = 0; i < Matrices; ++i) {
            const uint32_t low = Trans ? m[i][2 * q][g] : m[i][g][2 * q];
            const uint32_t high = Trans ? m[i][2 * q + 1][g] : m[i][g][2 * q + 1];
            set(l).r[i] = low | high << 16;
          }
        }
      },
      site);
  for (int i = 0; i < Matrices; ++i) r[i] = fragment.r[i];
}

}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row, Site site = Site::current()) {
  detail::ldmatrix<4, false>(r, "ldmatrix.x4", smem_row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row, Site site = Site::current()) {
  detail::ldmatrix<4, true>(r, "ldmatrix.x4.trans", smem_row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row, Site site = Site::current()) {
  detail::ldmatrix<2, false>(r, "ldmatrix.x2", smem_row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row, Site site = Site::current()) {
  detail::ldmatrix<2, true>(r, "ldmatrix.x2.trans", smem_row, site);
}

// ---- mma -------------------------------------------------------------------------------------------------------------

namespace detail {

struct MmaIn {
  float c[4];
  uint32_t a[4], b[2];
};
struct MmaOut {
  float d[4];
};

enum class Kind { bf16, f16, tf32 };

// Element i of a register: two 16-bit elements, lower first, or one tf32, of which the low 13 bits do not count.
template <Kind K>
inline float element(uint32_t word, unsigned i) {
  if (K == Kind::tf32) return simt::bits_as<float>(word & 0xffffe000u);
  const auto bits = static_cast<uint16_t>(word >> 16 * i);
  return K == Kind::bf16 ? simt::bf16_value(bits) : simt::f16_value(bits);
}

inline float round_toward_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f) : nearest;
}

template <Kind K>
inline void mma(float (&d)[4], const char* what, const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  const MmaIn in{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const MmaOut out = simt::warp_exchange<MmaOut>(
      what, 0xffffffffu, in,
      [](auto get, auto set, unsigned) {
        constexpr unsigned kDepth = K == Kind::tf32 ? 8 : 16;
        constexpr unsigned kPerWord = K == Kind::tf32 ? 1 : 2;
        double A[16][kDepth], B[kDepth][8];
        for (unsigned l = 0; l < 32; ++l) {
          const MmaIn& lane = get(l);
          const unsigned g = l / 4, q = l % 4;
          for (unsigned i = 0; i < kPerWord; ++i) {
            const unsigned k = kPerWord * q + i;
            A[g][k] = element<K>(lane.a[0], i);
            A[g + 8][k] = element<K>(lane.a[1], i);
            A[g][k + kDepth / 2] = element<K>(lane.a[2], i);
            A[g + 8][k + kDepth / 2] = element<K>(lane.a[3], i);
            B[k][g] = element<K>(lane.b[0], i);
            B[k + kDepth / 2][g] = element<K>(lane.b[1], i);
          }
        }
        for (unsigned l = 0; l < 32; ++l) {
          const unsigned g = l / 4, q = l % 4;
          for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = g + (i < 2 ? 0 : 8), column = 2 * q + i % 2;
            double sum = static_cast<double>(get(l).c[i]);
            for (unsigned k = 0; k < kDepth; ++k) sum += A[row][k] * B[k][column];
            set(l).d[i] = round_toward_zero(sum);
          }
        }
        simt::detail::count_mma();
      },
      site);
  for (int i = 0; i < 4; ++i) d[i] = out.d[i];
}

}  // namespace detail

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  detail::mma<detail::Kind::bf16>(d, "mma.m16n8k16.bf16", a, b, site);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  detail::mma<detail::Kind::f16>(d, "mma.m16n8k16.f16", a, b, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  detail::mma<detail::Kind::tf32>(d, "mma.m16n8k8.tf32", a, b, site);
}

// To nearest, ties away from zero: half of the last kept bit is added to the magnitude, the rest cut.
inline uint32_t cvt_rna_tf32(float value) {
  const auto bits = simt::bits_as<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return std::isnan(value) ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

// ---- plain accesses --------------------------------------------------------------------------------------------------

namespace detail {
template <typename T>
inline T load(const T* p, simt::detail::Space space, simt::detail::Cache cache, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16);
  T value;
  simt::detail::load(&value, p, sizeof(T), space, cache, site);
  return value;
}
template <typename T>
inline void store(T* p, const T& value, simt::detail::Space space, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 16);
  simt::detail::store(p, &value, sizeof(T), space, site);
}
}  // namespace detail

template <typename T>
inline T ld_global(const T* p, Site site = Site::current()) {
  return detail::load(p, simt::detail::Space::global, simt::detail::Cache::normal, site);
}
template <typename T>
inline T ld_global_nc(const T* p, Site site = Site::current()) {
  return detail::load(p, simt::detail::Space::global, simt::detail::Cache::read_only, site);
}
template <typename T>
inline T ld_global_stream(const T* p, Site site = Site::current()) {
  return detail::load(p, simt::detail::Space::global, simt::detail::Cache::normal, site);
}
template <typename T>
inline void st_global(T* p, const simt::SameType<T>& value, Site site = Site::current()) {
  detail::store(p, value, simt::detail::Space::global, site);
}
template <typename T>
inline void st_global_stream(T* p, const simt::SameType<T>& value, Site site = Site::current()) {
  detail::store(p, value, simt::detail::Space::global, site);
}
template <typename T>
inline T ld_shared(const T* p, Site site = Site::current()) {
  return detail::load(p, simt::detail::Space::shared, simt::detail::Cache::normal, site);
}
template <typename T>
inline void st_shared(T* p, const simt::SameType<T>& value, Site site = Site::current()) {
  detail::store(p, value, simt::detail::Space::shared, site);
}
inline void prefetch_l2(const void* p, Site site = Site::current()) { simt::detail::prefetch(p, site); }

}  // namespace smt_ext::cuda::ptx
