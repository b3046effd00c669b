// The arena that kernels may touch, the state of its bytes and the order of the accesses to its
// elements.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "internal.h"

namespace simt::detail {
namespace {

// Every allocation starts a page of its own, and at least kGap bytes of its last page stay unused:
// an address near an allocation but outside of it never belongs to another. Pages are handed out
// round robin, so that a freed one rests long.
constexpr std::size_t kPage = 64 << 10;
constexpr std::size_t kGap = 4096;
constexpr std::size_t kArena = std::size_t{64} << 30;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type

struct Arena {
  char* base = nullptr;
  std::size_t pages = 0, next = 1;
  std::vector<std::uint32_t> page_owner;  // index into allocations + 1
  std::vector<std::unique_ptr<Allocation>> allocations;
  std::vector<std::uint32_t> free_slots;

  Arena() {
    for (std::size_t bytes = kArena; bytes >= (std::size_t{1} << 30) && base == nullptr;
         bytes /= 4) {
      void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) continue;
      // The kernel aligns to 4 KB; align to pages of ours.
      const std::size_t skip = (kPage - reinterpret_cast<std::uintptr_t>(p) % kPage) % kPage;
      base = static_cast<char*>(p) + skip;
      pages = (bytes - skip) / kPage;
    }
    if (base == nullptr) throw std::bad_alloc();
    page_owner.assign(pages, 0);
  }

  std::size_t take(std::size_t count) {
    for (int pass = 0; pass < 2; ++pass) {
      for (std::size_t run = 0; next < pages; ++next) {
        run = page_owner[next] == 0 ? run + 1 : 0;
        if (run == count) return ++next - count;
      }
      next = 1;
    }
    throw std::bad_alloc();
  }
};

Arena& arena() {
  static Arena the_arena;
  return the_arena;
}

template <typename T>
T* zeroed(std::size_t count) {
  auto* p = static_cast<T*>(std::calloc(std::max<std::size_t>(count, 1), sizeof(T)));
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

std::string span(const Allocation& a, const void* p, std::size_t bytes) {
  const auto offset = static_cast<const char*>(p) - a.begin;
  return "bytes " + std::to_string(offset) + ".." +
         std::to_string(offset + static_cast<std::ptrdiff_t>(bytes) - 1) + " of " + a.name + " (" +
         std::to_string(a.bytes) + " bytes)";
}

// ---- order of accesses --------------------------------------------------------------------------

constexpr unsigned kTimeBits = 21, kThreadBits = 10;
constexpr std::uint32_t kMaxTime = (1u << kTimeBits) - 1;

std::uint32_t run_of(Record r) { return static_cast<std::uint32_t>(r >> 32); }
bool is_atomic(Record r) { return (r >> 31) & 1; }
unsigned thread_of(Record r) {
  return static_cast<unsigned>(r >> kTimeBits) & ((1u << kThreadBits) - 1);
}
std::uint32_t time_of(Record r) { return static_cast<std::uint32_t>(r) & kMaxTime; }

Record record_now(const Thread& me, bool atomic) {
  if (block_time() > kMaxTime)
    fail("more than two million barriers in one block are not supported", {nullptr, 0});
  return static_cast<Record>(block_run()) << 32 | static_cast<Record>(atomic) << 31 |
         static_cast<Record>(me.number) << kTimeBits | block_time();
}

// Does the access happen before whatever the running thread does now?
bool is_ordered(Record r, const Thread& me, bool shared) {
  if (r == 0) return true;
  if (run_of(r) == block_run()) {
    const unsigned thread = thread_of(r);
    return thread == me.number || time_of(r) < me.barrier_time ||
           (thread / 32 == me.warp && time_of(r) < me.warp_time[thread % 32]);
  }
  return shared || run_of(r) < first_block_run() || acquired(r);
}

[[noreturn]] void fail_race(const Allocation& a, const void* p, std::size_t bytes,
                            const char* doing, Record r, const char* earlier, Site site) {
  const std::string who = run_of(r) == block_run()
                              ? "thread " + std::to_string(thread_of(r)) + " of this block"
                              : "thread " + std::to_string(thread_of(r)) + " of another block";
  fail(std::string("race: ") + doing + " " + span(a, p, bytes) + ", which " + who + " " + earlier +
           " with nothing to order the two",
       site);
}

void check_order(Allocation& a, const void* p, std::size_t bytes, Access access, const Thread& me,
                 Site site) {
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(p) - a.begin);
  const bool atomic = access == Access::atomic;
  const Record now = record_now(me, atomic);
  for (std::size_t i = offset >> a.element_shift; i <= (offset + bytes - 1) >> a.element_shift;
       ++i) {
    Element& e = a.elements[i];
    const auto conflicts = [&](Record r) {
      return !is_ordered(r, me, a.shared) && !(atomic && is_atomic(r));
    };
    if (conflicts(e.write)) {
      fail_race(a, p, bytes, access == Access::read ? "reads" : "writes", e.write, "wrote", site);
    }
    if (access == Access::read) {
      // Keep the reads that a later write could race with. Of three unordered ones two suffice,
      // from two warps if possible.
      if (is_ordered(e.reads[0], me, a.shared)) {
        e.reads[0] = now;
      } else if (is_ordered(e.reads[1], me, a.shared) ||
                 thread_of(e.reads[0]) / 32 == thread_of(e.reads[1]) / 32) {
        e.reads[1] = now;
      }
      continue;
    }
    for (Record& r : e.reads) {
      if (!is_ordered(r, me, a.shared)) fail_race(a, p, bytes, "writes", r, "reads", site);
      r = 0;
    }
    e.write = now;
  }
}

}  // namespace

