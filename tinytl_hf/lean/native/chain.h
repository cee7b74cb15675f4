/* A chain, forward or backward, row by row of its maps: each thread takes a share of the rows of the batch's output
 * and, of each map in between, holds the few rows that the next stage needs. So wide maps never exist as a whole. */
#include "tiles.h"
#ifdef _OPENMP
#include <omp.h>
#endif

enum { MOST_STAGES = 16 };

/* Maps in the order in which a pass makes them: from the input to the output, or backward. */
typedef struct {
    const Chain *chain;
    i64 backward;
    i64 steps;                         /* map 0 is what the pass starts from, map `steps` what it ends with */
    i64 height[MOST_STAGES + 1], width[MOST_STAGES + 1], channels[MOST_STAGES + 1];
    i64 images, rows;                  /* of the last map that are made at a time: whole images, or rows of one */
    i64 capacity[MOST_STAGES + 1];     /* rows of each map in its window */
    i64 window[MOST_STAGES + 1];       /* where it lies in a thread's scratch; -1: in the caller's own tensor */
    i64 weights[MOST_STAGES], scale[MOST_STAGES], shift[MOST_STAGES], zeros; /* places in the scratch */
    i64 sums[MOST_STAGES], totals, most_sums;                                /* in a thread's scratch */
    i64 line, table, row;
    i64 shared, per_thread;            /* fp32 values of scratch */
} Plan;

/* One thread's pass over some rows. */
typedef struct {
    const Plan *plan;
    float *shared, *own;
    i64 image, images;
    i64 low[MOST_STAGES + 1], done[MOST_STAGES + 1]; /* rows of each map in its window: from low to before done */
    i64 first_own[MOST_STAGES + 1];    /* earlier rows are another thread's to count */
} Pass;

static int is_pointwise(const Stage *s) { return s->kernel == 1 && s->stride == 1 && !s->depthwise && !s->padding; }

static i64 size_after(const Stage *s, i64 size) { return (size + 2 * s->padding - s->kernel) / s->stride + 1; }

/* The stage between map `step` and the next. */
static const Stage *stage_of(const Plan *p, i64 step) {
    return p->chain->stage + (p->backward ? p->chain->stages - 1 - step : step);
}

/* The index, in forward order, of a pass's map. */
static i64 map_index(const Plan *p, i64 map) { return p->backward ? p->chain->stages - map : map; }

/* Rows of map `step` that the rows from `a` to before `b` of the next are made of. */
static void needed_rows(const Plan *p, i64 step, i64 a, i64 b, i64 *low, i64 *high) {
    const Stage *s = stage_of(p, step);
    if (p->backward) {
        const i64 from = a + s->padding - s->kernel + 1;
        *low = from <= 0 ? 0 : whole(from, s->stride) / s->stride;
        *high = (b - 1 + s->padding) / s->stride + 1;
    } else {
        *low = a * s->stride - s->padding;
        *high = (b - 1) * s->stride - s->padding + s->kernel;
    }
    if (b == p->height[step + 1]) *high = p->height[step];
    *low = min_of(max_of(*low, 0), p->height[step]);
    *high = min_of(max_of(*high, 0), p->height[step]);
}

static void set_sizes(Plan *p, const Chain *c) {
    i64 h[MOST_STAGES + 1] = {c->height}, w[MOST_STAGES + 1] = {c->width}, n[MOST_STAGES + 1];
    n[0] = c->stage[0].in_channels;
    for (i64 i = 0; i < c->stages; i++) {
        h[i + 1] = size_after(c->stage + i, h[i]);
        w[i + 1] = size_after(c->stage + i, w[i]);
        n[i + 1] = c->stage[i].out_channels;
    }
    p->steps = p->backward ? c->stages - (c->grad_input.data ? 0 : c->first + 1) : c->stages;
    for (i64 map = 0; map <= p->steps; map++) {
        const i64 i = map_index(p, map);
        p->height[map] = h[i];
        p->width[map] = w[i];
        p->channels[map] = n[i];
    }
}

/* Whether a pass reads or writes a map where the caller has it. */
static int in_place(const Plan *p, i64 map) {
    const Chain *c = p->chain;
    if (!p->backward) return map == 0 ? !c->input.is_bf16 : map == p->steps && !c->output.is_bf16;
    return map == p->steps && c->grad_input.data && !c->grad_input.is_bf16;
}

