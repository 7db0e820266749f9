/* Power spectra in shared memory to features in device memory: the end of the CUDA kernel of log_mel. */
#pragma once

#include <math.h>

#include "halves.cuh"
#include "log_mel_layout.cuh"

namespace clvp_fast {

/* Maps numbers to unsigned integers in the same order. */
CLVP_FAST_INLINE uint32_t ordered(float value) {
    const uint32_t bits = bits_of(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
CLVP_FAST_INLINE float number_of(uint32_t ordered) {
    return float_of(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

/* unit * log2(value) of a normal number, within 2^-22 * unit and a rounding; infinity and NaN stay. */
CLVP_FAST_INLINE float logarithm(float value, float unit) {
    /* value = 2^e * near_one, near_one in [2/3, 4/3): e is exact, and the GPU's log2 is good near 1. */
    const uint32_t e = (bits_of(value) - bits_of(2.f / 3)) & 0xff800000u; /* in the place of a float's exponent */
    const float near_one = float_of(bits_of(value) - e);
#ifdef __CUDA_ARCH__
    float log2;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(near_one));
#else
    const float log2 = log2f(near_one);
#endif
    const float result = fmaf(float(int32_t(e)), unit * 0x1p-23f, unit * log2);
    return value < INFINITY ? result : value;
}

/* Features of two neighbouring frames, of which the second may lie past the row. */
CLVP_FAST_INLINE void store_features(const clvp_fast_log_mel &call, int64_t place, FramePair value, bool both) {
    if (call.features_dtype == CLVP_FAST_FLOAT32) {
        float *to = static_cast<float *>(call.features) + place;
        to[0] = value.of[0];
        if (both) to[1] = value.of[1];
    } else {
        const bool half = call.features_dtype == CLVP_FAST_FLOAT16;
        uint16_t *to = static_cast<uint16_t *>(call.features) + place;
        to[0] = half ? float16_of(value.of[0]) : bfloat16_of(value.of[0]);
        if (both) to[1] = half ? float16_of(value.of[1]) : bfloat16_of(value.of[1]);
    }
}
/* A feature that another block may have written. */
template <class Run>
CLVP_FAST_INLINE float stored_feature(Run &run, const clvp_fast_log_mel &call, int64_t place) {
    if (call.features_dtype == CLVP_FAST_FLOAT32) return run.fresh(static_cast<const float *>(call.features) + place);
    const uint16_t bits = run.fresh(static_cast<const uint16_t *>(call.features) + place);
    return call.features_dtype == CLVP_FAST_FLOAT16 ? of_float16(bits) : float_of(uint32_t(bits) << 16);
}

/* The weighted sums of a band's powers, of both frames of a pair. */
template <class L>
CLVP_FAST_INLINE FramePair sum_band(const float *weight, const FramePair *power, int left) {
    constexpr int WIDE = 64;
    FramePair total = {};
    /* Short chains of additions, for less rounding in a wide band: four sums for every WIDE bins. */
    CLVP_FAST_UNROLL(1)
    do {
        const int count = left < WIDE ? left : WIDE;
        FramePair sums[4] = {};
        int bin = 0;
        const auto add = [&](auto i) {
            const float factor = read_only(weight + bin + i);
            unroll<2>([&](auto frame) { sums[i].of[frame] += factor * power[L::STRIDE * (bin + i)].of[frame]; });
        };
        unroll<3>([&](auto i) {
            if (i < count % 4) add(i);
        });
        CLVP_FAST_UNROLL(1)
        for (bin = count % 4; bin < count; bin += 4) unroll<4>(add);
        unroll<2>([&](auto frame) {
            total.of[frame] += (sums[0].of[frame] + sums[1].of[frame]) + (sums[2].of[frame] + sums[3].of[frame]);
        });
        weight += WIDE;
        power += L::STRIDE * WIDE;
        left -= WIDE;
    } while (left > 0);
    return total;
}

/* All channels of the range's frames. */
template <int N, class Sample>
CLVP_FAST_INLINE void mel(const Shared<N> &shared, const clvp_fast_log_mel &call, int thread, Registers<N> &registers) {
    using L = Layout<N>;
    constexpr int STEP = L::THREADS / L::PAIRS;
    const FrameRange &range = shared.range;
    const int pair = thread % L::PAIRS, true_frames = range.true_frames - 2 * pair, frames = range.frames - 2 * pair;
    const FramePair spoil = shared.spoil[pair];
    /* Powers are four times too large, and those of integers not yet divided by 32768: all exact. */
    const float scale = sizeof(Sample) == 2 ? 0.25f / (32768.f * 32768.f) : 0.25f;
    const float floor = shared.log_floor, unit = shared.log_unit;
    float loudest = -INFINITY;
    const auto feature = [&](float power, float spoil, bool there) {
        const float value = scale * power + spoil, log = logarithm(value < floor ? floor : value, unit);
        if (there) loudest = fmaxf(loudest, log); /* of a NaN and a number the number */
        return there ? log : 0.f;
    };
    int m = thread / L::PAIRS;
    const auto *filters = static_cast<const float *>(call.mel_filters) + L::BINS * m;
    int64_t place = (range.row * call.num_mels + m) * call.frames + range.first_frame + 2 * pair;
    CLVP_FAST_UNROLL(1)
    for (; m < call.num_mels; m += STEP, filters += STEP * L::BINS, place += STEP * call.frames) {
        FramePair value = {};
        if (true_frames > 0) {
            const Channel channel = shared.channels[m];
            const FramePair *powers = shared.power + L::STRIDE * channel.first + pair;
            const FramePair sum = sum_band<L>(filters + channel.first, powers, channel.bins);
            value.of[0] = channel.inverse_norm * feature(sum.of[0], spoil.of[0], true);
            value.of[1] = channel.inverse_norm * feature(sum.of[1], spoil.of[1], true_frames > 1);
        }
        if (frames > 0) store_features(call, place, value, frames > 1);
    }
    registers.loudest = ordered(loudest);
}

/* The stored features were divided by the norms, and so is the bound. */
template <int N, class Run>
CLVP_FAST_INLINE void clamp(Run &run, const Shared<N> &shared, const clvp_fast_log_mel &call, int thread) {
    const int64_t frames = 1 + shared.range.length / call.hop_length;
    const float least = number_of(shared.loudest) - float(call.top_db);
    for (int m = thread / 32; m < call.num_mels; m += Layout<N>::THREADS / 32) {
        const float inverse_norm = shared.channels[m].inverse_norm, bound = least * inverse_norm;
        const int64_t begin = (shared.range.row * call.num_mels + m) * call.frames;
        for (int64_t frame = thread % 32; frame < frames; frame += 32) {
            const float value = stored_feature(run, call, begin + frame);
            if (inverse_norm < 0 ? value > bound : value < bound)
                store_features(call, begin + frame, {bound, 0.f}, false);
        }
    }
}

}  // namespace clvp_fast
