/* A lite residual's grouped convolution, pixel by pixel, forward and backward, and the memory that a branch needs. */
#include "chain.h"

enum { PIXELS = 96 }; /* at a time: a multiple of every TILE_ROWS */

static i64 height_out(const Branch *b) { return (b->height + 2 * b->padding - b->kernel) / b->stride + 1; }
static i64 width_out(const Branch *b) { return (b->width + 2 * b->padding - b->kernel) / b->stride + 1; }
static i64 pixels_in(const Branch *b) { return b->images * b->height * b->width; }
static i64 pixels_out(const Branch *b) { return b->images * height_out(b) * width_out(b); }

/* Places in the scratch, in fp32 values. */
typedef struct {
    i64 input, maps, flow, zeros, vectors, totals, packed, per_thread; /* of all threads; the first thread's own */
    i64 act, outer, rows, sums, weight, table, pair_rows, own_size; /* within a thread's own */
} Room;

/* Whether the 1x1 convolution, or the grouped one, reads pairs of bf16 values. */
static int outer_pairs(const Branch *b) {
    return HAS_PAIRS && b->input.is_bf16 && b->middle % 2 == 0 && b->out_channels % 2 == 0;
}
static int grouped_pairs(const Branch *b) {
    return HAS_PAIRS && b->input.is_bf16 && b->in_channels / b->groups % 2 == 0 && b->middle / b->groups % 2 == 0;
}

static Room branch_room(const Branch *b) {
    const i64 taps = b->kernel * b->kernel, widest = max_of(max_of(b->in_channels, b->middle), b->out_channels);
    const i64 in_group = b->in_channels / b->groups, pairs = grouped_pairs(b);
    const i64 wide = whole(pixels_out(b) * b->middle / (pairs ? 2 : 1), 16);
    Room r = {0};
    r.maps = b->input.is_bf16 && !pairs ? whole(pixels_in(b) * b->in_channels, 16) : 0;
    r.flow = r.maps + wide;
    r.zeros = r.flow + (b->grad_output.data ? wide : b->output.is_bf16 ? whole(pixels_out(b) * b->out_channels, 16) : 0);
    r.vectors = r.zeros + whole(widest, 16); /* what a phase wants of the norms: four vectors of each */
    r.totals = r.vectors + whole(8 * widest, 16);
    r.packed = r.totals + whole(4 * widest, 16); /* two vectors of fp64 */
    const i64 packed1 = b->groups * taps * max_of(in_group * whole(b->middle / b->groups, TILE_COLUMNS),
                                                  b->middle / b->groups * whole(in_group, TILE_COLUMNS));
    const i64 packed2 = b->middle * whole(b->out_channels, TILE_COLUMNS) + b->out_channels * whole(b->middle, TILE_COLUMNS);
    r.per_thread = r.packed + whole(max_of(packed1, packed2), 16);
    r.outer = PIXELS * whole(widest, 16);
    r.rows = 2 * r.outer;
    r.sums = 3 * r.outer;
    r.weight = r.sums + 4 * whole(widest, 16);
    r.table = r.weight + whole(b->out_channels * b->middle, 16);
    r.pair_rows = whole(r.table + 2 * taps * PIXELS, 16);
    r.own_size = r.pair_rows + (outer_pairs(b) ? PIXELS * whole(max_of(b->middle, b->out_channels), 16) : 0);
    return r;
}

static i64 branch_scratch(const Branch *b) {
    const Room r = branch_room(b);
    return r.per_thread + b->threads * r.own_size;
}

/* [pixels, middle], of the grouped convolution's output or, backward, of its gradient: bf16 where that reads pairs. */
static Maps wide_maps(const Branch *b, i64 at) { return (Maps){b->scratch + at, grouped_pairs(b)}; }

/* The output pixels of one convolution that share their taps: all of them, or every stride-th one backward. */
typedef struct {
    i64 height, width, channels;      /* of the maps that are read; `channels`: values, or pairs, to the next pixel */
    i64 rows, columns;                /* of the pixels that are made, in each image */
    i64 stride;                       /* pixels that are read from one that is made to the next */
    i64 taps, at[MOST_TAPS], y[MOST_TAPS], x[MOST_TAPS];
    const float *maps, *zeros;
    int pairs;                        /* whether pairs are read */
} Grid;

