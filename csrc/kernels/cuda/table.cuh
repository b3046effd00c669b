// One launch over many tensors: a table of records on the device, and which blocks of the grid
// ("chunks") work on which record.
//
// The table is built on the host at every call and travels as kernel parameters, kPageBytes a
// launch: no pinned memory that must outlive the call, no copy that waits for the host, and a
// captured CUDA graph holds its own copy.
#pragma once

#include <cstring>
#include <vector>

#include "launch.cuh"
#include "ptx.cuh"

namespace smt_ext::cuda {

inline constexpr int kPageWords = 248;  // of 16 bytes: just below the 4 KB of kernel parameters

struct Page {
  uint4 words[kPageWords];
};

inline constexpr int kPageThreads = 256;
static_assert(kPageWords <= kPageThreads);

static __global__ void __launch_bounds__(kPageThreads)
    write_page_kernel(const __grid_constant__ Page page, uint4* to, int words) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < words) ptx::st_global(to + i, page.words[i]);
}

inline void write_table(const std::vector<uint4>& words, uint4* to, cudaStream_t stream) {
  for (std::size_t begin = 0; begin < words.size(); begin += kPageWords) {
    const std::size_t count = std::min<std::size_t>(kPageWords, words.size() - begin);
    Page page{};
    std::memcpy(page.words, words.data() + begin, count * sizeof(uint4));
    launch("write_table", write_page_kernel, dim3(1), dim3(kPageThreads), 0, stream, page,
           to + begin, static_cast<int>(count));
  }
}

// n records at the start of the workspace, then the first chunk of each.
template <typename Record>
class Table {
  static_assert(sizeof(Record) % sizeof(uint4) == 0 && std::is_trivially_copyable_v<Record>);
  static constexpr std::size_t kRecordWords = sizeof(Record) / sizeof(uint4);

 public:
  static std::size_t workspace_bytes(int64_t n) {
    const std::size_t words = static_cast<std::size_t>(n) * kRecordWords + first_words(n);
    return (words + words % 2) * sizeof(uint4);  // what follows begins at a sector
  }

  // chunks_of(record): how many blocks work on it.
  template <typename Chunks>
  Table(const std::vector<Record>& records, const Chunks& chunks_of, void* workspace,
        cudaStream_t stream)
      : words_(static_cast<uint4*>(workspace)), n_(static_cast<int>(records.size())) {
    std::vector<int32_t> first;
    for (const Record& record : records) {
      first.push_back(static_cast<int32_t>(grid_blocks(chunks_)));
      chunks_ += chunks_of(record);
    }
    const std::size_t record_words = records.size() * kRecordWords;
    std::vector<uint4> words(record_words + first_words(n_));
    if (!records.empty()) {
      std::memcpy(words.data(), records.data(), record_words * sizeof(uint4));
      std::memcpy(words.data() + record_words, first.data(), first.size() * sizeof(int32_t));
    }
    write_table(words, words_, stream);
  }

  int64_t chunks() const { return chunks_; }

  struct Chunk {
    Record record;
    int index;   // of the record
    int64_t at;  // number of the chunk within the record
  };

  // What this block works on.
  __device__ __forceinline__ Chunk chunk() const {
    const int32_t* first = reinterpret_cast<const int32_t*>(words_ + n_ * kRecordWords);
    const int block = static_cast<int>(blockIdx.x);
    int low = 0, high = n_;  // first[low] <= block < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (ptx::ld_global_nc(first + middle) <= block ? low : high) = middle;
    }
    Chunk chunk;
    uint4 words[kRecordWords];
#pragma unroll
    for (std::size_t i = 0; i < kRecordWords; ++i) {
      words[i] = ptx::ld_global_nc(words_ + low * kRecordWords + i);
    }
    memcpy(&chunk.record, words, sizeof(Record));
    chunk.index = low;
    chunk.at = block - ptx::ld_global_nc(first + low);
    return chunk;
  }

 private:
  static std::size_t first_words(int64_t n) { return (static_cast<std::size_t>(n) + 3) / 4; }

  uint4* words_;
  int n_;
  int64_t chunks_ = 0;
};

}  // namespace smt_ext::cuda
