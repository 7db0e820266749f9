/* Products on a CPU, of float32 or of pairs of bfloat16, with sums of float32: of a unit of 32 bits with all lanes of a
 * vector, and of two vectors. */
#pragma once

#include "floats.h"

namespace clvp_fast {
namespace {

/* The type of factors: that of the numbers in memory, or float32 where the CPU cannot multiply that. */
#if defined(__AVX512BF16__)
template <class In>
using Factor = In;
#else
template <class In>
using Factor = float;
#endif
/* The number of factors in a unit of 32 bits. */
template <class In>
constexpr int UNIT_FACTORS = sizeof(float) / sizeof(Factor<In>);

/* sum + a * b, where `a` is 32 bits of a row, for all lanes of b. */
CLVP_FAST_INLINE Floats dot(Floats sum, const float *a, Floats b) { return sum + *a * b; }
#if defined(__AVX512BF16__)
CLVP_FAST_INLINE Floats dot(Floats sum, const uint16_t *a, Floats b) {
    int32_t pair;
    memcpy(&pair, a, sizeof pair);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
#endif

/* LANES times 32 bits of what is multiplied, or the first `count` numbers of them and zeros. */
template <class In>
CLVP_FAST_INLINE Floats load_units(const In *from, int64_t count = LANES * UNIT_FACTORS<In>) {
    if constexpr (std::is_same_v<Factor<In>, float>) {
        return count >= LANES ? load_floats(from) : load_floats(from, count);
    } else {
        Floats units = {};
        if (count >= 2 * LANES)
            memcpy(&units, from, sizeof units);
        else
            units = (Floats)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
        return units;
    }
}

/* Products of two vectors, lane by lane; float32 of anything. */
struct Single {
    typedef Floats Factors;
    typedef float Stored;
    static constexpr int COUNT = LANES; /* numbers of a vector */
    template <class From>
    CLVP_FAST_INLINE Factors load(const From *from) {
        return load_floats(from);
    }
    CLVP_FAST_INLINE Floats dot(Floats sum, Factors a, Factors b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
/* Pairs of bfloat16, which hold whole numbers up to 256 exactly; their products are summed in float32. */
struct Pairs {
    typedef __m512bh Factors;
    typedef uint16_t Stored;
    static constexpr int COUNT = 2 * LANES;
    CLVP_FAST_INLINE Factors load(const uint16_t *from) { return (Factors)_mm512_loadu_si512(from); }
    CLVP_FAST_INLINE Factors load(const int8_t *from) {
        return _mm512_cvtne2ps_pbh((__m512)load_floats(from + LANES), (__m512)load_floats(from));
    }
    CLVP_FAST_INLINE Floats dot(Floats sum, Factors a, Factors b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b);
    }
};
template <class In>
using ProductsOf = std::conditional_t<std::is_same_v<In, uint16_t>, Pairs, Single>;
#else
template <class In>
using ProductsOf = Single;
#endif

}  // namespace
}  // namespace clvp_fast
