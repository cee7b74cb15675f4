/* Tiles: a few pixels by one or two vectors of channels, whose sums stay in registers until they are finished.
 *
 * Every convolution is the same loop. For each output pixel, `taps` input pixels count, whose addresses come in a
 * table (Dukhan 2019, "The indirect convolution algorithm"): one for a 1x1 convolution, fewer than k*k at a border. */
#include "vectors.h"

/* What becomes of a tile's sums. */
enum {
    AS_IT_IS,
    SCALE,          /* v * scale + shift: a frozen norm */
    SCALE_CLAMP,    /* and clamp(0, upper), with a mask of what lies strictly between */
    SUM_SCALE,      /* backward of SCALE: the gradients are added up for the bias, then times scale */
    MASK_SUM_SCALE, /* backward of SCALE_CLAMP */
};

typedef struct {
    int kind;
    float *out;        /* row 0 of the output, channel 0 */
    i64 pitch;         /* values from one row to the next */
    const float *scale, *shift;
    float upper;
    uint8_t *mask;     /* of row 0; SCALE_CLAMP writes it unless it is null */
    i64 mask_pitch;    /* bytes */
    float *sums;       /* [channels] */
    int pairs;         /* whether the output is written as pairs */
} Finish;

INLINE void mask_write(uint8_t *mask, unsigned bits, i64 n) {
    mask[0] = (uint8_t)bits;
    if (LANES == 16 && n > 8) mask[1] = (uint8_t)(bits >> 8);
}

INLINE unsigned mask_read(const uint8_t *mask, i64 n) {
    return LANES == 16 && n > 8 ? mask[0] | (unsigned)mask[1] << 8 : mask[0];
}

/* Finish `rows` vectors of the channels from c on, n of them (n < LANES in the last vector only). */
INLINE void finish(const int kind, const int rows, const Finish *f, i64 row, i64 row_step, i64 c, i64 n, V *v) {
    V scale = v_all(1), shift = v_all(0), sum = v_all(0);
    const V low = v_all(0), high = v_all(f->upper);
    if (kind != AS_IT_IS) scale = v_get(f->scale + c, n);
    if (kind == SCALE || kind == SCALE_CLAMP) shift = v_get(f->shift + c, n);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++, row += row_step) {
        V value = v[i];
        if (kind == SCALE || kind == SCALE_CLAMP) value = v_fma(value, scale, shift);
        if (kind == SCALE_CLAMP) {
            if (f->mask) mask_write(f->mask + row * f->mask_pitch + c / 8, v_inside(value, low, high), n);
            value = v_clamp(value, low, high);
        }
        if (kind == MASK_SUM_SCALE) value = v_keep(value, mask_read(f->mask + row * f->mask_pitch + c / 8, n));
        if (kind == MASK_SUM_SCALE || kind == SUM_SCALE) {
            sum = v_add(sum, value);
            value = v_mul(value, scale);
        }
        float *to = f->out + row * f->pitch;
        if (HAS_PAIRS && f->pairs) v_put_bf16((uint16_t *)to + c, value, n);
        else v_put(to + c, value, n);
    }
    if (kind == MASK_SUM_SCALE || kind == SUM_SCALE) {
        v_put(f->sums + c, v_add(v_get(f->sums + c, n), sum), n);
    }
}

/* A line of output pixels that share their taps. */
enum { MOST_TAPS = 128 };
typedef struct {
    i64 count;               /* pixels */
    i64 first, step;         /* rows of the output: pixel i is row first + i * step */
    i64 taps, stride;        /* input pixels from one output pixel to the next */
    i64 width;               /* of the input, in pixels */
    const float *row[MOST_TAPS]; /* of each tap: the input's row ... */
    i64 x[MOST_TAPS];        /* ... the column that belongs to output pixel 0 ... */
    i64 at[MOST_TAPS];       /* ... and its place in the kernel */
} Line;

/* ---- dense convolutions: weights packed as [columns / TILE_COLUMNS][taps][depth][TILE_COLUMNS], padded with zeros;
 * with `pairs`, what is read and the weights are pairs of bf16 values, and `depth` of a tile counts pairs */

