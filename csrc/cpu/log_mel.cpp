/* Log-mel on a CPU. An item is some frames of one row: a lane is a pair of neighbouring frames, one in the real and one
 * in the imaginary part of a complex transform, so that every operation is one on whole vectors. Neighbours are about
 * equally loud, and what rounding carries over from one to the other is small. Compiled once for each instruction set
 * (-DCLVP_FAST_ISA=portable, avx2, avx512), with vectors as wide as it has. */
#include "dispatch.h"

#include <string.h>

#include "../fourier.h"
#include "vectors.h"

namespace clvp_fast {
namespace {

/* Natural logarithm of positive normal numbers, to about one unit in the last place; infinity and NaN stay.
 * x = m 2^e with m in [sqrt(1/2), sqrt(2)) and f = m - 1, s = f / (2 + f): log m = 2 artanh s = f - s (f - 2 series).
 */
template <class Real>
CLVP_FAST_INLINE Vector<Real> logarithm(Vector<Real> x) {
    using Integer = typename Lanes<Real>::Integer;
    using Integers = typename Lanes<Real>::Integers;
    constexpr bool SINGLE = sizeof(Real) == 4;
    constexpr int FRACTION_BITS = SINGLE ? 23 : 52, TERMS = SINGLE ? 4 : 10;
    constexpr Integer ROOT_HALF_BITS = SINGLE ? Integer(0x3f3504f3) : Integer(0x3fe6a09e667f3bcd);
    /* ln 2 in two parts, of which the first times any exponent is exact. */
    constexpr Real LN2_HIGH = SINGLE ? Real(0.693359375) : Real(6.93147180369123816490e-01);
    constexpr Real LN2_LOW = SINGLE ? Real(-2.12194440e-4) : Real(1.90821492927058770002e-10);
    const Integers bits = (Integers)x, exponent = (bits - ROOT_HALF_BITS) >> FRACTION_BITS;
    const Vector<Real> e = __builtin_convertvector(exponent, Vector<Real>);
    const Vector<Real> f = (Vector<Real>)(bits - (exponent << FRACTION_BITS)) - Real(1);
    const Vector<Real> s = f / (f + Real(2)), square = s * s;
    Vector<Real> series = {};
    unroll<TERMS>([&](auto i) CLVP_FAST_INLINED { series = (series + Real(1) / Real(2 * (TERMS - i) + 1)) * square; });
    const Vector<Real> result = f - (s * (f - series - series) - e * LN2_LOW) + e * LN2_HIGH;
    return x < Real(__builtin_inf()) ? result : x;
}

/* One stage of radix R over a block of length L of a transform of length N, in place. */
template <int N, int L, int R, class Real>
CLVP_FAST_INLINE void stage(Complex<Vector<Real>> *z, const Real *twiddles) {
    constexpr int STEP = L / R;
    for (int j = 0; j < STEP; ++j) {
        Complex<Vector<Real>> x[R], *const at = z + j;
        unroll<R>([&](auto r) CLVP_FAST_INLINED { x[r] = at[r * STEP]; });
        dft<R>(x);
        unroll<R>([&](auto r) CLVP_FAST_INLINED {
            if constexpr (r.value > 0 && STEP > 1) {
                const Real *twiddle = twiddles + 2 * (j * r * (N / L));
                x[r] = multiply(x[r], twiddle[0], twiddle[1]);
            }
            at[r * STEP] = x[r];
        });
    }
}

/* Radices of the three stages of a transform: what fits the registers. */
template <int N>
struct Radices {
    static constexpr int R3 = N < 1024 ? 8 : 16, R2 = N < 2048 ? 8 : 16, R1 = N / (R2 * R3);
};

/* z becomes its transform, bins in the order of `position`, and power[k] the pair of frames' powers of bin k. The
 * second and third stage of a block follow each other while it lies in the nearest cache. */
template <class Real, int N>
void transform(Complex<Vector<Real>> *z, const Real *twiddles, Complex<Vector<Real>> *power, int num_bins) {
    constexpr int R1 = Radices<N>::R1, R2 = Radices<N>::R2, R3 = Radices<N>::R3;
    stage<N, N, R1>(z, twiddles);
    for (int first = 0; first < N; first += R2 * R3) {
        stage<N, R2 * R3, R2>(z + first, twiddles);
        for (int second = first; second < first + R2 * R3; second += R3) stage<N, R3, R3>(z + second, twiddles);
    }
    for (int k = 0; k < num_bins; ++k) {
        const Complex<Vector<Real>> &bin = z[position<R1, R2, R3>(k)], &mirrored = z[position<R1, R2, R3>((N - k) % N)];
        power[k].re = power_of_real(bin, mirrored);
        power[k].im = power_of_imaginary(bin, mirrored);
    }
}

template <class Real>
void transform(int n_fft, Complex<Vector<Real>> *z, const Real *twiddles, Complex<Vector<Real>> *power, int num_bins) {
    switch (n_fft) {
        case 256: return transform<Real, 256>(z, twiddles, power, num_bins);
        case 512: return transform<Real, 512>(z, twiddles, power, num_bins);
        case 1024: return transform<Real, 1024>(z, twiddles, power, num_bins);
        case 2048: return transform<Real, 2048>(z, twiddles, power, num_bins);
        case 4096: return transform<Real, 4096>(z, twiddles, power, num_bins);
    }
}

/* An item's scratch memory, in the order in which it lies there. */
template <class Real, class Sample>
struct Scratch {
    Complex<Vector<Real>> *z, *power; /* [n_fft], [n_fft / 2 + 1] */
    Sample *edge;                     /* [item_frames, n_fft]: frames that had to be mirrored or do not exist */

