// simt.h on a real GPU: memory between guard bytes, and a failure where there is no GPU.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <map>

#include "simt.h"

namespace simt {

namespace {

// On both sides of every buffer; a kernel that writes there is found out when the buffer goes.
constexpr std::size_t kGuardBytes = 4096;
constexpr unsigned char kGuard = 0xa5;
constexpr int kPoison = 0xff;

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw Error(what + ": " + cudaGetErrorString(error));
}

// compute-sanitizer (sanitize.sh) knows better: where a buffer ends, and what was never written.
// For it nothing surrounds or fills a buffer.
bool watched() {
  static const bool value = std::getenv("SMT_EXT_COMPUTE_SANITIZER") != nullptr;
  return value;
}

struct Allocation {
  std::size_t bytes;
  std::string name;
};

// By the address that tests know.
std::map<const void*, Allocation>& allocations() {
  static std::map<const void*, Allocation> all;
  return all;
}

unsigned char* with_guards(const void* p) {
  return static_cast<unsigned char*>(const_cast<void*>(p)) - kGuardBytes;
}

void expect_guards(const void* p, const Allocation& a) {
  std::vector<unsigned char> guards(2 * kGuardBytes);
  const unsigned char* const begin = with_guards(p);
  check(cudaMemcpy(guards.data(), begin, kGuardBytes, cudaMemcpyDeviceToHost), a.name);
  check(cudaMemcpy(guards.data() + kGuardBytes, begin + kGuardBytes + a.bytes, kGuardBytes,
                   cudaMemcpyDeviceToHost),
        a.name);
  for (std::size_t i = 0; i < guards.size(); ++i) {
    if (guards[i] == kGuard) continue;
    ADD_FAILURE() << "a kernel wrote beside '" << a.name << "' of " << a.bytes << " bytes, "
                  << (i < kGuardBytes ? kGuardBytes - i : i - kGuardBytes + 1)
                  << (i < kGuardBytes ? " bytes before its start" : " bytes past its end");
    return;
  }
}

}  // namespace

Config& config() {
  static Config value;
  return value;
}

const Stats& last_stats() {
  throw Error("a GPU counts no traffic: ask simt::counts_traffic first");
}
const Stats& last_stats(const std::string&) { return last_stats(); }
std::string Stats::report() const { return "a GPU counts no traffic"; }

void exit_with_outcome(const std::function<void()>& f) {
  int status = 0;
  try {
    f();
    const cudaError_t error = cudaDeviceSynchronize();
    std::fprintf(stderr, "outcome: %s\n", cudaGetErrorString(error));
    // What a trap is reported as.
    if (error == cudaErrorLaunchFailure || error == cudaErrorIllegalInstruction) status = kStopped;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "outcome: %s\n", error.what());
  }
  // Nothing of the broken context is torn down.
  std::_Exit(status);
}

namespace detail {

void* allocate(std::size_t bytes, std::size_t, const std::string& name) {
  void* p = nullptr;
  if (watched()) {
    check(cudaMalloc(&p, bytes), name);
    return p;
  }
  check(cudaMalloc(&p, bytes + 2 * kGuardBytes), name);
  check(cudaMemset(p, kGuard, bytes + 2 * kGuardBytes), name);
  void* const inner = static_cast<unsigned char*>(p) + kGuardBytes;
  check(cudaMemset(inner, kPoison, bytes), name);
  allocations()[inner] = {bytes, name};
  return inner;
}

void release(void* p) noexcept {
  if (p == nullptr) return;
  try {
    if (watched()) {
      check(cudaFree(p), "cudaFree");
      return;
    }
    const auto found = allocations().find(p);
    const Allocation allocation = found->second;
    allocations().erase(found);
    check(cudaDeviceSynchronize(), "a kernel that was given '" + allocation.name + "'");
    expect_guards(p, allocation);
    check(cudaFree(with_guards(p)), allocation.name);
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what();
  }
}

void copy_in(void* device, const void* host, std::size_t bytes) {
  check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "copy to the GPU");
}

void copy_out(void* host, const void* device, std::size_t bytes) {
  check(cudaDeviceSynchronize(), "a kernel");
  check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "copy from the GPU");
}

void copy_raw(void* host, const void* device, std::size_t bytes) { copy_out(host, device, bytes); }

bool is_written(const void*, std::size_t) {
  throw Error("a GPU does not know what was written: compute-sanitizer's initcheck does");
}

}  // namespace detail

// Without a GPU no case runs, and the program fails.
class Gpu final : public ::testing::Environment {
 public:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
      FAIL() << "no GPU: "
             << (error == cudaSuccess ? "CUDA finds no device" : cudaGetErrorString(error))
             << ". These are the checks for a machine with one; `make test` runs the same kernels "
                "on the CPU, under the SIMT checker.";
    }
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    std::printf("%s, sm_%d%d, %d multiprocessors, driver for CUDA %d.%d\n", properties.name,
                properties.major, properties.minor, properties.multiProcessorCount, driver / 1000,
                driver % 1000 / 10);
    ASSERT_GE(properties.major, 8) << "the kernels need sm_80 (Ampere) or later";
    // EXPECT_STOPS: a forked process could not use CUDA, one that starts anew can.
    ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  }
};

static ::testing::Environment* const kGpu = ::testing::AddGlobalTestEnvironment(new Gpu);

}  // namespace simt
