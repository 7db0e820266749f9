/* Samples to the power spectra of a block's frames, in shared memory: the middle of the CUDA kernel of log_mel.
 *
 * A job is one complex transform of length M = R1 * R2 <= 1024 by T = R1 threads of one warp. Up to n_fft = 1024 a pair
 * of frames is one job. A longer frame is folded while it is loaded: bins FOLD * k + r of a signal z of length FOLD * M
 * are the transform of length M of
 *
 *   y[n] = exp(-2 pi i n r / N) sum_q z[n + M q] exp(-2 pi i q r / FOLD),
 *
 * so residue 0 is a sum and FOLD / 2 an alternating sum, each with its mirrored bins N - K in the same job; residue
 * 1 of FOLD = 4 is complex for one real frame alone, and holds residue 3 as its own mirrored bins. */
#pragma once

#include <math.h>

#include "log_mel_layout.cuh"

namespace clvp_fast {

/* `reflect` for places less than `length` from the signal: without division and branches. */
CLVP_FAST_INLINE int reflect_once(int place, int length) {
    const int right = place < 0 ? -place : place, back = 2 * (length - 1) - right;
    return right < back ? right : back;
}

/* A frame's part of a folded signal: sign * window * samples of its block `fold`. */
struct Source {
    int frame, fold; /* of the pair; of the frame */
    float sign;
};

/* x += one source in the real parts and one in the imaginary parts. SAME: both are of one block and sign. */
template <int N, class Sample, bool SAME>
CLVP_FAST_INLINE void add_samples(Shared<N> &shared, const clvp_fast_log_mel &call, Job job, Source re, Source im,
                                  Complex<float> (&x)[Layout<N>::R2]) {
    using L = Layout<N>;
    const FrameRange &range = shared.range;
    const auto *samples = static_cast<const Sample *>(range.samples);
    const auto *window = static_cast<const float *>(call.window) + job.thread;
    const auto weight = [&](const Source &of, int i) {
        const float value = read_only(window + L::M * of.fold + L::T * i);
        return L::FOLD == 1 ? value : of.sign * value;
    };
    const auto begin = [&](const Source &of) { return range.begin + (2 * job.pair + of.frame) * call.hop_length; };
    const auto there = [&](const Source &of) { return 2 * job.pair + of.frame < range.true_frames; };
    if (there(im) && begin(re) >= 0 && begin(im) + N <= range.length) { /* im is the later frame, or the same one */
        const Sample *a = samples + begin(re) + L::M * re.fold + job.thread;
        const Sample *b = samples + begin(im) + L::M * im.fold + job.thread;
        if (L::FOLD == 1 && call.hop_length == N / 4) { /* the frames share three samples of four */
            constexpr int SHIFT = L::R2 / 4;
            float both[L::R2 + SHIFT];
            unroll<L::R2 + SHIFT>([&](auto i) { both[i] = float(read_only(a + L::T * i)); });
            unroll<L::R2>([&](auto i) {
                const float factor = weight(re, i);
                x[i] = {factor * both[i], factor * both[i + SHIFT]};
            });
            return;
        }
        unroll<L::R2>([&](auto i) {
            const float weight_re = weight(re, i), weight_im = SAME ? weight_re : weight(im, i);
            x[i].re += weight_re * float(read_only(a + L::T * i));
            x[i].im += weight_im * float(read_only(b + L::T * i));
        });
        return;
    }
    /* Loops, that pass samples through cells that only this thread uses until the next barrier. */
    FramePair *cells = shared.power + exchange_cell<L>(job, job.thread % L::HALF, 0);
    const auto own = [&](int i) -> float & { return cells[L::STRIDE * i].of[job.thread / L::HALF]; };
    const auto add = [&](auto part, const Source &of) {
        if (!there(of)) return;
        /* The signal around the frame, for integers of 32 bits: mirrored places lie less than N from it. */
        const int64_t origin = begin(of) > N ? begin(of) - N : 0, rest = range.length - origin;
        const Sample *near = samples + origin;
        const int length = int(rest < 4 * N ? rest : 4 * N);
        const int place = int(begin(of) - origin) + L::M * of.fold + job.thread;
        if (length > N / 2) {
            CLVP_FAST_UNROLL(8) /* so many loads are on their way together */
            for (int i = 0; i < L::R2; ++i)
                own(i) = weight(of, i) * float(read_only(near + reflect_once(place + L::T * i, length)));
        } else {
            CLVP_FAST_UNROLL(1)
            for (int i = 0; i < L::R2; ++i)
                own(i) = weight(of, i) * float(read_only(near + reflect(place + L::T * i, length)));
        }
        unroll<L::R2>([&](auto i) { (part == 0 ? x[i].re : x[i].im) += own(i); });
    };
    add(Index<0>{}, re);
    add(Index<1>{}, im);
}

/* The folded samples of a job; those of a frame that is not there count as 0. */
template <int N, class Sample>
CLVP_FAST_INLINE void load_folded(Shared<N> &shared, const clvp_fast_log_mel &call, Job job,
                                  Complex<float> (&x)[Layout<N>::R2]) {
    using L = Layout<N>;
    unroll<L::R2>([&](auto i) { x[i] = {0.f, 0.f}; });
    if (L::FOLD == 4 && job.kind == Job::QUARTER) {
        CLVP_FAST_UNROLL(1)
        for (int fold = 0; fold < 4; fold += 2) {
            const float sign = fold == 0 ? 1.f : -1.f;
            add_samples<N, Sample, false>(shared, call, job, {job.frame, fold, sign}, {job.frame, fold + 1, -sign}, x);
        }
        return;
    }
    CLVP_FAST_UNROLL(1)
    for (int fold = 0; fold < L::FOLD; ++fold) {
        const float sign = job.kind == Job::ALTERNATE && fold % 2 ? -1.f : 1.f;
        add_samples<N, Sample, true>(shared, call, job, {0, fold, sign}, {1, fold, sign}, x);
    }
}

/* Marks a frame that reaches a NaN or infinite sample, and takes this thread's part of it for 0, so that the other
 * frame of the pair stays what it is. A frame whose samples are so large that their sum overflows is taken for one. */
template <int N>
CLVP_FAST_INLINE void remove_not_finite(Shared<N> &shared, Job job, Complex<float> (&x)[Layout<N>::R2]) {
    constexpr int COUNT = Layout<N>::R2;
    /* One sum costs half as much as two; a product that overflows only causes a false alarm. */
    float products[4] = {};
    unroll<COUNT>([&](auto i) { products[i % 4] += x[i].re * x[i].im; });
    if (fabsf(products[0] + products[1] + (products[2] + products[3])) < INFINITY) return;
    Complex<float> sum = x[0];
    unroll<COUNT - 1>([&](auto i) { sum = sum + x[i + 1]; });
    if (!(fabsf(sum.re) < INFINITY)) {
        shared.spoil[job.pair].of[0] = NAN;
        unroll<COUNT>([&](auto i) { x[i].re = 0.f; });
    }
    if (!(fabsf(sum.im) < INFINITY)) {
        shared.spoil[job.pair].of[1] = NAN;
        unroll<COUNT>([&](auto i) { x[i].im = 0.f; });
    }
}

/* Loads, transforms of radix R1, twiddles. */
template <int N, class Sample>
CLVP_FAST_INLINE void first_stage(Shared<N> &shared, const clvp_fast_log_mel &call, Job job,
                                  Complex<float> (&x)[Layout<N>::R2]) {
    using L = Layout<N>;
    load_folded<N, Sample>(shared, call, job, x);
    if (job.kind != Job::QUARTER) remove_not_finite<N>(shared, job, x);
    if constexpr (L::FOLD > 1) {
        if (job.kind != Job::SUM) {
            const auto *twiddles = static_cast<const Complex<float> *>(call.twiddles);
            const int step = L::T * job.residue;
            unroll<L::R2>([&](auto i) {
                const Complex<float> twiddle = read_only(twiddles + step * i);
                x[i] = multiply(x[i], twiddle.re, twiddle.im);
            });
        }
    }
    unroll<L::COLUMNS>([&](auto column) {
        Complex<float> down[L::R1];
        unroll<L::R1>([&](auto row) { down[row] = x[L::COLUMNS * row + column]; });
        dft<L::R1>(down);
        unroll<L::R1>([&](auto row) { x[L::COLUMNS * row + column] = down[row]; });
    });

    const auto &low = shared.low[job.kind];
    unroll<L::COLUMNS>([&](auto column) {
        const int n2 = job.thread + L::T * column;
        Complex<float> ones[4];
        unroll<4>([&](auto b) { ones[b] = low[b][n2]; });
        unroll<L::R1 / 4>([&](auto a) {
            const Complex<float> fours = shared.high[a][n2];
            unroll<4>([&](auto b) {
                constexpr int k1 = 4 * a.value + b.value;
                if constexpr (k1 == 0 && L::FOLD == 1) return;
                Complex<float> twiddle = ones[b];
                if constexpr (b.value == 0 && L::FOLD == 1) {
                    twiddle = fours;
                } else if constexpr (a.value > 0) {
                    twiddle = multiply(twiddle, fours.re, fours.im);
                }
                auto &value = x[L::COLUMNS * k1 + column];
                value = multiply(value, twiddle.re, twiddle.im);
            });
        });
    });
}

template <int N, int PART>
CLVP_FAST_INLINE void put(Shared<N> &shared, Job job, const Complex<float> (&x)[Layout<N>::R2]) {
    using L = Layout<N>;
    unroll<L::COLUMNS>([&](auto column) {
        unroll<L::HALF>([&](auto k1) {
            const auto &a = x[L::COLUMNS * k1 + column], &b = x[L::COLUMNS * (k1 + L::HALF) + column];
            FramePair &cell = shared.power[exchange_cell<L>(job, k1, job.thread + L::T * column)];
            cell = PART == 0 ? FramePair{a.re, b.re} : FramePair{a.im, b.im};
        });
    });
}

template <int N, int PART>
CLVP_FAST_INLINE void get(const Shared<N> &shared, Job job, Complex<float> (&x)[Layout<N>::R2]) {
    using L = Layout<N>;
    const FramePair *cells = shared.power + exchange_cell<L>(job, job.thread % L::HALF, 0);
    const int half = job.thread / L::HALF;
    unroll<L::R2>([&](auto n2) { (PART == 0 ? x[n2].re : x[n2].im) = cells[L::STRIDE * n2].of[half]; });
}

/* x[k2] of thread t is bin K = FOLD * (t + T * k2) + residue; bins from the last band's end on are left out, four k2 at
 * a time. All lanes of a warp take part in `from`, outside of any branch. */
template <int N, class Run>
CLVP_FAST_INLINE void power(Run &run, Shared<N> &shared, Job job, bool work, Registers<N> &registers) {
    using L = Layout<N>;
    auto &x = registers.x;
    const int t = job.thread, bins = work ? int(shared.bins) : 0;
    const bool own = job.kind == Job::SUM && t == 0;
    const int partner = job.kind == Job::SUM ? (L::T - t) % L::T : L::T - 1 - t;
    FramePair *column = shared.power + job.pair;
    FramePair *place = column + L::STRIDE * (L::FOLD * t + job.residue);
    const auto store = [&](auto k2, Complex<float> mirrored) {
        constexpr int first = L::FOLD * L::T * k2.value, last = L::R2 - 1 - k2.value;
        if (L::FOLD == 4 && job.kind == Job::QUARTER) {
            FramePair *back = column + L::STRIDE * (4 * (L::T - 1 - t) + 3);
            place[L::STRIDE * first].of[job.frame] = 4 * (x[k2].re * x[k2].re + x[k2].im * x[k2].im);
            back[L::STRIDE * first].of[job.frame] = 4 * (x[last].re * x[last].re + x[last].im * x[last].im);
            return;
        }
        if (own) mirrored = x[(L::R2 - k2) % L::R2];
        place[L::STRIDE * first] = {power_of_real(x[k2], mirrored), power_of_imaginary(x[k2], mirrored)};
    };
    unroll<L::R2 / 8>([&](auto four) {
        Complex<float> mirrored[4];
        unroll<4>([&](auto i) {
            mirrored[i] = run.template from<L::T, L::R2 - 1 - 4 * four.value - i.value>(registers, partner);
        });
        if (L::FOLD * L::T * 4 * four.value >= bins) return;
        unroll<4>([&](auto i) { store(Index<4 * four.value + i.value>{}, mirrored[i]); });
    });
    if (own && N / 2 < bins) {
        const Complex<float> nyquist = x[L::R2 / 2];
        column[L::STRIDE * (N / 2)] = {power_of_real(nyquist, nyquist), power_of_imaginary(nyquist, nyquist)};
    }
}

}  // namespace clvp_fast