/* Lays out the windows for `rows` rows of the last map; their size in fp32 values. */
static i64 set_windows(Plan *p, i64 rows) {
    i64 total = 0;
    p->capacity[p->steps] = rows;
    for (i64 map = p->steps; map >= 0; map--) {
        if (map < p->steps) {
            const Stage *s = stage_of(p, map);
            const i64 n = p->capacity[map + 1];
            const i64 wanted = p->backward ? (n + s->kernel - 1) / s->stride + 2 : (n - 1) * s->stride + s->kernel;
            p->capacity[map] = n == p->height[map + 1] ? p->height[map] : min_of(wanted, p->height[map]);
        }
        p->window[map] = -1;
        if (in_place(p, map)) continue;
        p->window[map] = total;
        total += whole(p->capacity[map] * p->width[map] * p->channels[map], 16);
    }
    return total;
}

static i64 set_tile(Plan *p, const Chain *c) {
    const i64 fits = max_of(c->cache / (i64)sizeof(float), 1), height = p->height[p->steps];
    p->images = 1;
    p->rows = height;
    i64 total = set_windows(p, height);
    if (total <= fits) {
        p->images = total ? min_of(fits / total, whole(c->images, c->threads) / c->threads) : 1;
        p->images = max_of(p->images, 1);
        for (i64 map = 0; map <= p->steps; map++) p->window[map] *= p->window[map] < 0 ? 1 : p->images;
        return total * p->images;
    }
    i64 rows = 1;
    while (rows < height && set_windows(p, rows + 1) <= fits) rows++;
    p->rows = whole(height, rows) / rows; /* tiles ... */
    p->rows = whole(height, p->rows) / p->rows; /* ... of equal size */
    return set_windows(p, p->rows);
}

static i64 packed_size(const Stage *s, int backward) {
    const i64 taps = s->kernel * s->kernel;
    if (s->depthwise) return taps * s->in_channels;
    const i64 columns = backward ? s->in_channels : s->out_channels;
    return whole(columns, TILE_COLUMNS) * taps * (backward ? s->out_channels : s->in_channels);
}

static Plan make_plan(const Chain *c) {
    Plan p = {.chain = c, .backward = c->grad_output.data != 0};
    set_sizes(&p, c);
    i64 at = set_tile(&p, c), most_channels = 0, most_table = 0, most_row = 0;
    for (i64 i = 0; i < c->stages; i++) {
        p.sums[i] = at;
        at += whole(c->stage[i].out_channels, 16);
        most_channels = max_of(most_channels, max_of(c->stage[i].in_channels, c->stage[i].out_channels));
        p.most_sums = max_of(p.most_sums, c->stage[i].out_channels);
    }
    p.totals = at;
    at += 2 * (at - p.sums[0]); /* as fp64 */
    for (i64 map = 0; map <= p.steps; map++) {
        most_row = max_of(most_row, p.width[map] * p.channels[map]);
        if (map == p.steps) continue;
        const Stage *s = stage_of(&p, map);
        if (!s->depthwise) most_table = max_of(most_table, s->kernel * s->kernel * (p.width[map + 1] + TILE_ROWS));
    }
    p.line = at;
    p.row = p.line + whole(most_row, 16);
    p.table = p.row + whole(most_row, 16);
    p.per_thread = whole(p.table + 2 * most_table, 16);
    for (i64 i = 0; i < c->stages; i++) {
        const Stage *s = c->stage + i;
        p.scale[i] = p.shared;
        p.shift[i] = p.scale[i] + whole(s->out_channels, 16);
        p.weights[i] = p.shift[i] + whole(s->out_channels, 16);
        p.shared = p.weights[i] + whole(packed_size(s, (int)p.backward), 16);
    }
    p.zeros = p.shared;
    p.shared += whole(most_channels, 16);
    return p;
}

static i64 chain_scratch(const Chain *c) {
    const Plan p = make_plan(c);
    return p.shared + c->threads * p.per_thread;
}

/* What a stage's output is multiplied by and what is added: its norm and bias. */
static void set_scale(const Stage *s, float *scale, float *shift) {
    for (i64 i = 0; i < s->out_channels; i++) {
        const float bias = s->bias ? s->bias[i] : 0;
        scale[i] = s->gamma ? s->gamma[i] * (float)(1 / sqrt((double)s->var[i] + s->eps)) : 1;
        shift[i] = s->gamma ? bias - s->mean[i] * scale[i] : bias;
    }
}

