/* Products of 8 bits: rows of x rounded to 8 bits, as they are multiplied, by weights without a sign. */
#pragma once

#include <float.h>
#include <math.h>
#include <string.h>

#include "floats.h"

namespace clvp_fast {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
/* Numbers of x as they are multiplied, and products of four columns at a time. */
typedef int8_t Stored;
constexpr int STEPS = 1, ROWS = LANES == 16 ? 8 : 4, VECTORS = 3;

CLVP_FAST_INLINE Integers factors(Integers quads, Index<0>) { return quads; }

CLVP_FAST_INLINE Integers dot(Integers sum, const int8_t *x, Integers quads) {
    int32_t quad;
    memcpy(&quad, x, sizeof quad);
#if defined(__AVX512VNNI__)
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)quads, _mm512_set1_epi32(quad));
#else
    return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)quads, _mm256_set1_epi32(quad));
#endif
}
#else
/* The same in 16 bits, two columns at a time: sums of two products of bytes do not fit into the 16 bits that the
 * instruction for them has. Where all 16 registers are in use, two vectors of a panel leave room for a product. */
typedef int16_t Stored;
constexpr int STEPS = 2, ROWS = LANES == 16 ? 8 : 4, VECTORS = LANES == 16 ? 3 : 2;

/* The first and third column of each four, or the second and fourth. */
template <int STEP>
CLVP_FAST_INLINE Integers factors(Integers quads, Index<STEP>) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES)));
    return (Integers)(STEP ? (Halves)quads >> 8 : (Halves)quads & 255);
}

CLVP_FAST_INLINE Integers dot(Integers sum, const int16_t *x, Integers pairs) {
#if defined(__AVX2__)
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
#if defined(__AVX512F__)
    sum += (Integers)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi32(pair));
#else
    sum += (Integers)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32(pair));
#endif
    /* Compilers would multiply for several rows before they add, and let sums go through memory. */
    asm("" : "+v"(sum));
    return sum;
#else
    return sum + (pairs & 0xffff) * x[0] + (pairs >> 16) * x[1];
#endif
}
#endif

/* Rounds to the nearest, ties to even. */
CLVP_FAST_INLINE Integers round_floats(Floats x) {
#if defined(__AVX512F__)
    return (Integers)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#elif defined(__AVX2__)
    return (Integers)_mm256_cvtps_epi32((__m256)x);
#else
    Integers rounded;
    for (int lane = 0; lane < LANES; ++lane) rounded[lane] = (int32_t)lrintf(x[lane]);
    return rounded;
#endif
}

/* Stores numbers from -127 to 127 as they are multiplied. */
template <int... LANE>
CLVP_FAST_INLINE void store_rounded(Stored *to, Integers x, std::integer_sequence<int, LANE...>) {
    typedef Stored Narrow __attribute__((vector_size(LANES * sizeof(Stored))));
#if defined(__clang__)
    const Integers ordered =
        STEPS == 1 ? x : __builtin_shufflevector(x, x, (LANE / 4 * 4 + LANE % 2 * 2 + LANE % 4 / 2)...);
#else
    const Integers ordered =
        STEPS == 1 ? x : __builtin_shuffle(x, Integers{(LANE / 4 * 4 + LANE % 2 * 2 + LANE % 4 / 2)...});
#endif
    const Narrow narrow = __builtin_convertvector(ordered, Narrow);
    memcpy(to, &narrow, sizeof narrow);
}

/* A row of x in 8 bits: the numbers times `step`; not finite if one of the row is not. */
struct Rounded {
    float step;
    int32_t total; /* of the numbers */
};

/* Rounds a row of a multiple of 32 columns to steps of a 127th of its largest number. */
template <class In>
Rounded round_row(const In *row, int64_t columns, Stored *to) {
    using Lane = std::make_integer_sequence<int, LANES>;
    Integers largest = {}, total = {}; /* as integers, magnitudes are in order, NaN behind infinity */
    for (int64_t k = 0; k < columns; k += LANES) {
        const Integers magnitude = (Integers)load_floats(row + k) & INT32_MAX;
        largest = magnitude > largest ? magnitude : largest;
    }
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
    float step;
    memcpy(&step, &bits, sizeof step);
    step /= 127;
    if (step < FLT_MIN) step = FLT_MIN; /* whose inverse is finite; NaN stays */
    const float inverse = 1 / step;
    for (int64_t k = 0; k < columns; k += LANES) {
        Floats x = load_floats(row + k) * inverse;
        x = x <= 127.0f ? x : Floats{} + 127.0f; /* NaN too */
        x = x >= -127.0f ? x : Floats{} - 127.0f;
        const Integers rounded = round_floats(x);
        total += rounded;
        store_rounded(to + k, rounded, Lane{});
    }
    Rounded result = {step, 0};
    for (int lane = 0; lane < LANES; ++lane) result.total += total[lane];
    return result;
}

}  // namespace
}  // namespace clvp_fast
