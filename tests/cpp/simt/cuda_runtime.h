// What a kernel source expects of CUDA, for the SIMT checker (simt.h): shadows the toolkit's header
// of the same name. Only what smt_ext's kernels use and its near kin; anything missing is a compile
// error, never a wrong answer.
#pragma once

#include <math.h>

#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_types.h"
#include "half_bits.h"
#include "simt.h"

// ---- language -----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// The checker must know, bound and poison shared memory.
#define __shared__ use_SMT_EXT_SHARED_or_dynamic_smem_of_ptx_cuh

#define threadIdx (std::as_const(::simt::detail::builtins.thread))
#define blockIdx (std::as_const(::simt::detail::builtins.block))
#define blockDim (std::as_const(::simt::detail::builtins.block_dim))
#define gridDim (std::as_const(::simt::detail::builtins.grid_dim))
inline constexpr int warpSize = 32;

namespace simt {

template <typename T>
struct Same {
  using type = T;
};
template <typename T>
using SameType = typename Same<T>::type;  // an argument that converts to what the others say

// A value from every lane in, a value to every lane out. Finish: (get(lane) -> In&, set(lane) ->
// Out&, mask).
template <typename Out, typename In, typename Finish>
inline Out warp_exchange(const char* what, unsigned mask, const In& in, Finish finish, Site site,
                         bool orders_memory = false) {
  Out out{};
  detail::meet(
      what, mask, &in, &out,
      [](const void* context, const void* const* ins, void* const* outs, unsigned lanes) {
        (*static_cast<const Finish*>(context))(
            [&](unsigned l) -> const In& { return *static_cast<const In*>(ins[l]); },
            [&](unsigned l) -> Out& { return *static_cast<Out*>(outs[l]); }, lanes);
      },
      &finish, orders_memory, site);
  return out;
}

}  // namespace simt

// ---- barriers, votes, shuffles ------------------------------------------------------------------

