// Planted bugs, one a test, each beside the correct kernel where they differ by a line: every one
// must be caught.
#include <cuda_bf16.h>

#include "testing.h"

using namespace simt_test;

namespace {

// ---- bounds and addresses -----------------------------------------------------------------------

__global__ void scale(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) ptx::st_global(out + i, 2 * ptx::ld_global(in + i));
}

TEST(Planted, OutOfBounds) {
  const simt::Buffer<float> in(std::vector<float>(100), "in");
  simt::Buffer<float> out(100, "out"), small(99, "small");
  launch("scale", scale, 4, 32, 0, nullptr, in.data(), out.data(), 100);
  EXPECT_ERROR(launch("scale", scale, 4, 32, 0, nullptr, in.data(), out.data(), 101),
               "kernel scale", "block (3, 0, 0)", "thread (4, 0, 0)", "out of bounds",
               "bytes 400..403 of in (400 bytes)", "test_planted.cpp:");
  EXPECT_ERROR(launch("scale", scale, 4, 32, 0, nullptr, in.data(), small.data(), 100),
               "out of bounds: store", "of small");
  EXPECT_ERROR(launch("scale", scale, 4, 32, 0, nullptr, in.data() - 1, out.data(), 100),
               "out of bounds", "bytes -4..-1 of in");
}

TEST(Planted, UseAfterFree) {
  float* freed;
  {
    simt::Buffer<float> buffer(std::vector<float>(100));
    freed = buffer.data();
  }
  simt::Buffer<float> out(100);
  EXPECT_ERROR(launch("scale", scale, 4, 32, 0, nullptr, freed, out.data(), 100), "out of bounds");
}

TEST(Planted, HostMemory) {
  const std::vector<float> host(100);
  simt::Buffer<float> out(100);
  EXPECT_ERROR(launch("scale", scale, 4, 32, 0, nullptr, host.data(), out.data(), 100),
               "not device memory");
}

__global__ void vector_copy(const float* in, float* out) {
  ptx::st_global(reinterpret_cast<float4*>(out),
                 ptx::ld_global(reinterpret_cast<const float4*>(in)));
}

TEST(Planted, MisalignedVector) {
  const simt::Buffer<float> in(std::vector<float>(8));
  simt::Buffer<float> out(8);
  launch("vector_copy", vector_copy, 1, 1, 0, nullptr, in.data() + 4, out.data());
  EXPECT_ERROR(launch("vector_copy", vector_copy, 1, 1, 0, nullptr, in.data() + 1, out.data()),
               "misaligned: load of 16 bytes");
  EXPECT_ERROR(launch("vector_copy", vector_copy, 1, 1, 0, nullptr, in.data(), out.data() + 2),
               "misaligned: store of 16 bytes");
}

__global__ void shared_overflow(int n) { ptx::st_shared(ptx::dynamic_smem<float>() + n, 1.0f); }
__global__ void shared_array_overflow(int n) {
  SMT_EXT_SHARED(float, partial, 32);
  ptx::st_shared(&partial[0] + n, 1.0f);
}

TEST(Planted, SharedOutOfBounds) {
  launch("shared_overflow", shared_overflow, 1, 1, 64, nullptr, 15);
  EXPECT_ERROR(launch("shared_overflow", shared_overflow, 1, 1, 64, nullptr, 16),
               "bytes 64..67 of dynamic shared memory (64 bytes)");
  launch("shared_array_overflow", shared_array_overflow, 1, 1, 0, nullptr, 31);
  EXPECT_ERROR(launch("shared_array_overflow", shared_array_overflow, 1, 1, 0, nullptr, 32),
               "of shared array partial (128 bytes)");
}

// ---- unwritten memory ---------------------------------------------------------------------------

TEST(Planted, UnwrittenOutput) {
  const simt::Buffer<float> in(std::vector<float>(100));
  simt::Buffer<float> out(100, "out");
  launch("scale", scale, 3, 32, 0, nullptr, in.data(), out.data(), 100);  // a block short
  EXPECT_ERROR(out.values(), "unwritten output: byte 384 of out");
  EXPECT_TRUE(out.written(95));
  EXPECT_FALSE(out.written(96));
  EXPECT_TRUE(std::isnan(out.raw()[96]));
}

TEST(Planted, UninitializedRead) {
  simt::Buffer<float> in(100, "in"), out(100);
  EXPECT_ERROR(launch("scale", scale, 4, 32, 0, nullptr, in.data(), out.data(), 100), "reads bytes",
               "of in", "not all of it ever written");
}

