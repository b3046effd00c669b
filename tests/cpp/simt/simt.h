// SIMT checker: runs CUDA kernel sources on the CPU and fails where a GPU would fail, or would be
// wrong in silence.
//
// This header is what tests use: buffers, the launch entry, errors, traffic statistics. What kernel
// sources see (threadIdx, __shfl_sync, cudaMemsetAsync, bf16) is in cuda_runtime.h, cuda_bf16.h and
// cuda_fp16.h beside it, which shadow CUDA's own. Without SMT_EXT_SIMT the same tests run on a real
// GPU: ../gpu has the other implementation of buffers.
//
// How it runs: the threads of a block are fibers; blocks run one after another. The order of
// blocks, warps and lanes is drawn from config().seed. Memory that kernels may touch lies in one
// arena, with a state for every byte and, for every element, the last write and the last reads.
// Kernel sources compiled with -fsanitize=thread call the __tsan_* hooks at every load and store;
// hooks.cpp answers them (libtsan is not linked), so that plain accesses are checked like those
// through ptx.cuh.
//
// Seen: out of bounds, host memory, uninitialised and unwritten memory, misaligned vector access,
// cp.async data used before its wait, races inside a block and between blocks (happens-before over
// __syncthreads, __syncwarp and fence + atomic), divergent barriers, wrong warp masks, invalid
// launch configurations; order dependence by running several seeds.
//
// Not seen: timing; the weak memory model beyond those races; fma contraction and -use_fast_math
// (sums may differ by rounding from nvcc's); the order in which a tensor core adds; registers,
// spills, occupancy and __launch_bounds__ (the compile report shows them); concurrency of streams
// and of running blocks (a block that spins on another hangs here). Of neighbouring single bytes of
// dynamic shared memory, races are told apart by pairs only: two threads that write one byte each
// look like a race.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef SMT_EXT_SIMT
#include "cuda_types.h"
#else
#include <cuda_runtime.h>
#endif

