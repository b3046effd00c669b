// ptx.cuh for the SIMT checker: the same functions, by their definition in the PTX ISA (the work is
// in ptx.cpp, schedule.cpp).
//
// An mma adds its products in double, rounds once and toward zero, as the tensor cores' f32
// accumulation does; their order and alignment of the addends is not modelled, so a result may
// differ from the hardware's in the last bits.
#pragma once

#include "cuda_runtime.h"

#define SMT_EXT_SHARED(type, name, count)            \
  static char name##_key;                            \
  type(&name)[count] = *static_cast<type(*)[count]>( \
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

// ---- cp.async -----------------------------------------------------------------------------------

template <int Bytes>
inline void cp_async(void* smem, const void* gmem, int src_bytes = Bytes,
                     Site site = Site::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::detail::cp_async(smem, gmem, Bytes, src_bytes, site);
}

inline void cp_async_16(void* smem, const void* gmem, bool pred = true,
                        Site site = Site::current()) {
  simt::detail::cp_async(smem, gmem, 16, pred ? 16 : 0, site);
}

inline void cp_async_commit() { simt::detail::cp_async_commit(); }

template <int Pending>
inline void cp_async_wait(Site site = Site::current()) {
  simt::detail::cp_async_wait(Pending, site);
}

// ---- ldmatrix, mma ------------------------------------------------------------------------------

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row, Site site = Site::current()) {
  simt::detail::ldmatrix(4, false, r, smem_row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row, Site site = Site::current()) {
  simt::detail::ldmatrix(4, true, r, smem_row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row, Site site = Site::current()) {
  simt::detail::ldmatrix(2, false, r, smem_row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row, Site site = Site::current()) {
  simt::detail::ldmatrix(2, true, r, smem_row, site);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Site site = Site::current()) {
  simt::detail::mma(simt::detail::Mma::bf16, d, a, b, site);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
  simt::detail::mma(simt::detail::Mma::f16, d, a, b, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
  simt::detail::mma(simt::detail::Mma::tf32, d, a, b, site);
}

// To nearest, ties away from zero: half of the last kept bit is added to the magnitude, the rest
// cut. (Inf and NaN are only cut, as in the code that ptxas makes of it.)
inline uint32_t cvt_rna_tf32(float value) {
  const auto bits = simt::bits_as<uint32_t>(value);
  return (std::isfinite(value) ? bits + 0x1000u : bits) & 0xffffe000u;
}

// ---- plain accesses -----------------------------------------------------------------------------

namespace detail {
template <typename T>
inline T load(const T* p, simt::detail::Space space, simt::detail::Cache cache, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) & (sizeof(T) - 1)) == 0 &&
                sizeof(T) <= 16);
  T value;
  simt::detail::load(&value, p, sizeof(T), space, cache, site);
  return value;
}
template <typename T>
inline void store(T* p, const T& value, simt::detail::Space space, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) & (sizeof(T) - 1)) == 0 &&
                sizeof(T) <= 16);
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
inline unsigned block_index_x() { return blockIdx.x; }
inline void prefetch_l2(const void* p, Site site = Site::current()) {
  simt::detail::prefetch(p, site);
}

}  // namespace smt_ext::cuda::ptx
