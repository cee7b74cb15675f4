/* A chain, forward or backward, row by row of its maps: each thread takes a share of the rows of the batch's output
 * and, of each map in between, holds the few rows that the next stage needs. So wide maps never exist as a whole. */
#include "smooth.h"

/* One thread's pass over some rows. */
typedef struct {
    const Plan *plan;
    float *shared, *own;
    i64 image, images;
    i64 low[MOST_STAGES + 1], done[MOST_STAGES + 1]; /* rows of each map in its window: from low to before done */
    i64 first_own[MOST_STAGES + 1];    /* earlier rows are another thread's to count */
} Pass;

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
        pointwise(row_at(pass, step, 0, a), depth, rows, depth, reads_pairs(p, s), packed, columns, &f);
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
                    dense_line(&line, depth, reads_pairs(p, s), s->kernel * s->kernel, packed, columns, &g,
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
        .kind = s->activation == CLAMP ? MASK_SUM_SCALE : SUM_SCALE,
        .pitch = s->out_channels,
        .scale = pass->shared + p->scale[index],
        .mask = s->activation == CLAMP ? s->mask + pass->image * image_bytes : 0,
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
    const Stage *s = index ? c->stage + index - 1 : 0;
    const int smooth = s && is_smooth(s), apart = map == 0 || at_block_input || smooth;
    Finish plain = {.kind = AS_IT_IS, .pitch = n};
    f.pairs = in_pairs(p, map) && !smooth;
    if (map > 0) convolve_rows(pass, map - 1, a, b, apart ? plain : f);
    for (i64 image = 0; image < pass->images; image++)
        for (i64 r = a; r < b; r++) {
            float *to = row_at(pass, map, image, r);
            const float *from = to;
            const i64 at = ((pass->image + image) * p->height[map] + r) * w * n;
            if (map == 0) from = read_values(c->grad_output, at, w * n, to);
            if (at_block_input) add_to_block_input(pass, map, image, r, to);
            if (s && apart) {
                Finish g = f;
                g.out = to;
                if (g.mask) g.mask += (image * p->height[map] + r) * w * f.mask_pitch;
                if (smooth) finish_smooth(s->activation, from, s->before + at, w, n, &g);
                else finish_rows(from, w, n, &g);
                if (smooth && in_pairs(p, map)) to_pairs(to, w, n, to);
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

static void activate_rows(const Pass *pass, i64 map, i64 a, i64 b, float *before) {
    const Plan *p = pass->plan;
    const i64 row = p->width[map] * p->channels[map];
    for (i64 image = 0; image < pass->images; image++) {
        const i64 at = ((pass->image + image) * p->height[map] + a) * row; /* rows of an image lie one after the other */
        activate(stage_of(p, map - 1)->activation, row_at(pass, map, image, a), (b - a) * row, before ? before + at : 0);
    }
}

static void make_rows(const Pass *pass, i64 map, i64 a, i64 b, int counts) {
    const Plan *p = pass->plan;
    const Chain *c = p->chain;
    const i64 row = p->width[map] * p->channels[map];
    const Stage *s = map ? stage_of(p, map - 1) : 0; /* that makes the map */
    const int pools = map == c->branch && c->pooled.data, ends = map == p->steps, smooth = s && is_smooth(s);
    const int packs = in_pairs(p, map) && (!s || pools || smooth); /* once it is there; else the stage writes pairs */
    if (s) {
        const i64 image_bytes = p->height[map] * row / 8;
        convolve_rows(pass, map - 1, a, b, (Finish){
            .pairs = in_pairs(p, map) && !packs,
            .kind = s->activation == CLAMP ? SCALE_CLAMP : SCALE,
            .pitch = s->out_channels,
            .scale = pass->shared + p->scale[map - 1],
            .shift = pass->shared + p->shift[map - 1],
            .upper = s->upper,
            .mask = counts && s->mask ? s->mask + pass->image * image_bytes : 0,
            .mask_pitch = s->out_channels / 8,
        });
        if (smooth) activate_rows(pass, map, a, b, counts ? s->before : 0);
    }
    if (s && !pools && !packs && !(ends && (c->residual || c->output.is_bf16))) return;
    for (i64 image = 0; image < pass->images; image++)
        for (i64 r = a; r < b; r++) {
            const i64 at = ((pass->image + image) * p->height[map] + r) * row;
            float *to = row_at(pass, map, image, r);
            if (map == 0 && c->input.is_bf16) read_values(c->input, at, row, to);
            if (pools) pool_row(pass, map, image, r);
            if (packs) to_pairs(to, p->width[map], p->channels[map], to);
            if (ends && c->residual) add_residual_row(pass, at, row, to);
            if (ends && c->output.is_bf16) write_values(c->output, at, row, to);
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
                pack_stage(p, c->stage + i, panel, shared + p->weights[i]);
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