static i64 panels_of(const Stage *s, int backward) {
    return s->depthwise ? 1 : whole(backward ? s->in_channels : s->out_channels, TILE_COLUMNS) / TILE_COLUMNS;
}

static void pack_stage(const Stage *s, int backward, i64 panel, float *packed) {
    const i64 taps = s->kernel * s->kernel, *strides = s->weight_strides;
    const i64 depth = backward ? s->out_channels : s->in_channels, columns = backward ? s->in_channels : s->out_channels;
    for (i64 t = 0; t < taps; t++) {
        const i64 place = t / s->kernel * strides[2] + t % s->kernel * strides[3];
        const float *weight = s->weight ? s->weight + place : 0;
        const int8_t *int8 = s->weight ? 0 : s->int8_weight + place;
        if (s->depthwise)
            for (i64 i = 0; i < s->in_channels; i++)
                packed[t * s->in_channels + i] =
                    weight ? weight[i * strides[0]] : int8[i * strides[0]] * s->int8_scale[i];
        else
            pack_panel(weight, int8, s->int8_scale, !backward, strides[backward ? 1 : 0], strides[backward ? 0 : 1],
                       panel * TILE_COLUMNS, columns, depth, packed + (panel * taps + t) * depth * TILE_COLUMNS);
    }
}

/* Where row `r` of an image's map lies, channel 0. */
static float *row_at(const Pass *pass, i64 map, i64 image, i64 r) {
    const Plan *p = pass->plan;
    const i64 row = p->width[map] * p->channels[map];
    if (p->window[map] >= 0)
        return pass->own + p->window[map] + (image * p->capacity[map] + r - pass->low[map]) * row;
    const Chain *c = p->chain;
    const Maps maps = map ? (p->backward ? c->grad_input : c->output) : c->input;
    return (float *)maps.data + ((pass->image + image) * p->height[map] + r) * row;
}

/* The taps of row `r` of the next map, for a pass forward. */
static void forward_line(const Pass *pass, i64 step, i64 image, i64 r, Line *line) {
    const Plan *p = pass->plan;
    const Stage *s = stage_of(p, step);
    *line = (Line){.count = p->width[step + 1], .step = 1, .stride = s->stride, .width = p->width[step]};
    for (i64 y = 0; y < s->kernel; y++) {
        const i64 from = r * s->stride - s->padding + y;
        if (from < 0 || from >= p->height[step]) continue;
        for (i64 x = 0; x < s->kernel; x++, line->taps++) {
            line->row[line->taps] = row_at(pass, step, image, from);
            line->x[line->taps] = x - s->padding;
            line->at[line->taps] = y * s->kernel + x;
        }
    }
}

/* Those of every `stride`-th pixel from `phase` on of row `r`, for a pass backward: other pixels have other taps. */
static void backward_line(const Pass *pass, i64 step, i64 image, i64 r, i64 phase, Line *line) {
    const Plan *p = pass->plan;
    const Stage *s = stage_of(p, step);
    const i64 count = (p->width[step + 1] - phase + s->stride - 1) / s->stride;
    *line = (Line){.count = count, .first = phase, .step = s->stride, .stride = 1, .width = p->width[step]};
    for (i64 y = 0; y < s->kernel; y++) {
        const i64 row = r + s->padding - y;
        if (row < 0 || row % s->stride || row / s->stride >= p->height[step]) continue;
        for (i64 x = 0; x < s->kernel; x++) {
            const i64 column = phase + s->padding - x;
            if ((column % s->stride + s->stride) % s->stride) continue;
            line->row[line->taps] = row_at(pass, step, image, row / s->stride);
            line->x[line->taps] = column < 0 ? -(-column / s->stride) : column / s->stride;
            line->at[line->taps++] = y * s->kernel + x;
        }
    }
}

