// Threads as fibers: blocks, barriers, warp-wide instructions, cp.async.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>

#include "internal.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

Config& config() {
  static Config the_config;
  return the_config;
}

namespace detail {

Builtins builtins;
bool at_work = false;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kStack = 256 << 10;  // reserved; only touched pages cost memory
constexpr std::size_t kGuard = 4096;
constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9;  // cudaError_t

// ---- context switch -----------------------------------------------------------------------------

#ifdef __x86_64__
// Saves the registers that a call preserves and the stack pointer of this context, resumes the
// other.
extern "C" void simt_switch_context(void** save, void* resume);
asm(R"(
.text
.globl simt_switch_context
.type simt_switch_context, @function
simt_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_context, . - simt_switch_context
)");

void* prepare_stack(char* low, std::size_t bytes, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(low + bytes);
  *--top = nullptr;  // entry's return address (it never returns): aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::fill_n(top, 6, nullptr);
  return top;
}
#else
ucontext_t contexts[kMaxThreads + 1];
std::size_t contexts_used = 0;

void simt_switch_context(void** save, void* resume) {
  auto* from = static_cast<ucontext_t*>(*save);
  if (from == nullptr) *save = from = &contexts[kMaxThreads];
  swapcontext(from, static_cast<ucontext_t*>(resume));
}

void* prepare_stack(char* low, std::size_t bytes, void (*entry)()) {
  ucontext_t& context = contexts[contexts_used++ % kMaxThreads];
  getcontext(&context);
  context.uc_stack.ss_sp = low;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  return &context;
}
#endif

// ---- state of the launch ------------------------------------------------------------------------

struct Meeting {  // lanes of a warp on their way into one warp-wide instruction
  const char* what;
  Site site;
  unsigned mask, arrived = 0;
  std::array<const void*, 32> in{};
  std::array<void*, 32> out{};
};

struct Release {  // what an atomic published: accesses of a block run that a fence came before
  std::uint32_t run, thread, time, barrier_time;
};

struct Acquire {
  Release release;
  std::uint32_t thread, time;  // who of this block acquired it, and when
};

struct Running {
  const Launch* launch = nullptr;
  std::mt19937_64 random;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  std::vector<std::vector<Meeting>> meetings;  // by warp
  Thread* thread = nullptr;
  void* scheduler_stack_pointer = nullptr;
  enum class Order { newest_first, oldest_first, any } order = Order::any;
  std::uint32_t run = 0, first_run = 1, time = 1;
  std::size_t barrier_count = 0;
  int votes = 0;
  char* stacks = nullptr;
  void* dynamic = nullptr;
  std::map<const void*, void*> statics;
  // Of this launch, by the atomic's address; of this block, by block run.
  std::unordered_map<const void*, std::vector<Release>> releases;
  std::unordered_map<std::uint32_t, std::vector<Acquire>> acquires;
  bool failed = false;
  std::string failure;
  const void* failure_pc = nullptr;
};
Running running;

std::unordered_map<const void*, int> max_dynamic_shared;

char* stack_low(unsigned number) { return running.stacks + number * (kStack + kGuard) + kGuard; }

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string index(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string at(Site site) {
  return site.file == nullptr ? "" : std::string(site.file) + ":" + std::to_string(site.line);
}

// file:line of an instruction, or its address when addr2line does not know.
std::string symbolize(const void* pc) {
  Dl_info info;
  link_map* module = nullptr;
  if (dladdr1(pc, &info, reinterpret_cast<void**>(&module), RTLD_DL_LINKMAP) == 0 ||
      module == nullptr)
    return "unknown code";
  const std::string file =
      module->l_name[0] == 0 ? "/proc/" + std::to_string(getpid()) + "/exe" : module->l_name;
  char command[4400];
  // The instruction before the return address.
  const std::uintptr_t offset = reinterpret_cast<std::uintptr_t>(pc) - module->l_addr - 1;
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", file.c_str(),
                offset);
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char line[1024];
    if (std::fgets(line, sizeof line, pipe) != nullptr) text = line;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.empty() || text[0] == '?' ? file + " offset " + std::to_string(offset) : text;
}

// ---- fibers -------------------------------------------------------------------------------------

void to_scheduler() {
  Thread* me = running.thread;
  simt_switch_context(&me->stack_pointer, running.scheduler_stack_pointer);
}

void to_thread(Thread& thread) {
  running.thread = &thread;
  builtins.thread = thread.index;
  at_work = false;
  simt_switch_context(&running.scheduler_stack_pointer, thread.stack_pointer);
  running.thread = nullptr;
}

void thread_main() {
  running.launch->body(running.launch->context);
  at_work = true;
  Thread& me = *running.thread;
  if (!me.copies.empty()) {
    fail("ends with " + std::to_string(me.copies.size()) +
             " cp.async copies that no cp_async_wait has covered",
         {nullptr, 0});
  }
  me.state = Thread::State::exited;
  to_scheduler();
}

void wait(Thread::State state, const char* what, unsigned mask, Site site) {
  Thread& me = *running.thread;
  me.state = state;
  me.wait_what = what;
  me.wait_mask = mask;
  me.wait_site = site;
  to_scheduler();
  at_work = true;  // as it was before
}

void wake(Thread& thread) {
  thread.state = Thread::State::ready;
  running.ready.push_back(&thread);
}

Thread& next_ready() {
  auto& ready = running.ready;
  if (running.order != Running::Order::newest_first) {
    // Oldest first is approximate: swapping instead of shifting keeps it O(1) and shuffles a little
    // more.
    const std::size_t i =
        running.order == Running::Order::any ? running.random() % ready.size() : 0;
    std::swap(ready[i], ready.back());
  }
  Thread& thread = *ready.back();
  ready.pop_back();
  return thread;
}

// ---- barriers -----------------------------------------------------------------------------------

// Who waits where, for the error: "12 threads (first: (3, 0, 0)) at __syncthreads a.cu:7; ..."
std::string waiting() {
  std::map<std::string, std::vector<const Thread*>> groups;
  for (const Thread& t : running.threads) {
    std::string key = t.state == Thread::State::exited
                          ? "have exited"
                          : std::string("wait at ") + t.wait_what + " " + at(t.wait_site);
    if (t.state == Thread::State::at_warp) key += " with mask " + hex(t.wait_mask);
    groups[key].push_back(&t);
  }
  std::string text;
  for (const auto& [key, threads] : groups) {
    text += (text.empty() ? "" : "; ") + std::to_string(threads.size()) +
            " threads (first: " + index(threads[0]->index) + ") " + key;
  }
  return text;
}

[[noreturn]] void fail_block(const std::string& what) {
  const Launch& l = *running.launch;
  throw Error(std::string("kernel ") + l.name + ", block " + index(builtins.block) + ": " + what);
}

void release_barrier() {
  const Thread& first = running.threads[0];
  const bool together =
      std::all_of(running.threads.begin(), running.threads.end(), [&](const Thread& t) {
        return t.state == Thread::State::at_barrier && t.wait_site == first.wait_site &&
               t.wait_what == first.wait_what;
      });
  if (!together) fail_block("divergent barrier or deadlock: " + waiting());
  ++running.time;
  ++current_stats().barriers;
  running.votes = std::accumulate(running.threads.begin(), running.threads.end(), 0,
                                  [](int n, const Thread& t) { return n + t.vote; });
  std::vector<Thread*> all;
  for (Thread& t : running.threads) {
    t.barrier_time = running.time;
    all.push_back(&t);
  }
  std::shuffle(all.begin(), all.end(), running.random);
  for (Thread* t : all) wake(*t);
}

void run_block(const uint3& block) {
  const Launch& launch = *running.launch;
  ++running.run;
  running.time = 1;
  running.acquires.clear();
  builtins.block = block;
  if (running.dynamic != nullptr) poison(*find(running.dynamic));
  for (const auto& [key, p] : running.statics) poison(*find(p));
  for (auto& open : running.meetings) open.clear();

  // Whole warps in random order and lanes in random order within each, or all threads mixed.
  std::vector<Thread*> all;
  for (Thread& t : running.threads) {
    const std::size_t keep = t.occurrences.size();
    const unsigned number = static_cast<unsigned>(&t - running.threads.data());
    std::vector<std::uint32_t> occurrences = std::move(t.occurrences);
    t = Thread{};
    occurrences.assign(keep, 0);
    t.occurrences = std::move(occurrences);
    t.number = number;
    t.warp = number / 32;
    t.lane = number % 32;
    t.index = {number % launch.block.x, number / launch.block.x % launch.block.y,
               number / (launch.block.x * launch.block.y)};
    t.stack_pointer = prepare_stack(stack_low(number), kStack, thread_main);
    all.push_back(&t);
  }
  std::shuffle(all.begin(), all.end(), running.random);
  running.order = static_cast<Running::Order>(running.random() % 3);
  if (running.order != Running::Order::any) {
    std::vector<unsigned> rank(running.meetings.size());
    std::iota(rank.begin(), rank.end(), 0u);
    std::shuffle(rank.begin(), rank.end(), running.random);
    std::stable_sort(all.begin(), all.end(), [&](const Thread* a, const Thread* b) {
      return rank[a->warp] < rank[b->warp];
    });
  }
  running.ready = std::move(all);

  for (;;) {
    while (!running.ready.empty()) {
      to_thread(next_ready());
      if (running.failed) {
        throw Error(running.failure);
      }
    }
    if (std::all_of(running.threads.begin(), running.threads.end(),
                    [](const Thread& t) { return t.state == Thread::State::exited; }))
      break;
    release_barrier();
  }
  stats_end_block();
}

// ---- cp.async -----------------------------------------------------------------------------------

void set_states(const void* p, std::size_t bytes, ByteState state) {
  Allocation& a = *find(p);
  std::memset(&a.states[static_cast<std::size_t>(static_cast<const char*>(p) - a.begin)],
              static_cast<int>(state), bytes);
}

void land(Thread& me, std::size_t count, Site site) {
  for (std::size_t i = 0; i < count; ++i) {
    const Copy& copy = me.copies[i];
    const auto bytes = static_cast<std::size_t>(copy.bytes);
    set_states(copy.smem, bytes, ByteState::written);
    check_access(copy.smem, bytes, Access::write, site);  // written by this thread, now
    std::memcpy(copy.smem, copy.data.data(), bytes);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

void check_aligned(const void* p, std::size_t bytes, const char* doing, Site site) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
    fail(std::string("misaligned: ") + doing + " of " + std::to_string(bytes) +
             " bytes at an address that is " +
             std::to_string(reinterpret_cast<std::uintptr_t>(p) % bytes) + " past a multiple of it",
         site);
  }
}

Allocation& require_space(const void* p, std::size_t bytes, Space space, const char* doing,
                          Site site) {
  Allocation& a = require(p, bytes, doing, site);
  if (a.shared != (space == Space::shared)) {
    fail(std::string(doing) + " expects " + (space == Space::shared ? "shared" : "global") +
             " memory, got " + a.name,
         site);
  }
  return a;
}

}  // namespace

