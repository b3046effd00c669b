// How the tiles of a product are spread over the multiprocessors: which are computed whole, which
// with their tokens split, so that the busiest multiprocessor is done soonest. Host code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace smt_ext::cuda {

// Tiles of a first level, then of a second and a third, each level with finer splits of the tokens.
// A block whose tile has more than one writes a part.
struct Split {
  int64_t tiles = 0, splits = 1, tokens = 0;  // tokens of a block
  constexpr int64_t blocks() const { return tiles * splits; }
  constexpr int64_t parts() const { return splits > 1 ? blocks() : 0; }
};

struct Schedule {
  static constexpr int kLevels = 3;
  Split levels[kLevels];

  int64_t blocks() const { return levels[0].blocks() + levels[1].blocks() + levels[2].blocks(); }
  int64_t parts() const { return levels[0].parts() + levels[1].parts() + levels[2].parts(); }
};

// All in tokens, the time that a multiprocessor takes for a token of a tile of so many entries.
// Estimated for an H100, not measured: 8 bytes an entry through L2 for a part that is written and
// read again, 2 us for a launch.
inline constexpr int64_t kLeastTokens = 128;  // of a split
inline constexpr int64_t kTokenGranule = 64;
inline constexpr int64_t kPartTokens = 256;
constexpr int64_t add_launch_tokens(int entries) { return 300 * (128 * 128 / entries); }

// Blocks from which on a multiprocessor's tensor cores are busy, in quarters: fewer leave it
// waiting for panels and barriers. A block of tile 32 is one warp, those of the others are four or,
// of 256 x 64, eight.
constexpr int64_t busy_quarters(int entries) {
  return entries >= 128 * 128 ? 5 : entries >= 64 * 64 ? 6 : 24;
}

inline Split split_evenly(int64_t tiles, int64_t splits, int64_t tokens) {
  if (splits == 1) return {tiles, 1, tokens};
  const int64_t each =
      ((tokens + splits - 1) / splits + kTokenGranule - 1) / kTokenGranule * kTokenGranule;
  return {tiles, (tokens + each - 1) / each, each};
}

// Four times the tokens that the busiest multiprocessor works off. `resident`: blocks that one
// holds.
inline int64_t cost_of(const Schedule& s, int entries, int64_t multiprocessors, int64_t resident) {
  const auto share = [&](int64_t blocks) {
    return (blocks + multiprocessors - 1) / multiprocessors;
  };
  // Rounds of the first level fill the multiprocessor; what is left of it runs beside the rest.
  const int64_t busy = busy_quarters(entries), first = share(s.levels[0].blocks());
  const int64_t left = first % resident;
  int64_t work = left * s.levels[0].tokens, longest = left > 0 ? s.levels[0].tokens : 0;
  for (int level = 1; level < Schedule::kLevels; ++level) {
    const Split& split = s.levels[level];
    work += share(split.blocks()) * split.tokens;
    if (longest == 0 && split.tiles > 0) longest = split.tokens;
  }
  int64_t cost = first / resident * std::max(4 * resident, busy) * s.levels[0].tokens;
  cost += std::max(4 * work, busy * longest);
  if (s.parts() > 0) cost += 4 * (share(s.parts()) * kPartTokens + add_launch_tokens(entries));
  return cost;
}

inline Schedule schedule_of(int64_t tiles, int64_t tokens, int entries, int64_t multiprocessors,
                            int64_t resident) {
  const int64_t most = std::max<int64_t>(1, tokens / kLeastTokens);
  Schedule best{{{tiles, 1, tokens}, {}, {}}};
  if (tiles == 0) return best;
  // Parts shall save an eighth, or half of a tile's tokens: what they move through L2 beside
  // the panels is not in the cost. That is bounded, so that of many tiles less will do.
  int64_t least = cost_of(best, entries, multiprocessors, resident);
  least -= std::min(least / 8, 2 * tokens);
  const auto consider = [&](const Split& a, const Split& b = {}, const Split& c = {}) {
    const Schedule s{{a, b, c}};
    // No more parts than blocks that are at work at once: they stay in the L2 cache.
    if (s.parts() > multiprocessors * resident) return;
    const int64_t cost = cost_of(s, entries, multiprocessors, resident);
    if (cost < least) least = cost, best = s;  // of equals the first: fewer parts
  };
  // Of n tiles in so many splits, those that fill whole rounds of the multiprocessors.
  const auto even = [&](int64_t n, int64_t splits) {
    return n * splits / multiprocessors * multiprocessors / splits;
  };
  const auto with_first = [&](int64_t splits) {
    if (splits < 1 || splits > most) return;
    consider(split_evenly(tiles, splits, tokens));
    const int64_t whole = even(tiles, splits), rest = tiles - whole;
    if (whole == 0 || rest == 0) return;
    const Split first = split_evenly(whole, splits, tokens);
    for (int64_t round = 1; round <= 2; ++round) {
      for (const int64_t more : {0, 1}) {
        const int64_t second = std::min(most, round * multiprocessors / rest + more);
        if (second <= splits) continue;
        consider(first, split_evenly(rest, second, tokens));
        const int64_t middle = even(rest, second), last = rest - middle;
        if (middle == 0 || last == 0) continue;
        const int64_t third = std::min(most, multiprocessors / last);
        if (third <= second) continue;
        consider(first, split_evenly(middle, second, tokens), split_evenly(last, third, tokens));
      }
    }
  };
  for (int64_t splits = 1; splits <= 8; ++splits) with_first(splits);
  for (int64_t round = 1; round <= resident; ++round) {
    with_first(std::min(most, round * multiprocessors / tiles));
  }
  return best;
}

}  // namespace smt_ext::cuda