static Grid forward_grid(const Branch *b, const float *input, const float *zeros, int pairs) {
    Grid g = {.height = b->height, .width = b->width, .channels = pairs ? b->in_channels / 2 : b->in_channels,
              .rows = height_out(b), .columns = width_out(b), .stride = b->stride, .maps = input, .zeros = zeros,
              .pairs = pairs};
    for (i64 t = 0; t < b->kernel * b->kernel; t++, g.taps++) {
        g.at[t] = t;
        g.y[t] = t / b->kernel - b->padding;
        g.x[t] = t % b->kernel - b->padding;
    }
    return g;
}

/* Of the input pixels whose row and column are `top` and `left` modulo the stride. */
static Grid backward_grid(const Branch *b, i64 top, i64 left, const float *flow, const float *zeros, int pairs) {
    Grid g = {.height = height_out(b), .width = width_out(b), .stride = 1, .maps = flow,
              .channels = pairs ? b->middle / 2 : b->middle,
              .rows = (b->height - top + b->stride - 1) / b->stride,
              .columns = (b->width - left + b->stride - 1) / b->stride, .zeros = zeros, .pairs = pairs};
    for (i64 t = 0; t < b->kernel * b->kernel; t++) {
        const i64 y = top + b->padding - t / b->kernel, x = left + b->padding - t % b->kernel;
        if (y % b->stride || x % b->stride) continue;
        g.at[g.taps] = t;
        g.y[g.taps] = y / b->stride;
        g.x[g.taps++] = x / b->stride;
    }
    return g;
}

/* Addresses of what `count` pixels from `first` on read: [tile][tap][pixel of the tile]. */
static void grid_addresses(const Grid *g, i64 first, i64 count, const float **table) {
    i64 step[MOST_TAPS], top = 0, left = 0, bottom = 0, right = 0; /* how far the taps reach */
    for (i64 t = 0; t < g->taps; t++) {
        step[t] = (g->y[t] * g->width + g->x[t]) * g->channels;
        top = min_of(top, g->y[t]);
        left = min_of(left, g->x[t]);
        bottom = max_of(bottom, g->y[t]);
        right = max_of(right, g->x[t]);
    }
    for (i64 r = 0; r < whole(count, TILE_ROWS); r++) {
        const i64 pixel = first + min_of(r, count - 1);
        const i64 y = pixel / g->columns % g->rows * g->stride, x = pixel % g->columns * g->stride;
        const float *at = g->maps + ((pixel / (g->rows * g->columns) * g->height + y) * g->width + x) * g->channels;
        const float **to = table + r / TILE_ROWS * g->taps * TILE_ROWS + r % TILE_ROWS;
        if (y + top >= 0 && x + left >= 0 && y + bottom < g->height && x + right < g->width) {
            for (i64 t = 0; t < g->taps; t++) to[t * TILE_ROWS] = at + step[t];
            continue;
        }
        for (i64 t = 0; t < g->taps; t++) {
            const i64 v = y + g->y[t], u = x + g->x[t];
            const int inside = v >= 0 && v < g->height && u >= 0 && u < g->width;
            to[t * TILE_ROWS] = inside ? at + step[t] : g->zeros;
        }
    }
}

/* Group `group`, of `depth` values of a pixel, of a dense convolution of `count` pixels with addresses in `table`. */
static void dense_pixels(const Grid *g, i64 count, const float *const *table, i64 group, i64 depth, i64 all_taps,
                         const float *packed, i64 columns, const Finish *f) {
    if (g->pairs) depth /= 2;
    const i64 offset = group * depth;
    packed += group * whole(columns, TILE_COLUMNS) * all_taps * depth;
    for (i64 c = 0; c < columns; c += TILE_COLUMNS, packed += all_taps * depth * TILE_COLUMNS)
        for (i64 r = 0, n; r < count; r += n) {
            n = rows_at_a_time(count - r, columns - c);
            dense_rows(n, g->pairs, table + r * g->taps, offset, packed, g->at, g->taps, depth, f, r, 1, c,
                       columns - c);
        }
}