/* `rows` pixels by one or two vectors; of one vector up to two tiles, so that enough sums are under way at a time. */
INLINE void dense_tile(const int kind, const int rows, const int two, const int pairs, const float *const *a, i64 offset,
                       const float *packed, const i64 *at, i64 taps, i64 depth, const Finish *f, i64 row, i64 row_step,
                       i64 c, i64 n) {
    V s0[2 * TILE_ROWS], s1[TILE_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) s0[i] = v_all(0);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++) s1[i] = v_all(0);
    for (i64 t = 0; t < taps; t++) {
        const float *b = packed + at[t] * depth * TILE_COLUMNS, *p[2 * TILE_ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
            p[i] = (i < TILE_ROWS ? a[t * TILE_ROWS + i] : a[(taps + t) * TILE_ROWS + i - TILE_ROWS]) + offset;
        for (i64 k = 0; k < depth; k++, b += TILE_COLUMNS) {
            const V b0 = v_load(b), b1 = two ? v_load(b + LANES) : v_all(0);
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++) {
                const V x = v_all(p[i][k]);
                s0[i] = pairs ? v_dot(x, b0, s0[i]) : v_fma(x, b0, s0[i]);
                if (two) s1[i] = pairs ? v_dot(x, b1, s1[i]) : v_fma(x, b1, s1[i]);
            }
        }
    }
    finish(kind, rows, f, row, row_step, c, two ? LANES : min_of(n, LANES), s0);
    if (two) finish(kind, rows, f, row, row_step, c + LANES, min_of(n - LANES, LANES), s1);
}

#define DENSE_ARGUMENTS                                                                                            \
    const float *const *a, i64 offset, const float *packed, const i64 *at, i64 taps, i64 depth, const Finish *f,      \
        i64 row, i64 row_step, i64 c, i64 n
#define DENSE_VALUES a, offset, packed, at, taps, depth, f, row, row_step, c, n
#define ONE_ROW_COUNT(KIND, PAIRS, ROWS)                                                                               \
    case ROWS:                                                                                                         \
        if (n > LANES) dense_tile(KIND, ROWS, 1, PAIRS, DENSE_VALUES);                                                 \
        else dense_tile(KIND, ROWS, 0, PAIRS, DENSE_VALUES);                                                           \
        break;
#if TILE_ROWS == 4
#define OTHER_ROW_COUNTS(KIND, PAIRS) ONE_ROW_COUNT(KIND, PAIRS, 4)
#elif TILE_ROWS == 6
#define OTHER_ROW_COUNTS(KIND, PAIRS)                                                                                  \
    ONE_ROW_COUNT(KIND, PAIRS, 4) ONE_ROW_COUNT(KIND, PAIRS, 5) ONE_ROW_COUNT(KIND, PAIRS, 6)
#else
#define OTHER_ROW_COUNTS(KIND, PAIRS)                                                                                  \
    ONE_ROW_COUNT(KIND, PAIRS, 4) ONE_ROW_COUNT(KIND, PAIRS, 5) ONE_ROW_COUNT(KIND, PAIRS, 6)                          \
    ONE_ROW_COUNT(KIND, PAIRS, 7) ONE_ROW_COUNT(KIND, PAIRS, 8)
#endif
#define DENSE_OF_KIND(KIND, PAIRS)                                                                                     \
    static void dense_##KIND##_##PAIRS(i64 rows, DENSE_ARGUMENTS) {                                                    \
        switch (rows) {                                                                                                \
            ONE_ROW_COUNT(KIND, PAIRS, 1) ONE_ROW_COUNT(KIND, PAIRS, 2) ONE_ROW_COUNT(KIND, PAIRS, 3)                  \
            OTHER_ROW_COUNTS(KIND, PAIRS)                                                                              \
        default:                                                                                                       \
            dense_tile(KIND, 2 * TILE_ROWS, 0, PAIRS, DENSE_VALUES);                                                   \
        }                                                                                                              \
    }