/* Rows from `a` to before `b` of the next map, for all images of the pass; `f` is of row 0 of image 0. */
static void convolve_rows(const Pass *pass, i64 step, i64 a, i64 b, Finish f) {
    const Plan *p = pass->plan;
    const Stage *s = stage_of(p, step);
    const i64 depth = p->channels[step], columns = p->channels[step + 1], width = p->width[step + 1];
    const float *packed = pass->shared + p->weights[s - p->chain->stage];
    const i64 image_rows = p->height[step + 1] * width; /* of f */
    if (is_pointwise(s)) {
        const i64 rows = pass->images > 1 ? pass->images * image_rows : (b - a) * width;
        f.out = row_at(pass, step + 1, 0, a);
        if (f.mask) f.mask += a * width * f.mask_pitch;
        pointwise(row_at(pass, step, 0, a), depth, rows, depth, packed, columns, &f);
        return;
    }
    Line line;
    for (i64 image = 0; image < pass->images; image++)
        for (i64 r = a; r < b; r++)
            for (i64 phase = 0; phase < (p->backward ? min_of(s->stride, width) : 1); phase++) {
                Finish g = f;
                g.out = row_at(pass, step + 1, image, r);
                if (g.mask) g.mask += (image * image_rows + r * width) * f.mask_pitch;
                if (p->backward) backward_line(pass, step, image, r, phase, &line);
                else forward_line(pass, step, image, r, &line);
                if (s->depthwise) depthwise_line(&line, packed, columns, &g);
                else
                    dense_line(&line, depth, s->kernel * s->kernel, packed, columns, &g,
                               pass->shared + p->zeros, (const float **)(pass->own + p->table));
            }
}

/* What the gradients of a stage's output go through before they reach its convolution. */
static Finish backward_finish(const Pass *pass, i64 index, int counts) {
    const Plan *p = pass->plan;
    const Stage *s = p->chain->stage + index;
    const i64 map = p->chain->stages - 1 - index;
    const i64 image_bytes = p->height[map] * p->width[map] * s->out_channels / 8;
    return (Finish){
        .kind = s->activated ? MASK_SUM_SCALE : SUM_SCALE,
        .pitch = s->out_channels,
        .scale = pass->shared + p->scale[index],
        .mask = s->activated ? s->mask + pass->image * image_bytes : 0,
        .mask_pitch = s->out_channels / 8,
        .sums = counts ? pass->own + p->sums[index] : pass->own + p->row, /* the row's room is free then */
    };
}

/* Adds to a row of the gradient of the block's input what reaches it beside the block. */
static void add_to_block_input(const Pass *pass, i64 map, i64 image, i64 r, float *to) {
    const Plan *p = pass->plan;
    const Chain *c = p->chain;
    const i64 w = p->width[map], n = p->channels[map], at = pass->image + image;
    if (c->residual) {
        const float *outer = read_values(c->grad_output, (at * p->height[0] + r) * w * n, w * n, pass->own + p->row);
        for (i64 i = 0; i < w * n; i++) to[i] += outer[i];
    }
    if (!c->grad_pooled.data || r / 2 >= p->height[map] / 2) return;
    const i64 half = w / 2, place = (at * (p->height[map] / 2) + r / 2) * half * n;
    const float *small = read_values(c->grad_pooled, place, half * n, pass->own + p->row);
    for (i64 x = 0; x < 2 * half; x++)
        for (i64 i = 0; i < n; i++) to[x * n + i] += .25f * small[x / 2 * n + i];
}

/* Rows from `a` to before `b` of a map of a pass backward; `counts`: their sums are this thread's. */
static void make_gradient_rows(const Pass *pass, i64 map, i64 a, i64 b, int counts) {
    const Plan *p = pass->plan;
    const Chain *c = p->chain;
    const i64 index = map_index(p, map), w = p->width[map], n = p->channels[map]; /* after stage index - 1 */
    Finish f = index ? backward_finish(pass, index - 1, counts) : (Finish){.kind = AS_IT_IS, .pitch = n};
    const int at_block_input = map > 0 && index == c->branch && (c->residual || c->grad_pooled.data);
    Finish plain = {.kind = AS_IT_IS, .pitch = n};
    if (map > 0) convolve_rows(pass, map - 1, a, b, at_block_input ? plain : f);
    for (i64 image = 0; image < pass->images; image++)
        for (i64 r = a; r < b; r++) {
            float *to = row_at(pass, map, image, r);
            const float *from = to;
            const i64 at = ((pass->image + image) * p->height[map] + r) * w * n;
            if (map == 0) from = read_values(c->grad_output, at, w * n, to);
            if (at_block_input) add_to_block_input(pass, map, image, r, to);
            if (index && (map == 0 || at_block_input)) {
                Finish g = f;
                g.out = to;
                if (g.mask) g.mask += (image * p->height[map] + r) * w * f.mask_pitch;
                finish_rows(from, w, n, &g);
            }
            if (index == 0 && c->grad_input.is_bf16) write_values(c->grad_input, at, w * n, to);
        }
}

