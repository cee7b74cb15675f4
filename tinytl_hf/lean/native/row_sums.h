/* Sums over rows of channels that a lite residual needs: its weights' gradients, and those of its batch norms. */
#include "grid.h"

/* ---- weights' gradients: sums over pixels of an output channel's gradient times an input channel's value */

INLINE void outer_tile(const int rows, const int two, const int pairs, const float *gradient, i64 pitch,
                       const float *const *x, i64 x_step, i64 offset, i64 count, float *to, i64 to_pitch, i64 n) {
    const int step = pairs ? 2 : 1; /* pixels at a time */
    V s0[TILE_ROWS], s1[TILE_ROWS];
    const int part = two ? n < 2 * LANES : n < LANES;
    const i64 n0 = two ? LANES : n, n1 = n - LANES;
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        s0[i] = part ? v_load_part(to + i * to_pitch, n0) : v_load(to + i * to_pitch);
        s1[i] = !two ? v_all(0) : part ? v_load_part(to + i * to_pitch + LANES, n1) : v_load(to + i * to_pitch + LANES);
    }
    for (i64 r = 0, i = 0; r < count; r += step, gradient += pitch) {
        const float *p = x[i] + offset, *q = pairs && r + 1 < count ? x[i + 1] + offset : p;
        i += r % TILE_ROWS == TILE_ROWS - step ? x_step - TILE_ROWS + step : step;
        V b0, b1 = v_all(0);
        if (pairs) {
            b0 = v_get_pair((const uint16_t *)p, (const uint16_t *)q, part ? n0 : LANES);
            if (two) b1 = v_get_pair((const uint16_t *)p + LANES, (const uint16_t *)q + LANES, part ? n1 : LANES);
        } else {
            b0 = part ? v_load_part(p, n0) : v_load(p);
            if (two) b1 = part ? v_load_part(p + LANES, n1) : v_load(p + LANES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const V a = v_all(gradient[i]);
            s0[i] = pairs ? v_dot(a, b0, s0[i]) : v_fma(a, b0, s0[i]);
            if (two) s1[i] = pairs ? v_dot(a, b1, s1[i]) : v_fma(a, b1, s1[i]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        if (part) v_store_part(to + i * to_pitch, s0[i], n0);
        else v_store(to + i * to_pitch, s0[i]);
        if (two && part) v_store_part(to + i * to_pitch + LANES, s1[i], n1);
        else if (two) v_store(to + i * to_pitch + LANES, s1[i]);
    }
}

/* to[i][j] += sum over pixels of gradient[pixel][i] * x[pixel][offset + j], for i < rows and j < columns. With `pairs`,
 * x holds bf16 values, `offset` counts pairs of them, and the gradient is that of `pair_pixels`. */
INLINE void outer_product_of(const int pairs, const float *gradient, i64 pitch, i64 rows, const float *const *x,
                             i64 x_step, i64 offset, i64 count, float *to, i64 to_pitch, i64 columns) {
    for (i64 j = 0; j < columns; j += TILE_COLUMNS) {
        const i64 n = min_of(TILE_COLUMNS, columns - j);
        i64 i = 0;
#define OUTER(ROWS, TWO)                                                                                               \
    outer_tile(ROWS, TWO, pairs, gradient + i, pitch, x, x_step, offset + (pairs ? j / 2 : j), count,                  \
               to + i * to_pitch + j, to_pitch, n)
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS) {
            if (n > LANES) OUTER(TILE_ROWS, 1);
            else OUTER(TILE_ROWS, 0);
        }
        for (; i + 2 <= rows; i += 2) {
            if (n > LANES) OUTER(2, 1);
            else OUTER(2, 0);
        }
        for (; i < rows; i++) {
            if (n > LANES) OUTER(1, 1);
            else OUTER(1, 0);
        }
    }
}

static void outer_product(int pairs, const float *gradient, i64 pitch, i64 rows, const float *const *x, i64 x_step,
                          i64 offset, i64 count, float *to, i64 to_pitch, i64 columns) {
    if (HAS_PAIRS && pairs)
        outer_product_of(1, gradient, pitch, rows, x, x_step, offset, count, to, to_pitch, columns);
    else outer_product_of(0, gradient, pitch, rows, x, x_step, offset, count, to, to_pitch, columns);
}

/* Pairs of the bf16 values of two pixels, for the channels from `from` to before `end`: to[pixel / 2][channel]; the last
 * of an odd number is paired with `zeros`. */
static void pair_pixels(const uint16_t *values, const uint16_t *zeros, i64 rows, i64 channels, i64 from, i64 end,
                        float *to) {
    for (i64 r = 0; r < rows; r += 2, values += 2 * channels, to += channels) {
        const uint16_t *second = r + 1 < rows ? values + channels : zeros;
        for (i64 c = from; c < end; c += LANES) {
            const i64 n = min_of(LANES, end - c);
            v_put(to + c, v_get_pair(values + c, second + c, n), n);
        }
    }
}

/* ---- batch norm over rows of channels */

/* Adds the first n values of two vectors to sums[0] and sums[1] of the channels from c on. */
static void add_two(V first, V second, i64 c, i64 n, i64 channels, double *sums) {
    float room[2 * LANES];
    v_store(room, first);
    v_store(room + LANES, second);
    for (i64 i = 0; i < n; i++) {
        sums[c + i] += room[i];
        sums[channels + c + i] += room[LANES + i];
    }
}

/* Adds the sums of maps - at, and of its square, to sums[0] and sums[1]. */
static void add_statistics(const float *maps, i64 rows, i64 channels, const float *at, double *sums) {
    for (i64 c = 0; c < channels; c += LANES) {
        const i64 n = min_of(LANES, channels - c);
        V s = v_all(0), q = v_all(0);
        const V centre = v_get(at + c, n);
        for (i64 r = 0; r < rows; r++) {
            const V d = v_sub(v_get(maps + r * channels + c, n), centre);
            s = v_add(s, d);
            q = v_fma(d, d, q);
        }
        add_two(s, q, c, n, channels, sums);
    }
}

/* to = from * scale + shift, and no less than 0 if `relu`. */
static void affine(const float *from, float *to, i64 rows, i64 channels, const float *norm, int relu) {
    const V low = v_all(relu ? 0 : -INFINITY), high = v_all(INFINITY);
    for (i64 c = 0; c < channels; c += LANES) {
        const i64 n = min_of(LANES, channels - c);
        const V scale = v_get(norm + c, n), shift = v_get(norm + channels + c, n);
        for (i64 r = 0; r < rows; r++) {
            const i64 at = r * channels + c;
            v_put(to + at, v_clamp(v_fma(v_get(from + at, n), scale, shift), low, high), n);
        }
    }
}

/* to = a * gradient + b * (maps - mean) + d, of `norm`. */
static void norm_backward(const float *maps, const float *gradient, float *to, i64 rows, i64 channels,
                          const float *norm) {
    for (i64 c = 0; c < channels; c += LANES) {
        const i64 n = min_of(LANES, channels - c);
        const V a = v_get(norm + c, n), b = v_get(norm + channels + c, n);
        const V d = v_get(norm + 2 * channels + c, n), mean = v_get(norm + 3 * channels + c, n);
        for (i64 r = 0; r < rows; r++) {
            const i64 at = r * channels + c;
            const V v = v_fma(v_sub(v_get(maps + at, n), mean), b, d);
            v_put(to + at, v_fma(v_get(gradient + at, n), a, v), n);
        }
    }
}

/* Adds to sums[0] the gradient, and to sums[1] the gradient times (maps - mean) * inverse; first, where `act` is given,
 * the gradient is put to 0 where that is not above 0, and written. */
static void add_norm_sums(const float *maps, const float *gradient, float *to, const float *act, i64 rows, i64 channels,
                          const float *mean, const float *inverse, double *sums) {
    for (i64 c = 0; c < channels; c += LANES) {
        const i64 n = min_of(LANES, channels - c);
        V s = v_all(0), q = v_all(0);
        const V m = v_get(mean + c, n);
        for (i64 r = 0; r < rows; r++) {
            const i64 at = r * channels + c;
            V v = v_get(gradient + at, n);
            if (act) {
                v = v_keep(v, v_inside(v_get(act + at, n), v_all(0), v_all(INFINITY)));
                v_put(to + at, v, n);
            }
            s = v_add(s, v);
            q = v_fma(v, v_sub(v_get(maps + at, n), m), q);
        }
        add_two(s, v_mul(q, v_get(inverse + c, n)), c, n, channels, sums);
    }
}
