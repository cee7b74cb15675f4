/* A lite residual's branch. Its batch statistics are of all pixels, and of all processes, so that it runs in phases,
 * each of which adds up what the next one needs. Of its wide maps it keeps one, that of the grouped convolution. */
#include "row_sums.h"

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

static void pack_weight1(const Branch *b, int backward, int pairs, float *packed) {
    const i64 taps = b->kernel * b->kernel, in = b->in_channels / b->groups, out = b->middle / b->groups;
    const i64 depth = backward ? out : in, columns = backward ? in : out;
    const i64 panels = whole(columns, TILE_COLUMNS) / TILE_COLUMNS, *strides = b->weight1_strides;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 i = 0; i < b->groups * panels; i++)
        for (i64 t = 0; t < taps; t++) {
            const Weight weight = {.fp32 = b->weight1 + i / panels * out * strides[0] + t * strides[2],
                                   .column_stride = strides[backward ? 1 : 0],
                                   .depth_stride = strides[backward ? 0 : 1]};
            pack_panel(&weight, i % panels * TILE_COLUMNS, columns, depth, pairs,
                       packed + (i * taps + t) * (pairs ? depth / 2 : depth) * TILE_COLUMNS);
        }
}

static void pack_weight2(const Branch *b, int backward, float *packed) {
    const i64 depth = backward ? b->out_channels : b->middle, columns = backward ? b->middle : b->out_channels;
    const Weight weight = {.fp32 = b->weight2, .column_stride = backward ? 1 : b->middle,
                           .depth_stride = backward ? b->middle : 1};
    const int pairs = outer_pairs(b);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 c = 0; c < columns; c += TILE_COLUMNS)
        pack_panel(&weight, c, columns, depth, pairs, packed + c * (pairs ? depth / 2 : depth));
}

/* The input, as fp32 unless pairs are read, and zeros. */
static const float *prepare(const Branch *b, const Room *room) {
    memset(b->scratch + room->zeros, 0, (size_t)(room->vectors - room->zeros) * sizeof(float));
    if (!b->input.is_bf16 || grouped_pairs(b)) return b->input.data;
    const i64 row = b->width * b->in_channels;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 r = 0; r < b->images * b->height; r++) read_values(b->input, r * row, row, b->scratch + r * row);
    return b->scratch;
}

/* Where rows of maps from `first` on are made: where they are, or in `room`, from which write_values takes them. */
static float *fp32_rows(Maps maps, i64 first, i64 channels, float *room) {
    return maps.is_bf16 ? room : (float *)maps.data + first * channels;
}

/* The grouped convolution; `sums`: also of the difference to `centre`, and of its square. */
static double *convolve(const Branch *b, const float *centre) {
    const Room room = branch_room(b);
    const float *zeros = b->scratch + room.zeros;
    const int pairs = grouped_pairs(b);
    const Grid grid = forward_grid(b, prepare(b, &room), zeros, pairs);
    const i64 in = b->in_channels / b->groups, out = b->middle / b->groups;
    const Maps maps = wide_maps(b, room.maps);
    float *packed = b->scratch + room.packed;
    pack_weight1(b, 0, pairs, packed);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) {
        float *own = OWN(room);
        const float **table = (const float **)(own + room.table);
        double *sums = (double *)(own + room.sums);
        memset(sums, 0, (size_t)(2 * b->middle) * sizeof(double));
        EACH_CHUNK(pixels_out(b)) {
            float *rows = fp32_rows(maps, first, b->middle, own + room.rows);
            grid_addresses(&grid, first, count, table);
            for (i64 g = 0; g < b->groups; g++) {
                const Finish f = {.kind = AS_IT_IS, .out = rows + g * out, .pitch = b->middle};
                dense_pixels(&grid, count, table, g, in, grid.taps, packed, out, &f);
            }
            if (centre) add_statistics(rows, count, b->middle, centre, sums);
            write_values(maps, first * b->middle, count * b->middle, rows);
        }
    }
    return centre ? merge_sums(b, &room, b->middle) : 0;
}

/* The 1x1 convolution, or its backward pass, of `count` pixels of `depth` values, which stay; `room`: for pairs. */
static void outer_convolution(const Branch *b, const float *from, i64 count, i64 depth, const float *packed,
                              i64 columns, float *to, float *room) {
    const Finish f = {.kind = AS_IT_IS, .out = to, .pitch = columns};
    const int pairs = outer_pairs(b);
    if (pairs) to_pairs(from, count, depth, room);
    pointwise(pairs ? room : from, depth, count, depth, pairs, packed, columns, &f);
}