#if HAS_PAIRS
#define DENSE(KIND) DENSE_OF_KIND(KIND, 0) DENSE_OF_KIND(KIND, 1)
#define RUN_DENSE(KIND) (pairs ? dense_##KIND##_1 : dense_##KIND##_0)(rows, DENSE_VALUES)
#else
#define DENSE(KIND) DENSE_OF_KIND(KIND, 0)
#define RUN_DENSE(KIND) dense_##KIND##_0(rows, DENSE_VALUES)
#endif
DENSE(AS_IT_IS)
DENSE(SCALE)
DENSE(SCALE_CLAMP)
DENSE(SUM_SCALE)
DENSE(MASK_SUM_SCALE)

static void dense_rows(i64 rows, int pairs, DENSE_ARGUMENTS) {
    (void)pairs;
    switch (f->kind) {
    case AS_IT_IS: RUN_DENSE(AS_IT_IS); break;
    case SCALE: RUN_DENSE(SCALE); break;
    case SCALE_CLAMP: RUN_DENSE(SCALE_CLAMP); break;
    case SUM_SCALE: RUN_DENSE(SUM_SCALE); break;
    default: RUN_DENSE(MASK_SUM_SCALE);
    }
}

/* How many of `left` pixels are made at a time for `n` columns: one tile, or two of half the width. */
INLINE i64 rows_at_a_time(i64 left, i64 n) {
    return n <= LANES && left >= 2 * TILE_ROWS ? 2 * TILE_ROWS : min_of(left, TILE_ROWS);
}

/* A 1x1 convolution of `rows` rows that lie `lda` apart; `f` is of the first. */
static void pointwise(const float *a, i64 lda, i64 rows, i64 depth, int pairs, const float *packed, i64 columns,
                      const Finish *f) {
    static const i64 at[1] = {0};
    if (pairs) depth /= 2;
    for (i64 c = 0; c < columns; c += TILE_COLUMNS, packed += depth * TILE_COLUMNS)
        for (i64 r = 0, count; r < rows; r += count) {
            const float *pointers[2 * TILE_ROWS];
            count = rows_at_a_time(rows - r, columns - c);
            for (i64 i = 0; i < 2 * TILE_ROWS; i++) pointers[i] = a + min_of(r + i, rows - 1) * lda;
            dense_rows(count, pairs, pointers, 0, packed, at, 1, depth, f, r, 1, c, columns - c);
        }
}

/* Makes pairs of `rows` rows of `channels` values, one after the other; in place, if `from` is `to`. */
static void to_pairs(const float *from, i64 rows, i64 channels, float *to) {
    for (i64 r = 0; r < rows; r++, from += channels, to += channels)
        for (i64 c = 0; c < channels; c += LANES)
            v_put_bf16((uint16_t *)to + c, v_get(from + c, channels - c), channels - c);
}

/* The table of a line: for each tile of pixels, for each tap, the address of every pixel's input; zeros outside. */
static void line_addresses(const Line *line, i64 channels, const float *zeros, const float **table) {
    for (i64 r = 0; r < line->count; r += TILE_ROWS)
        for (i64 t = 0; t < line->taps; t++)
            for (i64 i = 0; i < TILE_ROWS; i++) {
                const i64 x = line->x[t] + min_of(r + i, line->count - 1) * line->stride;
                *table++ = x < 0 || x >= line->width ? zeros : line->row[t] + x * channels;
            }
}

/* A dense convolution of a line; `depth` channels of an input pixel, `all_taps` in the packed weights. */
static void dense_line(const Line *line, i64 depth, int pairs, i64 all_taps, const float *packed, i64 columns,
                       const Finish *f, const float *zeros, const float **table) {
    line_addresses(line, depth, zeros, table);
    if (pairs) depth /= 2;
    for (i64 c = 0; c < columns; c += TILE_COLUMNS, packed += all_taps * depth * TILE_COLUMNS)
        for (i64 r = 0, count; r < line->count; r += count) {
            count = rows_at_a_time(line->count - r, columns - c);
            dense_rows(count, pairs, table + r * line->taps, 0, packed, line->at, line->taps, depth, f,
                       line->first + r * line->step, line->step, c, columns - c);
        }
}

