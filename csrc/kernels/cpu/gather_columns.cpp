#include "gather_columns.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "clones.h"

namespace smt_ext::cpu {

// A task must be worth the handing over: about 64 KB.
constexpr int64_t kTaskElements = 16384;

// Columns [begin, begin + width): neighbouring blocks are one run.
struct Run {
  int64_t begin, width;
};

static std::vector<Run> runs_of(const GatherColumnsArgs& a) {
  std::vector<Run> runs;
  for (int64_t s = 0; s < a.C; ++s) {
    const int64_t begin = a.col_blocks[s] * a.L, width = std::min(a.L, a.K - begin);
    if (!runs.empty() && runs.back().begin + runs.back().width == begin) {
      runs.back().width += width;
    } else {
      runs.push_back({begin, width});
    }
  }
  return runs;
}

// Bytes of a run, by 64 at a time: a call of memcpy costs as much as copying a block's row.
typedef char Line __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) void copy_run(char* out, const char* from, int64_t n) {
  int64_t i = 0;
  for (; i + 256 <= n; i += 256) {
    Line lines[4];
    for (int64_t j = 0; j < 4; ++j) std::memcpy(&lines[j], from + i + 64 * j, 64);
    for (int64_t j = 0; j < 4; ++j) std::memcpy(out + i + 64 * j, &lines[j], 64);
  }
  for (; i + 64 <= n; i += 64) {
    Line line;
    std::memcpy(&line, from + i, 64);
    std::memcpy(out + i, &line, 64);
  }
  if (i < n) std::memcpy(out + i, from + i, static_cast<size_t>(n - i));
}

// Rows [begin, end) as they are, of columns that lie side by side. Sizes and strides in bytes.
SMT_CLONES void copy_rows(char* out, const char* x, int64_t begin, int64_t end, int64_t stride,
                          int64_t out_stride, const Run* runs, int64_t count, int64_t size) {
  // Runs of later rows are asked for ahead of time: short ones, far apart, are nothing that a
  // hardware prefetcher follows.
  constexpr int64_t kAhead = 2;
  for (int64_t t = begin; t < end; ++t) {
    const char* row = x + t * stride;
    char* to = out + t * out_stride;
    for (int64_t r = 0; r < count; ++r) {
      const char* from = row + runs[r].begin * size;
      const int64_t n = runs[r].width * size;
      const int64_t later = t + kAhead < end ? n : 0;
      for (int64_t i = 0; i < later; i += 64) __builtin_prefetch(from + kAhead * stride + i);
      copy_run(to, from, n);
      to += n;
    }
  }
}

template <typename In, typename Out>
SMT_CLONES void convert_rows(Out* out, const In* x, int64_t begin, int64_t end, int64_t stride_t,
                             int64_t stride_k, int64_t U, const Run* runs, int64_t count) {
  for (int64_t t = begin; t < end; ++t) {
    Out* to = out + t * U;
    for (int64_t r = 0; r < count; ++r) {
      const In* from = x + t * stride_t + runs[r].begin * stride_k;
      for (int64_t j = 0; j < runs[r].width; ++j) to[j] = convert<Out>::from(from[j * stride_k]);
      to += runs[r].width;
    }
  }
}

void gather_columns(const GatherColumnsArgs& args, const Parallel& parallel) {
  if (args.U == 0) return;
  const std::vector<Run> runs = runs_of(args);
  const int64_t count = static_cast<int64_t>(runs.size());
  const int64_t grain = std::max<int64_t>(1, kTaskElements / args.U);
  parallel.run(args.T, grain, [&](int64_t begin, int64_t end) {
    dispatch(args.dtype, [&](auto in) {
      dispatch(args.out_dtype, [&](auto out) {
        using In = decltype(in);
        using Out = decltype(out);
        constexpr int64_t kSize = sizeof(In);
        if (std::is_same<In, Out>::value && args.stride_k == 1) {
          copy_rows(static_cast<char*>(args.out), static_cast<const char*>(args.x), begin, end,
                    args.stride_t * kSize, args.U * kSize, runs.data(), count, kSize);
        } else {
          convert_rows(static_cast<Out*>(args.out), static_cast<const In*>(args.x), begin, end,
                       args.stride_t, args.stride_k, args.U, runs.data(), count);
        }
      });
    });
  });
}

}  // namespace smt_ext::cpu
