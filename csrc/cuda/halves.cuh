/* The bits of float32, and half types from and to it, on a CPU and on a GPU. */
#pragma once

#include <stdint.h>
#include <string.h>

#include "../inline.h"

namespace clvp_fast {

CLVP_FAST_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
CLVP_FAST_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

CLVP_FAST_INLINE uint16_t float16_of(float value) {
#ifdef __CUDA_ARCH__
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7fff;          /* NaN, as the GPU has one */
    if (magnitude >= 0x477ff000) return sign | 0x7c00;         /* from 65520 on: infinity */
    if (magnitude < 0x33000000) return sign;                   /* under 2^-25: zero */
    const int exponent = int(magnitude >> 23);                 /* biased by 127; float16's by 15 */
    const uint32_t digits = (magnitude & 0x7fffff) | 0x800000; /* 1.x, in units of 2^-23 */
    const int dropped = exponent < 113 ? 126 - exponent : 13;  /* digits that there is no room for */
    const uint32_t kept = digits >> dropped, rest = digits & ((1u << dropped) - 1), half = 1u << (dropped - 1);
    const uint32_t rounded = kept + (rest > half || (rest == half && (kept & 1)));
    /* A normal number's leading digit is in the exponent's place: rounding up may carry into it. */
    return uint16_t(sign | (rounded + (exponent < 113 ? 0 : uint32_t(exponent - 113) << 10)));
#endif
}
CLVP_FAST_INLINE uint16_t bfloat16_of(float value) {
    const uint32_t bits = bits_of(value);
    return value != value ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
CLVP_FAST_INLINE float of_float16(uint16_t bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, digits = bits & 0x3ff;
    if (exponent == 31) return float_of(sign | 0x7f800000 | digits << 13);
    if (exponent > 0) return float_of(sign | (exponent + 112) << 23 | digits << 13);
    const float small = float(digits) / 16777216; /* in units of 2^-24, exactly */
    return sign ? -small : small;
#endif
}
CLVP_FAST_INLINE float of_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

}  // namespace clvp_fast
