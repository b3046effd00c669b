// One way to launch a kernel: checked, with the kernel's name and configuration in the error.
//
//   launch("gather_columns", gather_columns_kernel<T>, grid, block, smem_bytes, stream, args...);
//
// Throws std::runtime_error; never exits, allocates or synchronises. Works under nvcc and, with
// SMT_EXT_SIMT defined, under the checker (tests/cpp/simt), which runs the kernel on the CPU before
// it returns.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace smt_ext::cuda {

// Dynamic shared memory that every kernel may use without asking for more.
inline constexpr std::size_t kDefaultSharedBytes = 48 * 1024;

inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) {
    throw std::runtime_error("smt_ext: " + what + ": " + cudaGetErrorString(error));
  }
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, current_device()), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// The most dynamic shared memory a block may ask for.
inline std::size_t max_shared_bytes() {
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

inline std::string describe(const char* name, dim3 grid, dim3 block, std::size_t smem_bytes) {
  const auto size = [](dim3 d) {
    return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z);
  };
  return std::string("kernel ") + name + " (grid " + size(grid) + ", block " + size(block) + ", " +
         std::to_string(smem_bytes) + " bytes of dynamic shared memory)";
}

// A number of blocks as gridDim.x; throws std::invalid_argument past the hardware's 2^31 - 1.
inline unsigned grid_blocks(std::int64_t count) {
  if (count < 0 || count > 0x7fffffff) {
    throw std::invalid_argument("smt_ext: a grid of " + std::to_string(count) +
                                " blocks; at most 2147483647 are possible");
  }
  return static_cast<unsigned>(count);
}

namespace detail {
// An integer argument that is wider than its parameter would lose its upper half in silence.
template <typename Param, typename Arg>
inline constexpr bool fits = !std::is_integral_v<Param> || std::is_same_v<Param, bool> ||
                             (std::is_integral_v<Arg> && sizeof(Arg) <= sizeof(Param));
}  // namespace detail

template <typename... Params>
void allow_shared_bytes(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                        std::size_t smem_bytes) {
  if (smem_bytes <= kDefaultSharedBytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(smem_bytes)),
        "shared memory of " + describe(name, grid, block, smem_bytes));
}

// Blocks of the kernel that a multiprocessor of the current device holds at once, at least 1.
template <typename... Params>
int resident_blocks(const char* name, void (*kernel)(Params...), int threads,
                    std::size_t smem_bytes) {
  const dim3 block(static_cast<unsigned>(threads));
  allow_shared_bytes(name, kernel, dim3(1), block, smem_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, smem_bytes),
        "occupancy of " + describe(name, dim3(1), block, smem_bytes));
  return blocks > 1 ? blocks : 1;
}

// A positive number of each device, asked for once.
class PerDevice {
 public:
  template <typename Ask>
  int get(const Ask& ask) {
    const auto device = static_cast<std::size_t>(current_device());
    if (device >= known_.size()) return ask();
    int value = known_[device].load(std::memory_order_relaxed);
    if (value == 0) known_[device].store(value = ask(), std::memory_order_relaxed);
    return value;
  }

 private:
  std::array<std::atomic<int>, 64> known_{};
};

// Launches kernel on stream; args are converted to the kernel's parameter types. A grid without
// blocks launches nothing.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
            std::size_t smem_bytes, cudaStream_t stream, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument for each kernel parameter");
  static_assert((detail::fits<Params, std::decay_t<Args>> && ...), "an argument does not fit");
  static_assert((sizeof(Params) + ... + 0) <= 4096, "kernel parameters are limited to 4 KB");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared_bytes(name, kernel, grid, block, smem_bytes);
  std::tuple<Params...> values(static_cast<Params>(std::forward<Args>(args))...);
#ifdef SMT_EXT_SIMT
  static_cast<void>(stream);  // launches run at once, in order
  const cudaError_t error = simt::run(name, kernel, grid, block, smem_bytes, values);
#else
  const cudaError_t error = std::apply(
      [&](Params&... value) {
        void* pointers[] = {static_cast<void*>(&value)..., nullptr};
        return cudaLaunchKernel(kernel, grid, block, pointers, smem_bytes, stream);
      },
      values);
#endif
  check(error, "launch of " + describe(name, grid, block, smem_bytes));
}

}  // namespace smt_ext::cuda
