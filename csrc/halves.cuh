/* The bits of float32, and half types from and to it, on a CPU and on a GPU. */
#pragma once

#include <stdint.h>
#include <string.h>

#include "inline.h"

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
    const _Float16 half = _Float16(value);
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
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
    _Float16 half;
    memcpy(&half, &bits, sizeof bits);
    return float(half);
#endif
}
CLVP_FAST_INLINE float of_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

}  // namespace clvp_fast
