/* Vectors of float32: loads and stores of the types in memory, and functions of them. */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

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

/* Loads the first `count` lanes, where memory has no more, and zeros behind them. */
CLVP_FAST_INLINE Floats load_floats(const float *from, int64_t count) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
    float given[LANES] = {};
    memcpy(given, from, count * sizeof *given);
    return load_floats(given);
#endif
}
CLVP_FAST_INLINE Floats load_floats(const uint16_t *from, int64_t count) {
#if defined(__AVX512F__)
    const __m256i halves = _mm256_maskz_loadu_epi16((1u << count) - 1, from);
    return (Floats)((Integers)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
#else
    uint16_t given[LANES] = {};
    memcpy(given, from, count * sizeof *given);
    return load_floats(given);
#endif
}

/* The first `count` lanes, where they are less than all. */
template <class In>
CLVP_FAST_INLINE Floats load_some(const In *from, int64_t count) {
    return count >= LANES ? load_floats(from) : load_floats(from, count);
}

/* The first `count` lanes. */
CLVP_FAST_INLINE void store_floats(float *to, Floats x, int64_t count = LANES) {
    if (count >= LANES) return (void)memcpy(to, &x, sizeof x);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)x);
#else
    memcpy(to, &x, count * sizeof *to);
#endif
}

/* The bits of bfloat16 in upper halves: rounded to the nearest, ties to even; NaN stays NaN. */
CLVP_FAST_INLINE Integers half_bits(Floats x) {
    const Integers bits = (Integers)x;
    const Integers rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return (x == x ? rounded : (bits | 0x400000)) & ~0xffff;
}

/* x, as bfloat16 holds it. Numbers under 2^-126 may become 0, here and below. */
CLVP_FAST_INLINE Floats rounded_to_half(Floats x) {
#if defined(__AVX512BF16__)
    return (Floats)((Integers)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)x)) << 16);
#else
    return (Floats)half_bits(x);
#endif
}

/* Rounds as `half_bits`. */
CLVP_FAST_INLINE void store_floats(uint16_t *to, Floats x, int64_t count = LANES) {
#if defined(__AVX512BF16__)
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    const Halves halves = __builtin_convertvector((half_bits(x) >> 16) & 0xffff, Halves);
#endif
    if (count >= LANES) return (void)memcpy(to, &halves, sizeof halves);
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(to, (1u << count) - 1, (__m256i)halves);
#else
    memcpy(to, &halves, count * sizeof *to);
#endif
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

/* The same to 4e-6, for results of a half type; 2^-126 or so where the exponent is less than -87. */
CLVP_FAST_INLINE Floats exponential_for_half(Floats exponent) {
    const Floats x = exponent < -87.0f ? Floats{} - 87.0f : exponent;
    const float shift = 12582912.0f; /* 1.5 * 2^23, as above; shifted by 23 bits, nothing of it is left */
    const Floats shifted = x * 1.44269504088896341f + shift, r = x * 1.44269504088896341f - (shifted - shift);
    Floats series = Floats{} + 0.009582855738699436f;
    series = series * r + 0.05590642988681793f;
    series = series * r + 0.24024099111557007f;
    series = series * r + 0.6931241750717163f;
    series = series * r + 1.0f;
    return (Floats)((Integers)series + ((Integers)shifted << 23));
}

/* x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), as x * sigmoid of twice that argument. */
CLVP_FAST_INLINE Floats gelu_tanh(Floats x) {
    const Floats argument = x * (1.5957691216057308f + 0.07135481282718181f * x * x);
    const Floats small = exponential(argument < 0 ? argument : -argument); /* at most 1, so that nothing overflows */
    return x * (argument < 0 ? small : Floats{} + 1.0f) / (1.0f + small);
}

/* x * Phi(x), Phi the normal distribution, whose tail Phi(-z) is exp(-z^2 / 2) times a polynomial in 1 / (1 + 0.3 z),
 * fitted to 6e-8 of it. */
CLVP_FAST_INLINE Floats gelu(Floats x) {
    const Floats z = x < 0 ? -x : x, t = 1.0f / (1.0f + 0.3f * z);
    Floats series = Floats{} + 3.8378339260816574e-2f;
    series = series * t - 1.6916634142398834e-1f;
    series = series * t + 2.2866050899028778e-1f;
    series = series * t - 7.6506912708282471e-2f;
    series = series * t + 1.4253579080104828e-1f;
    series = series * t + 9.4683416187763214e-2f;
    series = series * t + 1.2192036956548691e-1f;
    series = series * t + 1.1948768794536591e-1f;
    series = series * t + 7.1690374170430005e-6f;
    const Floats tail = exponential(-0.5f * z * z) * series;
    return x * (x < 0 ? tail : 1.0f - tail);
}

/* The same to 4e-5, for results of a half type: Phi(x) - 1/2 as an odd polynomial, fitted up to 4.5. */
CLVP_FAST_INLINE Floats gelu_for_half(Floats x) {
    const Floats from = x < -4.5f ? Floats{} - 4.5f : x, t = from > 4.5f ? Floats{} + 4.5f : from, s = t * t;
    Floats series = Floats{} - 1.2963984269767637e-12f;
    series = series * s + 1.5988209367545636e-10f;
    series = series * s - 8.798156869715967e-09f;
    series = series * s + 2.871455535569112e-07f;
    series = series * s - 6.249318630580092e-06f;
    series = series * s + 9.692905587144196e-05f;
    series = series * s - 1.1180773144587874e-03f;
    series = series * s + 9.820545092225075e-03f;
    series = series * s - 6.632004678249359e-02f;
    series = series * s + 3.9887481927871704e-01f;
    return from * (series * t + 0.5f);
}

}  // namespace
}  // namespace clvp_fast
