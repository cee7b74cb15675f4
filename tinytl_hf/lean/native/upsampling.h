/* Bilinear up-sampling (align_corners false) that is added to maps in place, and its adjoint. */
#include "branch.h"

/* The two small rows or columns between which `i` of `size` lies, and how far it is towards the second. */
static float place_between(i64 i, i64 size, i64 small, i64 *before, i64 *after) {
    const float scale = (float)small / (float)size, at = fmaxf(((float)i + .5f) * scale - .5f, 0);
    *before = min_of((i64)at, small - 1);
    *after = min_of(*before + 1, small - 1);
    return at - (float)*before;
}

/* In a thread's scratch: a row of small maps, a row of maps. */
static i64 upsampling_scratch(const Upsampling *u) {
    return u->threads * (2 * whole(u->small_width * u->channels, 16) + 2 * whole(u->width * u->channels, 16));
}

/* to = (1 - share) * a + share * b */
static void mix(const float *a, const float *b, float share, i64 count, float *to) {
    for (i64 i = 0; i < count; i++) to[i] = a[i] + share * (b[i] - a[i]);
}

static void add_scaled(const float *from, float scale, i64 count, float *to) {
    for (i64 i = 0; i < count; i++) to[i] += scale * from[i];
}

static void upsample_row(const Upsampling *u, i64 image, i64 y, float *room) {
    const i64 n = u->channels, small_row = u->small_width * n, row = u->width * n;
    float *line = room, *other = room + whole(small_row, 16), *values = other + whole(small_row, 16);
    i64 a, b;
    const float share = place_between(y, u->height, u->small_height, &a, &b);
    const i64 at = image * u->small_height;
    const float *upper = read_values(u->small, (at + a) * small_row, small_row, line);
    const float *lower = read_values(u->small, (at + b) * small_row, small_row, other);
    mix(upper, lower, share, small_row, line);
    const i64 place = (image * u->height + y) * row;
    float *to = (float *)read_values(u->maps, place, row, values); /* fp32 maps are written where they are */
    for (i64 x = 0; x < u->width; x++) {
        const float part = place_between(x, u->width, u->small_width, &a, &b);
        const float *left = line + a * n, *right = line + b * n;
        for (i64 i = 0; i < n; i++) to[x * n + i] += left[i] + part * (right[i] - left[i]);
    }
    write_values(u->maps, place, row, to);
}

static void upsample_add(const Upsampling *u) {
    const i64 own = upsampling_scratch(u) / u->threads;
#pragma omp parallel for schedule(static) num_threads((int)u->threads)
    for (i64 t = 0; t < u->threads; t++)
        for (i64 r = u->images * u->height * t / u->threads; r < u->images * u->height * (t + 1) / u->threads; r++)
            upsample_row(u, r / u->height, r % u->height, u->scratch + t * own);
}

/* A small row gathers from the rows of maps between its neighbours. */
static void gather_row(const Upsampling *u, i64 image, i64 small_y, float *room) {
    const i64 n = u->channels, small_row = u->small_width * n, row = u->width * n;
    float *line = room, *values = room + 2 * whole(small_row, 16), *sums = values + whole(row, 16);
    i64 a, b;
    memset(sums, 0, (size_t)row * sizeof(float));
    memset(line, 0, (size_t)small_row * sizeof(float));
    const i64 reach = u->height / u->small_height + 2, middle = small_y * u->height / u->small_height;
    for (i64 y = max_of(0, middle - reach); y < min_of(u->height, middle + 2 * reach); y++) {
        const float share = place_between(y, u->height, u->small_height, &a, &b);
        const float weight = (a == small_y ? 1 - share : 0) + (b == small_y ? share : 0);
        if (weight == 0) continue;
        add_scaled(read_values(u->maps, (image * u->height + y) * row, row, values), weight, row, sums);
    }
    for (i64 x = 0; x < u->width; x++) {
        const float share = place_between(x, u->width, u->small_width, &a, &b);
        add_scaled(sums + x * n, 1 - share, n, line + a * n);
        add_scaled(sums + x * n, share, n, line + b * n);
    }
    write_values(u->small, (image * u->small_height + small_y) * small_row, small_row, line);
}

static void upsample_backward(const Upsampling *u) {
    const i64 own = upsampling_scratch(u) / u->threads, rows = u->images * u->small_height;
#pragma omp parallel for schedule(static) num_threads((int)u->threads)
    for (i64 t = 0; t < u->threads; t++)
        for (i64 r = rows * t / u->threads; r < rows * (t + 1) / u->threads; r++)
            gather_row(u, r / u->small_height, r % u->small_height, u->scratch + t * own);
}
