// Sectors and bank conflicts of access patterns that are known by hand.
#include "testing.h"

using namespace simt_test;

namespace {

__global__ void strided_copy(const float* in, float* out, int stride, int offset) {
  const unsigned i = threadIdx.x;
  ptx::st_global(out + i, ptx::ld_global(in + i * stride + offset));
}

const simt::Stats& run_strided(int stride, int offset, unsigned threads = 32) {
  const simt::Buffer<float> in(std::vector<float>(4096, 1.0f));
  simt::Buffer<float> out(threads);
  launch("strided_copy", strided_copy, 1, threads, 0, nullptr, in.data(), out.data(), stride,
         offset);
  return simt::last_stats("strided_copy");
}

TEST(Sectors, OfGlobalRequests) {
  const auto& s = run_strided(1, 0);
  EXPECT_EQ(s.global_load.requests, 1u);
  EXPECT_EQ(s.global_load.sectors, 4u);
  EXPECT_EQ(s.global_load.ideal_sectors, 4u);
  EXPECT_EQ(s.global_load.bytes, 128u);
  EXPECT_EQ(s.global_store.sectors, 4u);
  EXPECT_EQ(run_strided(1, 1).global_load.sectors, 5u);  // misaligned
  EXPECT_EQ(run_strided(2, 0).global_load.sectors, 8u);  // every other element
  EXPECT_EQ(run_strided(64, 0).global_load.sectors, 32u);
  EXPECT_EQ(run_strided(64, 0).global_load.excess(), 28u);
  EXPECT_EQ(run_strided(0, 0).global_load.sectors, 1u);       // one address for all
  EXPECT_EQ(run_strided(1, 0, 48).global_load.requests, 2u);  // the second warp has 16 lanes
  EXPECT_EQ(run_strided(1, 0, 48).global_load.sectors, 6u);
}

__global__ void vector_loop(const uint4* in, uint4* out, int n) {
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(n); i += blockDim.x)
    ptx::st_global_stream(out + i, ptx::ld_global_nc(in + i));
}

TEST(Sectors, OfALoopAreGroupedByIteration) {
  const simt::Buffer<uint4> in(std::vector<uint4>(200));
  simt::Buffer<uint4> out(200);
  launch("vector_loop", vector_loop, 1, 64, 0, nullptr, in.data(), out.data(), 200);
  const auto& s = simt::last_stats();
  EXPECT_EQ(s.global_load.requests, 7u);  // 3 full iterations of 2 warps, and 8 lanes
  EXPECT_EQ(s.global_load.sectors, 100u);
  EXPECT_EQ(s.global_load.excess(), 0u);
  EXPECT_EQ(s.global_store.excess(), 0u);
  EXPECT_EQ(s.plain_global, 0u);
  EXPECT_EQ(s.sites.size(), 2u);
  EXPECT_NE(s.report().find("test_stats.cpp"), std::string::npos);
}

template <typename T>
__global__ void shared_pattern(int stride, T* out) {
  auto* s = ptx::dynamic_smem<T>();
  ptx::st_shared(s + threadIdx.x * stride, T{});
  out[threadIdx.x] = ptx::ld_shared(s + threadIdx.x * stride);
}

template <typename T>
simt::SharedTraffic run_shared(int stride) {
  simt::Buffer<T> out(32);
  launch("shared_pattern", shared_pattern<T>, 1, 32, sizeof(T) * (31 * stride + 1), nullptr, stride,
         out.data());
  EXPECT_EQ(simt::last_stats().shared_load.wavefronts, simt::last_stats().shared_store.wavefronts);
  return simt::last_stats().shared_load;
}

TEST(Banks, OfSharedRequests) {
  EXPECT_EQ(run_shared<float>(1).wavefronts, 1u);
  EXPECT_EQ(run_shared<float>(2).wavefronts, 2u);
  EXPECT_EQ(run_shared<float>(32).wavefronts, 32u);
  EXPECT_EQ(run_shared<float>(33).conflicts(), 0u);
  EXPECT_EQ(run_shared<unsigned short>(1).wavefronts, 1u);  // two lanes a word
  EXPECT_EQ(run_shared<float2>(1).wavefronts, 2u);          // two half warps
  EXPECT_EQ(run_shared<float2>(1).conflicts(), 0u);
  EXPECT_EQ(run_shared<float4>(1).wavefronts, 4u);
  EXPECT_EQ(run_shared<float4>(1).conflicts(), 0u);
  EXPECT_EQ(run_shared<float4>(2).conflicts(), 4u);
  EXPECT_EQ(run_shared<float4>(8).wavefronts, 32u);
}

// Rows of 16 bytes at a pitch; with swizzle, a row's chunk is exchanged as the kernels do.
__global__ void ldmatrix_pitch(int pitch, uint32_t* out) {
  auto* s = ptx::dynamic_smem();
  for (int i = 0; i < pitch; i += 4)
    ptx::st_shared(reinterpret_cast<uint32_t*>(s + threadIdx.x * pitch + i), 0u);
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, s + threadIdx.x * pitch);
  ptx::st_global(out + threadIdx.x, r[0]);
}

simt::SharedTraffic run_ldmatrix(int pitch) {
  simt::Buffer<uint32_t> out(32);
  launch("ldmatrix_pitch", ldmatrix_pitch, 1, 32, 32 * pitch, nullptr, pitch, out.data());
  return simt::last_stats().ldmatrix;
}

TEST(Banks, OfLdmatrix) {
  EXPECT_EQ(run_ldmatrix(16).wavefronts, 4u);
  EXPECT_EQ(run_ldmatrix(128).wavefronts, 32u);  // all rows in the same four banks
  EXPECT_EQ(run_ldmatrix(144).conflicts(), 0u);  // padded by one chunk
  EXPECT_EQ(run_ldmatrix(64).wavefronts, 16u);
}

__global__ void async_copy(const uint4* in, uint4* out) {
  auto* s = ptx::dynamic_smem<uint4>();
  ptx::cp_async_16(s + threadIdx.x, in + threadIdx.x, threadIdx.x < 20);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = ptx::ld_shared(s + (threadIdx.x ^ 1));
}

TEST(Sectors, OfCpAsync) {
  const simt::Buffer<uint4> in(std::vector<uint4>(20, {1, 1, 1, 1}));
  simt::Buffer<uint4> out(32);
  launch("async_copy", async_copy, 1, 32, 512, nullptr, in.data(), out.data());
  const auto& s = simt::last_stats();
  EXPECT_EQ(s.async_load.requests, 1u);
  EXPECT_EQ(s.async_load.sectors, 10u);
  EXPECT_EQ(s.async_store.wavefronts, 4u);
  EXPECT_EQ(s.async_store.conflicts(), 0u);
  EXPECT_EQ(s.barriers, 1u);
  EXPECT_GT(s.plain_global, 0u);  // out[...] = went past the wrappers
}

}  // namespace
