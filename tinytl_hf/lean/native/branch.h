/* A lite residual's branch. Its batch statistics are of all pixels, and of all processes, so that it runs in phases,
 * each of which adds up what the next one needs. Of its wide maps it keeps one, that of the grouped convolution. */
#include "chain.h"

enum { PIXELS = 96 }; /* at a time: a multiple of every TILE_ROWS */

static i64 height_out(const Branch *b) { return (b->height + 2 * b->padding - b->kernel) / b->stride + 1; }
static i64 width_out(const Branch *b) { return (b->width + 2 * b->padding - b->kernel) / b->stride + 1; }
static i64 pixels_in(const Branch *b) { return b->images * b->height * b->width; }
static i64 pixels_out(const Branch *b) { return b->images * height_out(b) * width_out(b); }

/* Places in the scratch, in fp32 values. */
typedef struct {
    i64 input, zeros, vectors, totals, packed, per_thread; /* of all threads; the first thread's own */
    i64 act, outer, rows, sums, weight, table, own_size; /* within a thread's own */
} Room;

static Room branch_room(const Branch *b) {
    const i64 taps = b->kernel * b->kernel, widest = max_of(max_of(b->in_channels, b->middle), b->out_channels);
    const i64 in_group = b->in_channels / b->groups;
    Room r = {0};
    r.zeros = b->input.is_bf16 ? whole(pixels_in(b) * b->in_channels, 16) : 0;
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
    r.own_size = whole(r.table + 2 * taps * PIXELS, 16);
    return r;
}

static i64 branch_scratch(const Branch *b) {
    const Room r = branch_room(b);
    return r.per_thread + b->threads * r.own_size;
}

/* The output pixels of one convolution that share their taps: all of them, or every stride-th one backward. */
typedef struct {
    i64 height, width, channels;      /* of the maps that are read */
    i64 rows, columns;                /* of the pixels that are made, in each image */
    i64 stride;                       /* pixels that are read from one that is made to the next */
    i64 taps, at[MOST_TAPS], y[MOST_TAPS], x[MOST_TAPS];
    const float *maps, *zeros;
} Grid;

static Grid forward_grid(const Branch *b, const float *input, const float *zeros) {
    Grid g = {.height = b->height, .width = b->width, .channels = b->in_channels, .rows = height_out(b),
              .columns = width_out(b), .stride = b->stride, .maps = input, .zeros = zeros};
    for (i64 t = 0; t < b->kernel * b->kernel; t++, g.taps++) {
        g.at[t] = t;
        g.y[t] = t / b->kernel - b->padding;
        g.x[t] = t % b->kernel - b->padding;
    }
    return g;
}

