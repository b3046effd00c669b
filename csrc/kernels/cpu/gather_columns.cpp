#include "gather_columns.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace smt_ext::cpu {

// A task must be worth the handing over: about 64 KB.
constexpr int64_t kTaskElements = 16384;
// From the row that is copied to the row that is asked for: runs of a few hundred bytes, a row
// apart, are over before a hardware prefetcher follows them.
constexpr int64_t kRowsAhead = 8;

template <typename In, typename Out>
static void gather_row(const GatherColumnsArgs& a, const In* x, const In* ahead, Out* out) {
  constexpr int64_t kLine = 64 / sizeof(In);
  for (int64_t s = 0; s < a.C; ++s, out += a.L) {
    const int64_t begin = a.col_blocks[s] * a.L, width = std::min(a.L, a.K - begin);
    const In* from = x + begin * a.stride_k;
    if (a.stride_k == 1) {
      for (int64_t j = 0; j < width; j += kLine) __builtin_prefetch(ahead + begin + j);
    }
    if (a.stride_k != 1) {
      for (int64_t j = 0; j < width; ++j) out[j] = convert<Out>::from(from[j * a.stride_k]);
    } else if (std::is_same<In, Out>::value) {
      std::memcpy(out, from, static_cast<size_t>(width) * sizeof(In));
    } else {
      for (int64_t j = 0; j < width; ++j) out[j] = convert<Out>::from(from[j]);
    }
  }
}

void gather_columns(const GatherColumnsArgs& args, const Parallel& parallel) {
  if (args.U == 0) return;
  const int64_t grain = std::max<int64_t>(1, kTaskElements / args.U);
  parallel.run(args.T, grain, [&](int64_t begin, int64_t end) {
    dispatch(args.dtype, [&](auto in) {
      dispatch(args.out_dtype, [&](auto out) {
        using In = decltype(in);
        using Out = decltype(out);
        for (int64_t t = begin; t < end; ++t) {
          const In* x = static_cast<const In*>(args.x);
          gather_row(args, x + t * args.stride_t,
                     x + std::min(t + kRowsAhead, end - 1) * args.stride_t,
                     static_cast<Out*>(args.out) + t * args.U);
        }
      });
    });
  });
}

}  // namespace smt_ext::cpu
