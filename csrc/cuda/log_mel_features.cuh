/* Power spectra in shared memory to features in device memory: the end of the CUDA kernel of log_mel. */
#pragma once

#include <math.h>

#include "halves.cuh"
#include "log_mel_layout.cuh"

namespace clvp_fast {

/* Maps numbers to unsigned integers in the same order; 0 is below them all. */
CLVP_FAST_INLINE uint32_t ordered(float value) {
    const uint32_t bits = bits_of(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
CLVP_FAST_INLINE float number_of(uint32_t ordered) {
    return float_of(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

CLVP_FAST_INLINE void store_feature(const clvp_fast_log_mel &call, int64_t place, float value) {
    if (call.features_dtype == CLVP_FAST_FLOAT32) {
        static_cast<float *>(call.features)[place] = value;
    } else {
        static_cast<uint16_t *>(call.features)[place] =
            call.features_dtype == CLVP_FAST_FLOAT16 ? float16_of(value) : bfloat16_of(value);
    }
}
/* A feature that another block may have written. */
template <class Run>
CLVP_FAST_INLINE float stored_feature(Run &run, const clvp_fast_log_mel &call, int64_t place) {
    if (call.features_dtype == CLVP_FAST_FLOAT32) return run.fresh(static_cast<const float *>(call.features) + place);
    const uint16_t bits = run.fresh(static_cast<const uint16_t *>(call.features) + place);
    return call.features_dtype == CLVP_FAST_FLOAT16 ? of_float16(bits) : float_of(uint32_t(bits) << 16);
}

/* All channels of the range's frames. */
template <int N, class Sample>
CLVP_FAST_INLINE void mel(const Shared<N> &shared, const clvp_fast_log_mel &call, int thread, Registers<N> &registers) {
    using L = Layout<N>;
    const FrameRange &range = shared.range;
    const int lane = thread % L::FRAMES;
    const int64_t frame = range.first_frame + lane;
    const bool true_frame = lane < range.true_frames, bad = shared.not_finite[lane], limited = call.top_db >= 0;
    /* Powers are four times too large, and those of integers not yet divided by 32768: all exact. */
    const float scale = sizeof(Sample) == 2 ? 0.25f / (32768.f * 32768.f) : 0.25f, floor = shared.log_floor;
    constexpr int STEP = L::THREADS / L::FRAMES, WIDE = 64;
    int channel = thread / L::FRAMES;
    const auto *filters = static_cast<const float *>(call.mel_filters) + L::BINS * channel;
    const auto *norms = static_cast<const float *>(call.mel_norms);
    int64_t place = (range.row * call.num_mels + channel) * call.frames + frame;
    uint32_t loudest = 0;
    for (; channel < call.num_mels; channel += STEP, filters += STEP * L::BINS, place += STEP * call.frames) {
        float value = 0.f;
        if (true_frame) {
            const Band band = shared.bands[channel];
            const float *weight = filters + band.first, *power = shared.power + L::STRIDE * band.first + lane;
            int left = band.last - band.first;
            /* Short chains of additions, for less rounding in a wide band: four sums for every WIDE bins. */
            float total = 0.f;
            CLVP_FAST_UNROLL(1)
            while (left > 0) {
                float sums[4] = {};
                int count = left < WIDE ? left : WIDE;
                left -= count;
                CLVP_FAST_UNROLL(1)
                for (; count >= 4; count -= 4, weight += 4, power += 4 * L::STRIDE)
                    unroll<4>([&](auto i) { sums[i] += read_only(weight + i) * power[L::STRIDE * i]; });
                CLVP_FAST_UNROLL(1)
                for (; count > 0; --count, ++weight, power += L::STRIDE) sums[0] += read_only(weight) * *power;
                total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
            }
            value = scale * total;
            value = value < floor ? floor : value;
            value = call.decibels ? 10.f * log10f(value) : logf(value);
            if (bad) value = NAN;
            if (limited && value == value && ordered(value) > loudest) loudest = ordered(value);
            if (norms) value /= read_only(norms + channel);
        }
        if (frame < call.frames) store_feature(call, place, value);
    }
    registers.loudest = loudest;
}

/* The stored features are divided by the norms, and so is the bound. */
template <int N, class Run>
CLVP_FAST_INLINE void clamp(Run &run, const Shared<N> &shared, const clvp_fast_log_mel &call, int thread) {
    const auto *norms = static_cast<const float *>(call.mel_norms);
    const float least = number_of(shared.loudest) - float(call.top_db);
    for (int channel = thread / 32; channel < call.num_mels; channel += Layout<N>::THREADS / 32) {
        const float norm = norms ? read_only(norms + channel) : 1.f;
        const float bound = norms ? least / norm : least;
        const int64_t begin = (shared.range.row * call.num_mels + channel) * call.frames;
        for (int64_t frame = thread % 32; frame <= shared.range.length / call.hop_length; frame += 32) {
            const float value = stored_feature(run, call, begin + frame);
            if (norm < 0 ? value > bound : value < bound) store_feature(call, begin + frame, bound);
        }
    }
}

}  // namespace clvp_fast
