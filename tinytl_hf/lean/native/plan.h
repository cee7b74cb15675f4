/* What a pass of a chain needs to know beforehand: the sizes of its maps, how many rows of each exist at a time, where
 * they lie in the scratch memory; and the weights in the order in which the tiles read them. */
#include "tiles.h"

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
    int pairs;                         /* whether dense convolutions of an even depth multiply pairs of bf16 values */
    i64 line, table, row;
    i64 shared, per_thread;            /* fp32 values of scratch */
} Plan;

static int is_pointwise(const Stage *s) { return s->kernel == 1 && s->stride == 1 && !s->depthwise && !s->padding; }

static int is_smooth(const Stage *s) { return s->activation == HARDSWISH || s->activation == SILU; }

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

/* Whether what a stage reads is in pairs of bf16 values. */
static int reads_pairs(const Plan *p, const Stage *s) {
    const int of_caller = s == stage_of(p, 0) && in_place(p, 0); /* which stays as it is */
    return p->pairs && !of_caller && !s->depthwise && (p->backward ? s->out_channels : s->in_channels) % 2 == 0;
}

/* Whether a map is held as pairs. */
static int in_pairs(const Plan *p, i64 map) { return map < p->steps && reads_pairs(p, stage_of(p, map)); }

/* Lays out the windows for `rows` rows of the last map; their size in fp32 values. */
static i64 set_windows(Plan *p, i64 rows) {
    i64 total = 0;
    p->capacity[p->steps] = rows;
    for (i64 map = p->steps; map >= 0; map--) {
        if (map < p->steps) {
            const Stage *s = stage_of(p, map);
            const i64 n = p->capacity[map + 1];
            const i64 beyond = (p->height[map] + 2 * s->padding - s->kernel) % s->stride - s->padding; /* of all taps */
            const i64 wanted = p->backward ? (n + s->kernel - 1) / s->stride + 2
                                           : (n - 1) * s->stride + s->kernel + max_of(beyond, 0);
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

static i64 packed_size(const Plan *p, const Stage *s) {
    const i64 taps = s->kernel * s->kernel;
    if (s->depthwise) return taps * s->in_channels;
    const i64 columns = p->backward ? s->in_channels : s->out_channels;
    const i64 depth = p->backward ? s->out_channels : s->in_channels;
    return whole(columns, TILE_COLUMNS) * taps * (reads_pairs(p, s) ? depth / 2 : depth);
}

static Plan make_plan(const Chain *c) {
    Plan p = {.chain = c, .backward = c->grad_output.data != 0};
    p.pairs = HAS_PAIRS && (p.backward ? c->grad_output : c->output).is_bf16;
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
        p.shared = p.weights[i] + whole(packed_size(&p, s), 16);
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

static void pack_stage(const Plan *p, const Stage *s, i64 panel, float *packed) {
    const int backward = (int)p->backward, transposed = backward && !s->depthwise, pairs = reads_pairs(p, s);
    const i64 taps = s->kernel * s->kernel, *strides = s->weight_strides;
    const i64 depth = backward ? s->out_channels : s->in_channels, columns = backward ? s->in_channels : s->out_channels;
    for (i64 t = 0; t < taps; t++) {
        const i64 place = t / s->kernel * strides[2] + t % s->kernel * strides[3];
        const Weight weight = {
            .fp32 = s->weight ? s->weight + place : 0,
            .int8 = s->weight ? 0 : s->int8_weight + place,
            .scales = s->int8_scale,
            .scale_by_column = !transposed,
            .column_stride = strides[transposed ? 1 : 0],
            .depth_stride = strides[transposed ? 0 : 1],
        };
        if (s->depthwise)
            for (i64 i = 0; i < s->in_channels; i++) packed[t * s->in_channels + i] = weight_at(&weight, i, 0);
        else
            pack_panel(&weight, panel * TILE_COLUMNS, columns, depth, pairs,
                       packed + (panel * taps + t) * (pairs ? depth / 2 : depth) * TILE_COLUMNS);
    }
}