Thread* current() { return running.thread; }
std::uint32_t block_run() { return running.run; }
std::uint32_t first_block_run() { return running.first_run; }
std::uint32_t block_time() { return running.time; }
unsigned lane() { return running.thread->lane; }

bool on_fiber_stack(const void* p) {
  return static_cast<std::size_t>(static_cast<const char*>(p) - running.stacks) <
         kMaxThreads * (kStack + kGuard);
}

bool is_parameter(const void* p, std::size_t bytes) {
  const auto inside = [&](const void* begin, std::size_t size) {
    const auto offset =
        static_cast<std::size_t>(static_cast<const char*>(p) - static_cast<const char*>(begin));
    return offset < size && size - offset >= bytes;
  };
  return inside(running.launch->params, running.launch->params_bytes) ||
         inside(running.launch->context, 2 * sizeof(void*));
}

std::string where() {
  if (running.thread == nullptr) return "host";
  return std::string("kernel ") + running.launch->name + ", block " + index(builtins.block) +
         ", thread " + index(running.thread->index);
}

void fail(const std::string& what, Site site) {
  std::string text = where() + ": " + what;
  if (site.file != nullptr) {
    text += " at " + at(site);
  } else if (running.failure_pc != nullptr) {
    text += " at " + symbolize(running.failure_pc);
  }
  if (running.thread == nullptr) throw Error(text);
  // Leave the fiber for good. (Throwing would have to unwind through code that the instrumentation
  // believes not to throw.)
  running.failed = true;
  running.failure = text;
  to_scheduler();
  __builtin_unreachable();
}