namespace simt {

// Whether last_stats() has something to tell: a real GPU counts neither sectors nor conflicts.
#ifdef SMT_EXT_SIMT
inline constexpr bool counts_traffic = true;
#else
inline constexpr bool counts_traffic = false;
#endif

// The statement stops its kernel (trap), and the caller learns of it. ../gpu/simt.h has the GPU's.
#ifdef SMT_EXT_SIMT
#define EXPECT_STOPS(statement) EXPECT_THROW(statement, ::simt::Error)
#endif

// Where in the kernel source something was asked for; a defaulted last argument of every intrinsic.
struct Site {
  const char* file;
  int line;
  static constexpr Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};

// What a kernel did wrong: kernel, block, thread, source line.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- configuration ------------------------------------------------------------------------------

struct Device {    // an A100, unless a test says otherwise
  int number = 0;  // as cudaGetDevice has it
  int major = 8, minor = 0;
  int multiprocessors = 108;
  int max_shared_bytes = 163 * 1024;  // a block, opted in
  int max_shared_bytes_per_multiprocessor = 164 * 1024;
  int max_threads_per_multiprocessor = 2048;
  int max_blocks_per_multiprocessor = 32;  // or what registers allow: the checker knows none
  int l2_bytes = 40 << 20;
};

// A real GPU is what it is and draws its own order: there none of this has an effect.
struct Config {
  std::uint64_t seed = 1;           // of the order of blocks, warps and lanes
  bool require_initialized = true;  // reading a byte that nothing wrote is an error
  Device device;
};
Config& config();

// The orders in which checks of the kernels run.
inline constexpr int orders = 2;

// Runs f once for each of n orders of blocks and threads:
//   for_each_seed(4, [&] { ...launch, compare bits... });
template <typename F>
void for_each_seed(int n, F&& f) {
  const std::uint64_t before = config().seed;
  for (int i = 0; i < n; ++i) {
    config().seed = before + static_cast<std::uint64_t>(i);
    f();
  }
  config().seed = before;
}

// ---- statistics ---------------------------------------------------------------------------------

// Requests are warp instructions: the lanes of a warp at the same source line, n-th time there.
// Global memory moves 32-byte sectors; ideal is the least that the bytes asked for fit in.
struct GlobalTraffic {
  std::uint64_t requests = 0, sectors = 0, ideal_sectors = 0, bytes = 0;
  std::uint64_t excess() const { return sectors - ideal_sectors; }
};

// Shared memory serves 32 banks of 4 bytes a wavefront; 8-byte requests take at least 2 (half
// warps), 16-byte requests at least 4 (quarter warps).
struct SharedTraffic {
  std::uint64_t requests = 0, wavefronts = 0, ideal_wavefronts = 0;
  std::uint64_t conflicts() const { return wavefronts - ideal_wavefronts; }
};

struct SiteStats {  // one source line and kind of request
  Site site{nullptr, 0};
  const char* kind = nullptr;
  GlobalTraffic global;
  SharedTraffic shared;
};

struct Stats {
  std::string kernel;
  dim3 grid, block;
  std::size_t smem_bytes = 0;
  GlobalTraffic global_load, global_store, async_load;  // async_load: what cp.async reads
  SharedTraffic shared_load, shared_store, async_store, ldmatrix;
  std::uint64_t mma = 0, warp_shuffles = 0, warp_barriers = 0, atomics = 0;
  std::uint64_t barriers = 0;  // once a block
  // Accesses of threads past the wrappers, hence in none of the above.
  std::uint64_t plain_global = 0, plain_shared = 0;
  std::vector<SiteStats> sites;  // in order of first use
  std::string report() const;
};

// Of the latest launch, or of a kernel's latest launch; throws Error when there is none.
const Stats& last_stats();
const Stats& last_stats(const std::string& kernel);

// ---- memory -------------------------------------------------------------------------------------

namespace detail {
void* allocate(std::size_t bytes, std::size_t element_bytes, const std::string& name);
void release(void* p) noexcept;
void copy_in(void* device, const void* host, std::size_t bytes);
// Throws Error where a byte was never written.
void copy_out(void* host, const void* device, std::size_t bytes);
void copy_raw(void* host, const void* device, std::size_t bytes);
bool is_written(const void* device, std::size_t bytes);
}  // namespace detail

// Device memory of exactly count elements, 256-byte aligned, poisoned (all bits set: NaN) until
// written. The host reads and writes it through the members only. (On a real GPU values() gives the
// poison where nothing was written: NaN, which no comparison with a reference survives.)
template <typename T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Buffer(std::size_t count, const std::string& name = "buffer")
      : data_(static_cast<T*>(detail::allocate(count * sizeof(T), sizeof(T), name))),
        count_(count) {}
  explicit Buffer(const std::vector<T>& values, const std::string& name = "buffer")
      : Buffer(values.size(), name) {
    assign(values.data(), values.size());
  }
  explicit Buffer(std::initializer_list<T> values, const std::string& name = "buffer")
      : Buffer(std::vector<T>(values), name) {}
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { detail::release(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return count_; }

  void assign(const T* host, std::size_t count) { detail::copy_in(data_, host, count * sizeof(T)); }
  void fill(const T& value) { assign(std::vector<T>(count_, value).data(), count_); }
  bool written(std::size_t i) const { return detail::is_written(data_ + i, sizeof(T)); }
  // Throws Error when an element was never written.
  std::vector<T> values() const {
    std::vector<T> host(count_);
    detail::copy_out(host.data(), data_, count_ * sizeof(T));
    return host;
  }
  // The bits as they are, poison included.
  std::vector<T> raw() const {
    std::vector<T> host(count_);
    detail::copy_raw(host.data(), data_, count_ * sizeof(T));
    return host;
  }

 private:
  T* data_;
  std::size_t count_;
};

// ---- what the kernel-side headers stand on ------------------------------------------------------

#ifdef SMT_EXT_SIMT
namespace detail {

struct Builtins {  // of the running thread
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Builtins builtins;

[[noreturn]] void fail(const std::string& what, Site site);

enum class Cache { normal, read_only };
enum class Space { global, shared };
void load(void* value, const void* p, std::size_t bytes, Space space, Cache cache, Site site);
void store(void* p, const void* value, std::size_t bytes, Space space, Site site);
void prefetch(const void* p, Site site);
void atomic_load(void* value, const void* p, std::size_t bytes, Site site);
void atomic_store(void* p, const void* value, std::size_t bytes, Site site);
void fence();

void cp_async(void* smem, const void* gmem, int bytes, int src_bytes, Site site);
void cp_async_commit();
void cp_async_wait(int pending, Site site);
void ldmatrix(int matrices, bool trans, std::uint32_t* r, const void* row, Site site);
enum class Mma { bf16, f16, tf32 };
void mma(Mma type, float* d, const std::uint32_t* a, const std::uint32_t* b, Site site);
void count_shuffle();
[[noreturn]] void fail_trap(Site site);
[[noreturn]] void fail_shuffle(unsigned lane, int source, Site site);

void* dynamic_shared();
void* static_shared(const void* key, std::size_t bytes, std::size_t element_bytes,
                    const char* name);
std::uint32_t shared_address(const void* p, Site site);

void syncthreads(Site site);
int syncthreads_count(int predicate, Site site);

// Meets the other lanes of mask at this instruction. The last to come calls finish(context, in,
// out, mask), in and out indexed by lane.
using Finish = void (*)(const void* context, const void* const* in, void* const* out,
                        unsigned mask);
void meet(const char* what, unsigned mask, const void* in, void* out, Finish finish,
          const void* context, bool orders_memory, Site site);

unsigned lane();

struct Launch {
  const char* name;
  const void* function;
  dim3 grid, block;
  std::size_t smem_bytes;
  const void* params;  // host memory that the kernel may read: its parameters
  std::size_t params_bytes;
  void (*body)(const void* context);
  const void* context;
};
int run(const Launch& launch);  // a cudaError_t; throws Error for what the kernel does wrong
void set_max_dynamic_shared(const void* function, int bytes);
}  // namespace detail
#endif  // SMT_EXT_SIMT

}  // namespace simt
