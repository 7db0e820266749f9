/* float16 from and to float32 as csrc/cuda/halves.cuh converts it on a CPU, many numbers at a time. */
#include "../../csrc/cuda/halves.cuh"

extern "C" void float16s_of(const float *from, uint16_t *to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = clvp_fast::float16_of(from[i]);
}

extern "C" void of_float16s(const uint16_t *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = clvp_fast::of_float16(from[i]);
}
