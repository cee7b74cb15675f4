/* The kernels with the compiler's own vectors. */
#include "upsampling.h"

const Kernels kernels_portable = KERNELS("portable");