/* What the 1x1 convolution makes of `count` pixels; `act`: what goes into it; `norm1`: scale and shift. */
static void outer_rows(const Branch *b, Maps maps, i64 first, i64 count, const float *norm1, const float *packed,
                       float *act, float *to, float *room) {
    affine(read_values(maps, first * b->middle, count * b->middle, act), act, count, b->middle, norm1, 1);
    outer_convolution(b, act, count, b->middle, packed, b->out_channels, to, room);
}

/* Forward, [pixels, out_channels] of what the 1x1 convolution makes, in fp32 until it is finished. */
static float *outer_maps(const Branch *b, const Room *room) {
    return b->output.is_bf16 ? b->scratch + room->flow : b->output.data;
}

/* The 1x1 convolution, forward, with sums as above. */
static double *convolve_outer(const Branch *b, const float *norm1, const float *centre) {
    const Room room = branch_room(b);
    float *packed = b->scratch + room.packed, *outer = outer_maps(b, &room);
    const Maps maps = wide_maps(b, room.maps);
    pack_weight2(b, 0, packed);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) {
        float *own = OWN(room);
        double *sums = (double *)(own + room.sums);
        memset(sums, 0, (size_t)(2 * b->out_channels) * sizeof(double));
        EACH_CHUNK(pixels_out(b)) {
            float *to = outer + first * b->out_channels;
            outer_rows(b, maps, first, count, norm1, packed, own + room.act, to, own + room.pair_rows);
            add_statistics(to, count, b->out_channels, centre, sums);
        }
    }
    return merge_sums(b, &room, b->out_channels);
}

static void finish_forward(const Branch *b, const float *norm2) {
    const Room room = branch_room(b);
    float *outer = outer_maps(b, &room);
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
    const Maps maps = wide_maps(b, room.maps);
    float *packed = b->scratch + room.packed;
    pack_weight2(b, 0, packed);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) {
        float *own = OWN(room), *outer = own + room.outer;
        double *sums = (double *)(own + room.sums);
        memset(sums, 0, (size_t)(2 * n) * sizeof(double));
        EACH_CHUNK(pixels_out(b)) {
            outer_rows(b, maps, first, count, norm1, packed, own + room.act, outer, own + room.pair_rows);
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
    const Maps maps = wide_maps(b, room.maps), flow = wide_maps(b, room.flow);
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
            outer_rows(b, maps, first, count, norm1, packed, act, outer, own + room.pair_rows);
            const float *gradient = read_values(b->grad_output, first * n, count * n, own + room.rows);
            norm_backward(outer, gradient, outer, count, n, norm2);
            outer_product(0, outer, n, n, x, TILE_ROWS, 0, count, weight, m, m);
            float *rows = fp32_rows(flow, first, m, own + room.rows);
            outer_convolution(b, outer, count, n, packed_backward, m, rows, own + room.pair_rows);
            const float *made = read_values(maps, first * m, count * m, outer);
            add_norm_sums(made, rows, rows, act, count, m, b->norm1.mean, b->norm1.inverse, sums);
            write_values(flow, first * m, count * m, rows);
        }
    }
    for (i64 i = 0; i < n * m; i++) {
        float sum = 0;
        for (i64 t = 0; t < b->threads; t++) sum += (OWN(room) + room.weight)[i];
        b->grad_weight2[i] = sum;
    }
    return merge_sums(b, &room, m);
}

/* The flow before the first norm; `norm1`: that of norm_backward. */
static void flow_before_norm(const Branch *b, const float *norm1) {
    const Room room = branch_room(b);
    const Maps maps = wide_maps(b, room.maps), flow = wide_maps(b, room.flow);
    const i64 m = b->middle;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++) EACH_CHUNK(pixels_out(b)) {
        float *own = OWN(room), *rows = fp32_rows(flow, first, m, own + room.rows);
        const float *made = read_values(maps, first * m, count * m, own + room.outer);
        norm_backward(made, read_values(flow, first * m, count * m, rows), rows, count, m, norm1);
        write_values(flow, first * m, count * m, rows);
    }
}

/* The gradient of the grouped convolution's weight, for the output channels from `from` to before `to`; `room`: for
 * pairs of pixels, which fit into PIXELS and TILE_ROWS. */