void* allocate_arena(std::size_t bytes, std::size_t element_bytes, const std::string& name,
                     bool shared) {
  Arena& all = arena();
  const std::size_t count = (bytes + kGap + kPage - 1) / kPage;
  const std::size_t first = all.take(count);
  auto a = std::make_unique<Allocation>();
  a->begin = all.base + first * kPage;
  a->bytes = bytes;
  a->shared = shared;
  a->element_shift = element_bytes % 4 == 0 ? 2 : element_bytes % 2 == 0 ? 1 : 0;
  a->name = name;
  a->states.reset(zeroed<ByteState>(bytes));
  a->elements.reset(zeroed<Element>((bytes >> a->element_shift) + 1));
  std::uint32_t slot;
  if (all.free_slots.empty()) {
    slot = static_cast<std::uint32_t>(all.allocations.size());
    all.allocations.emplace_back();
  } else {
    slot = all.free_slots.back();
    all.free_slots.pop_back();
  }
  std::fill_n(all.page_owner.begin() + static_cast<std::ptrdiff_t>(first), count, slot + 1);
  char* begin = a->begin;
  poison(*a);
  all.allocations[slot] = std::move(a);
  return begin;
}

void release_arena(void* p) noexcept {
  if (p == nullptr) return;
  Arena& all = arena();
  const std::size_t first = static_cast<std::size_t>(static_cast<char*>(p) - all.base) / kPage;
  const std::uint32_t slot = all.page_owner[first] - 1;
  const std::size_t count = (all.allocations[slot]->bytes + kGap + kPage - 1) / kPage;
  std::fill_n(all.page_owner.begin() + static_cast<std::ptrdiff_t>(first), count, 0);
  all.allocations[slot].reset();
  all.free_slots.push_back(slot);
  madvise(p, count * kPage, MADV_DONTNEED);
}

bool in_arena(const void* p) {
  const Arena& all = arena();
  return static_cast<std::size_t>(static_cast<const char*>(p) - all.base) < all.pages * kPage;
}

Allocation* find(const void* p) {
  if (!in_arena(p)) return nullptr;
  const Arena& all = arena();
  const std::uint32_t owner =
      all.page_owner[static_cast<std::size_t>(static_cast<const char*>(p) - all.base) / kPage];
  return owner == 0 ? nullptr : all.allocations[owner - 1].get();
}

Allocation& require(const void* p, std::size_t bytes, const char* doing, Site site) {
  Allocation* a = find(p);
  if (a != nullptr) {
    const auto offset = static_cast<std::size_t>(static_cast<const char*>(p) - a->begin);
    if (offset <= a->bytes && a->bytes - offset >= bytes) return *a;
  }
  const std::string what = std::string(doing) + " of " + std::to_string(bytes) + " bytes";
  if (!in_arena(p)) fail(what + " at an address that is not device memory", site);
  if (a == nullptr) a = find(static_cast<const char*>(p) + kGap);  // just below an allocation?
  if (a == nullptr) fail("out of bounds: " + what + " in no buffer (freed, or far outside)", site);
  fail("out of bounds: " + what + " at " + span(*a, p, bytes), site);
}

void poison(Allocation& a) {
  std::memset(a.begin, kPoison, a.bytes);
  std::memset(a.states.get(), static_cast<int>(ByteState::never_written), a.bytes);
}

void check_access(const void* p, std::size_t bytes, Access access, Site site) {
  if (bytes == 0) return;
  Allocation& a = require(p, bytes, access == Access::read ? "read" : "write", site);
  ByteState* states = &a.states[static_cast<std::size_t>(static_cast<const char*>(p) - a.begin)];
  const auto any = [&](ByteState state) {
    return std::find(states, states + bytes, state) != states + bytes;
  };
  if (any(ByteState::in_flight)) {
    fail(std::string(access == Access::read ? "reads " : "writes ") + span(a, p, bytes) +
             " while a cp.async to it is in flight: no cp_async_wait has covered it",
         site);
  }
  if (access != Access::write && config().require_initialized && any(ByteState::never_written)) {
    fail("reads " + span(a, p, bytes) + ", not all of it ever written", site);
  }
  if (const Thread* me = current()) check_order(a, p, bytes, access, *me, site);
  if (access != Access::read) std::memset(states, static_cast<int>(ByteState::written), bytes);
}

void* allocate(std::size_t bytes, std::size_t element_bytes, const std::string& name) {
  return allocate_arena(bytes, element_bytes, name, false);
}

void release(void* p) noexcept { release_arena(p); }

void copy_in(void* device, const void* host, std::size_t bytes) {
  if (bytes == 0) return;
  check_access(device, bytes, Access::write, {nullptr, 0});
  std::memcpy(device, host, bytes);
}

void copy_out(void* host, const void* device, std::size_t bytes) {
  if (bytes == 0) return;
  const Allocation& a = require(device, bytes, "read by the host", {nullptr, 0});
  const ByteState* states = a.states.get();
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(device) - a.begin);
  for (std::size_t i = offset; i < offset + bytes; ++i) {
    if (states[i] != ByteState::written)
      throw Error("unwritten output: byte " + std::to_string(i) + " of " + a.name);
  }
  std::memcpy(host, device, bytes);
}

void copy_raw(void* host, const void* device, std::size_t bytes) {
  if (bytes > 0) std::memcpy(host, device, bytes);
}

bool is_written(const void* device, std::size_t bytes) {
  const Allocation& a = require(device, bytes, "look", {nullptr, 0});
  const ByteState* states =
      &a.states[static_cast<std::size_t>(static_cast<const char*>(device) - a.begin)];
  return std::all_of(states, states + bytes, [](ByteState s) { return s == ByteState::written; });
}

}  // namespace simt::detail
