/* The kernels with AVX2 and FMA. */
#if defined(__x86_64__) || defined(__i386__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TINYTL_AVX2
#include "upsampling.h"

const Kernels kernels_avx2 = KERNELS("AVX2");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
