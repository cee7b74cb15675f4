/* Vectors of fp32 values under one set of names. The file that includes this has chosen an instruction set. */
#include <math.h>
#include <string.h>
#include "native.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(TINYTL_AVX512)
#include <immintrin.h>
#define LANES 16
#define TILE_ROWS 8 /* rows of a tile of sums that stay in registers, two vectors wide */
typedef __m512 V;
INLINE __mmask16 v_first(i64 n) { return (__mmask16)((1u << n) - 1); }
INLINE V v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE V v_load_part(const float *p, i64 n) { return _mm512_maskz_loadu_ps(v_first(n), p); }
INLINE void v_store(float *p, V v) { _mm512_storeu_ps(p, v); }
INLINE void v_store_part(float *p, V v, i64 n) { _mm512_mask_storeu_ps(p, v_first(n), v); }
INLINE V v_all(float x) { return _mm512_set1_ps(x); }
INLINE V v_add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V v_sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V v_clamp(V v, V low, V high) { return _mm512_min_ps(high, _mm512_max_ps(low, v)); } /* NaN stays */
INLINE unsigned v_inside(V v, V low, V high) { /* one bit a lane: low < v < high */
    return _mm512_cmp_ps_mask(v, low, _CMP_GT_OQ) & _mm512_cmp_ps_mask(v, high, _CMP_LT_OQ);
}
INLINE V v_keep(V v, unsigned mask) { return _mm512_maskz_mov_ps((__mmask16)mask, v); }
INLINE V v_div(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V v_add_to_exponent(V v, V bits) { /* times 2 to the power of the integer in the lowest bits */
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(bits), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), power));
}

#elif defined(TINYTL_AVX2)
#include <immintrin.h>
#define LANES 8
#define TILE_ROWS 6
typedef __m256 V;
static const int32_t FIRST[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
INLINE __m256i v_first(i64 n) { return _mm256_loadu_si256((const __m256i *)(FIRST + 8 - n)); }
INLINE V v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE V v_load_part(const float *p, i64 n) { return _mm256_maskload_ps(p, v_first(n)); }
INLINE void v_store(float *p, V v) { _mm256_storeu_ps(p, v); }
INLINE void v_store_part(float *p, V v, i64 n) { _mm256_maskstore_ps(p, v_first(n), v); }
INLINE V v_all(float x) { return _mm256_set1_ps(x); }
INLINE V v_add(V a, V b) { return _mm256_add_ps(a, b); }
INLINE V v_sub(V a, V b) { return _mm256_sub_ps(a, b); }
INLINE V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
INLINE V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V v_clamp(V v, V low, V high) { return _mm256_min_ps(high, _mm256_max_ps(low, v)); } /* NaN stays */
INLINE unsigned v_inside(V v, V low, V high) {
    return (unsigned)_mm256_movemask_ps(
        _mm256_and_ps(_mm256_cmp_ps(v, low, _CMP_GT_OQ), _mm256_cmp_ps(v, high, _CMP_LT_OQ)));
}
INLINE V v_keep(V v, unsigned mask) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)mask), lane);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}
INLINE V v_div(V a, V b) { return _mm256_div_ps(a, b); }
INLINE V v_add_to_exponent(V v, V bits) {
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(bits), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), power));
}

#else /* the compiler's own vectors: any processor, Arm included */
#define LANES 8
#define TILE_ROWS 4
typedef float V __attribute__((vector_size(32), aligned(4)));
typedef int32_t VI __attribute__((vector_size(32)));
typedef uint32_t VU __attribute__((vector_size(32)));
INLINE V v_load(const float *p) { V v; memcpy(&v, p, sizeof v); return v; }
INLINE V v_load_part(const float *p, i64 n) { V v = {0}; for (i64 i = 0; i < n; i++) v[i] = p[i]; return v; }
INLINE void v_store(float *p, V v) { memcpy(p, &v, sizeof v); }
INLINE void v_store_part(float *p, V v, i64 n) { for (i64 i = 0; i < n; i++) p[i] = v[i]; }
INLINE V v_all(float x) { return (V){x, x, x, x, x, x, x, x}; }
INLINE V v_add(V a, V b) { return a + b; }
INLINE V v_sub(V a, V b) { return a - b; }
INLINE V v_mul(V a, V b) { return a * b; }
INLINE V v_fma(V a, V b, V c) { return a * b + c; }
INLINE V v_if(VI mask, V yes, V no) { return (V)(((VI)yes & mask) | ((VI)no & ~mask)); }
INLINE V v_clamp(V v, V low, V high) { v = v_if(v < low, low, v); return v_if(v > high, high, v); } /* NaN stays */
INLINE unsigned v_inside(V v, V low, V high) {
    const VI lane = {1, 2, 4, 8, 16, 32, 64, 128};
    const VI set = (v > low) & (v < high) & lane;
    return (unsigned)(set[0] | set[1] | set[2] | set[3] | set[4] | set[5] | set[6] | set[7]);
}
INLINE V v_keep(V v, unsigned mask) {
    const VI lane = {1, 2, 4, 8, 16, 32, 64, 128};
    const VI set = ((VI){0} + (int32_t)mask) & lane;
    return (V)((VI)v & (set == lane));
}
INLINE V v_div(V a, V b) { return a / b; }
INLINE V v_add_to_exponent(V v, V bits) { return (V)((VU)v + ((VU)bits << 23)); }
#endif

