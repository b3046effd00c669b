#include "convert.cuh"
#include "grad_norm.h"
#include "reduce.cuh"
#include "table.cuh"

namespace smt_ext::cuda {

constexpr int kThreads = 256;
constexpr int64_t kChunkElements = 16384;  // 64 of a thread

// Its own name: records of the same name in two files would be one class to the linker.
struct alignas(16) GradientRecord {
  Gradient grad;
  int64_t padding;
};

template <typename T>
__device__ __forceinline__ double square(T x) {
  const double wide = static_cast<double>(widen(x));
  return wide * wide;
}

template <typename T>
__device__ __forceinline__ double sum_of_squares(const T* x, int count) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kUnroll = 4;  // loads in flight
  double sum = 0;
  int done = 0;
  if (is_aligned(x, 16)) {
    const int vectors = count / kVector;
    done = vectors * kVector;
    for (int begin = static_cast<int>(threadIdx.x); begin < vectors; begin += kUnroll * kThreads) {
      Vector<T, kVector> value[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int at = begin + i * kThreads;
        if (at < vectors) value[i] = load_nc<kVector>(x + at * kVector);
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (begin + i * kThreads < vectors) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) sum += square(value[i].at[e]);
        }
      }
    }
  }
  for (int i = done + static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    sum += square(load_nc<1>(x + i).at[0]);
  }
  return sum;
}

static __global__ void __launch_bounds__(kThreads, 4)
    sum_of_squares_kernel(Table<GradientRecord> table, double* sums) {
  const auto chunk = table.chunk();
  const Gradient& grad = chunk.record.grad;
  const int64_t begin = chunk.at * kChunkElements, left = grad.numel - begin;
  const int count = static_cast<int>(left < kChunkElements ? left : kChunkElements);
  double sum = 0;
  dispatch(grad.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    sum = sum_of_squares(static_cast<const T*>(grad.data) + begin, count);
  });
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) ptx::st_global(sums + blockIdx.x, sum);
}

static __global__ void __launch_bounds__(kThreads)
    root_of_sum_kernel(const double* sums, int64_t count, double* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += ptx::ld_global_nc(sums + i);
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) ptx::st_global(norm, sqrt(sum));
}

static int64_t chunks_of(int64_t numel) { return (numel + kChunkElements - 1) / kChunkElements; }

std::size_t grad_norm_workspace_bytes(const Gradient* grads, int64_t n) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < n; ++i) chunks += chunks_of(grads[i].numel);
  return Table<GradientRecord>::workspace_bytes(n) +
         static_cast<std::size_t>(chunks) * sizeof(double);
}

void grad_norm(const Gradient* grads, int64_t n, double* norm, void* workspace,
               cudaStream_t stream) {
  std::vector<GradientRecord> records;
  for (int64_t i = 0; i < n; ++i) records.push_back({grads[i], 0});
  const Table<GradientRecord> table(
      records, [](const GradientRecord& record) { return chunks_of(record.grad.numel); }, workspace,
      stream);
  double* sums = reinterpret_cast<double*>(static_cast<char*>(workspace) +
                                           Table<GradientRecord>::workspace_bytes(n));
  launch("grad_norm_sums", sum_of_squares_kernel, dim3(grid_blocks(table.chunks())), dim3(kThreads),
         0, stream, table, sums);
  launch("grad_norm", root_of_sum_kernel, dim3(1), dim3(kThreads), 0, stream, sums, table.chunks(),
         norm);
}

}  // namespace smt_ext::cuda
