// Run-time dispatch over instruction sets: one function body, compiled for each of them, chosen by
// the loader for the processor at hand.  Only plain loops that the compiler vectorises are marked.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GALORE_RRF_NO_SIMD_CLONES)
#define GALORE_RRF_SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GALORE_RRF_SIMD_CLONES
#endif