/* Of the input pixels whose row and column are `top` and `left` modulo the stride. */
static Grid backward_grid(const Branch *b, i64 top, i64 left, const float *zeros) {
    Grid g = {.height = height_out(b), .width = width_out(b), .channels = b->middle, .stride = 1, .maps = b->flow,
              .rows = (b->height - top + b->stride - 1) / b->stride,
              .columns = (b->width - left + b->stride - 1) / b->stride, .zeros = zeros};
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

/* One group of a dense convolution of `count` pixels whose addresses are in `table`; its channels begin at `offset`. */
static void dense_pixels(const Grid *g, i64 count, const float *const *table, i64 offset, i64 depth, i64 all_taps,
                         const float *packed, i64 columns, const Finish *f) {
    for (i64 c = 0; c < columns; c += TILE_COLUMNS, packed += all_taps * depth * TILE_COLUMNS)
        for (i64 r = 0, n; r < count; r += n) {
            n = rows_at_a_time(count - r, columns - c);
            dense_rows(n, table + r * g->taps, offset, packed, g->at, g->taps, depth, f, r, 1, c, columns - c);
        }
}

/* ---- weights' gradients: sums over pixels of an output channel's gradient times an input channel's value */

INLINE void outer_tile(const int rows, const int two, const float *gradient, i64 pitch, const float *const *x,
                       i64 x_step, i64 offset, i64 count, float *to, i64 to_pitch, i64 n) {
    V s0[TILE_ROWS], s1[TILE_ROWS];
    const int part = two ? n < 2 * LANES : n < LANES;
    const i64 n0 = two ? LANES : n, n1 = n - LANES;
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        s0[i] = part ? v_load_part(to + i * to_pitch, n0) : v_load(to + i * to_pitch);
        s1[i] = !two ? v_all(0) : part ? v_load_part(to + i * to_pitch + LANES, n1) : v_load(to + i * to_pitch + LANES);
    }
    for (i64 r = 0, i = 0; r < count; r++, gradient += pitch) {
        const float *p = x[i] + offset;
        i += r % TILE_ROWS == TILE_ROWS - 1 ? x_step - TILE_ROWS + 1 : 1;
        const V b0 = part ? v_load_part(p, n0) : v_load(p);
        const V b1 = !two ? v_all(0) : part ? v_load_part(p + LANES, n1) : v_load(p + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const V a = v_all(gradient[i]);
            s0[i] = v_fma(a, b0, s0[i]);
            if (two) s1[i] = v_fma(a, b1, s1[i]);
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

/* to[i][j] += sum over pixels of gradient[pixel][i] * x[pixel][offset + j], for i < rows and j < columns. */
static void outer_product(const float *gradient, i64 pitch, i64 rows, const float *const *x, i64 x_step, i64 offset,
                          i64 count, float *to, i64 to_pitch, i64 columns) {
    for (i64 j = 0; j < columns; j += TILE_COLUMNS) {
        const i64 n = min_of(TILE_COLUMNS, columns - j);
        i64 i = 0;
#define OUTER(ROWS, TWO)                                                                                               \
    outer_tile(ROWS, TWO, gradient + i, pitch, x, x_step, offset + j, count, to + i * to_pitch + j, to_pitch, n)
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

/* ---- batch norm over rows of channels */

/* Adds the sums of maps - at, and of its square, to sums[0] and sums[1]. */
static void add_statistics(const float *maps, i64 rows, i64 channels, const float *at, double *sums) {
    for (i64 c = 0; c < channels; c += LANES) {
        const i64 n = min_of(LANES, channels - c);
        float room[2 * LANES];
        V s = v_all(0), q = v_all(0);
        const V centre = v_get(at + c, n);
        for (i64 r = 0; r < rows; r++) {
            const V d = v_sub(v_get(maps + r * channels + c, n), centre);
            s = v_add(s, d);
            q = v_fma(d, d, q);
        }
        v_store(room, s);
        v_store(room + LANES, q);
        for (i64 i = 0; i < n; i++) {
            sums[c + i] += room[i];
            sums[channels + c + i] += room[LANES + i];
        }
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

/* to = a * gradient + b * (maps - mean) + d, of `norm`, for the channels from `from` to before `end`. */
static void norm_backward(const float *maps, const float *gradient, float *to, i64 rows, i64 channels, const float *norm,
                          i64 from, i64 end) {
    for (i64 c = from; c < end; c += LANES) {
        const i64 n = min_of(LANES, end - c);
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
        float room[2 * LANES];
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
        v_store(room, s);
        v_store(room + LANES, v_mul(q, v_get(inverse + c, n)));
        for (i64 i = 0; i < n; i++) {
            sums[c + i] += room[i];
            sums[channels + c + i] += room[LANES + i];
        }
    }
}

/* ---- the phases */

#define OWN(ROOM) (b->scratch + (ROOM).per_thread + t * (ROOM).own_size)
/* Thread t's share of `TOTAL` pixels, PIXELS at a time: `first` to before `first + count`. */
#define EACH_CHUNK(TOTAL)                                                                                              \
    for (i64 first = (TOTAL) * t / b->threads, end = (TOTAL) * (t + 1) / b->threads, count;                            \
         count = min_of(PIXELS, end - first), first < end; first += count)

/* Adds up what the threads have: in their order, so that the result is the same each time. */
static double *merge_sums(const Branch *b, const Room *room, i64 channels) {
    double *totals = (double *)(b->scratch + room->totals);
    for (i64 i = 0; i < 2 * channels; i++) {
        totals[i] = 0;
        for (i64 t = 0; t < b->threads; t++) totals[i] += ((double *)(OWN(*room) + room->sums))[i];
    }
    return totals;
}

static void pack_weight1(const Branch *b, int backward, float *packed) {
    const i64 taps = b->kernel * b->kernel, in = b->in_channels / b->groups, out = b->middle / b->groups;
    const i64 depth = backward ? out : in, columns = backward ? in : out;
    const i64 panels = whole(columns, TILE_COLUMNS) / TILE_COLUMNS, *strides = b->weight1_strides;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 i = 0; i < b->groups * panels; i++)
        for (i64 t = 0; t < taps; t++)
            pack_panel(b->weight1 + i / panels * out * strides[0] + t * strides[2], 0, 0, 0,
                       strides[backward ? 1 : 0], strides[backward ? 0 : 1], i % panels * TILE_COLUMNS, columns, depth,
                       packed + (i * taps + t) * depth * TILE_COLUMNS);
}

static void pack_weight2(const Branch *b, int backward, float *packed) {
    const i64 depth = backward ? b->out_channels : b->middle, columns = backward ? b->middle : b->out_channels;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 c = 0; c < columns; c += TILE_COLUMNS)
        pack_panel(b->weight2, 0, 0, 0, backward ? 1 : b->middle, backward ? b->middle : 1, c, columns, depth,
                   packed + c * depth);
}

/* The input as fp32, and zeros. */
static const float *prepare(const Branch *b, const Room *room) {
    memset(b->scratch + room->zeros, 0, (size_t)(room->vectors - room->zeros) * sizeof(float));
    if (!b->input.is_bf16) return b->input.data;
    const i64 row = b->width * b->in_channels;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 r = 0; r < b->images * b->height; r++) read_values(b->input, r * row, row, b->scratch + r * row);
    return b->scratch;
}

/* The grouped convolution; `sums`: also of the difference to `centre`, and of its square. */
static double *convolve(const Branch *b, const float *centre) {
    const Room room = branch_room(b);
    const float *zeros = b->scratch + room.zeros;
    const Grid grid = forward_grid(b, prepare(b, &room), zeros);
    const i64 in = b->in_channels / b->groups, out = b->middle / b->groups;
    float *packed = b->scratch + room.packed;
    pack_weight1(b, 0, packed);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) {
        float *own = OWN(room);
        const float **table = (const float **)(own + room.table);
        double *sums = (double *)(own + room.sums);
        memset(sums, 0, (size_t)(2 * b->middle) * sizeof(double));
        EACH_CHUNK(pixels_out(b)) {
            grid_addresses(&grid, first, count, table);
            for (i64 g = 0; g < b->groups; g++) {
                const Finish f = {.kind = AS_IT_IS, .out = b->maps + first * b->middle + g * out, .pitch = b->middle};
                dense_pixels(&grid, count, table, g * in, in, grid.taps,
                             packed + g * whole(out, TILE_COLUMNS) * grid.taps * in, out, &f);
            }
            if (centre) add_statistics(b->maps + first * b->middle, count, b->middle, centre, sums);
        }
    }
    return centre ? merge_sums(b, &room, b->middle) : 0;
}

/* What the 1x1 convolution makes of `count` pixels; `act`: what goes into it; `norm1`: scale and shift. */
static void outer_rows(const Branch *b, i64 first, i64 count, const float *norm1, const float *packed, float *act,
                       float *to) {
    const Finish f = {.kind = AS_IT_IS, .out = to, .pitch = b->out_channels};
    affine(b->maps + first * b->middle, act, count, b->middle, norm1, 1);
    pointwise(act, b->middle, count, b->middle, packed, b->out_channels, &f);
}

/* The 1x1 convolution, forward, with sums as above. */
static double *convolve_outer(const Branch *b, const float *norm1, const float *centre) {
    const Room room = branch_room(b);
    float *packed = b->scratch + room.packed, *outer = b->output.is_bf16 ? b->flow : b->output.data;
    pack_weight2(b, 0, packed);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) {
        float *own = OWN(room);
        double *sums = (double *)(own + room.sums);
        memset(sums, 0, (size_t)(2 * b->out_channels) * sizeof(double));
        EACH_CHUNK(pixels_out(b)) {
            float *to = outer + first * b->out_channels;
            outer_rows(b, first, count, norm1, packed, own + room.act, to);
            add_statistics(to, count, b->out_channels, centre, sums);
        }
    }
    return merge_sums(b, &room, b->out_channels);
}

static void finish_forward(const Branch *b, const float *norm2) {
    float *outer = b->output.is_bf16 ? b->flow : b->output.data;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) EACH_CHUNK(pixels_out(b)) {
        float *to = outer + first * b->out_channels;
        affine(to, to, count, b->out_channels, norm2, 0);
        write_values(b->output, first * b->out_channels, count * b->out_channels, to);
    }
}

/* Sums of the output's gradient, and of it times the second norm's normalised input. */
static double *outer_sums(const Branch *b, const float *norm1) {
    const Room room = branch_room(b);
    const i64 n = b->out_channels;
    float *packed = b->scratch + room.packed;
    pack_weight2(b, 0, packed);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) {
        float *own = OWN(room), *outer = own + room.outer;
        double *sums = (double *)(own + room.sums);
        memset(sums, 0, (size_t)(2 * n) * sizeof(double));
        EACH_CHUNK(pixels_out(b)) {
            outer_rows(b, first, count, norm1, packed, own + room.act, outer);
            const float *gradient = read_values(b->grad_output, first * n, count * n, own + room.rows);
            add_norm_sums(outer, gradient, 0, 0, count, n, b->norm2.mean, b->norm2.inverse, sums);
        }
    }
    return merge_sums(b, &room, n);
}