void set_failure_pc(const void* pc) { running.failure_pc = pc; }

void fail_trap(Site site) {
  const AtWork guard;
  fail("__trap", site);
}

void fail_shuffle(unsigned lane, int source, Site site) {
  const AtWork guard;
  fail("shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
           ", which is not in the mask",
       site);
}

// ---- ordering between blocks --------------------------------------------------------------------

void fence() {
  const AtWork guard;
  running.thread->fence_time = running.time + 1;
  running.thread->fence_barrier_time = running.thread->barrier_time;
}

void sync_atomic(const void* p) {
  const Thread& me = *running.thread;
  auto& released = running.releases[p];
  for (const Release& r : released) {
    if (r.run != running.run) running.acquires[r.run].push_back({r, me.number, running.time});
  }
  if (me.fence_time != 0)
    released.push_back({running.run, me.number, me.fence_time, me.fence_barrier_time});
}

bool acquired(Record record) {
  const auto found = running.acquires.find(static_cast<std::uint32_t>(record >> 32));
  if (found == running.acquires.end()) return false;
  const auto thread = static_cast<unsigned>(record >> 21) & 1023u;
  const auto time = static_cast<std::uint32_t>(record) & ((1u << 21) - 1);
  const Thread& me = *running.thread;
  return std::any_of(found->second.begin(), found->second.end(), [&](const Acquire& a) {
    const bool before_release =
        time < a.release.barrier_time || (thread == a.release.thread && time < a.release.time);
    return before_release && (a.thread == me.number || a.time < me.barrier_time);
  });
}