/* Streams rows of the block's input into the means of 2x2 px: the odd row of a pair finds the even one's sums. */
static void pool_row(const Pass *pass, i64 map, i64 image, i64 r) {
    const Plan *p = pass->plan;
    const i64 half = p->width[map] / 2, n = p->channels[map];
    const float *from = row_at(pass, map, image, r);
    float *line = pass->own + p->line;
    for (i64 x = 0; x < half; x++)
        for (i64 i = 0; i < n; i++) {
            const float pair = from[2 * x * n + i] + from[(2 * x + 1) * n + i];
            line[x * n + i] = r % 2 ? .25f * (line[x * n + i] + pair) : pair;
        }
    if (r % 2 && r >= pass->first_own[map])
        write_values(p->chain->pooled, ((pass->image + image) * (p->height[map] / 2) + r / 2) * half * n, half * n, line);
}

static void add_residual_row(const Pass *pass, i64 at, i64 count, float *to) {
    const Plan *p = pass->plan;
    const float *from = read_values(p->chain->input, at, count, pass->own + p->row);
    for (i64 i = 0; i < count; i++) to[i] += from[i];
}

static void make_rows(const Pass *pass, i64 map, i64 a, i64 b, int counts) {
    const Plan *p = pass->plan;
    const Chain *c = p->chain;
    const i64 row = p->width[map] * p->channels[map];
    if (map > 0) {
        const Stage *s = stage_of(p, map - 1);
        const i64 image_bytes = p->height[map] * row / 8;
        convolve_rows(pass, map - 1, a, b, (Finish){
            .kind = s->activated ? SCALE_CLAMP : SCALE,
            .pitch = s->out_channels,
            .scale = pass->shared + p->scale[map - 1],
            .shift = pass->shared + p->shift[map - 1],
            .upper = s->upper,
            .mask = counts && s->mask ? s->mask + pass->image * image_bytes : 0,
            .mask_pitch = s->out_channels / 8,
        });
    }
    const int pools = map == c->branch && c->pooled.data, ends = map == p->steps;
    if (map && !pools && !(ends && (c->residual || c->output.is_bf16))) return;
    for (i64 image = 0; image < pass->images; image++)
        for (i64 r = a; r < b; r++) {
            const i64 at = ((pass->image + image) * p->height[map] + r) * row;
            if (map == 0 && c->input.is_bf16) read_values(c->input, at, row, row_at(pass, map, image, r));
            if (pools) pool_row(pass, map, image, r);
            if (ends && c->residual) add_residual_row(pass, at, row, row_at(pass, map, image, r));
            if (ends && c->output.is_bf16) write_values(c->output, at, row, row_at(pass, map, image, r));
        }
}

/* Lets the window of a map begin at row `low`. */
static void slide(Pass *pass, i64 map, i64 low) {
    const Plan *p = pass->plan;
    const i64 row = p->width[map] * p->channels[map];
    if (low > pass->done[map]) pass->done[map] = low;
    if (p->window[map] >= 0 && low > pass->low[map]) {
        float *window = pass->own + p->window[map];
        memmove(window, window + (low - pass->low[map]) * row, (size_t)((pass->done[map] - low) * row) * sizeof(float));
    }
    pass->low[map] = max_of(low, pass->low[map]);
}

/* Sums of few values are added up in fp32, sums of those in fp64. */
static void flush_sums(Pass *pass) {
    const Plan *p = pass->plan;
    double *totals = (double *)(pass->own + p->totals);
    float *sums = pass->own + p->sums[0];
    for (i64 i = 0; i < p->totals - p->sums[0]; i++) {
        totals[i] += sums[i];
        sums[i] = 0;
    }
}

