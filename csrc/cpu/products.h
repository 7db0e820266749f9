/* Products on a CPU, of float32 or of pairs of bfloat16: both factors are taken 32 bits at a time, and sums are
 * float32. */
#pragma once

#include "floats.h"

namespace clvp_fast {
namespace {

/* What is multiplied: what is given, or float32 where the CPU has no products of it. */
#if defined(__AVX512BF16__)
template <class In>
using Product = In;
#else
template <class In>
using Product = float;
#endif
/* How many numbers 32 bits hold. */
template <class In>
constexpr int UNIT = sizeof(float) / sizeof(Product<In>);

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
CLVP_FAST_INLINE Floats load_units(const In *from, int64_t count = LANES * UNIT<In>) {
    if constexpr (std::is_same_v<Product<In>, float>) {
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

}  // namespace
}  // namespace clvp_fast