/* ---- depthwise convolutions: weights as [taps][channels] */

INLINE void depthwise_tile(const int kind, const int rows, const int two, const float *const *x, i64 x_step,
                           const float *weights, const i64 *at, i64 taps, i64 channels, const Finish *f, i64 row,
                           i64 row_step, i64 c, i64 n) {
    V s0[TILE_ROWS], s1[TILE_ROWS];
    const int part = !two && n < LANES;
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) s0[i] = s1[i] = v_all(0);
    for (i64 t = 0; t < taps; t++) {
        const float *w = weights + at[t] * channels + c, *p = x[t] + c;
        const V w0 = part ? v_load_part(w, n) : v_load(w), w1 = two ? v_load(w + LANES) : v_all(0);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            s0[i] = v_fma(part ? v_load_part(p + i * x_step, n) : v_load(p + i * x_step), w0, s0[i]);
            if (two) s1[i] = v_fma(v_load(p + i * x_step + LANES), w1, s1[i]);
        }
    }
    finish(kind, rows, f, row, row_step, c, two ? LANES : n, s0);
    if (two) finish(kind, rows, f, row, row_step, c + LANES, LANES, s1);
}

/* A few pixels, all of their channels: so that memory is read in its order. */
INLINE void depthwise_pixels(const int kind, const int rows, const float *const *x, i64 x_step, const float *weights,
                             const i64 *at, i64 taps, i64 channels, const Finish *f, i64 row, i64 row_step) {
    i64 c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES)
        depthwise_tile(kind, rows, 1, x, x_step, weights, at, taps, channels, f, row, row_step, c, 2 * LANES);
    for (; c < channels; c += LANES)
        depthwise_tile(kind, rows, 0, x, x_step, weights, at, taps, channels, f, row, row_step, c,
                       min_of(LANES, channels - c));
}

/* `count` pixels that have all of `taps`. */
INLINE void depthwise_run(const int kind, const float **x, i64 x_step, const float *weights, const i64 *at, i64 taps,
                          i64 channels, const Finish *f, i64 row, i64 row_step, i64 count) {
    while (count > 0) {
        const i64 rows = count >= TILE_ROWS ? TILE_ROWS : count >= TILE_ROWS / 2 ? TILE_ROWS / 2 : 1;
        if (rows == TILE_ROWS)
            depthwise_pixels(kind, TILE_ROWS, x, x_step, weights, at, taps, channels, f, row, row_step);
        else if (rows == TILE_ROWS / 2)
            depthwise_pixels(kind, TILE_ROWS / 2, x, x_step, weights, at, taps, channels, f, row, row_step);
        else depthwise_pixels(kind, 1, x, x_step, weights, at, taps, channels, f, row, row_step);
        for (i64 t = 0; t < taps; t++) x[t] += rows * x_step;
        row += rows * row_step;
        count -= rows;
    }
}

/* A depthwise convolution of a line: the pixels inside at once, those at a border one by one with the taps they have. */
INLINE void depthwise_of_kind(const int kind, const Line *line, const float *weights, i64 channels, const Finish *f) {
    i64 low = 0, high = line->count; /* the pixels whose taps all lie inside */
    for (i64 t = 0; t < line->taps; t++) {
        while (low < line->count && line->x[t] + low * line->stride < 0) low++;
        while (high > low && line->x[t] + (high - 1) * line->stride >= line->width) high--;
    }
    const float *x[MOST_TAPS];
    i64 at[MOST_TAPS];
    for (i64 i = 0; i < line->count; i++) {
        const int inside = i >= low && i < high;
        i64 taps = 0;
        for (i64 t = 0; t < line->taps; t++) {
            const i64 column = line->x[t] + i * line->stride;
            if (!inside && (column < 0 || column >= line->width)) continue;
            x[taps] = line->row[t] + column * channels;
            at[taps++] = line->at[t];
        }
        const i64 count = inside ? high - i : 1;
        depthwise_run(kind, x, line->stride * channels, weights, at, taps, channels, f, line->first + i * line->step,
                      line->step, count);
        i += count - 1;
    }
}