/* The 1x1 weight's gradient, and the flow before the ReLU with its two sums; `norm2`: that of norm_backward. */
static double *inner(const Branch *b, const float *norm1, const float *norm2) {
    const Room room = branch_room(b);
    const i64 n = b->out_channels, m = b->middle;
    float *packed = b->scratch + room.packed, *packed_backward = packed + m * whole(n, TILE_COLUMNS);
    pack_weight2(b, 0, packed);
    pack_weight2(b, 1, packed_backward);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) {
        float *own = OWN(room), *outer = own + room.outer, *act = own + room.act, *weight = own + room.weight;
        double *sums = (double *)(own + room.sums);
        memset(sums, 0, (size_t)(2 * m) * sizeof(double));
        memset(weight, 0, (size_t)(n * m) * sizeof(float));
        const float *x[PIXELS];
        for (i64 i = 0; i < PIXELS; i++) x[i] = act + i * m;
        EACH_CHUNK(pixels_out(b)) {
            float *flow = b->flow + first * m;
            outer_rows(b, first, count, norm1, packed, act, outer);
            const float *gradient = read_values(b->grad_output, first * n, count * n, own + room.rows);
            norm_backward(outer, gradient, outer, count, n, norm2, 0, n);
            outer_product(outer, n, n, x, TILE_ROWS, 0, count, weight, m, m);
            const Finish f = {.kind = AS_IT_IS, .out = flow, .pitch = m};
            pointwise(outer, n, count, n, packed_backward, m, &f);
            add_norm_sums(b->maps + first * m, flow, flow, act, count, m, b->norm1.mean, b->norm1.inverse, sums);
        }
    }
    for (i64 i = 0; i < n * m; i++) {
        float sum = 0;
        for (i64 t = 0; t < b->threads; t++) sum += (OWN(room) + room.weight)[i];
        b->grad_weight2[i] = sum;
    }
    return merge_sums(b, &room, m);
}