// ---- memory instructions ------------------------------------------------------------------------

void load(void* value, const void* p, std::size_t bytes, Space space, Cache cache, Site site) {
  const AtWork guard;
  check_aligned(p, bytes, "load", site);
  Allocation& a = require_space(p, bytes, space, "load", site);
  check_access(p, bytes, Access::read, site);
  if (cache == Cache::read_only) {
    const auto offset = static_cast<std::size_t>(static_cast<const char*>(p) - a.begin);
    for (std::size_t i = offset >> a.element_shift; i <= (offset + bytes - 1) >> a.element_shift;
         ++i) {
      if (a.elements[i].write >> 32 >= running.first_run)
        fail("read-only load of " + a.name + ", which this kernel writes", site);
    }
  }
  record(space == Space::global ? Request::global_load : Request::shared_load, p,
         static_cast<int>(bytes), site);
  std::memcpy(value, p, bytes);
}

void store(void* p, const void* value, std::size_t bytes, Space space, Site site) {
  const AtWork guard;
  check_aligned(p, bytes, "store", site);
  require_space(p, bytes, space, "store", site);
  check_access(p, bytes, Access::write, site);
  record(space == Space::global ? Request::global_store : Request::shared_store, p,
         static_cast<int>(bytes), site);
  std::memcpy(p, value, bytes);
}

void prefetch(const void* p, Site site) {
  const AtWork guard;
  require_space(p, 1, Space::global, "prefetch", site);
}

void atomic_load(void* value, const void* p, std::size_t bytes, Site site) {
  const AtWork guard;
  check_aligned(p, bytes, "atomic", site);
  check_access(p, bytes, Access::atomic, site);
  sync_atomic(p);
  ++current_stats().atomics;
  std::memcpy(value, p, bytes);
}

void atomic_store(void* p, const void* value, std::size_t bytes, Site) {
  std::memcpy(p, value, bytes);
}