static void depthwise_line(const Line *line, const float *weights, i64 channels, const Finish *f) {
    switch (f->kind) {
    case AS_IT_IS: depthwise_of_kind(AS_IT_IS, line, weights, channels, f); break;
    case SCALE: depthwise_of_kind(SCALE, line, weights, channels, f); break;
    case SCALE_CLAMP: depthwise_of_kind(SCALE_CLAMP, line, weights, channels, f); break;
    case SUM_SCALE: depthwise_of_kind(SUM_SCALE, line, weights, channels, f); break;
    default: depthwise_of_kind(MASK_SUM_SCALE, line, weights, channels, f);
    }
}

/* ---- rows that are already there: finished in place or from elsewhere */

INLINE void rows_of_kind(const int kind, const float *from, i64 rows, i64 channels, const Finish *f) {
    for (i64 c = 0; c < channels; c += LANES) {
        const i64 n = min_of(LANES, channels - c);
        i64 r = 0;
        for (; r + 4 <= rows; r += 4) {
            V v[4];
            for (int i = 0; i < 4; i++) v[i] = v_get(from + (r + i) * channels + c, n);
            finish(kind, 4, f, r, 1, c, n, v);
        }
        for (; r < rows; r++) {
            V v = v_get(from + r * channels + c, n);
            finish(kind, 1, f, r, 1, c, n, &v);
        }
    }
}

static void finish_rows(const float *from, i64 rows, i64 channels, const Finish *f) {
    if (f->kind == SUM_SCALE) rows_of_kind(SUM_SCALE, from, rows, channels, f);
    else rows_of_kind(MASK_SUM_SCALE, from, rows, channels, f);
}

/* A weight that is read through strides. */
typedef struct {
    const float *fp32;     /* or null, and then: */
    const int8_t *int8;
    const float *scales;   /* of columns, or else of the depth */
    int scale_by_column;
    i64 column_stride, depth_stride;
} Weight;

INLINE float weight_at(const Weight *w, i64 column, i64 k) {
    const i64 at = column * w->column_stride + k * w->depth_stride;
    return w->fp32 ? w->fp32[at] : w->int8[at] * w->scales[w->scale_by_column ? column : k];
}

/* `n` weights of a column, at most LANES, from depth k on. */
INLINE V column_weights(const Weight *w, i64 column, i64 k, i64 n) {
    if (w->fp32 && w->depth_stride == 1) return v_get(w->fp32 + column * w->column_stride + k, n);
    float values[LANES] = {0};
    for (i64 i = 0; i < n; i++) values[i] = weight_at(w, column, k + i);
    return v_load(values);
}

/* Packs the columns from `column` on of `depth` values: one column of the packed form is one output. */
static void pack_panel(const Weight *w, i64 column, i64 columns, i64 depth, int pairs, float *packed) {
    const i64 n = min_of(TILE_COLUMNS, columns - column), step = pairs ? 2 : 1;
    if (n < TILE_COLUMNS) memset(packed, 0, (size_t)(depth / step * TILE_COLUMNS) * sizeof(float));
    if (w->fp32 && w->column_stride == 1) { /* a row of the packed form lies as it is, or two that make pairs */
        for (i64 k = 0; k < depth; k += step, packed += TILE_COLUMNS)
            for (i64 j = 0; j < n; j += LANES) {
                const float *from = w->fp32 + column + j + k * w->depth_stride;
                const V first = v_get(from, n - j);
                v_put(packed + j, pairs ? v_pair(first, v_get(from + w->depth_stride, n - j)) : first, n - j);
            }
        return;
    }
    for (i64 j = 0; j < n; j++)
        for (i64 k = 0; k < depth; k += LANES) {
            float some[LANES];
            const i64 count = min_of(LANES, depth - k);
            const V weights = column_weights(w, column + j, k, count);
            if (pairs) v_put_bf16((uint16_t *)some, weights, LANES);
            else v_store(some, weights);
            for (i64 i = 0; i < count / step; i++) packed[(k / step + i) * TILE_COLUMNS + j] = some[i];
        }
}
