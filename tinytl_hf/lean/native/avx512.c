/* The kernels with AVX-512. */
#if defined(__x86_64__) || defined(__i386__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#define TINYTL_AVX512
#include "upsampling.h"

const Kernels kernels_avx512 = KERNELS("AVX-512");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
