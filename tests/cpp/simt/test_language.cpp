// The CUDA language as kernels see it: indices, barriers, warps, atomics, conversions, launches.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <numeric>

#include "testing.h"

using namespace simt_test;

namespace {

__global__ void write_indices(int* out, int3* last) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[i] = static_cast<int>(i);
  if (block == 29 && thread == 39) *last = make_int3(threadIdx.x, blockIdx.y, gridDim.z);
}

TEST(Launch, RunsEveryThreadOfEveryBlock) {
  simt::Buffer<int> out(30 * 40);
  simt::Buffer<int3> last(1);
  launch("write_indices", write_indices, dim3(2, 3, 5), dim3(4, 5, 2), 0, nullptr, out.data(),
         last.data());
  std::vector<int> expected(1200);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(out.values(), expected);
  EXPECT_EQ(last.values()[0].x, 3);
  EXPECT_EQ(last.values()[0].y, 2);
  EXPECT_EQ(last.values()[0].z, 5);
}

__global__ void nothing() {}

TEST(Launch, RefusesWhatAGpuRefuses) {
  EXPECT_ERROR(launch("nothing", nothing, 1, 1025, 0, nullptr), "launch of kernel nothing",
               "block 1025x1x1", "invalid configuration");
  EXPECT_ERROR(launch("nothing", nothing, dim3(1, 65536), 32, 0, nullptr), "grid 1x65536x1");
  EXPECT_ERROR(launch("nothing", nothing, 1, 32, 200 << 10, nullptr),
               "shared memory of kernel nothing");
  launch("nothing", nothing, 1, 32, 100 << 10, nullptr);
  launch("nothing", nothing, dim3(0), 32, 0, nullptr);  // no blocks: nothing to do
}

__global__ void record_order(int* order, int* count) {
  order[atomicAdd(count, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

TEST(Launch, SeedChoosesTheOrder) {
  const auto order = [](std::uint64_t seed) {
    simt::config().seed = seed;
    simt::Buffer<int> out(256), count({0});
    launch("record_order", record_order, 4, 64, 0, nullptr, out.data(), count.data());
    simt::config().seed = 1;
    return out.values();
  };
  EXPECT_EQ(order(5), order(5));
  EXPECT_NE(order(5), order(6));
}

__global__ void block_sum(const float* in, float* out) {
  SMT_EXT_SHARED(float, partial, 32);
  float sum = in[threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x == 0) *out = sum;
  }
}

TEST(Block, SumsThroughShufflesAndSharedMemory) {
  const auto in = small_integers(1024, 7);
  const simt::Buffer<float> device(in);
  simt::for_each_seed(4, [&] {
    simt::Buffer<float> out(1);
    launch("block_sum", block_sum, 1, 1024, 0, nullptr, device.data(), out.data());
    EXPECT_EQ(out.values()[0], std::accumulate(in.begin(), in.end(), 0.0f));
  });
}

__global__ void warp_functions(unsigned* out) {
  const unsigned lane = threadIdx.x;
  unsigned r[10];
  r[0] = __ballot_sync(0xffffffffu, lane % 3 == 0);
  r[1] = __shfl_sync(0xffffffffu, lane, 37);    // modulo the width
  r[2] = __shfl_sync(0xffffffffu, lane, 2, 8);  // lane 2 of its eight
  r[3] = __shfl_up_sync(0xffffffffu, lane, 3);  // keeps its own below lane 3
  r[4] = __shfl_down_sync(0xffffffffu, lane, 4, 16);
  r[5] = __reduce_add_sync(0xffffffffu, lane);
  r[6] = __reduce_max_sync(0xffffffffu, lane ^ 5);
  r[7] = static_cast<unsigned>(__any_sync(0xffffffffu, lane == 9)) * 2 +
         static_cast<unsigned>(__all_sync(0xffffffffu, lane < 31));
  r[8] = 0;
  if (lane < 8) r[8] = __shfl_xor_sync(0xffu, lane, 1);  // a mask of eight
  r[9] = static_cast<unsigned>(__syncthreads_count(lane < 5));
  for (int i = 0; i < 10; ++i) out[lane * 10 + i] = r[i];
}

TEST(Warp, FunctionsFollowTheirDefinition) {
  simt::Buffer<unsigned> out(320);
  launch("warp_functions", warp_functions, 1, 32, 0, nullptr, out.data());
  const auto r = out.values();
  unsigned thirds = 0;
  for (unsigned l = 0; l < 32; l += 3) thirds |= 1u << l;
  for (unsigned l = 0; l < 32; ++l) {
    const unsigned* v = &r[l * 10];
    EXPECT_EQ(v[0], thirds);
    EXPECT_EQ(v[1], 5u);
    EXPECT_EQ(v[2], l / 8 * 8 + 2);
    EXPECT_EQ(v[3], l < 3 ? l : l - 3);
    EXPECT_EQ(v[4], l % 16 >= 12 ? l : l + 4);
    EXPECT_EQ(v[5], 496u);
    EXPECT_EQ(v[6], 31u);
    EXPECT_EQ(v[7], 2u);
    EXPECT_EQ(v[8], l < 8 ? l ^ 1 : 0);
    EXPECT_EQ(v[9], 5u);
  }
}

__global__ void atomics(unsigned* u, float* f, unsigned long long* wide) {
  atomicAdd(f, 1);
  atomicOr(u, 1u << threadIdx.x);
  atomicMax(u + 1, threadIdx.x);
  atomicInc(u + 2, 9);
  atomicCAS(u + 3, threadIdx.x, threadIdx.x + 1);
  atomicExch(u + 4, 7u);
  atomicAdd(wide, 1ull << 33);
}

TEST(Atomics, UpdateMemory) {
  simt::Buffer<unsigned> u({0, 0, 0, 0, 0});
  simt::Buffer<float> f({0.5f});
  simt::Buffer<unsigned long long> wide({1});
  launch("atomics", atomics, 1, 32, 0, nullptr, u.data(), f.data(), wide.data());
  const auto v = u.values();
  EXPECT_EQ(v[0], ~0u);
  EXPECT_EQ(v[1], 31u);
  EXPECT_EQ(v[2], 2u);
  EXPECT_GE(v[3], 1u);
  EXPECT_EQ(v[4], 7u);
  EXPECT_EQ(f.values()[0], 32.5f);
  EXPECT_EQ(wide.values()[0], (32ull << 33) + 1);
}

// ---- conversions --------------------------------------------------------------------------------

// The nearest of all 65536 values, ties to the even pattern, found by search.
template <typename Value>
uint16_t nearest(double x, Value value, uint16_t infinity) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  uint16_t
      low = 0,
      high = infinity;  // value(low) <= |x| < value(high), taking infinity as the next power of two
  const auto magnitude = [&](uint16_t bits) {
    return bits == infinity ? 2 * static_cast<double>(value(infinity - 1)) -
                                  static_cast<double>(value(infinity - 2))
                            : static_cast<double>(value(bits));
  };
  const double target = std::fabs(x);
  if (target >= magnitude(infinity)) return sign | infinity;
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (magnitude(middle) <= target ? low : high) = middle;
  }
  const double below = target - magnitude(low), above = magnitude(high) - target;
  return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
}

