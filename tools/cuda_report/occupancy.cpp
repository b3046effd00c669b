// Blocks that a multiprocessor holds, by NVIDIA's own rules (cuda_occupancy.h of the toolkit).
//
// A line of input is a kernel on an architecture:
//   major minor  threads registers barriers static_shared dynamic_shared  (bytes)
// and a line of output is: blocks, warps that could be resident, and the limits joined by commas.
//
// The header asks the device for what it holds; here it comes from the CUDA programming guide,
// "Compute Capabilities", table of technical specifications.
#include <cuda_occupancy.h>

#include <cstdio>
#include <string>

struct Limits {
  int major, minor, threads, shared_kb;
};
constexpr Limits kLimits[] = {{8, 0, 2048, 164},  {8, 6, 1536, 100},  {8, 7, 1536, 164},
                              {8, 9, 1536, 100},  {9, 0, 2048, 228},  {10, 0, 2048, 228},
                              {10, 3, 2048, 228}, {12, 0, 1536, 100}, {12, 1, 1536, 100}};

static const Limits* limits_of(int major, int minor) {
  for (const Limits& limits : kLimits) {
    if (limits.major == major && limits.minor == minor) return &limits;
  }
  return nullptr;
}

int main() {
  int major, minor, threads, registers, barriers;
  unsigned long static_shared, dynamic_shared;
  while (std::scanf("%d %d %d %d %d %lu %lu", &major, &minor, &threads, &registers, &barriers,
                    &static_shared, &dynamic_shared) == 7) {
    const Limits* const limits = limits_of(major, minor);
    if (!limits) {
      std::fprintf(stderr, "no limits known for compute capability %d.%d\n", major, minor);
      return 1;
    }
    cudaOccDeviceProp device{};
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = limits->threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = static_cast<size_t>(limits->shared_kb) * 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.sharedMemPerBlockOptin =
        device.sharedMemPerMultiprocessor - device.reservedSharedMemPerBlock;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = static_shared;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = dynamic_shared;
    kernel.numBlockBarriers = barriers;
    const cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                dynamic_shared) != CUDA_OCC_SUCCESS) {
      std::fprintf(stderr, "cuda_occupancy.h refuses compute capability %d.%d\n", major, minor);
      return 1;
    }
    std::string by;
    const auto add = [&](unsigned factor, const char* name) {
      if (result.limitingFactors & factor) by += (by.empty() ? "" : ",") + std::string(name);
    };
    add(OCC_LIMIT_WARPS, "threads");
    add(OCC_LIMIT_REGISTERS, "registers");
    add(OCC_LIMIT_SHARED_MEMORY, "shared");
    add(OCC_LIMIT_BLOCKS, "blocks");
    add(OCC_LIMIT_BARRIERS, "barriers");
    std::printf("%d %d %s\n", result.activeBlocksPerMultiprocessor, limits->threads / 32,
                by.c_str());
  }
  return 0;
}
