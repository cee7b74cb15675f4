/* The kernels with the compiler's own vectors. */
#include "upsampling.h"

const Kernels kernels_portable = {
    "portable",
    chain_scratch, chain_forward, chain_backward,
    branch_scratch, branch_forward, branch_backward,
    upsampling_scratch, upsample_add, upsample_backward,
};
