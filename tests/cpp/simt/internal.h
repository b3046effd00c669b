// Shared by the checker's own source files; not for tests or kernels.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt::detail {

// ---- memory.cpp ---------------------------------------------------------------------------------

// in_flight: the target of a cp.async
enum class ByteState : std::uint8_t { never_written, written, in_flight };

// One access, packed: number of the block run (32 bits), atomic (1), thread (10), time in the block
// (21). 0: none.
using Record = std::uint64_t;

struct Element {  // the last write, and two reads since that the last write does not follow
  Record write, reads[2];
};

struct FreeDeleter {
  void operator()(void* p) const { free(p); }
};

struct Allocation {
  char* begin = nullptr;
  std::size_t bytes = 0;
  bool shared = false;
  unsigned element_shift = 0;  // log2 of the bytes that share one Element
  std::string name;
  std::unique_ptr<ByteState[], FreeDeleter> states;
  std::unique_ptr<Element[], FreeDeleter> elements;
};

enum class Access { read, write, atomic };

void* allocate_arena(std::size_t bytes, std::size_t element_bytes, const std::string& name,
                     bool shared);
void release_arena(void* p) noexcept;
bool in_arena(const void* p);
Allocation* find(const void* p);  // nullptr outside of every allocation
// Fails out of bounds.
Allocation& require(const void* p, std::size_t bytes, const char* doing, Site site);
void poison(Allocation& allocation);
// Bounds, state, races; marks what is written.
void check_access(const void* p, std::size_t bytes, Access access, Site site);

// ---- schedule.cpp -------------------------------------------------------------------------------

struct Copy {  // one cp.async that has not landed
  char* smem;
  int bytes;
  std::array<unsigned char, 16> data;
};

struct Thread {
  enum class State { ready, at_barrier, at_warp, exited };
  State state = State::ready;
  uint3 index{};
  unsigned number = 0, warp = 0, lane = 0;
  void* stack_pointer = nullptr;
  Site wait_site{nullptr, 0};
  const char* wait_what = nullptr;
  unsigned wait_mask = 0;
  int vote = 0;                    // of __syncthreads_count
  std::uint32_t barrier_time = 0;  // accesses of this block before it happened before now
  std::array<std::uint32_t, 32> warp_time{};             // the same, for each lane of the warp
  std::uint32_t fence_time = 0, fence_barrier_time = 0;  // of the last __threadfence
  std::vector<Copy> copies;                              // oldest first
  std::vector<std::size_t> group_sizes;                  // committed cp.async groups, oldest first
  std::size_t committed = 0;                             // copies in them
  std::vector<std::uint32_t> occurrences;                // requests so far, by site
};

// The checker at work. Its own accesses must not be checked, and some are seen: of a template of
// the standard library that both it and an instrumented source instantiate, the linker keeps
// either.
extern bool at_work;
struct AtWork {
  bool before = at_work;
  AtWork() { at_work = true; }
  ~AtWork() { at_work = before; }
};

Thread* current();                // nullptr on the host
std::uint32_t block_run();        // number of the running block; never used twice
std::uint32_t first_block_run();  // of this launch
std::uint32_t block_time();
// Ordered before the current thread by fences and atomics of another block?
bool acquired(Record record);
// An atomic releases what a fence came before, and acquires what others released there.
void sync_atomic(const void* p);
bool on_fiber_stack(const void* p);
bool is_parameter(const void* p, std::size_t bytes);
std::string where();  // "kernel k, block (0,0,0), thread (0,0,0)" or "host"
void check_ldmatrix_row(const void* row, Site site);
void set_failure_pc(const void* pc);  // names the source line of a failure that has no Site

// ---- stats.cpp ----------------------------------------------------------------------------------

enum class Request {
  global_load,
  global_store,
  async_load,
  shared_load,
  shared_store,
  async_store,
  ldmatrix
};
constexpr int kRequestKinds = 7;

void stats_begin_launch(const Launch& launch);
void stats_end_block();
void stats_end_launch();
void record(Request kind, const void* p, int bytes, Site site);  // one lane's part of a request
void count_ldmatrix(const void* const* rows, int matrices, Site site);
Stats& current_stats();

}  // namespace simt::detail