void cp_async(void* smem, const void* gmem, int bytes, int src_bytes, Site site) {
  const AtWork guard;
  const auto size = static_cast<std::size_t>(bytes);
  if (src_bytes < 0 || src_bytes > bytes)
    fail("cp.async of " + std::to_string(src_bytes) + " out of " + std::to_string(bytes) + " bytes",
         site);
  check_aligned(smem, size, "cp.async to shared memory", site);
  check_aligned(gmem, size, "cp.async from global memory", site);
  require_space(smem, size, Space::shared, "cp.async", site);
  Copy copy{static_cast<char*>(smem), bytes, {}};
  if (src_bytes > 0) {
    require_space(gmem, static_cast<std::size_t>(src_bytes), Space::global, "cp.async", site);
    check_access(gmem, static_cast<std::size_t>(src_bytes), Access::read, site);
    record(Request::async_load, gmem, src_bytes, site);
    std::memcpy(copy.data.data(), gmem, static_cast<std::size_t>(src_bytes));
  }
  record(Request::async_store, smem, bytes, site);
  check_access(smem, size, Access::write, site);  // may land from now on
  std::memset(smem, 0xFF, size);
  set_states(smem, size, ByteState::in_flight);
  running.thread->copies.push_back(copy);
}

void cp_async_commit() {
  const AtWork guard;
  Thread& me = *running.thread;
  me.group_sizes.push_back(me.copies.size() - me.committed);
  me.committed = me.copies.size();
}

void cp_async_wait(int pending, Site site) {
  const AtWork guard;
  Thread& me = *running.thread;
  std::size_t count = 0;
  const std::size_t groups = me.group_sizes.size() > static_cast<std::size_t>(pending)
                                 ? me.group_sizes.size() - static_cast<std::size_t>(pending)
                                 : 0;
  for (std::size_t i = 0; i < groups; ++i) count += me.group_sizes[i];
  me.group_sizes.erase(me.group_sizes.begin(),
                       me.group_sizes.begin() + static_cast<std::ptrdiff_t>(groups));
  me.committed -= count;
  land(me, count, site);
}

void check_ldmatrix_row(const void* row, Site site) {
  check_aligned(row, 16, "ldmatrix row", site);
  require_space(row, 16, Space::shared, "ldmatrix", site);
  check_access(row, 16, Access::read, site);
}

void count_shuffle() { ++current_stats().warp_shuffles; }

// ---- shared memory ------------------------------------------------------------------------------

void* dynamic_shared() {
  // Without any, a valid start of nothing, as on the GPU.
  return running.dynamic;
}

void* static_shared(const void* key, std::size_t bytes, std::size_t element_bytes,
                    const char* name) {
  const AtWork guard;
  void*& p = running.statics[key];
  if (p == nullptr)
    p = allocate_arena(bytes, element_bytes, std::string("shared array ") + name, true);
  return p;
}

std::uint32_t shared_address(const void* p, Site site) {
  const AtWork guard;
  const Allocation& a = require_space(p, 0, Space::shared, "shared address", site);
  return static_cast<std::uint32_t>(static_cast<const char*>(p) - a.begin);
}

// ---- barriers and warps -------------------------------------------------------------------------

void syncthreads(Site site) {
  const AtWork guard;
  wait(Thread::State::at_barrier, "__syncthreads", 0, site);
}

int syncthreads_count(int predicate, Site site) {
  const AtWork guard;
  running.thread->vote = predicate != 0;
  wait(Thread::State::at_barrier, "__syncthreads_count", 0, site);
  running.thread->vote = 0;
  return running.votes;
}