inline void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::detail::syncthreads(site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::syncthreads_count(predicate, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::syncthreads_count(predicate, site) != 0;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::current()) {
  return simt::detail::syncthreads_count(predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  simt::detail::meet("__syncwarp", mask, nullptr, nullptr, nullptr, nullptr, true, site);
}
inline void __threadfence() { simt::detail::fence(); }
[[noreturn]] inline void __trap(simt::Site site = simt::Site::current()) {
  simt::detail::fail_trap(site);
}
// Orders within the block; the checker asks for barriers there all the same.
inline void __threadfence_block() {}

namespace simt {

enum class Shuffle { index, up, down, bitwise_xor };

template <Shuffle Kind, typename T>
inline T shuffle(const char* what, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct In {
    T value;
    int source;
    Site site;
  };
  const int lane = static_cast<int>(detail::lane());
  const int first = lane / width * width;
  int source = lane;
  if (Kind == Shuffle::index) source = first + (argument & (width - 1));
  if (Kind == Shuffle::up) source = lane - argument < first ? lane : lane - argument;
  if (Kind == Shuffle::down) source = lane + argument >= first + width ? lane : lane + argument;
  if (Kind == Shuffle::bitwise_xor)
    source = (lane ^ argument) >= first + width ? lane : lane ^ argument;
  return warp_exchange<T>(
      what, mask, In{value, source, site},
      [](auto get, auto set, unsigned lanes) {
        detail::count_shuffle();
        for (unsigned l = 0; l < 32; ++l) {
          if ((lanes >> l & 1) == 0) continue;
          const auto& in = get(l);
          if ((lanes >> in.source & 1) == 0) {
            detail::fail_shuffle(l, in.source, in.site);
          }
          set(l) = get(static_cast<unsigned>(in.source)).value;
        }
      },
      site);
}

template <typename Out, typename In, typename Combine>
inline Out warp_reduce(const char* what, unsigned mask, In value, Combine, Site site) {
  return warp_exchange<Out>(
      what, mask, value,
      [](auto get, auto set, unsigned lanes) {
        Out sum{};
        bool any = false;
        for (unsigned l = 0; l < 32; ++l) {
          if ((lanes >> l & 1) == 0) continue;
          sum = any ? Combine{}(sum, static_cast<Out>(get(l)), l)
                    : Combine{}.first(static_cast<Out>(get(l)), l);
          any = true;
        }
        for (unsigned l = 0; l < 32; ++l) {
          if (lanes >> l & 1) set(l) = sum;
        }
      },
      site);
}

template <typename F>
struct Fold {
  template <typename T>
  T first(T value, unsigned) const {
    return value;
  }
  template <typename T>
  T operator()(T a, T b, unsigned) const {
    return F{}(a, b);
  }
};
struct Ballot {
  unsigned first(unsigned bit, unsigned lane) const { return bit << lane; }
  unsigned operator()(unsigned sum, unsigned bit, unsigned lane) const { return sum | bit << lane; }
};
struct Smaller {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Larger {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

}  // namespace simt

#define SMT_EXT_SIMT_SHUFFLE(name, kind, parameter)                                        \
  template <typename T>                                                                    \
  inline T name(unsigned mask, T value, int parameter, int width = 32,                     \
                simt::Site site = simt::Site::current()) {                                 \
    return simt::shuffle<simt::Shuffle::kind>(#name, mask, value, parameter, width, site); \
  }
SMT_EXT_SIMT_SHUFFLE(__shfl_sync, index, source)
SMT_EXT_SIMT_SHUFFLE(__shfl_up_sync, up, delta)
SMT_EXT_SIMT_SHUFFLE(__shfl_down_sync, down, delta)
SMT_EXT_SIMT_SHUFFLE(__shfl_xor_sync, bitwise_xor, lane_mask)
#undef SMT_EXT_SIMT_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Site site = simt::Site::current()) {
  return simt::warp_reduce<unsigned>("__ballot_sync", mask, static_cast<unsigned>(predicate != 0),
                                     simt::Ballot{}, site);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
#define SMT_EXT_SIMT_REDUCE(name, type, functor)                                         \
  inline type name(unsigned mask, type value, simt::Site site = simt::Site::current()) { \
    return simt::warp_reduce<type>(#name, mask, value, simt::Fold<functor>{}, site);     \
  }
SMT_EXT_SIMT_REDUCE(__reduce_add_sync, unsigned, std::plus<>)
SMT_EXT_SIMT_REDUCE(__reduce_min_sync, unsigned, simt::Smaller)
SMT_EXT_SIMT_REDUCE(__reduce_max_sync, unsigned, simt::Larger)
SMT_EXT_SIMT_REDUCE(__reduce_or_sync, unsigned, std::bit_or<>)
SMT_EXT_SIMT_REDUCE(__reduce_and_sync, unsigned, std::bit_and<>)
#undef SMT_EXT_SIMT_REDUCE

// ---- atomics and cached loads -------------------------------------------------------------------

namespace simt {
template <typename T, typename F>
inline T atomic(T* p, F&& update, Site site) {
  T old;
  detail::atomic_load(&old, p, sizeof(T), site);
  const T value = update(old);
  detail::atomic_store(p, &value, sizeof(T), site);
  return old;
}
}  // namespace simt

#define SMT_EXT_SIMT_ATOMIC(name, expression)                                         \
  template <typename T>                                                               \
  inline T name(T* p, simt::SameType<T> v, simt::Site site = simt::Site::current()) { \
    return simt::atomic(p, [&](T old) { return static_cast<T>(expression); }, site);  \
  }
SMT_EXT_SIMT_ATOMIC(atomicAdd, old + v)
SMT_EXT_SIMT_ATOMIC(atomicSub, old - v)
SMT_EXT_SIMT_ATOMIC(atomicOr, old | v)
SMT_EXT_SIMT_ATOMIC(atomicAnd, old& v)
SMT_EXT_SIMT_ATOMIC(atomicXor, old ^ v)
SMT_EXT_SIMT_ATOMIC(atomicMin, v < old ? v : old)
SMT_EXT_SIMT_ATOMIC(atomicMax, old < v ? v : old)
SMT_EXT_SIMT_ATOMIC(atomicExch, ((void)old, v))
SMT_EXT_SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
SMT_EXT_SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef SMT_EXT_SIMT_ATOMIC
template <typename T>
inline T atomicCAS(T* p, simt::SameType<T> expected, simt::SameType<T> v,
                   simt::Site site = simt::Site::current()) {
  return simt::atomic(p, [&](T old) { return old == expected ? v : old; }, site);
}

#define SMT_EXT_SIMT_LOAD(name, cache)                                    \
  template <typename T>                                                   \
  inline T name(const T* p, simt::Site site = simt::Site::current()) {    \
    T value;                                                              \
    simt::detail::load(&value, p, sizeof(T), simt::detail::Space::global, \
                       simt::detail::Cache::cache, site);                 \
    return value;                                                         \
  }
SMT_EXT_SIMT_LOAD(__ldg, read_only)
SMT_EXT_SIMT_LOAD(__ldcs, normal)
SMT_EXT_SIMT_LOAD(__ldca, normal)
SMT_EXT_SIMT_LOAD(__ldcg, normal)
#undef SMT_EXT_SIMT_LOAD
template <typename T>
inline void __stcs(T* p, simt::SameType<T> value, simt::Site site = simt::Site::current()) {
  simt::detail::store(p, &value, sizeof(T), simt::detail::Space::global, site);
}
template <typename T>
inline void __stcg(T* p, simt::SameType<T> value, simt::Site site = simt::Site::current()) {
  simt::detail::store(p, &value, sizeof(T), simt::detail::Space::global, site);
}

// ---- arithmetic ---------------------------------------------------------------------------------

#define SMT_EXT_SIMT_MIN_MAX(type)                          \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
SMT_EXT_SIMT_MIN_MAX(int)
SMT_EXT_SIMT_MIN_MAX(unsigned)
SMT_EXT_SIMT_MIN_MAX(long)
SMT_EXT_SIMT_MIN_MAX(unsigned long)
SMT_EXT_SIMT_MIN_MAX(long long)
SMT_EXT_SIMT_MIN_MAX(unsigned long long)
#undef SMT_EXT_SIMT_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
// Approximate on the GPU (2 ulp and a narrower range); here exact.
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)

inline unsigned __float_as_uint(float x) { return simt::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return simt::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits_as<float>(x); }
inline float __int_as_float(int x) { return simt::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits_as<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((std::uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((std::uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 0xF;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (pick & 7)) & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;  // replicates the sign
    r |= byte << 8 * i;
  }
  return r;
}

// ---- runtime API --------------------------------------------------------------------------------

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
using cudaError_t = cudaError;
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unknown error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // launches return their error
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  return *device = simt::config().device.number, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == simt::config().device.number ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::Device& d = simt::config().device;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return *value = 1024, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return *value = 48 << 10, cudaSuccess;
    case cudaDevAttrWarpSize:
      return *value = 32, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = d.multiprocessors, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *value = d.l2_bytes, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = d.max_threads_per_multiprocessor, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = d.major, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = d.minor, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = d.max_shared_bytes_per_multiprocessor, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = d.max_shared_bytes, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

template <typename F>
inline cudaError_t cudaFuncSetAttribute(F* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > simt::config().device.max_shared_bytes) return cudaErrorInvalidValue;
  simt::detail::set_max_dynamic_shared(reinterpret_cast<const void*>(function), value);
  return cudaSuccess;
}

// By threads, shared memory and what the configuration allows; the checker knows no registers.
template <typename F>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int threads,
                                                                 std::size_t smem_bytes) {
  const simt::Device& d = simt::config().device;
  if (threads <= 0 || smem_bytes > static_cast<std::size_t>(d.max_shared_bytes))
    return cudaErrorInvalidValue;
  const int by_shared = d.max_shared_bytes_per_multiprocessor / static_cast<int>(smem_bytes + 1024);
  *blocks = min(min(d.max_threads_per_multiprocessor / threads, by_shared),
                d.max_blocks_per_multiprocessor);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t = nullptr) {
  simt::detail::copy_in(
      p, std::vector<unsigned char>(bytes, static_cast<unsigned char>(value)).data(), bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                   cudaMemcpyKind kind, cudaStream_t = nullptr) {
  std::vector<unsigned char> host(bytes);
  if (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) {
    simt::detail::copy_out(host.data(), from, bytes);
  } else if (bytes > 0) {
    std::memcpy(host.data(), from, bytes);
  }
  if (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) {
    simt::detail::copy_in(to, host.data(), bytes);
  } else if (bytes > 0) {
    std::memcpy(to, host.data(), bytes);
  }
  return cudaSuccess;
}

namespace simt {

// Runs a kernel to its end; what launch.cuh calls instead of cudaLaunchKernel.
template <typename... Params>
inline cudaError_t run(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                       std::size_t smem_bytes, std::tuple<Params...>& values) {
  struct Context {
    void (*kernel)(Params...);
    const std::tuple<Params...>* values;
  };
  const Context context{kernel, &values};
  const detail::Launch launch{name,
                              reinterpret_cast<const void*>(kernel),
                              grid,
                              block,
                              smem_bytes,
                              &values,
                              sizeof values,
                              [](const void* c) {
                                std::apply(static_cast<const Context*>(c)->kernel,
                                           *static_cast<const Context*>(c)->values);
                              },
                              &context};
  return static_cast<cudaError_t>(detail::run(launch));
}

}  // namespace simt
