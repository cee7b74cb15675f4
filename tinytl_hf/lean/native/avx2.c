/* The kernels with AVX2 and FMA. */
#if defined(__x86_64__) || defined(__i386__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TINYTL_AVX2
#include "upsampling.h"

const Kernels kernels_avx2 = {
    "AVX2",
    chain_scratch, chain_forward, chain_backward,
    branch_scratch, branch_forward, branch_backward,
    upsampling_scratch, upsample_add, upsample_backward,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