TEST(Conversions, RoundToNearestEven) {
  std::mt19937 random(11);
  const auto bf16 = [](uint16_t b) { return __bfloat162float(__ushort_as_bfloat16(b)); };
  const auto f16 = [](uint16_t b) { return __half2float(__ushort_as_half(b)); };
  for (int i = 0; i < 50000; ++i) {
    const float x = __uint_as_float(static_cast<unsigned>(random()));
    if (std::isnan(x)) continue;
    EXPECT_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(x)), nearest(x, bf16, 0x7F80)) << x;
    const float y = std::ldexp(x / std::ldexp(1.0f, std::ilogb(x == 0 ? 1 : x)),
                               static_cast<int>(random() % 44) - 27);  // in f16's range and past it
    EXPECT_EQ(__half_as_ushort(__float2half_rn(y)), nearest(y, f16, 0x7C00)) << y;
  }
}

TEST(Conversions, KeepEveryValueAndTies) {
  for (unsigned b = 0; b < 0x10000; ++b) {
    const auto bits = static_cast<uint16_t>(b);
    const float x = __bfloat162float(__ushort_as_bfloat16(bits)),
                y = __half2float(__ushort_as_half(bits));
    EXPECT_EQ(__bfloat16_as_ushort(x), std::isnan(x) ? 0x7FFF : bits);
    EXPECT_EQ(__half_as_ushort(y), std::isnan(y) ? 0x7FFF : bits);
  }
  EXPECT_EQ(__bfloat16_as_ushort(1 + 0x1p-8f), 0x3F80);    // tie, down to even
  EXPECT_EQ(__bfloat16_as_ushort(1 + 0x1.8p-7f), 0x3F82);  // tie, up to even
  EXPECT_EQ(__half_as_ushort(65519.0f), 0x7BFF);           // the last that is finite
  EXPECT_EQ(__half_as_ushort(65520.0f), 0x7C00);
  EXPECT_EQ(__half_as_ushort(0x1p-25f), 0x0000);  // half of the smallest subnormal
  EXPECT_EQ(__half_as_ushort(0x1.8p-25f), 0x0001);
  EXPECT_EQ(__half_as_ushort(1 + 0x1p-11 + 0x1p-40), 0x3C01);  // from double, rounded once
}

TEST(Integers, BitFunctions) {
  EXPECT_EQ(__brev(1u), 0x80000000u);
  EXPECT_EQ(__clz(1), 31);
  EXPECT_EQ(__umulhi(0x80000000u, 6u), 3u);
  EXPECT_EQ(__funnelshift_l(0x80000000u, 1u, 1), 3u);
  EXPECT_EQ(__byte_perm(0x33221100u, 0x77665544u, 0x7531), 0x77553311u);
}

}  // namespace
