#include "block_score.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "scratch.h"

namespace smt_ext::cpu {

constexpr int64_t kRowsPerFold = 32;
// Rows of a small block are added to its lanes so many at once: for each by itself, lanes would be
// read and written as often as numbers are read. Of larger ones these are rows too many for a
// hardware prefetcher.
constexpr int64_t kRowsAtOnce = 4, kSmallBlock = 64;
static_assert(kRowsPerFold % kRowsAtOnce == 0);
// Columns that a task reads from each row: long enough runs for the hardware prefetcher, of so few
// blocks that their lanes (256 bytes each) leave L1 to what is read.
constexpr int64_t kTaskColumns = 4096;
constexpr int64_t kTaskBlocks = 64;
constexpr int64_t kAheadBytes = 16384;  // from what is read to what is asked for

template <Metric M, typename Acc>
static inline Acc term(Acc x) {
  if (M == Metric::mean) return x;
  if (M == Metric::l2) return x * x;
  return std::abs(x);
}

// 64 bytes of sums. The compiler cuts them into what the instruction set has; arrays of numbers in
// their place would go through memory at every addition.
template <typename Acc>
struct Wide;
template <>
struct Wide<float> {
  typedef float Sums __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
};
template <>
struct Wide<double> {
  typedef double Sums __attribute__((vector_size(64)));
  typedef uint64_t Bits __attribute__((vector_size(64)));
  static constexpr uint64_t kMagnitude = 0x7fffffffffffffffu;
};
template <typename Acc>
constexpr int64_t kWidth = 64 / sizeof(Acc);
// Of one block, independent of each other: enough to hide the latency of an addition.
constexpr int kVectors = 4;
template <typename Acc>
constexpr int64_t kLanes = kVectors * kWidth<Acc>;
template <typename Acc>
struct alignas(64) Lanes {
  Acc at[kLanes<Acc>];
};

// By reference: what returns or takes such vectors by value has another ABI in each clone.
template <typename Vec, typename T>
static inline __attribute__((always_inline)) void load(const T* p, Vec& vec) {
  std::memcpy(&vec, p, sizeof vec);
}

template <Metric M, typename Acc>
static inline __attribute__((always_inline)) void add_bits(typename Wide<Acc>::Sums& sum,
                                                           const typename Wide<Acc>::Bits& term) {
  typename Wide<Acc>::Bits bits = term;
  if (M == Metric::mean_abs || M == Metric::l1) bits &= Wide<Acc>::kMagnitude;
  const auto x = reinterpret_cast<typename Wide<Acc>::Sums>(bits);
  sum += M == Metric::l2 ? x * x : x;
}

// sum[0, Count) += terms of the Count vectors of numbers at p.
template <Metric M, int Count, typename Acc, typename T>
static inline __attribute__((always_inline)) void add_vectors(typename Wide<Acc>::Sums* sum,
                                                              const T* p) {
  typename Wide<Acc>::Bits bits;
  if constexpr (std::is_same_v<T, bf16> && Count > 1) {
    // Two neighbours in a word: the upper is a float32 once the lower is masked, the lower once it
    // is shifted up. Cheaper than spreading them out, and a sum does not care about the order.
    static_assert(Count % 2 == 0);
#pragma GCC unroll 4
    for (int v = 0; v < Count; v += 2) {
      load(p + v * kWidth<Acc>, bits);
      add_bits<M, Acc>(sum[v], bits << 16);
      add_bits<M, Acc>(sum[v + 1], bits & 0xffff0000u);
    }
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < Count; ++v, p += kWidth<Acc>) {
      if constexpr (std::is_same_v<T, Acc>) {
        load(p, bits);
      } else if constexpr (std::is_same_v<T, bf16>) {
        uint16_t halves __attribute__((vector_size(32)));
        load(p, halves);
        bits = __builtin_convertvector(halves, typename Wide<Acc>::Bits) << 16;
      } else {
        Acc x[kWidth<Acc>];
        for (int64_t l = 0; l < kWidth<Acc>; ++l) x[l] = convert<Acc>::from(p[l]);
        load(x, bits);
      }
      add_bits<M, Acc>(sum[v], bits);
    }
  }
}

