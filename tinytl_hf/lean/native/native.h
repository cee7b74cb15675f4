/* What Python and the kernels share: the description of a chain or of a lite branch, and the kernels of one instruction set.
 *
 * Maps are channels-last: [images, height, width, channels]. Inside the kernels numbers are fp32, or bf16 where the
 * processor multiplies those; sums are fp32. Masks hold one bit a value, the first value in the lowest bit, in the order
 * of memory. */
#ifndef TINYTL_NATIVE_H
#define TINYTL_NATIVE_H

#include <stdint.h>

typedef int64_t i64;

/* Compilers that know AVX-512's products of bf16 values, and how to ask a processor for them. */
#if defined(__x86_64__) || defined(__i386__)
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define TINYTL_KNOWS_BF16
#endif
#endif

/* Tensors whose type may vary: fp32, or bf16 where the flag is set. */
typedef struct {
    void *data;
    i64 is_bf16;
} Maps;

/* What follows a convolution and its norm: nothing, clamp(0, upper), or what needs the value before it for its slope. */
enum { NO_ACTIVATION, CLAMP, HARDSWISH, SILU };

/* A frozen convolution with its norm and activation. */
typedef struct {
    i64 in_channels, out_channels, kernel, stride, padding, depthwise;
    i64 weight_strides[4];         /* of [out, in, row, column], in values */
    const float *weight;           /* or null, and then: */
    const int8_t *int8_weight;     /* with a scale for each output channel */
    const float *int8_scale;
    const float *gamma, *mean, *var; /* of the norm; null where there is none */
    const float *bias;             /* the norm's, else the convolution's; may be null */
    double eps;
    i64 activation;
    float upper;                   /* of CLAMP */
    uint8_t *mask;                 /* of CLAMP: [images, height, width, channels / 8]; null where it is not kept */
    float *before;                 /* of HARDSWISH and SILU: its input [images, height, width, channels]; null the same */
    float *grad_bias;              /* null where it is not wanted */
} Stage;

/* One pass through a chain. */
typedef struct {
    i64 images, height, width;     /* of the input */
    i64 stages;
    const Stage *stage;
    i64 branch;                    /* the stage whose input is the block's */
    i64 residual;                  /* whether the block's input is added to the output */
    Maps input, output, pooled;    /* pooled: null, or means of 2x2 px of the block's input */
    Maps grad_output, grad_pooled; /* backward; grad_pooled may be null */
    Maps grad_input;               /* null where it is not wanted */
    i64 first;                     /* the first stage whose gradients are wanted */
    float *scratch;
    i64 threads;
    i64 cache;                     /* bytes that the maps of a thread may take at a time */
} Chain;

/* A batch norm on batch statistics. */
typedef struct {
    const float *gamma, *beta;
    float *running_mean, *running_var; /* or null */
    double rate, eps;                  /* the share of a batch in the running statistics */
    float *mean, *inverse;             /* of the batch: mean and inverse standard deviation */
    float *grad_gamma, *grad_beta;
} Norm;

/* A lite residual's branch: grouped convolution, batch norm, ReLU, 1x1 convolution, batch norm. */
typedef struct {
    i64 images, height, width;
    i64 in_channels, middle, out_channels, kernel, stride, padding, groups;
    Maps input, output, grad_output, grad_input;
    const float *weight1, *weight2;
    i64 weight1_strides[3];            /* [middle, in_channels / groups, taps]; weight2 is contiguous */
    float *grad_weight1, *grad_weight2; /* grad_weight1: [middle, taps, in_channels / groups] */
    Norm norm1, norm2;
    double values;                     /* of a channel, on all processes */
    void (*reduce)(double *, i64);     /* adds up over processes, in place; null where there is one */
    float *scratch;
    i64 threads;
} Branch;

/* Bilinear up-sampling of `small` that is added to `maps`; backward, `small` is the gradient that `maps` gives. */
typedef struct {
    i64 images, height, width, small_height, small_width, channels;
    Maps maps, small;
    float *scratch;
    i64 threads;
} Upsampling;

typedef struct {
    const char *name;
    i64 (*chain_scratch)(const Chain *);
    void (*chain_forward)(const Chain *);
    void (*chain_backward)(const Chain *);
    i64 (*branch_scratch)(const Branch *);
    void (*branch_forward)(const Branch *);
    void (*branch_backward)(const Branch *);
    i64 (*upsampling_scratch)(const Upsampling *);
    void (*upsample_add)(const Upsampling *);
    void (*upsample_backward)(const Upsampling *);
} Kernels;

/* Those of a file, which includes upsampling.h. */
#define KERNELS(NAME)                                                                                                  \
    {NAME,          chain_scratch,   chain_forward,      chain_backward, branch_scratch,                               \
     branch_forward, branch_backward, upsampling_scratch, upsample_add,   upsample_backward}

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

#endif
