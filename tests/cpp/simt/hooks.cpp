// Answers -fsanitize=thread's calls, one at every load and store of the instrumented sources;
// libtsan is not linked.
#include <link.h>

#include <algorithm>
#include <cstring>

#include "internal.h"

namespace simt::detail {
namespace {

// Constants of the program and of its libraries may be read by kernels, as nvcc would have put them
// into the kernel.
bool in_program_image(const void* p) {
  static const std::vector<std::pair<std::uintptr_t, std::uintptr_t>> images = [] {
    std::vector<std::pair<std::uintptr_t, std::uintptr_t>> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* out) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            const std::uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            static_cast<decltype(found)*>(out)->emplace_back(begin,
                                                             begin + info->dlpi_phdr[i].p_memsz);
          }
          return 0;
        },
        &found);
    return found;
  }();
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  return std::any_of(images.begin(), images.end(),
                     [&](const auto& i) { return address >= i.first && address < i.second; });
}

bool is_builtin(const void* p) {  // threadIdx and the like, by far the most frequent
  return static_cast<const char*>(p) - reinterpret_cast<const char*>(&builtins) <
             static_cast<std::ptrdiff_t>(sizeof builtins) &&
         p >= &builtins;
}

void plain_access(const void* p, std::size_t bytes, bool write, const void* pc) {
  if (current() == nullptr || at_work || on_fiber_stack(p) || is_builtin(p)) return;
  const AtWork guard;
  set_failure_pc(pc);
  if (const Allocation* a = find(p)) {
    ++(a->shared ? current_stats().plain_shared : current_stats().plain_global);
  } else if (!in_arena(p)) {
    if (!write && (is_parameter(p, bytes) || in_program_image(p))) return;
    fail(std::string(write ? "writes" : "reads") + " memory of the host", {nullptr, 0});
  }
  check_access(p, bytes, write ? Access::write : Access::read, {nullptr, 0});
  set_failure_pc(nullptr);
}

}  // namespace
}  // namespace simt::detail

#define ACCESS(bytes, write) \
  simt::detail::plain_access(p, bytes, write, __builtin_return_address(0))

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, std::size_t n) { ACCESS(n, false); }
void __tsan_write_range(void* p, std::size_t n) { ACCESS(n, true); }

#define READ_AND_WRITE(bytes)                                          \
  void __tsan_read##bytes(void* p) { ACCESS(bytes, false); }           \
  void __tsan_write##bytes(void* p) { ACCESS(bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { ACCESS(bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { ACCESS(bytes, true); } \
  void __tsan_volatile_read##bytes(void* p) { ACCESS(bytes, false); }  \
  void __tsan_volatile_write##bytes(void* p) { ACCESS(bytes, true); }
READ_AND_WRITE(1)
READ_AND_WRITE(2)
READ_AND_WRITE(4)
READ_AND_WRITE(8)
READ_AND_WRITE(16)

// std::atomic and the like, which only host code uses.
#define ATOMICS(bits, T)                                                                    \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {                                  \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                            \
  }                                                                                         \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                               \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                               \
  }                                                                                         \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                               \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                     \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                              \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                              \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) {                               \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                       \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) {                              \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) {   \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) {     \
    return __atomic_compare_exchange_n(p, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }
ATOMICS(8, unsigned char)
ATOMICS(16, unsigned short)
ATOMICS(32, unsigned int)
ATOMICS(64, unsigned long)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
}
