/* Hardswish and SiLU, whose slope needs the value before them: of rows that a convolution has just made. */
#include "plan.h"

/* e to the power of x, |x| <= 87, to about one unit in the last place (the polynomial of Cephes' expf, Moshier 1992). */
INLINE V v_exp(V x) {
    const V round = v_all(12582912.f); /* 1.5 * 2^23: a sum with it is an integer, in the lowest bits */
    const V bits = v_fma(x, v_all(1.44269504088896341f), round), power = v_sub(bits, round);
    const V r = v_fma(power, v_all(2.12194440e-4f), v_fma(power, v_all(-.693359375f), x)); /* x - power * log(2) */
    V p = v_all(1.9875691500e-4f);
    p = v_fma(p, r, v_all(1.3981999507e-3f));
    p = v_fma(p, r, v_all(8.3334519073e-3f));
    p = v_fma(p, r, v_all(4.1665795894e-2f));
    p = v_fma(p, r, v_all(1.6666665459e-1f));
    p = v_fma(p, r, v_all(5.0000001201e-1f));
    return v_add_to_exponent(v_add(v_fma(v_mul(p, r), r, r), v_all(1)), bits);
}

INLINE V v_sigmoid(V x) {
    const V opposite = v_sub(v_all(0), v_clamp(x, v_all(-87), v_all(87)));
    return v_div(v_all(1), v_add(v_all(1), v_exp(opposite)));
}

INLINE V smooth_value(const int activation, V x) {
    if (activation == SILU) return v_mul(x, v_sigmoid(x));
    return v_mul(x, v_mul(v_clamp(v_add(x, v_all(3)), v_all(0), v_all(6)), v_all(1.f / 6)));
}

INLINE V smooth_slope(const int activation, V x) {
    if (activation == SILU) {
        const V s = v_sigmoid(x);
        return v_fma(v_mul(x, s), v_sub(v_all(1), s), s);
    }
    /* 0 up to -3, 1 from 3 on, x / 3 + 1/2 in between. What is not a number is not inside, and stays what it is. */
    const V inside = v_fma(x, v_all(1.f / 3), v_all(.5f)), beyond = v_clamp(v_mul(x, v_all(INFINITY)), v_all(0), v_all(1));
    const unsigned mask = v_inside(x, v_all(-3), v_all(3));
    return v_add(v_keep(inside, mask), v_keep(beyond, ~mask));
}

INLINE void activate_of_kind(const int activation, float *values, i64 count, float *before) {
    for (i64 i = 0; i < count; i += LANES) {
        const i64 n = min_of(LANES, count - i);
        const V x = v_get(values + i, n);
        if (before) v_put(before + i, x, n);
        v_put(values + i, smooth_value(activation, x), n);
    }
}

/* Activates `count` values in place; what they were is written to `before`, unless it is null. */
static void activate(i64 activation, float *values, i64 count, float *before) {
    if (activation == SILU) activate_of_kind(SILU, values, count, before);
    else activate_of_kind(HARDSWISH, values, count, before);
}

INLINE void slope_of_kind(const int activation, const float *grad, const float *before, i64 rows, i64 channels,
                          const Finish *f) {
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < channels; c += LANES) {
            const i64 n = min_of(LANES, channels - c), at = r * channels + c;
            const V value = v_mul(v_get(grad + at, n), smooth_slope(activation, v_get(before + at, n)));
            v_put(f->sums + c, v_add(v_get(f->sums + c, n), value), n);
            v_put(f->out + at, v_mul(value, v_get(f->scale + c, n)), n);
        }
}

/* The backward pass of `activate` and of the norm before it: gradients are added up for the bias, then times scale. */
static void finish_smooth(i64 activation, const float *grad, const float *before, i64 rows, i64 channels,
                          const Finish *f) {
    if (activation == SILU) slope_of_kind(SILU, grad, before, rows, channels, f);
    else slope_of_kind(HARDSWISH, grad, before, rows, channels, f);
}