#define TILE_COLUMNS (2 * LANES)

/* Pairs of bf16 values, which some processors multiply and add up at once. A pair is moved as one fp32 value is. In maps
 * it is of neighbouring channels, as bf16 values lie anyway (in a chain, where a map may be read as fp32 first, a pixel's
 * pairs are in the first half of the room of its fp32 values); in gradients of weights, which are sums over pixels, it is
 * of one channel of two pixels (v_pair, v_get_pair). */
#if defined(TINYTL_BF16)
#define HAS_PAIRS 1
INLINE V v_dot(V a, V b, V sum) { /* sum + a * b of both values */
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
INLINE void v_put_bf16(uint16_t *p, V v, i64 n) { /* rounded to the nearest bf16 */
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    if (n >= LANES) _mm256_storeu_si256((__m256i *)p, rounded);
    else _mm256_mask_storeu_epi16(p, v_first(n), rounded);
}
INLINE V v_zip(__m512i both) { /* a pair of each value of the first half and that of the second */
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
}
INLINE V v_pair(V first, V second) { return v_zip((__m512i)_mm512_cvtne2ps_pbh(second, first)); }
INLINE __m256i v_get_bf16(const uint16_t *p, i64 n) {
    return n >= LANES ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi16(v_first(n), p);
}
INLINE V v_get_pair(const uint16_t *p, const uint16_t *q, i64 n) {
    return v_zip(_mm512_inserti64x4(_mm512_castsi256_si512(v_get_bf16(p, n)), v_get_bf16(q, n), 1));
}
#else /* the same names, never called */
#define HAS_PAIRS 0
INLINE V v_dot(V a, V b, V sum) { (void)a, (void)b; return sum; }
INLINE void v_put_bf16(uint16_t *p, V v, i64 n) { (void)p, (void)v, (void)n; }
INLINE V v_pair(V first, V second) { (void)second; return first; }
INLINE V v_get_pair(const uint16_t *p, const uint16_t *q, i64 n) { (void)p, (void)q, (void)n; return v_all(0); }
#endif

/* The first n lanes; a whole vector is the usual case, and masked stores are slow. */
INLINE V v_get(const float *p, i64 n) { return n >= LANES ? v_load(p) : v_load_part(p, n); }
INLINE void v_put(float *p, V v, i64 n) {
    if (n >= LANES) v_store(p, v);
    else v_store_part(p, v, n);
}

INLINE i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 max_of(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 whole(i64 a, i64 step) { return (a + step - 1) / step * step; } /* rounded up to a multiple */

/* Reads values of maps as fp32: where they are, or converted into `room`. */
static const float *read_values(Maps maps, i64 at, i64 count, float *room) {
    if (!maps.is_bf16) return (const float *)maps.data + at;
    const uint16_t *p = (const uint16_t *)maps.data + at;
    for (i64 i = 0; i < count; i++) {
        const uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(room + i, &bits, 4);
    }
    return room;
}

/* Writes fp32 values into maps, rounded to the nearest bf16 (ties to even) where that is their type. */
static void write_values(Maps maps, i64 at, i64 count, const float *values) {
    if (!maps.is_bf16) {
        float *to = (float *)maps.data + at;
        if (to != values) memcpy(to, values, (size_t)count * sizeof(float));
        return;
    }
    uint16_t *to = (uint16_t *)maps.data + at;
    for (i64 i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
        to[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded); /* NaN stays NaN */
    }
}
