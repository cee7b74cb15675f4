/* Chooses the kernels of an instruction set. Called by ctypes; the module itself only makes the library importable. */
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include "native.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* The kernels of the best instruction set, or of the `skip`-th best. Null where there are no more. */
EXPORT const Kernels *tinytl_kernels(int skip) {
    const Kernels *found[4];
    int count = 0;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
#if defined(TINYTL_KNOWS_BF16)
        if (__builtin_cpu_supports("avx512bf16")) found[count++] = &kernels_avx512_bf16;
#endif
        found[count++] = &kernels_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &kernels_avx2;
#endif
    found[count++] = &kernels_portable;
    return skip < count ? found[skip] : 0;
}

/* Whether threads are used. */
EXPORT int tinytl_has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Kernels of the lean engine.", -1, 0, 0, 0, 0, 0};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
