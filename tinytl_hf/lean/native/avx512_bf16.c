/* The kernels with AVX-512 and its products of bf16 values. */
#include "native.h"

#if defined(TINYTL_KNOWS_BF16)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16")
#endif
#define TINYTL_AVX512
#define TINYTL_BF16
#include "upsampling.h"

const Kernels kernels_avx512_bf16 = KERNELS("AVX-512 BF16");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