/* The flow before the first norm, and the gradient of the grouped convolution's weight, for the output channels from
 * `from` to before `to`. */
static void weight1_backward(const Branch *b, const float *norm1, const Grid *grid, i64 from, i64 to,
                             const float **table) {
    const i64 in = b->in_channels / b->groups, out = b->middle / b->groups, row = grid->taps * in;
    memset(b->grad_weight1 + from * row, 0, (size_t)((to - from) * row) * sizeof(float));
    for (i64 first = 0, count; first < pixels_out(b); first += count) {
        count = min_of(PIXELS, pixels_out(b) - first);
        float *flow = b->flow + first * b->middle;
        norm_backward(b->maps + first * b->middle, flow, flow, count, b->middle, norm1, from, to);
        grid_addresses(grid, first, count, table);
        for (i64 g = from / out; g * out < to; g++) { /* groups that have some of these channels */
            const i64 low = max_of(from, g * out), high = min_of(to, (g + 1) * out);
            for (i64 t = 0; t < grid->taps; t++)
                outer_product(flow + low, b->middle, high - low, table + t * TILE_ROWS,
                              grid->taps * TILE_ROWS, g * in, count, b->grad_weight1 + low * row + t * in, row, in);
        }
    }
}

static void write_grad_input(const Branch *b, i64 top, i64 left, const Grid *grid, i64 first, i64 count,
                             const float *rows) {
    for (i64 i = 0; i < count; i++) {
        const i64 pixel = first + i, image = pixel / (grid->rows * grid->columns);
        const i64 y = pixel / grid->columns % grid->rows * b->stride + top, x = pixel % grid->columns * b->stride + left;
        write_values(b->grad_input, ((image * b->height + y) * b->width + x) * b->in_channels, b->in_channels,
                     rows + i * b->in_channels);
    }
}