/* Makes the rows from `a` to before `b` of the last map, for `images` images from `image` on. */
static void run_band(const Plan *p, float *shared, float *own, i64 image, i64 images, i64 a, i64 b) {
    Pass pass = {.plan = p, .shared = shared, .own = own, .image = image, .images = images};
    i64 low, high[MOST_STAGES + 1], from[MOST_STAGES + 1];
    pass.first_own[p->steps] = a;
    for (i64 map = p->steps - 1; map >= 0; map--) {
        pass.first_own[map] = 0;
        if (pass.first_own[map + 1]) needed_rows(p, map, 0, pass.first_own[map + 1], &low, &pass.first_own[map]);
    }
    for (i64 start = a; start < b; start += p->rows) {
        from[p->steps] = start;
        high[p->steps] = min_of(start + p->rows, b);
        for (i64 map = p->steps; map >= 0; map--) {
            if (map < p->steps) {
                if (from[map + 1] < high[map + 1]) needed_rows(p, map, from[map + 1], high[map + 1], &low, high + map);
                else {
                    low = pass.low[map];
                    high[map] = pass.done[map];
                }
            } else low = start;
            slide(&pass, map, low);
            from[map] = pass.done[map];
        }
        for (i64 map = 0; map <= p->steps; map++) {
            const i64 own_from = max_of(from[map], min_of(pass.first_own[map], high[map]));
            for (int counts = 0; counts < 2; counts++) {
                const i64 x = counts ? own_from : from[map], y = counts ? high[map] : own_from;
                if (x >= y) continue;
                if (p->backward) make_gradient_rows(&pass, map, x, y, counts);
                else make_rows(&pass, map, x, y, counts);
            }
            pass.done[map] = max_of(from[map], high[map]);
        }
        if (p->backward) flush_sums(&pass);
    }
}

/* A thread's share of the batch: from row `a` to before row `b`, images counted one after the other. */
static void run_share(const Plan *p, float *shared, float *own, i64 a, i64 b) {
    const i64 height = p->height[p->steps];
    memset(own + p->sums[0], 0, (size_t)(p->line - p->sums[0]) * sizeof(float));
    while (a < b) {
        const i64 image = a / height, top = a % height;
        if (top || b - a < height) {
            const i64 end = min_of(height, top + b - a);
            run_band(p, shared, own, image, 1, top, end);
            a += end - top;
        } else {
            const i64 images = min_of(p->images, (b - a) / height);
            run_band(p, shared, own, image, images, 0, height);
            a += images * height;
        }
    }
}

static void run_chain(const Chain *c) {
    const Plan plan = make_plan(c), *p = &plan;
    float *shared = c->scratch;
    /* Shares end between images or, of few images, between pairs of rows: pooling takes two at a time. */
    const i64 height = p->height[p->steps], step = c->images >= 4 * c->threads ? height : 2;
    const i64 parts = c->images * (whole(height, step) / step);
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for schedule(static)
        for (i64 i = 0; i < c->stages; i++) set_scale(c->stage + i, shared + p->scale[i], shared + p->shift[i]);
        for (i64 i = 0; i < c->stages; i++) {
#pragma omp for schedule(static) nowait
            for (i64 panel = 0; panel < panels_of(c->stage + i, (int)p->backward); panel++)
                pack_stage(c->stage + i, (int)p->backward, panel, shared + p->weights[i]);
        }
#pragma omp single
        memset(shared + p->zeros, 0, (size_t)(p->shared - p->zeros) * sizeof(float));
#pragma omp for schedule(static)
        for (i64 t = 0; t < c->threads; t++) {
            const i64 each = whole(height, step) / step; /* parts of an image */
            const i64 from = parts * t / c->threads, to = parts * (t + 1) / c->threads;
            const i64 a = from / each * height + from % each * step, b = to / each * height + to % each * step;
            run_share(p, shared, shared + p->shared + t * p->per_thread, a, b);
        }
    }
}

static void chain_forward(const Chain *c) { run_chain(c); }

static void chain_backward(const Chain *c) {
    run_chain(c);
    const Plan p = make_plan(c);
    for (i64 i = 0; i < c->stages; i++) {
        const Stage *s = c->stage + i;
        if (!s->grad_bias) continue;
        for (i64 k = 0; k < s->out_channels; k++) {
            double sum = 0; /* in the order of the threads, so the same each time */
            for (i64 t = 0; t < c->threads; t++) {
                const float *own = c->scratch + p.shared + t * p.per_thread;
                sum += ((const double *)(own + p.totals))[p.sums[i] - p.sums[0] + k];
            }
            s->grad_bias[k] = (float)sum;
        }
    }
}
