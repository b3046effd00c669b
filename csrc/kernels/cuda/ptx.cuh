// The only file with PTX: thin wrappers over the instructions that C++ cannot name.
//
// Kernels reach cp.async, ldmatrix and mma, and every vector access whose pattern matters, through
// this header, so that the very same kernel sources also run on the CPU: with SMT_EXT_SIMT defined
// the wrappers come from the checker (tests/cpp/simt), which executes them by their definition in
// the PTX ISA and watches what they touch.
//
// Shared memory. Kernels use dynamic shared memory through dynamic_smem<T>() and small fixed arrays
// through SMT_EXT_SHARED(type, name, count); never a bare __shared__, which the checker could
// neither poison nor bound.
//
// Fragments of mma.m16n8kX; lane = threadIdx % 32, g = lane / 4, q = lane % 4;
// A is 16 x k, B is k x 8, D is 16 x 8:
//   k16, 16-bit elements, two in a register, the lower column (A) or row (B) in the lower half
//     a[0] = A[g][2q, 2q+1]     a[1] = A[g + 8][2q, 2q+1]
//     a[2] = A[g][2q+8, 2q+9]   a[3] = A[g + 8][2q+8, 2q+9]
//     b[0] = B[2q, 2q+1][g]     b[1] = B[2q+8, 2q+9][g]
//   k8, tf32
//     a[0] = A[g][q]   a[1] = A[g + 8][q]   a[2] = A[g][q + 4]   a[3] = A[g + 8][q + 4]
//     b[0] = B[q][g]   b[1] = B[q + 4][g]
//   d[0], d[1] = D[g][2q, 2q+1]   d[2], d[3] = D[g + 8][2q, 2q+1]
// ldmatrix: lane 8 i + j holds the address of row j (8 elements, 16 bytes, aligned) of the 8 x 8
// matrix i. Register i of a lane receives elements [g][2q, 2q+1] of matrix i; with _trans, elements
// [2q, 2q+1][g] (matrix i transposed).
//
// Architecture: sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef SMT_EXT_SIMT

#include "ptx_simt.h"

#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "smt_ext CUDA kernels need sm_80 or later (cp.async, bf16 and tf32 mma)"
#endif

// A fixed array in shared memory, 16-byte aligned, not initialised:
//   SMT_EXT_SHARED(float, partial, 32);
#define SMT_EXT_SHARED(type, name, count) __shared__ alignas(16) type name[count]

namespace smt_ext::cuda::ptx {

// ---- shared memory ------------------------------------------------------------------------------

// Start of the block's dynamic shared memory, 128-byte aligned. Every call returns the same
// address.
template <typename T = unsigned char>
__device__ __forceinline__ T* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char smt_ext_dynamic_smem[];
  return reinterpret_cast<T*>(smt_ext_dynamic_smem);
}

// The 32-bit address in the shared window that shared-memory instructions take.
__device__ __forceinline__ uint32_t smem_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// ---- cp.async: global -> shared without registers -----------------------------------------------

// Copies 4, 8 or 16 bytes (both addresses aligned to Bytes). Only the first src_bytes (0..Bytes)
// are read from gmem, the rest is filled with zero; with src_bytes = 0 gmem is not read, but pass a
// valid pointer all the same. 16 bytes bypass L1. The data may be read by this thread after
// cp_async_wait, by others after a barrier on top of it.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* smem, const void* gmem, int src_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(smem)),
                 "l"(gmem), "r"(src_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem_address(smem)),
                 "l"(gmem), "n"(Bytes), "r"(src_bytes)
                 : "memory");
  }
}

// 16 bytes, or 16 zero bytes when pred is false, and gmem may be any address then: a predicate of
// the one instruction, where a count of bytes costs address arithmetic as well.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool pred = true) {
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.eq.u32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignore;\n"
      "}" ::"r"(smem_address(smem)),
      "l"(gmem), "r"(static_cast<unsigned>(pred))
      : "memory");
}

// Closes this thread's group of the cp.async issued so far (the group may be empty).
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most Pending of this thread's most recent groups are still in flight.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- ldmatrix: 8 x 8 matrices of 16-bit elements, shared -> fragments ---------------------------

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(smem_row))
               : "memory");
}

// Addresses come from lanes 0..15; those of the other lanes are ignored but must be valid all the
// same.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(smem_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(smem_row))
               : "memory");
}

// ---- mma: d += a b, fp32 accumulation -----------------------------------------------------------

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Operands must come from cvt_rna_tf32 (the hardware truncates the low 13 bits of anything else).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float32 -> tf32 (10-bit mantissa), to nearest, ties away from zero. Three integer instructions;
// no architecture up to sm_120 has one.
__device__ __forceinline__ uint32_t cvt_rna_tf32(float value) {
  uint32_t tf32;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(tf32) : "f"(value));
  return tf32;
}

// ---- plain accesses of 1, 2, 4, 8 or 16 bytes, one instruction each -----------------------------

namespace detail {
template <std::size_t Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <typename T>
using WordOf = typename Word<sizeof(T)>::type;

template <typename T>
struct Same {
  using type = T;
};
template <typename T>
using SameType = typename Same<T>::type;  // a value that converts to what the pointer says

// By value: a memcpy straight from memory would load byte by byte, it knows no alignment.
template <typename To, typename From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<From>);
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
template <typename T>
__device__ __forceinline__ const WordOf<T>* word(const T* p) {
  return reinterpret_cast<const WordOf<T>*>(p);
}
template <typename T>
__device__ __forceinline__ WordOf<T>* word(T* p) {
  return reinterpret_cast<WordOf<T>*>(p);
}
}  // namespace detail

// T is any trivially copyable type of 1, 2, 4, 8 or 16 bytes; the pointer is aligned to sizeof(T).
template <typename T>
__device__ __forceinline__ T ld_global(const T* p) {
  return detail::bit_cast<T>(*detail::word(p));
}

// Through the read-only path: only for memory that nothing writes while the kernel runs.
template <typename T>
__device__ __forceinline__ T ld_global_nc(const T* p) {
  return detail::bit_cast<T>(__ldg(detail::word(p)));
}

// Read once: evicted from the caches first.
template <typename T>
__device__ __forceinline__ T ld_global_stream(const T* p) {
  return detail::bit_cast<T>(__ldcs(detail::word(p)));
}

template <typename T>
__device__ __forceinline__ void st_global(T* p, const detail::SameType<T>& value) {
  *detail::word(p) = detail::bit_cast<detail::WordOf<T>, T>(value);
}

// Written and not read again soon: evicted from the caches first.
template <typename T>
__device__ __forceinline__ void st_global_stream(T* p, const detail::SameType<T>& value) {
  __stcs(detail::word(p), detail::bit_cast<detail::WordOf<T>, T>(value));
}

template <typename T>
__device__ __forceinline__ T ld_shared(const T* p) {
  return detail::bit_cast<T>(*detail::word(p));
}

template <typename T>
__device__ __forceinline__ void st_shared(T* p, const detail::SameType<T>& value) {
  *detail::word(p) = detail::bit_cast<detail::WordOf<T>, T>(value);
}

// blockIdx.x, read where it is written: what is computed from it after a loop is not kept in
// registers through the loop, as it may be with blockIdx.x itself.
__device__ __forceinline__ unsigned block_index_x() {
  unsigned x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

// Brings the cache line of p into L2. p is a valid address.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

}  // namespace smt_ext::cuda::ptx

#endif  // SMT_EXT_SIMT