// lanes[c][...] += terms of kRows rows of x, [0, width) of each, cut into blocks c of L columns.
// Asks for the same columns of the rows from `ahead` on meanwhile: a run of a few KB is over before
// a hardware prefetcher follows it.
template <Metric M, int64_t kRows, typename T>
SMT_CLONES void add_rows(const T* x, const T* ahead, int64_t stride_n, int64_t stride_k,
                         int64_t width, int64_t L, Lanes<accumulator_t<T>>* lanes) {
  using Acc = accumulator_t<T>;
  for (int64_t left = width; left > 0; left -= L, ++lanes) {
    const int64_t n = std::min(L, left);
    int64_t in_vectors = 0;
    if (stride_k == 1) {
      constexpr int64_t kLine = 64 / sizeof(T);
      for (int64_t i = 0; i < kRows; ++i) {
        const T* row = ahead + i * stride_n;
        for (int64_t line = 0; line < n; line += kLine) __builtin_prefetch(row + line);
      }
      in_vectors = n / kWidth<Acc> * kWidth<Acc>;
      typename Wide<Acc>::Sums sum[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) load(lanes->at + v * kWidth<Acc>, sum[v]);
      for (int64_t i = 0; i < kRows; ++i) {
        const T* row = x + i * stride_n;
        int64_t j = 0;
        for (; j + kLanes<Acc> <= n; j += kLanes<Acc>) add_vectors<M, kVectors, Acc>(sum, row + j);
        if (j + 2 * kWidth<Acc> <= n) {
          add_vectors<M, 2, Acc>(sum, row + j);
          j += 2 * kWidth<Acc>;
        }
        if (j + kWidth<Acc> <= n) add_vectors<M, 1, Acc>(sum + 2, row + j);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(lanes->at + v * kWidth<Acc>, &sum[v], sizeof sum[v]);
      }
    }
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = in_vectors; j < n; ++j) {
        const T entry = x[i * stride_n + j * stride_k];
        lanes->at[j % kLanes<Acc>] += term<M>(convert<Acc>::from(entry));
      }
    }
    x += n * stride_k;
    ahead += n * stride_k;
  }
}

// Sum of the lanes in float64; they start again from zero.
template <typename Acc>
SMT_CLONES double take_lanes(Lanes<Acc>& lanes) {
  double sums[kWidth<Acc>] = {};
  for (int64_t begin = 0; begin < kLanes<Acc>; begin += kWidth<Acc>) {
    for (int64_t l = 0; l < kWidth<Acc>; ++l) {
      sums[l] += static_cast<double>(lanes.at[begin + l]);
      lanes.at[begin + l] = Acc{};
    }
  }
  for (int64_t half = kWidth<Acc> / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

// Sums of the terms of blocks side by side, in float64.
template <typename Acc>
class BlockSums {
 public:
  explicit BlockSums(int64_t blocks) : lanes_(blocks), sums_(blocks) {}

  template <Metric M, typename T>
  void add(const T* x, int64_t stride_n, int64_t stride_k, int64_t rows, int64_t width, int64_t L) {
    const int64_t ahead =
        std::max<int64_t>(1, kAheadBytes / (width * static_cast<int64_t>(sizeof(T))));
    const auto add = [&](auto count, int64_t i) {
      const int64_t later = std::min(i + ahead, rows - count);
      add_rows<M, count>(x + i * stride_n, x + later * stride_n, stride_n, stride_k, width, L,
                         lanes_.data());
      if ((i + count) % kRowsPerFold == 0 || i + count == rows) fold();
    };
    int64_t i = 0;
    if (L <= kSmallBlock) {
      for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce) {
        add(std::integral_constant<int64_t, kRowsAtOnce>{}, i);
      }
    }
    for (; i < rows; ++i) add(std::integral_constant<int64_t, 1>{}, i);
  }

  double operator[](int64_t block) const { return sums_[block]; }

 private:
  void fold() {
    for (size_t c = 0; c < sums_.size(); ++c) sums_[c] += take_lanes(lanes_[c]);
  }

  std::vector<Lanes<Acc>> lanes_;
  std::vector<double> sums_;
};

static double finish(Metric metric, double sum, int64_t area) {
  switch (metric) {
    case Metric::l1:
      return sum;
    case Metric::l2:
      return std::sqrt(sum);
    default:
      return sum / static_cast<double>(area);
  }
}

template <typename F>
static void dispatch_metric(Metric metric, F&& f) {
  switch (metric) {
    case Metric::mean:
      return f(std::integral_constant<Metric, Metric::mean>{});
    case Metric::l2:
      return f(std::integral_constant<Metric, Metric::l2>{});
    default:
      return f(std::integral_constant<Metric, Metric::l1>{});
  }
}

void block_score(const BlockScoreArgs& a, const Parallel& parallel) {
  const int64_t R = (a.N + a.L - 1) / a.L, C = (a.K + a.L - 1) / a.L;
  const int64_t per_task = std::clamp<int64_t>(kTaskColumns / a.L, 1, kTaskBlocks);
  const int64_t tasks_a_row = (C + per_task - 1) / per_task;
  parallel.run(R * tasks_a_row, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / tasks_a_row, c0 = task % tasks_a_row * per_task;
      const int64_t rows = std::min(a.L, a.N - r * a.L);
      const int64_t k0 = c0 * a.L, width = std::min(per_task * a.L, a.K - k0);
      dispatch(a.dtype, [&](auto type) {
        using T = decltype(type);
        using Acc = accumulator_t<T>;
        const int64_t blocks = (width + a.L - 1) / a.L;
        BlockSums<Acc> sums(blocks);
        const T* g = static_cast<const T*>(a.g) + r * a.L * a.stride_n + k0 * a.stride_k;
        dispatch_metric(a.metric, [&](auto m) {
          sums.template add<decltype(m)::value>(g, a.stride_n, a.stride_k, rows, width, a.L);
        });
        for (int64_t c = 0; c < blocks; ++c) {
          const int64_t area = rows * std::min(a.L, width - c * a.L);
          static_cast<Acc*>(a.score)[r * C + c0 + c] =
              static_cast<Acc>(finish(a.metric, sums[c], area));
        }
      });
    }
  });
}

