#include "block_score.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "scratch.h"

namespace smt_ext::cpu {

// Independent sums of one block: as many as hide the latency of an addition.
constexpr int64_t kLanes = 64;
// Rows that are read side by side, so that the lanes are fetched and put back once for all of them.
constexpr int64_t kRowsTogether = 8;
constexpr int64_t kRowsPerFold = 32;
// Columns that a task reads from each row: long enough runs for the hardware prefetcher.
constexpr int64_t kTaskColumns = 4096;

template <Metric M, typename Acc>
static inline Acc term(Acc x) {
  if (M == Metric::mean) return x;
  if (M == Metric::l2) return x * x;
  return std::abs(x);
}

// lanes[c][l] += terms of `rows` rows x[0, width), cut into blocks of L columns.
template <Metric M, typename T>
SMT_CLONES void add_rows(const T* x, int64_t stride_n, int64_t stride_k, int64_t rows,
                         int64_t width, int64_t L, accumulator_t<T>* lanes) {
  using Acc = accumulator_t<T>;
  for (int64_t begin = 0; begin < width; begin += L, lanes += kLanes) {
    const int64_t n = std::min(L, width - begin);
    const int64_t whole = stride_k == 1 ? n / kLanes * kLanes : 0;
    Acc sum[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) sum[l] = lanes[l];
    for (int64_t i = 0; i < rows; ++i) {
      const T* p = x + i * stride_n + begin * stride_k;
      for (int64_t j = 0; j < whole; j += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) sum[l] += term<M>(convert<Acc>::from(p[j + l]));
      }
    }
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = sum[l];
    for (int64_t i = 0; i < rows; ++i) {
      const T* p = x + i * stride_n + begin * stride_k;
      for (int64_t j = whole; j < n; ++j) {
        lanes[j % kLanes] += term<M>(convert<Acc>::from(p[j * stride_k]));
      }
    }
  }
}

// Sum of the lanes in float64; they start again from zero.
template <typename Acc>
SMT_CLONES double take_lanes(Acc* lanes) {
  constexpr int64_t kWide = 16;
  double sums[kWide] = {};
  for (int64_t begin = 0; begin < kLanes; begin += kWide) {
    for (int64_t l = 0; l < kWide; ++l) {
      sums[l] += static_cast<double>(lanes[begin + l]);
      lanes[begin + l] = Acc{};
    }
  }
  double sum = 0;
  for (const double lane : sums) sum += lane;
  return sum;
}

// Sums of the terms of blocks side by side, in float64.
template <typename Acc>
class BlockSums {
 public:
  explicit BlockSums(int64_t blocks) : lanes_(blocks * kLanes), sums_(blocks) {}

  template <Metric M, typename T>
  void add(const T* x, int64_t stride_n, int64_t stride_k, int64_t rows, int64_t width, int64_t L) {
    for (int64_t i = 0; i < rows; i += kRowsTogether) {
      const int64_t together = std::min(kRowsTogether, rows - i);
      add_rows<M>(x + i * stride_n, stride_n, stride_k, together, width, L, lanes_.data());
      if ((i + together) % kRowsPerFold == 0 || i + together == rows) fold();
    }
  }

  double operator[](int64_t block) const { return sums_[block]; }

 private:
  void fold() {
    for (size_t c = 0; c < sums_.size(); ++c) sums_[c] += take_lanes(lanes_.data() + c * kLanes);
  }

  std::vector<Acc> lanes_;
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
  const int64_t per_task = std::max<int64_t>(1, kTaskColumns / a.L);
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
                static_cast<const char*>(a.dy.data) + (n0 + i) * a.dy.stride_i * element,
                a.dy.stride_t, a.dy.stride_i};
            const Operand x{static_cast<const char*>(a.x.data) + (k0 + j) * a.x.stride_i * element,
                            a.x.stride_t, a.x.stride_i};
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