// Shared memory of the block before must not leak into the next.
__global__ void stale_shared(float* out) {
  auto* s = ptx::dynamic_smem<float>();
  if (blockIdx.x % 2 == 0) ptx::st_shared(s, 1.0f);
  ptx::st_global(out + blockIdx.x, ptx::ld_shared(s));
}

TEST(Planted, SharedMemoryOfAnotherBlock) {
  simt::Buffer<float> out(8);
  EXPECT_ERROR(launch("stale_shared", stale_shared, 8, 1, 4, nullptr, out.data()),
               "dynamic shared memory", "not all of it ever written");
}

// ---- cp.async -----------------------------------------------------------------------------------

enum class Async { correct, no_wait, no_commit, too_few, no_barrier, overwritten, left_in_flight };

__global__ void async_reverse(const uint4* in, uint4* out, Async bug) {
  auto* s = ptx::dynamic_smem<uint4>();
  const unsigned t = threadIdx.x;
  ptx::cp_async_16(s + t, in + t);
  if (bug != Async::no_commit) ptx::cp_async_commit();
  if (bug == Async::too_few) {
    ptx::cp_async_wait<1>();
  } else if (bug != Async::no_wait && bug != Async::left_in_flight) {
    ptx::cp_async_wait<0>();
  }
  if (bug != Async::no_barrier) __syncthreads();
  if (bug == Async::left_in_flight) return;
  ptx::st_global(out + t, ptx::ld_shared(s + (bug == Async::no_wait ? t : blockDim.x - 1 - t)));
  if (bug == Async::overwritten) {  // the next stage lands while others still read this one
    ptx::cp_async_16(s + t, in + t);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
}

void run_async(Async bug) {
  const simt::Buffer<uint4> in(std::vector<uint4>(64));
  simt::Buffer<uint4> out(64);
  launch("async_reverse", async_reverse, 1, 64, 64 * 16, nullptr, in.data(), out.data(), bug);
}

TEST(Planted, CpAsync) {
  simt::for_each_seed(5, [] {
    run_async(Async::correct);
    EXPECT_ERROR(run_async(Async::no_wait), "while a cp.async to it is in flight");
    EXPECT_ERROR(run_async(Async::no_commit), "cp.async");
    EXPECT_ERROR(run_async(Async::too_few), "while a cp.async to it is in flight");
    EXPECT_ERROR(run_async(Async::overwritten), "dynamic shared memory");
    EXPECT_ERROR(run_async(Async::left_in_flight), "no cp_async_wait has covered");
    EXPECT_FALSE(error_of([] { run_async(Async::no_barrier); }).empty());
  });
}

__global__ void async_misaligned(const float* in) {
  ptx::cp_async_16(ptx::dynamic_smem<float>(), in + 1);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

TEST(Planted, CpAsyncMisalignedOrOutOfBounds) {
  const simt::Buffer<float> in(std::vector<float>(8));
  EXPECT_ERROR(launch("async_misaligned", async_misaligned, 1, 1, 16, nullptr, in.data()),
               "misaligned: cp.async from global");
  EXPECT_ERROR(launch("async_misaligned", async_misaligned, 1, 1, 16, nullptr, in.data() + 7),
               "out of bounds");
}

// A ring of two stages, as a main loop has it.
__global__ void pipeline(const uint4* in, uint4* out, int steps, bool barrier_before_refill) {
  auto* s = ptx::dynamic_smem<uint4>();
  const unsigned t = threadIdx.x, n = blockDim.x;
  ptx::cp_async_16(s + t, in + t);
  ptx::cp_async_commit();
  for (int i = 0; i < steps; ++i) {
    if (barrier_before_refill) __syncthreads();
    ptx::cp_async_16(s + (i + 1) % 2 * n + t, in + (i + 1) * n + t, i + 1 < steps);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    ptx::st_global(out + i * n + t, ptx::ld_shared(s + i % 2 * n + (t + 1) % n));
  }
  ptx::cp_async_wait<0>();
}

TEST(Planted, PipelineThatRefillsTooEarly) {
  const simt::Buffer<uint4> in(std::vector<uint4>(64 * 5));
  simt::Buffer<uint4> out(64 * 5);
  simt::for_each_seed(4, [&] {
    launch("pipeline", pipeline, 1, 64, 2 * 64 * 16, nullptr, in.data(), out.data(), 5, true);
    EXPECT_ERROR(
        launch("pipeline", pipeline, 1, 64, 2 * 64 * 16, nullptr, in.data(), out.data(), 5, false),
        "dynamic shared memory");
  });
}

// ---- barriers and warps -------------------------------------------------------------------------

enum class Sync {
  correct,
  half_a_block,
  two_places,
  early_exit,
  lane_missing,
  own_lane_missing,
  no_such_lane,
  exited_lane,
  source_not_in_mask,
  in_divergent_warp
};

__global__ void sync_kernel(float* out, Sync bug) {
  const unsigned t = threadIdx.x;
  float v = static_cast<float>(t);
  switch (bug) {
    case Sync::correct:
      __syncthreads();
      break;
    case Sync::half_a_block:
      if (t < 32) __syncthreads();
      break;
    case Sync::two_places:
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Sync::early_exit:
      if (t == 63) return;
      __syncthreads();
      break;
    case Sync::lane_missing:
      if (t % 32 < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
      break;
    case Sync::own_lane_missing:
      v = __shfl_xor_sync(0xffffu, v, 1);
      break;
    case Sync::no_such_lane:
      v = __shfl_xor_sync(0xffffffffu, v, 1);
      break;
    case Sync::exited_lane:
      if (t % 32 == 5) return;
      for (int i = 0; i < 2; ++i) v = __shfl_xor_sync(0xffffffffu, v, 1);
      break;
    case Sync::source_not_in_mask:
      if (t % 32 < 8) v = __shfl_xor_sync(0xffu, v, 16);
      break;
    case Sync::in_divergent_warp: {
      uint32_t r[4];
      if (t % 2 == 0) ptx::ldmatrix_x4(r, ptx::dynamic_smem());
      break;
    }
  }
  ptx::st_global(out + t, v);
}

void run_sync(Sync bug, unsigned threads = 64) {
  simt::Buffer<float> out(threads);
  launch("sync_kernel", sync_kernel, 1, threads, 0, nullptr, out.data(), bug);
}

TEST(Planted, DivergentBarrier) {
  simt::for_each_seed(4, [] {
    run_sync(Sync::correct);
    EXPECT_ERROR(run_sync(Sync::half_a_block), "kernel sync_kernel", "divergent barrier",
                 "32 threads", "have exited", "test_planted.cpp:");
    EXPECT_ERROR(run_sync(Sync::two_places), "divergent barrier", "32 threads");
    EXPECT_ERROR(run_sync(Sync::early_exit), "divergent barrier",
                 "1 threads (first: (63, 0, 0)) have exited");
  });
}

TEST(Planted, WarpMask) {
  simt::for_each_seed(4, [] {
    EXPECT_FALSE(error_of([] { run_sync(Sync::lane_missing); }).empty());
    EXPECT_ERROR(run_sync(Sync::own_lane_missing), "is not in its own mask 0x0000ffff");
    EXPECT_ERROR(run_sync(Sync::no_such_lane, 48), "names lane 16, which the block does not have");
    EXPECT_FALSE(error_of([] { run_sync(Sync::exited_lane); }).empty());
    EXPECT_ERROR(run_sync(Sync::source_not_in_mask),
                 "lane 0 reads lane 16, which is not in the mask");
    EXPECT_FALSE(error_of([] { run_sync(Sync::in_divergent_warp); }).empty());
  });
}

// ---- races --------------------------------------------------------------------------------------

enum class Race { none, no_barrier, no_second_barrier, warp_without_syncwarp, warp_with_syncwarp };

__global__ void rotate(float* out, Race bug) {
  auto* s = ptx::dynamic_smem<float>();
  const unsigned t = threadIdx.x, n = blockDim.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    ptx::st_shared(s + t, static_cast<float>(t));
    if (bug == Race::warp_with_syncwarp) {
      __syncwarp();
      sum += ptx::ld_shared(s + (t ^ 1));
      __syncwarp();
    } else if (bug == Race::warp_without_syncwarp) {
      sum += ptx::ld_shared(s + (t ^ 1));
    } else {
      if (bug != Race::no_barrier) __syncthreads();
      sum += ptx::ld_shared(s + (t + 32) % n);
      if (bug != Race::no_second_barrier) __syncthreads();
    }
  }
  ptx::st_global(out + t, sum);
}

void run_rotate(Race bug) {
  simt::Buffer<float> out(128);
  launch("rotate", rotate, 1, 128, 512, nullptr, out.data(), bug);
}

TEST(Planted, SharedRace) {
  simt::for_each_seed(6, [] {
    run_rotate(Race::none);
    run_rotate(Race::warp_with_syncwarp);
    EXPECT_FALSE(error_of([] { run_rotate(Race::no_barrier); }).empty());
    EXPECT_ERROR(run_rotate(Race::no_second_barrier), "race", "dynamic shared memory");
    EXPECT_FALSE(error_of([] { run_rotate(Race::warp_without_syncwarp); }).empty());
  });
}

__global__ void same_output(float* out) { ptx::st_global(out, static_cast<float>(blockIdx.x)); }

__global__ void read_neighbour(float* data) {
  const unsigned i = blockIdx.x;
  ptx::st_global(data + i, ptx::ld_global(data + i) + ptx::ld_global(data + (i + 1) % gridDim.x));
}

TEST(Planted, RaceBetweenBlocks) {
  simt::Buffer<float> out(1, "out"), data(std::vector<float>(8), "data");
  EXPECT_ERROR(launch("same_output", same_output, 2, 1, 0, nullptr, out.data()),
               "race: writes bytes 0..3 of out", "of another block");
  EXPECT_ERROR(launch("read_neighbour", read_neighbour, 8, 1, 0, nullptr, data.data()), "race",
               "data");
}

__global__ void read_only_but_written(float* data) {
  const float v = ptx::ld_global_nc(data + threadIdx.x);
  ptx::st_global(data + threadIdx.x, v + 1);
  ptx::st_global(data + threadIdx.x, ptx::ld_global_nc(data + threadIdx.x) + 1);
}

TEST(Planted, ReadOnlyLoadOfWrittenMemory) {
  simt::Buffer<float> data(std::vector<float>(32), "data");
  EXPECT_ERROR(
      launch("read_only_but_written", read_only_but_written, 1, 32, 0, nullptr, data.data()),
      "read-only load of data");
}

// The last block to finish adds up what all have written: right with a barrier and a fence before
// the counter.
enum class Last { correct, no_fence, no_barrier };

__global__ void last_block_sums(float* partial, unsigned* count, float* out, Last bug) {
  SMT_EXT_SHARED(unsigned, ticket, 1);
  ptx::st_global(partial + blockIdx.x * 2 + threadIdx.x, 1.0f);
  if (bug != Last::no_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (bug != Last::no_fence) __threadfence();
    ptx::st_shared(&ticket[0], atomicAdd(count, 1));
  }
  __syncthreads();
  if (ptx::ld_shared(&ticket[0]) != gridDim.x - 1) return;
  float sum = 0;
  if (threadIdx.x == 0) {
    for (unsigned i = 0; i < 2 * gridDim.x; ++i) sum += ptx::ld_global(partial + i);
    ptx::st_global(out, sum);
  }
}

TEST(Planted, LastBlockWithoutFence) {
  const auto run_last = [](Last bug) {
    simt::Buffer<float> partial(16, "partial"), out(1);
    simt::Buffer<unsigned> count({0});
    launch("last_block_sums", last_block_sums, 8, 2, 0, nullptr, partial.data(), count.data(),
           out.data(), bug);
    EXPECT_EQ(out.values()[0], 16.0f);
  };
  simt::for_each_seed(4, [&] {
    run_last(Last::correct);
    EXPECT_ERROR(run_last(Last::no_fence), "race", "partial");
    EXPECT_ERROR(run_last(Last::no_barrier), "race", "partial");
  });
}

// No race (atomics), yet the order of the blocks shows in the bits: seen by comparing seeds.
__global__ void float_atomic_sum(const float* in, float* out) {
  atomicAdd(out, ptx::ld_global(in + blockIdx.x));
}

TEST(Planted, OrderDependence) {
  std::vector<float> in(64);
  for (int i = 0; i < 64; ++i) in[i] = 1.0f / static_cast<float>(i + 1);
  const simt::Buffer<float> device(in);
  std::vector<float> results;
  simt::for_each_seed(8, [&] {
    simt::Buffer<float> out({0.0f});
    launch("float_atomic_sum", float_atomic_sum, 64, 1, 0, nullptr, device.data(), out.data());
    results.push_back(out.values()[0]);
  });
  EXPECT_NE(std::count(results.begin(), results.end(), results[0]), 8);
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
__global__ void sum_without_start(const float* in, float* out) {
  float sum;
  for (int i = 0; i < 4; ++i) sum += ptx::ld_global(in + i);
  ptx::st_global(out, sum);
}
#pragma GCC diagnostic pop

TEST(Planted, UninitializedLocal) {
  const simt::Buffer<float> in({1.0f, 2.0f, 3.0f, 4.0f});
  simt::Buffer<float> out(1);
  launch("sum_without_start", sum_without_start, 1, 1, 0, nullptr, in.data(), out.data());
  EXPECT_LT(out.raw()[0], -1e30f);
}

__global__ void trap() { __trap(); }

TEST(Planted, Trap) {
  EXPECT_ERROR(launch("trap", trap, 1, 1, 0, nullptr), "kernel trap", "__trap at");
}

// ---- plain accesses, past the wrappers ----------------------------------------------------------

__global__ void plain_scale(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = 2 * in[i];
}

TEST(PlantedPlain, OutOfBounds) {
  const simt::Buffer<float> in(std::vector<float>(100), "in");
  simt::Buffer<float> out(100, "out");
  launch("plain_scale", plain_scale, 4, 32, 0, nullptr, in.data(), out.data(), 100);
  EXPECT_ERROR(launch("plain_scale", plain_scale, 4, 32, 0, nullptr, in.data(), out.data(), 101),
               "out of bounds", "bytes 400..403 of in", "test_planted.cpp:");
}

TEST(PlantedPlain, HostMemory) {
  const std::vector<float> host(100);
  simt::Buffer<float> out(100);
  EXPECT_ERROR(launch("plain_scale", plain_scale, 4, 32, 0, nullptr, host.data(), out.data(), 100),
               "reads memory of the host");
}

TEST(PlantedPlain, UninitializedRead) {
  simt::Buffer<float> in(100, "in"), out(100);
  EXPECT_ERROR(launch("plain_scale", plain_scale, 4, 32, 0, nullptr, in.data(), out.data(), 100),
               "not all of it ever written");
}

__global__ void plain_rotate(float* out, bool barrier) {
  SMT_EXT_SHARED(float, s, 64);
  s[threadIdx.x] = 1;
  if (barrier) __syncthreads();
  out[threadIdx.x] = s[(threadIdx.x + 32) % 64] + s[threadIdx.x];
}

TEST(PlantedPlain, SharedRace) {
  simt::Buffer<float> out(64);
  simt::for_each_seed(4, [&] {
    launch("plain_rotate", plain_rotate, 1, 64, 0, nullptr, out.data(), true);
    EXPECT_FALSE(error_of([&] {
                   launch("plain_rotate", plain_rotate, 1, 64, 0, nullptr, out.data(), false);
                 }).empty());
  });
}

__global__ void plain_async(const uint4* in, uint4* out) {
  auto* s = ptx::dynamic_smem<uint4>();
  ptx::cp_async_16(s, in);
  out[0].x = s[0].x;
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

TEST(PlantedPlain, CpAsyncNotWaitedFor) {
  const simt::Buffer<uint4> in(std::vector<uint4>(1));
  simt::Buffer<uint4> out(1);
  EXPECT_ERROR(launch("plain_async", plain_async, 1, 1, 16, nullptr, in.data(), out.data()),
               "while a cp.async to it is in flight");
}

// ---- undefined behaviour ------------------------------------------------------------------------

__global__ void local_overflow(int* out, int n) {
  const int local[4] = {1, 2, 3, 4};
  *out = local[n];
}
__global__ void signed_overflow(int* out, int n) { *out = n + 1; }
__global__ void plain_vector(const float* in, float4* out) {
  *out = *reinterpret_cast<const float4*>(in);
}

TEST(PlantedPlainDeathTest, UndefinedBehaviour) {
  simt::Buffer<int> out(1);
  EXPECT_DEATH(launch("local_overflow", local_overflow, 1, 1, 0, nullptr, out.data(), 4),
               "index 4 out of bounds");
  EXPECT_DEATH(launch("signed_overflow", signed_overflow, 1, 1, 0, nullptr, out.data(), 0x7fffffff),
               "signed integer overflow");
  const simt::Buffer<float> in(std::vector<float>(8));
  simt::Buffer<float4> vectors(1);
  EXPECT_DEATH(
      launch("plain_vector", plain_vector, 1, 1, 0, nullptr, in.data() + 1, vectors.data()),
      "misaligned address");
}

}  // namespace
