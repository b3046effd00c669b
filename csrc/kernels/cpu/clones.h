// Plain loops compiled for several instruction sets; the loader picks the best one for the CPU.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// noinline: an inlined copy would be built for the caller's instruction set. Sanitizers are not set
// up yet when the loader asks which copy to take.
#define SMT_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define SMT_CLONES
#endif