    Scratch(const clvp_fast_log_mel *call, void *memory)
        : z((Complex<Vector<Real>> *)memory), power(z + call->n_fft), edge((Sample *)(power + call->n_fft / 2 + 1)) {}
};

/* The windowed samples of 2 * COUNT frames: the first COUNT in the real parts, the others in the imaginary ones. */
template <class Real, class Sample>
CLVP_FAST_INLINE void load_windowed(Complex<Vector<Real>> *z, const Sample *const *frame, const Real *window,
                                    int n_fft) {
    constexpr int COUNT = Lanes<Real>::COUNT;
    /* One half from the pair of frames, see fourier.h. */
    constexpr Real SCALE = std::is_integral_v<Sample> ? Real(0.5 / 32768) : Real(0.5);
    for (int first = 0; first < n_fft; first += COUNT) {
        Vector<Real> x[COUNT];
        unroll<COUNT>([&](auto lane) CLVP_FAST_INLINED { x[lane] = load<Real>(frame[lane] + first); });
        transpose<Real>(x);
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { z[first + i].re = x[i] * (window[first + i] * SCALE); });
        unroll<COUNT>([&](auto lane) CLVP_FAST_INLINED { x[lane] = load<Real>(frame[COUNT + lane] + first); });
        transpose<Real>(x);
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { z[first + i].im = x[i] * (window[first + i] * SCALE); });
    }
}