static void weight1_backward(const Branch *b, Maps flow, const Grid *grid, i64 from, i64 to, const float **table,
                             float *room) {
    const i64 in = b->in_channels / b->groups, out = b->middle / b->groups, row = grid->taps * in;
    const int pairs = grid->pairs;
    memset(b->grad_weight1 + from * row, 0, (size_t)((to - from) * row) * sizeof(float));
    for (i64 first = 0, count; first < pixels_out(b); first += count) {
        count = min_of(PIXELS, pixels_out(b) - first);
        const float *gradient = room;
        if (pairs) pair_pixels((uint16_t *)flow.data + first * b->middle, (const uint16_t *)grid->zeros, count, b->middle,
                               from, to, room);
        else gradient = (const float *)flow.data + first * b->middle;
        grid_addresses(grid, first, count, table);
        for (i64 g = from / out; g * out < to; g++) { /* groups that have some of these channels */
            const i64 low = max_of(from, g * out), high = min_of(to, (g + 1) * out);
            for (i64 t = 0; t < grid->taps; t++)
                outer_product(pairs, gradient + low, b->middle, high - low, table + t * TILE_ROWS,
                              grid->taps * TILE_ROWS, g * (pairs ? in / 2 : in), count,
                              b->grad_weight1 + low * row + t * in, row, in);
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

/* The gradients of the grouped convolution. */
static void convolve_backward(const Branch *b) {
    const Room room = branch_room(b);
    const i64 in = b->in_channels / b->groups, out = b->middle / b->groups, taps = b->kernel * b->kernel;
    const float *zeros = b->scratch + room.zeros;
    const int pairs = grouped_pairs(b);
    const Grid forward = forward_grid(b, prepare(b, &room), zeros, pairs);
    const Maps flow = wide_maps(b, room.flow);
    float *packed = b->scratch + room.packed;
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
    for (i64 t = 0; t < b->threads; t++)
        weight1_backward(b, flow, &forward, b->middle * t / b->threads, b->middle * (t + 1) / b->threads,
                         (const float **)(OWN(room) + room.table), OWN(room) + room.act);
    if (!b->grad_input.data) return;
    pack_weight1(b, 1, pairs, packed);
    for (i64 phase = 0; phase < b->stride * b->stride; phase++) {
        const i64 top = phase / b->stride, left = phase % b->stride;
        if (top >= b->height || left >= b->width) continue;
        const Grid grid = backward_grid(b, top, left, flow.data, zeros, pairs);
#pragma omp parallel for schedule(static) num_threads((int)b->threads)
        for (i64 t = 0; t < b->threads; t++) {
            float *own = OWN(room), *rows = own + room.act;
            const float **table = (const float **)(own + room.table);
            EACH_CHUNK(b->images * grid.rows * grid.columns) {
                grid_addresses(&grid, first, count, table);
                for (i64 g = 0; g < b->groups; g++) {
                    const Finish f = {.kind = AS_IT_IS, .out = rows + g * in, .pitch = b->in_channels};
                    dense_pixels(&grid, count, table, g, out, taps, packed, in, &f);
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

/* A variance that rounding brought below 0 is 0; what is not a number stays so. */
static double no_less_than_zero(double var) { return var < 0 ? 0 : var; }

/* From sums about `centre`: the batch's statistics, which the running ones follow. */
static void set_statistics(const Branch *b, const Norm *norm, const double *sums, const float *centre, i64 channels) {
    for (i64 i = 0; i < channels; i++) {
        const double shift = sums[i] / b->values;
        const double var = no_less_than_zero(sums[channels + i] / b->values - shift * shift);
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

/* Brings `centre` to the batch's means where it lies so far off that squares about it lose digits of the variance, as
   where the running mean is of other data: the sums are then to be taken again. */
static int moves_centre(const Branch *b, const Norm *norm, const double *sums, i64 channels, float *centre) {
    int is_far = 0;
    for (i64 i = 0; i < channels; i++) {
        const double shift = sums[i] / b->values, square = shift * shift;
        is_far |= square > 16 * (no_less_than_zero(sums[channels + i] / b->values - square) + norm->eps);
    }
    for (i64 i = 0; is_far && i < channels; i++) centre[i] += (float)(sums[i] / b->values);
    return is_far;
}

static void branch_forward(const Branch *b) {
    const Room room = branch_room(b);
    const i64 m = b->middle, n = b->out_channels;
    float *norm1 = b->scratch + room.vectors, *norm2 = norm1 + 2 * m, *centre = norm2 + 2 * n;
    set_centre(&b->norm1, m, centre);
    double *sums = convolve(b, centre);
    reduce(b, sums, m);
    if (moves_centre(b, &b->norm1, sums, m, centre)) {
        sums = convolve(b, centre);
        reduce(b, sums, m);
    }
    set_statistics(b, &b->norm1, sums, centre, m);
    set_affine(&b->norm1, m, norm1);
    set_centre(&b->norm2, n, centre);
    sums = convolve_outer(b, norm1, centre);
    reduce(b, sums, n);
    if (moves_centre(b, &b->norm2, sums, n, centre)) {
        sums = convolve_outer(b, norm1, centre);
        reduce(b, sums, n);
    }
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
    flow_before_norm(b, norm1);
    convolve_backward(b);
}