void block_score_fused(const BlockScoreFusedArgs& a, const Parallel& parallel) {
  const int64_t R = (a.N + a.L - 1) / a.L, C = (a.K + a.L - 1) / a.L;
  // A task is a square of whole blocks, at least one; small blocks share a tile and its packing.
  const int64_t per_task = std::max<int64_t>(1, kTile / a.L);
  const int64_t tile = std::min(kTile, per_task * a.L);
  const int64_t tasks_r = (R + per_task - 1) / per_task, tasks_c = (C + per_task - 1) / per_task;
  const int64_t element = size_of(a.dtype);
  parallel.run(tasks_r * tasks_c, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r0 = task / tasks_c * per_task, c0 = task % tasks_c * per_task;
      const int64_t n0 = r0 * a.L, k0 = c0 * a.L;
      const int64_t height = std::min(per_task * a.L, a.N - n0);
      const int64_t width = std::min(per_task * a.L, a.K - k0);
      const int64_t down = (height + a.L - 1) / a.L, across = (width + a.L - 1) / a.L;
      const bool wide = a.dtype == DType::f64;
      dispatch(wide ? DType::f64 : DType::f32, [&](auto type) {
        using Acc = accumulator_t<decltype(type)>;
        Acc* g = static_cast<Acc*>(thread_scratch(Scratch::tile, kTile * kTile * sizeof(Acc)));
        std::vector<BlockSums<Acc>> sums(down, BlockSums<Acc>(across));
        // One tile where L <= kTile; a larger block is the sum over its tiles.
        for (int64_t i = 0; i < height; i += tile) {
          for (int64_t j = 0; j < width; j += tile) {
            const int64_t m = std::min(tile, height - i), n = std::min(tile, width - j);
            const Operand dy{
                static_cast<const char*>(a.dy.data) + (n0 + i) * a.dy.stride_column * element,
                a.dy.stride_t, a.dy.stride_column};
            const Operand x{
                static_cast<const char*>(a.x.data) + (k0 + j) * a.x.stride_column * element,
                a.x.stride_t, a.x.stride_column};
            tile_gemm(a.dtype, dy, x, a.T, m, n, g, kTile);
            for (int64_t b = 0; b * a.L < m; ++b) {
              dispatch_metric(a.metric, [&](auto metric) {
                sums[b].template add<decltype(metric)::value>(g + b * a.L * kTile, kTile, 1,
                                                              std::min(a.L, m - b * a.L), n, a.L);
              });
            }
          }
        }
        for (int64_t b = 0; b < down; ++b) {
          for (int64_t c = 0; c < across; ++c) {
            const int64_t area = std::min(a.L, height - b * a.L) * std::min(a.L, width - c * a.L);
            static_cast<Acc*>(a.score)[(r0 + b) * C + c0 + c] =
                static_cast<Acc>(finish(a.metric, sums[b][c], area));
          }
        }
      });
    }
  });
}

}  // namespace smt_ext::cpu