void meet(const char* what, unsigned mask, const void* in, void* out, Finish finish,
          const void* context, bool orders_memory, Site site) {
  const AtWork guard;
  Thread& me = *running.thread;
  const unsigned bit = 1u << me.lane;
  if ((mask & bit) == 0)
    fail(std::string(what) + ": lane " + std::to_string(me.lane) + " is not in its own mask " +
             hex(mask),
         site);
  Thread* const lanes = &running.threads[me.warp * 32];
  const std::size_t lane_count = std::min<std::size_t>(32, running.threads.size() - me.warp * 32);
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) == 0) continue;
    if (l >= lane_count)
      fail(std::string(what) + ": mask " + hex(mask) + " names lane " + std::to_string(l) +
               ", which the block does not have",
           site);
    if (lanes[l].state == Thread::State::exited)
      fail(std::string(what) + ": mask " + hex(mask) + " names lane " + std::to_string(l) +
               ", which has exited",
           site);
  }
  auto& open = running.meetings[me.warp];
  auto found = std::find_if(open.begin(), open.end(), [&](const Meeting& m) {
    return m.what == what && m.site == site && m.mask == mask && (m.arrived & bit) == 0;
  });
  if (found == open.end()) found = open.insert(open.end(), Meeting{what, site, mask});
  found->arrived |= bit;
  found->in[me.lane] = in;
  found->out[me.lane] = out;
  if (found->arrived != mask) {
    wait(Thread::State::at_warp, what, mask, site);
    return;
  }
  const Meeting meeting = *found;
  open.erase(found);
  if (finish != nullptr) finish(context, meeting.in.data(), meeting.out.data(), mask);
  if (orders_memory) {
    ++current_stats().warp_barriers;
    const std::uint32_t now = ++running.time;
    std::array<std::uint32_t, 32> joined{};
    for (unsigned l = 0; l < lane_count; ++l) {
      if ((mask >> l & 1) == 0) continue;
      for (unsigned k = 0; k < 32; ++k) joined[k] = std::max(joined[k], lanes[l].warp_time[k]);
    }
    for (unsigned l = 0; l < lane_count; ++l) {
      if (mask >> l & 1) joined[l] = now;
    }
    for (unsigned l = 0; l < lane_count; ++l) {
      if (mask >> l & 1) lanes[l].warp_time = joined;
    }
  }
  for (unsigned l = 0; l < lane_count; ++l) {
    if (l != me.lane && (mask >> l & 1)) wake(lanes[l]);
  }
}

// ---- launch -------------------------------------------------------------------------------------

void set_max_dynamic_shared(const void* function, int bytes) {
  max_dynamic_shared[function] = bytes;
}

int run(const Launch& launch) {
  if (running.launch != nullptr) throw Error("a kernel launch inside a kernel");
  const dim3 g = launch.grid, b = launch.block;
  const std::uint64_t threads = std::uint64_t{b.x} * b.y * b.z;
  if (threads == 0 || threads > kMaxThreads || b.z > 64) return kInvalidConfiguration;
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
    return kInvalidConfiguration;
  const auto allowed = max_dynamic_shared.find(launch.function);
  const std::size_t limit = std::max<std::size_t>(
      48 << 10,
      allowed == max_dynamic_shared.end() ? 0 : static_cast<std::size_t>(allowed->second));
  if (launch.smem_bytes > limit) return kInvalidValue;

  if (running.stacks == nullptr) {
    void* p = mmap(nullptr, kMaxThreads * (kStack + kGuard), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    running.stacks = static_cast<char*>(p);
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stack_low(i) - kGuard, kGuard, PROT_NONE);
  }
  struct Finally {
    ~Finally() {
      release_arena(running.dynamic);
      running.dynamic = nullptr;
      for (const auto& [key, p] : running.statics) release_arena(p);
      running.statics.clear();
      running.releases.clear();
      running.ready.clear();
      running.launch = nullptr;
      running.thread = nullptr;
      running.failed = false;
      at_work = false;
      running.failure_pc = nullptr;
    }
  } finally;
  running.launch = &launch;
  running.first_run = running.run + 1;
  running.random.seed(config().seed);
  running.threads.assign(threads, Thread{});
  running.meetings.assign((threads + 31) / 32, {});
  running.dynamic = allocate_arena(launch.smem_bytes, 2, "dynamic shared memory", true);
  builtins.block_dim = b;
  builtins.grid_dim = g;
  stats_begin_launch(launch);

  std::vector<std::uint64_t> order(std::uint64_t{g.x} * g.y * g.z);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  std::shuffle(order.begin(), order.end(), running.random);
  for (const std::uint64_t i : order) {
    run_block({static_cast<unsigned>(i % g.x), static_cast<unsigned>(i / g.x % g.y),
               static_cast<unsigned>(i / g.x / g.y)});
  }
  stats_end_launch();
  return kSuccess;
}

}  // namespace detail
}  // namespace simt