template <class Real, class Sample, class Feature>
void run(const clvp_fast_log_mel *call, int64_t row, int64_t length, int64_t row_frames, int64_t first_frame,
         int num_bins, void *memory) {
    constexpr int COUNT = Lanes<Real>::COUNT;
    using Integer = typename Lanes<Real>::Integer;
    using Lane = std::make_integer_sequence<int, COUNT>;
    const Scratch<Real, Sample> scratch(call, memory);
    const int n_fft = call->n_fft;
    const Sample *samples = (const Sample *)call->samples + row * call->samples_stride;
    const Real *window = (const Real *)call->window, *twiddles = (const Real *)call->twiddles;

    const Sample *frame[2 * COUNT];
    for (int lane = 0; lane < 2 * COUNT; ++lane) {
        const int64_t number = first_frame + 2 * (lane % COUNT) + lane / COUNT;
        /* Past a row's last frame the product would overflow where the hop is huge. */
        const int64_t start = number < row_frames ? number * call->hop_length - n_fft / 2 : 0;
        Sample *edge = scratch.edge + (int64_t)lane * n_fft;
        frame[lane] = edge;
        if (number >= row_frames)
            memset(edge, 0, n_fft * sizeof(Sample));
        else if (start >= 0 && start + n_fft <= length)
            frame[lane] = samples + start;
        else
            for (int i = 0; i < n_fft; ++i) edge[i] = samples[reflect(start + i, length)];
    }
    load_windowed(scratch.z, frame, window, n_fft);
    transform(n_fft, scratch.z, twiddles, scratch.power, num_bins);

    /* Bin 0 is the plain sum of a frame's samples, so it tells of those that are NaN or infinite. They have spoilt the
     * other frame of the pair too: the transform is done again without them, and the frame itself is made NaN. */
    const Complex<Vector<Real>> sum = scratch.z[0];
    Vector<Real> spoilt[2] = {sum.re - sum.re, sum.im - sum.im};
    bool again = false;
    for (int lane = 0; lane < 2 * COUNT; ++lane) {
        if (spoilt[lane / COUNT][lane % COUNT] == 0) continue;
        again = true;
        frame[lane] = (Sample *)memset(scratch.edge + (int64_t)lane * n_fft, 0, n_fft * sizeof(Sample));
    }
    if (again) {
        load_windowed(scratch.z, frame, window, n_fft);
        transform(n_fft, scratch.z, twiddles, scratch.power, num_bins);
    }

    const Real *weights = (const Real *)call->mel_filters, *norms = (const Real *)call->mel_norms;
    const Real scale = call->decibels ? Real(4.3429448190325182765) : Real(1), floor = Real(call->log_floor);
    const bool divide = norms && !(call->top_db >= 0);
    const int64_t frames_here = call->frames - first_frame;
    Feature *features = (Feature *)call->features + row * call->num_mels * call->frames + first_frame;
    typename Lanes<Real>::Integers lane_number;
    for (int lane = 0; lane < COUNT; ++lane) lane_number[lane] = lane;
    for (int mel = 0; mel < call->num_mels; ++mel, weights += n_fft / 2 + 1, features += call->frames) {
        /* Four sums each: shorter chains of additions, and less rounding in a wide band. */
        Vector<Real> sums[4][2] = {};
        const int end = call->bands[2 * mel + 1];
        int k = call->bands[2 * mel];
        const auto add = [&](int sum, int bin) CLVP_FAST_INLINED {
            sums[sum][0] += scratch.power[bin].re * weights[bin];
            sums[sum][1] += scratch.power[bin].im * weights[bin];
        };
        for (; k + 4 <= end; k += 4) unroll<4>([&](auto i) CLVP_FAST_INLINED { add(i, k + i); });
        for (; k < end; ++k) add(0, k);
        const Vector<Real> power[2] = {(sums[0][0] + sums[1][0]) + (sums[2][0] + sums[3][0]),
                                       (sums[0][1] + sums[1][1]) + (sums[2][1] + sums[3][1])};
        Vector<Real> value[2];
        for (int part = 0; part < 2; ++part) {
            /* A comparison that NaN fails keeps NaN. */
            const Vector<Real> kept = power[part] < floor ? Vector<Real>{} + floor : power[part];
            value[part] = logarithm<Real>(kept) * scale + spoilt[part];
            if (divide) value[part] /= norms[mel];
        }
        const Vector<Real> in_order[2] = {interleave<Real, 0>(value[0], value[1], Lane{}),
                                          interleave<Real, 1>(value[0], value[1], Lane{})};
        for (int half = 0; half < 2 && half * COUNT < frames_here; ++half) {
            const int64_t true_lanes = row_frames - first_frame - half * COUNT;
            Vector<Real> shown = in_order[half];
            if (true_lanes < COUNT)
                shown = lane_number < Integer(true_lanes < 0 ? 0 : true_lanes) ? shown : Vector<Real>{};
            store<Real>(features + half * COUNT, shown, frames_here - half * COUNT);
        }
    }
}

