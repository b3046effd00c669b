// Groups the accesses of lanes into warp requests; counts 32-byte sectors and shared-memory
// wavefronts.
#include <algorithm>
#include <cstdio>

#include "internal.h"

namespace simt {
namespace detail {
namespace {

constexpr const char* kKindNames[kRequestKinds] = {"ld.global", "st.global", "cp.async read",
                                                   "ld.shared", "st.shared", "cp.async write",
                                                   "ldmatrix"};
constexpr std::uintptr_t kSector = 32, kBankWidth = 4, kBanks = 32;

struct WarpRequest {
  Request kind;
  std::uint32_t site;
  unsigned active = 0;
  std::array<std::uintptr_t, 32> address{};
  std::array<std::uint8_t, 32> bytes{};
};

struct Open {
  Stats stats;
  std::map<std::pair<std::pair<const char*, int>, Request>, std::uint32_t> site_numbers;
  std::vector<std::unordered_map<std::uint64_t, WarpRequest>> warps;
  struct {
    const char* file = nullptr;
    int line = 0;
    Request kind{};
    std::uint32_t number = 0;
  } latest;
};
Open open;
std::map<std::string, Stats> by_kernel;
std::string latest_kernel;

std::uint32_t site_number(Request kind, Site site) {
  if (open.latest.file == site.file && open.latest.line == site.line && open.latest.kind == kind)
    return open.latest.number;
  const auto next = static_cast<std::uint32_t>(open.stats.sites.size());
  const auto [it, added] = open.site_numbers.try_emplace({{site.file, site.line}, kind}, next);
  if (added) {
    open.stats.sites.emplace_back();
    open.stats.sites.back().site = site;
    open.stats.sites.back().kind = kKindNames[static_cast<int>(kind)];
  }
  open.latest = {site.file, site.line, kind, it->second};
  return it->second;
}

// Number of distinct values; sorts.
template <typename Values>
std::uint64_t distinct(Values begin, Values end) {
  std::sort(begin, end);
  return static_cast<std::uint64_t>(std::unique(begin, end) - begin);
}

GlobalTraffic global_traffic(const WarpRequest& r) {
  std::array<std::pair<std::uintptr_t, std::uintptr_t>, 32> spans;
  std::array<std::uintptr_t, 64> sectors;
  std::size_t n = 0, s = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if ((r.active >> l & 1) == 0) continue;
    spans[n++] = {r.address[l], r.address[l] + r.bytes[l]};
    for (std::uintptr_t sector = r.address[l] / kSector;
         sector <= (r.address[l] + r.bytes[l] - 1) / kSector; ++sector)
      sectors[s++] = sector;
  }
  std::sort(spans.begin(), spans.begin() + n);
  std::uint64_t bytes = 0;
  std::uintptr_t end = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (spans[i].second > end) bytes += spans[i].second - std::max(end, spans[i].first);
    end = std::max(end, spans[i].second);
  }
  return {1, distinct(sectors.begin(), sectors.begin() + s), (bytes + kSector - 1) / kSector,
          bytes};
}

// Wavefronts of lanes that are served together: the most distinct words that fall into one bank.
std::uint64_t wavefronts(const std::uintptr_t* addresses, const std::uint8_t* bytes,
                         unsigned active, unsigned count) {
  std::array<std::uintptr_t, 64> words;
  std::size_t n = 0;
  for (unsigned l = 0; l < count; ++l) {
    if ((active >> l & 1) == 0) continue;
    for (std::uintptr_t w = addresses[l] / kBankWidth;
         w <= (addresses[l] + bytes[l] - 1) / kBankWidth; ++w)
      words[n++] = w;
  }
  n = distinct(words.begin(), words.begin() + n);
  std::array<unsigned, kBanks> load{};
  for (std::size_t i = 0; i < n; ++i) ++load[words[i] % kBanks];
  return *std::max_element(load.begin(), load.end());
}

SharedTraffic shared_traffic(const WarpRequest& r) {
  const std::uint8_t widest = *std::max_element(r.bytes.begin(), r.bytes.end());
  const unsigned group = widest <= 4 ? 32 : widest == 8 ? 16 : 8;
  SharedTraffic t{1, 0, 0};
  for (unsigned first = 0; first < 32; first += group) {
    const unsigned active = r.active >> first & (group == 32 ? ~0u : (1u << group) - 1);
    if (active == 0) continue;
    t.wavefronts += wavefronts(&r.address[first], &r.bytes[first], active, group);
    t.ideal_wavefronts += 1;
  }
  return t;
}

void add(GlobalTraffic& sum, const GlobalTraffic& t) {
  sum.requests += t.requests;
  sum.sectors += t.sectors;
  sum.ideal_sectors += t.ideal_sectors;
  sum.bytes += t.bytes;
}

void add(SharedTraffic& sum, const SharedTraffic& t) {
  sum.requests += t.requests;
  sum.wavefronts += t.wavefronts;
  sum.ideal_wavefronts += t.ideal_wavefronts;
}

void add(Request kind, std::uint32_t site, const SharedTraffic& t) {
  Stats& s = open.stats;
  add(kind == Request::shared_load    ? s.shared_load
      : kind == Request::shared_store ? s.shared_store
      : kind == Request::async_store  ? s.async_store
                                      : s.ldmatrix,
      t);
  add(s.sites[site].shared, t);
}

void close(const WarpRequest& r) {
  Stats& s = open.stats;
  if (r.kind == Request::global_load || r.kind == Request::global_store ||
      r.kind == Request::async_load) {
    const GlobalTraffic t = global_traffic(r);
    add(r.kind == Request::global_load    ? s.global_load
        : r.kind == Request::global_store ? s.global_store
                                          : s.async_load,
        t);
    add(s.sites[r.site].global, t);
  } else {
    add(r.kind, r.site, shared_traffic(r));
  }
}

std::string line(const char* name, const GlobalTraffic& t) {
  char text[256];
  std::snprintf(text, sizeof text, "  %-15s %10llu requests %12llu sectors (%llu ideal)\n", name,
                static_cast<unsigned long long>(t.requests),
                static_cast<unsigned long long>(t.sectors),
                static_cast<unsigned long long>(t.ideal_sectors));
  return t.requests == 0 ? "" : text;
}

std::string line(const char* name, const SharedTraffic& t) {
  char text[256];
  std::snprintf(text, sizeof text, "  %-15s %10llu requests %12llu wavefronts (%llu ideal)\n", name,
                static_cast<unsigned long long>(t.requests),
                static_cast<unsigned long long>(t.wavefronts),
                static_cast<unsigned long long>(t.ideal_wavefronts));
  return t.requests == 0 ? "" : text;
}

}  // namespace