/* The flow before the first norm (`norm1`: that of norm_backward), and the gradients of the grouped convolution. */
static void convolve_backward(const Branch *b, const float *norm1) {
    const Room room = branch_room(b);
    const i64 in = b->in_channels / b->groups, out = b->middle / b->groups, taps = b->kernel * b->kernel;
    const float *zeros = b->scratch + room.zeros;
    const Grid forward = forward_grid(b, prepare(b, &room), zeros);
    float *packed = b->scratch + room.packed;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++)
        weight1_backward(b, norm1, &forward, b->middle * t / b->threads, b->middle * (t + 1) / b->threads,
                         (const float **)(OWN(room) + room.table));
    if (!b->grad_input.data) return;
    pack_weight1(b, 1, packed);
    for (i64 phase = 0; phase < b->stride * b->stride; phase++) {
        const i64 top = phase / b->stride, left = phase % b->stride;
        if (top >= b->height || left >= b->width) continue;
        const Grid grid = backward_grid(b, top, left, zeros);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
        for (i64 t = 0; t < b->threads; t++) {
            float *own = OWN(room), *rows = own + room.act;
            const float **table = (const float **)(own + room.table);
            EACH_CHUNK(b->images * grid.rows * grid.columns) {
                grid_addresses(&grid, first, count, table);
                for (i64 g = 0; g < b->groups; g++) {
                    const Finish f = {.kind = AS_IT_IS, .out = rows + g * in, .pitch = b->in_channels};
                    dense_pixels(&grid, count, table, g * out, out, taps,
                                 packed + g * whole(in, TILE_COLUMNS) * taps * out, in, &f);
                }
                write_grad_input(b, top, left, &grid, first, count, rows);
            }
        }
    }
}

/* ---- the norms' vectors */

static void reduce(const Branch *b, double *sums, i64 channels) {
    if (b->reduce) b->reduce(sums, 2 * channels);
}

/* From sums about `centre`: the batch's statistics, which the running ones follow. */
static void set_statistics(const Branch *b, const Norm *norm, const double *sums, const float *centre, i64 channels) {
    for (i64 i = 0; i < channels; i++) {
        const double shift = sums[i] / b->values, var = fmax(sums[channels + i] / b->values - shift * shift, 0);
        norm->mean[i] = (float)(centre[i] + shift);
        norm->inverse[i] = (float)(1 / sqrt(var + norm->eps));
        if (!norm->running_mean || norm->rate == 0) continue;
        norm->running_mean[i] += (float)(norm->rate * (norm->mean[i] - norm->running_mean[i]));
        norm->running_var[i] += (float)(norm->rate * (var * b->values / (b->values - 1) - norm->running_var[i]));
    }
}

/* to: scale, shift */
static void set_affine(const Norm *norm, i64 channels, float *to) {
    for (i64 i = 0; i < channels; i++) {
        to[i] = norm->gamma[i] * norm->inverse[i];
        to[channels + i] = norm->beta[i] - norm->mean[i] * to[i];
    }
}

/* The norm's own gradients, of this process; to: what norm_backward takes, by the sums of all processes. */
static void set_backward(const Branch *b, const Norm *norm, double *sums, i64 channels, float *to) {
    for (i64 i = 0; i < channels; i++) {
        norm->grad_beta[i] = (float)sums[i];
        norm->grad_gamma[i] = (float)sums[channels + i];
    }
    reduce(b, sums, channels);
    for (i64 i = 0; i < channels; i++) {
        const float a = norm->gamma[i] * norm->inverse[i];
        const float of_maps = -a * norm->inverse[i] * (float)(sums[channels + i] / b->values);
        to[i] = a;
        to[channels + i] = of_maps;
        to[2 * channels + i] = -a * (float)(sums[i] / b->values);
        to[3 * channels + i] = norm->mean[i];
    }
}

static void set_centre(const Norm *norm, i64 channels, float *to) {
    if (norm->running_mean) memcpy(to, norm->running_mean, (size_t)channels * sizeof(float));
    else memset(to, 0, (size_t)channels * sizeof(float));
}

static void branch_forward(const Branch *b) {
    const Room room = branch_room(b);
    const i64 m = b->middle, n = b->out_channels;
    float *norm1 = b->scratch + room.vectors, *norm2 = norm1 + 2 * m, *centre = norm2 + 2 * n;
    set_centre(&b->norm1, m, centre);
    double *sums = convolve(b, centre);
    reduce(b, sums, m);
    set_statistics(b, &b->norm1, sums, centre, m);
    set_affine(&b->norm1, m, norm1);
    set_centre(&b->norm2, n, centre);
    sums = convolve_outer(b, norm1, centre);
    reduce(b, sums, n);
    set_statistics(b, &b->norm2, sums, centre, n);
    set_affine(&b->norm2, n, norm2);
    finish_forward(b, norm2);
}

static void branch_backward(const Branch *b) {
    const Room room = branch_room(b);
    const i64 m = b->middle, n = b->out_channels;
    float *affine1 = b->scratch + room.vectors, *norm2 = affine1 + 2 * m, *norm1 = norm2;
    convolve(b, 0);
    set_affine(&b->norm1, m, affine1);
    set_backward(b, &b->norm2, outer_sums(b, affine1), n, norm2);
    double *sums = inner(b, affine1, norm2);
    set_backward(b, &b->norm1, sums, m, norm1);
    convolve_backward(b, norm1);
}