using RunFunction = decltype(&run<float, float, float>);

template <class Real, class Feature>
RunFunction run_of_samples(int32_t dtype) {
    if (dtype == CLVP_FAST_INT16) return run<Real, int16_t, Feature>;
    if (dtype == CLVP_FAST_FLOAT64) return run<Real, double, Feature>;
    return run<Real, float, Feature>;
}

/* Returns the number of frames of an item. */
int64_t item_frames(const clvp_fast_log_mel *call) {
    return 2 * (VECTOR_BYTES / (call->compute_dtype == CLVP_FAST_FLOAT64 ? 8 : 4));
}

/* Of one row. */
int64_t row_items(const clvp_fast_log_mel *call) { return (call->frames + item_frames(call) - 1) / item_frames(call); }

int64_t items(const clvp_fast_log_mel *call) { return call->batch * row_items(call); }

int64_t length_of(const clvp_fast_log_mel *call, int64_t row) {
    return call->lengths ? call->lengths[row] : call->time;
}

void run_any(const clvp_fast_log_mel *call, int64_t item, void *scratch) {
    const int64_t row = item / row_items(call), first_frame = item % row_items(call) * item_frames(call);
    const int64_t length = length_of(call, row);
    int num_bins = 1; /* one past the last bin of any band */
    for (int32_t mel = 0; mel < call->num_mels; ++mel)
        if (call->bands[2 * mel + 1] > num_bins) num_bins = call->bands[2 * mel + 1];
    const int32_t in = call->samples_dtype;
    const RunFunction chosen = call->compute_dtype == CLVP_FAST_FLOAT32    ? run_of_samples<float, float>(in)
                               : call->features_dtype == CLVP_FAST_FLOAT32 ? run_of_samples<double, float>(in)
                                                                           : run_of_samples<double, double>(in);
    chosen(call, row, length, 1 + length / call->hop_length, first_frame, num_bins, scratch);
}

/* Raises what lies more than top_db under the loudest value of a row's true frames to it, and divides by the norms. */
template <class Real, class Feature>
void limit_range(const clvp_fast_log_mel *call, int64_t row) {
    Feature *const features = (Feature *)call->features + row * call->num_mels * call->frames;
    const Real *const norms = (const Real *)call->mel_norms;
    const int64_t row_frames = 1 + length_of(call, row) / call->hop_length;
    Feature loudest = -Feature(__builtin_inf());
    for (int64_t mel = 0; mel < call->num_mels; ++mel)
        for (int64_t frame = 0; frame < row_frames; ++frame) {
            const Feature value = features[mel * call->frames + frame];
            if (value > loudest) loudest = value; /* NaN is not */
        }
    const Feature lowest = loudest - Feature(call->top_db);
    for (int64_t mel = 0; mel < call->num_mels; ++mel)
        for (int64_t frame = 0; frame < row_frames; ++frame) {
            Feature &value = features[mel * call->frames + frame];
            if (value < lowest) value = lowest;
            if (norms) value /= Feature(norms[mel]);
        }
}

void limit_any(const clvp_fast_log_mel *call, int64_t row) {
    if (call->compute_dtype == CLVP_FAST_FLOAT32)
        limit_range<float, float>(call, row);
    else if (call->features_dtype == CLVP_FAST_FLOAT32)
        limit_range<double, float>(call, row);
    else
        limit_range<double, double>(call, row);
}

size_t scratch_bytes(const clvp_fast_log_mel *call) {
    const size_t edge = (size_t)item_frames(call) * call->n_fft * sizeof(double);
    return edge + (size_t)(call->n_fft + call->n_fft / 2 + 1) * 2 * VECTOR_BYTES;
}

}  // namespace

const LogMelKernel CLVP_FAST_OF(log_mel, CLVP_FAST_ISA) = {{items, scratch_bytes, run_any}, limit_any};

}  // namespace clvp_fast