void stats_begin_launch(const Launch& launch) {
  open = {};
  open.stats.kernel = launch.name;
  open.stats.grid = launch.grid;
  open.stats.block = launch.block;
  open.stats.smem_bytes = launch.smem_bytes;
  open.warps.resize((launch.block.x * launch.block.y * launch.block.z + 31) / 32);
}

void stats_end_block() {
  for (auto& requests : open.warps) {
    for (const auto& [key, request] : requests) close(request);
    requests.clear();
  }
}

void stats_end_launch() {
  latest_kernel = open.stats.kernel;
  by_kernel[latest_kernel] = open.stats;
}

void record(Request kind, const void* p, int bytes, Site site) {
  const std::uint32_t number = site_number(kind, site);
  Thread& me = *current();
  if (me.occurrences.size() <= number) me.occurrences.resize(number + 1);
  const std::uint64_t key = std::uint64_t{number} << 32 | me.occurrences[number]++;
  auto& requests = open.warps[me.warp];
  const auto [it, added] = requests.try_emplace(key);
  WarpRequest& r = it->second;
  if (added) {
    r.kind = kind;
    r.site = number;
  }
  r.active |= 1u << me.lane;
  r.address[me.lane] = reinterpret_cast<std::uintptr_t>(p);
  r.bytes[me.lane] = static_cast<std::uint8_t>(bytes);
  if (r.active == ~0u) {
    close(r);
    requests.erase(it);
  }
}

void count_ldmatrix(const void* const* rows, int matrices, Site site) {
  SharedTraffic t{1, 0, 0};
  for (int m = 0; m < matrices; ++m) {
    std::array<std::uintptr_t, 8> address;
    std::array<std::uint8_t, 8> bytes;
    bytes.fill(16);
    for (int j = 0; j < 8; ++j) address[j] = reinterpret_cast<std::uintptr_t>(rows[8 * m + j]);
    t.wavefronts += wavefronts(address.data(), bytes.data(), 0xFF, 8);
    t.ideal_wavefronts += 1;
  }
  add(Request::ldmatrix, site_number(Request::ldmatrix, site), t);
}

Stats& current_stats() { return open.stats; }

}  // namespace detail

const Stats& last_stats() { return last_stats(detail::latest_kernel); }

const Stats& last_stats(const std::string& kernel) {
  const auto found = detail::by_kernel.find(kernel);
  if (found == detail::by_kernel.end())
    throw Error("no launch of kernel '" + kernel + "' has finished");
  return found->second;
}

std::string Stats::report() const {
  using detail::line;
  std::string text = kernel + ": grid " + std::to_string(grid.x) + "x" + std::to_string(grid.y) +
                     "x" + std::to_string(grid.z) + ", block " +
                     std::to_string(block.x * block.y * block.z) + ", " +
                     std::to_string(smem_bytes) + " bytes of shared memory, " +
                     std::to_string(mma) + " mma, " + std::to_string(barriers) + " barriers\n";
  text += line("ld.global", global_load) + line("st.global", global_store) +
          line("cp.async read", async_load);
  text += line("ld.shared", shared_load) + line("st.shared", shared_store) +
          line("cp.async write", async_store);
  text += line("ldmatrix", ldmatrix);
  if (plain_global + plain_shared > 0) {
    text += "  past the wrappers: " + std::to_string(plain_global) + " global, " +
            std::to_string(plain_shared) + " shared accesses\n";
  }
  for (const SiteStats& s : sites) {
    const std::string name =
        std::string(s.kind) + " " + s.site.file + ":" + std::to_string(s.site.line);
    text += line(name.c_str(), s.global) + line(name.c_str(), s.shared);
  }
  return text;
}

}  // namespace simt
