/* Vectors of float32 from and to what memory holds, and functions of them. */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace clvp_fast {
namespace {

constexpr int LANES = Lanes<float>::COUNT;
using Floats = Vector<float>;
using Integers = Lanes<float>::Integers;

/* Compilers do not find the instructions that widen integers by themselves; the masked forms are free of a false
 * warning. */
CLVP_FAST_INLINE Integers widen(const int8_t *from) {
#if defined(__AVX512F__)
    return (Integers)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (Integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Integers);
#endif
}

CLVP_FAST_INLINE Integers widen(const uint16_t *from) {
#if defined(__AVX512F__)
    return (Integers)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
    return (Integers)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Integers);
#endif
}

CLVP_FAST_INLINE Floats load_floats(const float *from) { return load<float>(from); }

CLVP_FAST_INLINE Floats load_floats(const int8_t *from) { return __builtin_convertvector(widen(from), Floats); }

/* bfloat16 is the upper half of a float32. */
CLVP_FAST_INLINE Floats load_floats(const uint16_t *from) { return (Floats)(widen(from) << 16); }

/* The first `count` lanes. */
CLVP_FAST_INLINE void store_floats(float *to, Floats x, int64_t count = LANES) {
    memcpy(to, &x, count >= LANES ? sizeof x : count * sizeof *to);
}

/* Rounds to the nearest, ties to even; NaN stays NaN. */
CLVP_FAST_INLINE void store_floats(uint16_t *to, Floats x, int64_t count = LANES) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    const Integers bits = (Integers)x;
    const Integers rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Integers kept = x == x ? rounded : (bits | 0x400000);
    const Halves halves = __builtin_convertvector((kept >> 16) & 0xffff, Halves);
    memcpy(to, &halves, count >= LANES ? sizeof halves : count * sizeof *to);
}

/* Lane i is the sum over the lanes of x[i], for COUNT vectors: LANES, or half as many. Each round adds the upper half
 * of what is left of every vector to the lower one. */
template <int COUNT>
CLVP_FAST_INLINE Floats fold(const Floats *from) {
    using Lane = std::make_integer_sequence<int, LANES>;
    Floats x[COUNT];
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { x[i] = from[i]; });
#pragma GCC unroll 4
    for (int half = COUNT / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            x[i] = interleave<float, 0>(x[i], x[i + half], Lane{}) + interleave<float, 1>(x[i], x[i + half], Lane{});
    if constexpr (COUNT < LANES) {
        float lanes[LANES];
        store_floats(lanes, x[0]);
        Floats upper = {};
        memcpy(&upper, lanes + COUNT, COUNT * sizeof *lanes);
        x[0] += upper;
    }
    return x[0];
}

/* exp(x) for x <= 0, to about one unit in the last place; 0 where float32 ends; NaN stays. Cody and Waite's reduction
 * by ln 2, then the Taylor series. */
CLVP_FAST_INLINE Floats exponential(Floats exponent) {
    const Floats x = exponent < -87.0f ? Floats{} - 87.0f : exponent;
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it leaves a whole number in the lowest bits */
    const Floats shifted = x * 1.44269504088896341f + shift, n = shifted - shift;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats series = Floats{} + 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const Integers power = __builtin_convertvector(n, Integers) << 23;
    return exponent < -87.0f ? Floats{} : (Floats)((Integers)series + power);
}

/* x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), as x * sigmoid of twice that argument. */
CLVP_FAST_INLINE Floats gelu_tanh(Floats x) {
    const Floats argument = x * (1.5957691216057308f + 0.07135481282718181f * x * x);
    const Floats small = exponential(argument < 0 ? argument : -argument); /* at most 1, so that nothing overflows */
    return x * (argument < 0 ? small : Floats{} + 1.0f) / (1.0f + small);
}

}  // namespace
}  // namespace clvp_fast
