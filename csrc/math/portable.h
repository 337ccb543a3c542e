// What lets one header be compiled by the host compiler and by nvcc alike.
#pragma once

#if defined(__CUDACC__)
#define GALORE_RRF_HD __host__ __device__ __forceinline__
#else
#define GALORE_RRF_HD inline __attribute__((always_inline))
#endif

// Before a loop over an array that is to be in registers.
#if defined(__CUDACC__)
#define GALORE_RRF_UNROLL _Pragma("unroll")
#else
#define GALORE_RRF_UNROLL
#endif
