/* What one thread block of the CUDA kernel does: log-mel of FRAMES consecutive frames of one clip.
 *
 *   prepare     tables of twiddles, clamped bands                                              all threads
 *   first       samples * window, transforms of radix R1 in registers, twiddles        |
 *   exchange    through shared memory: real parts, then imaginary parts                | T threads a job, no block barrier
 *   second      transforms of radix R2 in registers                                    |
 *   power       Z[k] and Z[N - k] become the power spectra of two frames, in shared    |
 *   mel         bands, floor, logarithm, division, coalesced stores                            a lane a frame, a warp a channel
 *   clamp       top_db: the last block of a row to finish raises what lies too low
 *
 * A job is one complex transform of length M = R1 * R2 <= 1024 by T = R1 threads of one warp. Up to n_fft = 1024 a pair of
 * frames is one job. A longer frame is folded while it is loaded: bins FOLD * k + r of a signal z of length FOLD * M are
 * the transform of length M of
 *
 *   y[n] = exp(-2 pi i n r / N) sum_q z[n + M q] exp(-2 pi i q r / FOLD),
 *
 * so residue 0 is a sum, residue FOLD / 2 an alternating sum, each with its mirrored bins N - K in the same job; residue 1
 * of FOLD = 4 is complex for one real frame alone, and holds residue 3 as its own mirrored bins.
 *
 * Everything here runs on the host too, thread by thread (tests/csrc/emulator.cpp): `block` is the one text of the phases
 * and barriers, and `Run` says how threads run it. */
#pragma once

#include <math.h>
#include <string.h>

#include "clvp_fast.h"
#include "log_mel.cuh"

#ifdef __CUDACC__
#define CLVP_FAST_PRAGMA(text) _Pragma(#text)
#define CLVP_FAST_UNROLL(times) CLVP_FAST_PRAGMA(unroll times)
#else
#define CLVP_FAST_UNROLL(times)
#endif

namespace clvp_fast {

enum class Barrier { WARP, BLOCK };

/* How the work on frames of N samples is laid out. */
template <int N_FFT>
struct Shape {
    static constexpr int N = N_FFT;
    static constexpr int FOLD = N <= 1024 ? 1 : N / 1024;
    static constexpr int M = N / FOLD;
    static constexpr int R1 = M == 1024 ? 32 : 16, R2 = M / R1;
    static constexpr int T = R1;        /* threads of a job */
    static constexpr int COLUMNS = R2 / T; /* transforms of radix R1 by one thread */
    static constexpr int FRAMES = FOLD == 1 ? 32 : 16, PAIRS = FRAMES / 2;
    static constexpr int THREADS = FOLD == 4 ? 512 : 256;
    static constexpr int BLOCKS_PER_SM = FOLD == 4 ? 1 : 2;
    static constexpr int GROUPS = THREADS / T, ROUNDS = PAIRS * FOLD / GROUPS;
    static constexpr int KINDS = FOLD == 4 ? 3 : FOLD;
    static constexpr int BINS = N / 2 + 1;

    /* power[row][frame]: the odd stride spreads rows over the banks. A pair's exchange lies in its own two columns:
     * element (k1, n2) in column k1 / HALF, row ROW_STEP * (k1 % HALF) + n2 + SHIFT * (k1 / HALF). Writes (lanes are n2) and
     * reads (lanes are k1) then meet every bank once. */
    static constexpr int STRIDE = FRAMES + 1;
    static constexpr int HALF = R1 / 2, ROW_STEP = R2 + 1;
    static constexpr int SHIFT = R1 == 16 ? 7 : FRAMES == 32 ? 15 : 31;
    static constexpr int JOB_ROWS = ROW_STEP * (HALF - 1) + R2 + SHIFT;
    static constexpr int ROWS = FOLD * JOB_ROWS;
    static_assert(ROWS >= BINS && COLUMNS * T == R2 && ROUNDS * GROUPS == PAIRS * FOLD);
};

struct Band {
    int first, last;
};

template <int N>
struct Shared {
    using S = Shape<N>;
    float power[S::ROWS * S::STRIDE];
    /* The twiddle of row k1 = 4 a + b, column n2 of a job of residue r is low[kind][b][n2] * high[a][n2]. */
    Complex<float> low[S::KINDS][4][S::R2], high[S::R1 / 4][S::R2];
    Band bands[256];
    int not_finite[S::FRAMES];
    uint32_t bins; /* the end of the last band */
    uint32_t loudest, last_block;
};

/* What a thread keeps in registers from phase to phase. */
template <int N>
struct Registers {
    Complex<float> x[Shape<N>::R2];
    uint32_t loudest;
};

/* FRAMES frames of one clip. */
template <class Sample>
struct Tile {
    const clvp_fast_log_mel *call;
    const Sample *samples;
    int64_t row, length, first_frame, true_frames;
};

template <class T>
CLVP_FAST_INLINE T read_only(const T *place) {
#ifdef __CUDA_ARCH__
    return __ldg(place);
#else
    return *place;
#endif
}
CLVP_FAST_INLINE Complex<float> read_only(const Complex<float> *place) {
#ifdef __CUDA_ARCH__
    const float2 pair = __ldg(reinterpret_cast<const float2 *>(place));
    return {pair.x, pair.y};
#else
    return *place;
#endif
}

/* One of the transforms that a block does. */
struct Job {
    int pair, index; /* of the pair's FOLD jobs */
    int thread;      /* 0 .. T - 1 */
    enum Kind { SUM, ALTERNATE, QUARTER } kind;
    int frame;   /* QUARTER: which frame of the pair */
    int residue; /* bins FOLD * k + residue */
};

template <class S>
CLVP_FAST_INLINE int residue_of(int kind) {
    return kind == Job::SUM ? 0 : kind == Job::ALTERNATE ? S::FOLD / 2 : 1;
}

template <class S>
CLVP_FAST_INLINE Job job_of(int thread, int round) {
    const int group = thread / S::T;
    Job job = {};
    job.thread = thread % S::T;
    if constexpr (S::T == 16) {
        job.pair = group / 2 + 8 * (group % 2); /* 16 columns apart: no bank in common */
    } else {
        job.pair = (round * S::GROUPS + group) / S::FOLD;
        job.index = (round * S::GROUPS + group) % S::FOLD;
    }
    job.kind = job.index == 0 ? Job::SUM : job.index == 1 ? Job::ALTERNATE : Job::QUARTER;
    job.frame = job.index == 3;
    job.residue = residue_of<S>(job.kind);
    return job;
}

/* The cell of element (k1, n2) of a job's exchange. */
template <class S>
CLVP_FAST_INLINE int exchange_cell(Job job, int k1, int n2) {
    const int row = S::JOB_ROWS * job.index + S::ROW_STEP * (k1 % S::HALF) + n2 + S::SHIFT * (k1 / S::HALF);
    return row * S::STRIDE + 2 * job.pair + k1 / S::HALF;
}

/* Whether the whole warp has nothing to transform. A warp's first pair is its earliest. */
template <class S, class Sample>
CLVP_FAST_INLINE bool idle(const Tile<Sample> &tile, int thread, int round) {
    const Job first = job_of<S>(thread & ~31, round);
    return tile.first_frame + 2 * first.pair >= tile.true_frames;
}

/* Tables, once for all tiles of a block. `ready` has run before: shared.bins is zero. */
template <int N, class Run>
CLVP_FAST_INLINE void prepare(Run &run, Shared<N> &shared, const clvp_fast_log_mel &call, int thread) {
    using S = Shape<N>;
    const auto *twiddles = static_cast<const Complex<float> *>(call.twiddles);
    for (int entry = thread; entry < (4 * S::KINDS + S::R1 / 4) * S::R2; entry += S::THREADS) {
        const int n2 = entry % S::R2, row = entry / S::R2, kind = row / 4;
        if (kind < S::KINDS) {
            shared.low[kind][row % 4][n2] = read_only(twiddles + n2 * (S::FOLD * (row % 4) + residue_of<S>(kind)));
        } else {
            const int a = row - 4 * S::KINDS;
            shared.high[a][n2] = read_only(twiddles + n2 * S::FOLD * 4 * a);
        }
    }
    Band band = {0, 0};
    if (thread < call.num_mels) {
        const int first = read_only(call.bands + 2 * thread), last = read_only(call.bands + 2 * thread + 1);
        if (last > 0 && first < last) band = {first < 0 ? 0 : first, last > S::BINS ? S::BINS : last};
        if (band.first >= band.last) band = {0, 0};
        shared.bands[thread] = band;
    }
    run.max(&shared.bins, uint32_t(band.last), thread);
}

/* `reflect` for places less than n_fft from the signal: without the division of 64-bit integers, which is a call. */
CLVP_FAST_INLINE int64_t reflect_near(int64_t place, int64_t length) {
    if (place >= 0 && place < length) return place;
    const int64_t once = place < 0 ? -place : 2 * (length - 1) - place;
    if (once >= 0 && once < length) return once;
    return reflect(int32_t(place), int32_t(length));
}

/* A frame's part of a folded signal: sign * window * samples of its block `fold`. */
struct Source {
    int frame, fold; /* of the pair; of the frame */
    float sign;
    bool present; /* else it counts as 0 */
};

/* x += one source in the real parts and one in the imaginary parts. SAME: both are of one block and sign. */
template <int N, bool SAME, class Sample>
CLVP_FAST_INLINE void add_samples(
    Shared<N> &shared, const Tile<Sample> &tile, Job job, Source re, Source im, Complex<float> (&x)[Shape<N>::R2]) {
    using S = Shape<N>;
    const auto *window = static_cast<const float *>(tile.call->window) + job.thread;
    const auto weight = [&](const Source &of, int i) {
        const float value = read_only(window + S::M * of.fold + S::T * i);
        return S::FOLD == 1 ? value : of.sign * value;
    };
    const auto begin = [&](const Source &of) {
        return (tile.first_frame + 2 * job.pair + of.frame) * tile.call->hop_length - N / 2;
    };
    const auto inside = [&](const Source &of) { return of.present && begin(of) >= 0 && begin(of) + N <= tile.length; };
    if (inside(re) && inside(im)) {
        const Sample *a = tile.samples + begin(re) + S::M * re.fold + job.thread;
        const Sample *b = tile.samples + begin(im) + S::M * im.fold + job.thread;
        unroll<S::R2>([&](auto i) {
            const float weight_re = weight(re, i), weight_im = SAME ? weight_re : weight(im, i);
            x[i].re += weight_re * float(read_only(a + S::T * i));
            x[i].im += weight_im * float(read_only(b + S::T * i));
        });
        return;
    }
    /* A loop, not unrolled code, that passes samples through cells that only this thread uses until the next barrier. */
    float *own = shared.power + exchange_cell<S>(job, job.thread, 0);
    const auto add = [&](auto part, const Source &of) {
        if (!of.present) return;
        const int64_t place = begin(of) + S::M * of.fold + job.thread;
        CLVP_FAST_UNROLL(1)
        for (int i = 0; i < S::R2; ++i)
            own[S::STRIDE * i] = weight(of, i) * float(read_only(tile.samples + reflect_near(place + S::T * i, tile.length)));
        unroll<S::R2>([&](auto i) { (part == 0 ? x[i].re : x[i].im) += own[S::STRIDE * i]; });
    };
    add(Index<0>{}, re);
    add(Index<1>{}, im);
}

/* The folded samples of a job; those of a frame that is not present count as 0. */
template <int N, class Sample>
CLVP_FAST_INLINE void load(Shared<N> &shared, const Tile<Sample> &tile, Job job, bool re_present, bool im_present,
                           Complex<float> (&x)[Shape<N>::R2]) {
    using S = Shape<N>;
    unroll<S::R2>([&](auto i) { x[i] = {0.f, 0.f}; });
    if (S::FOLD == 4 && job.kind == Job::QUARTER) {
        const int frame = job.frame;
        const bool there = frame == 0 ? re_present : im_present;
        CLVP_FAST_UNROLL(1)
        for (int fold = 0; fold < 4; fold += 2) {
            const float sign = fold == 0 ? 1.f : -1.f;
            add_samples<N, false>(shared, tile, job, {frame, fold, sign, there}, {frame, fold + 1, -sign, there}, x);
        }
        return;
    }
    CLVP_FAST_UNROLL(1)
    for (int fold = 0; fold < S::FOLD; ++fold) {
        const float sign = job.kind == Job::ALTERNATE && fold % 2 ? -1.f : 1.f;
        add_samples<N, true>(shared, tile, job, {0, fold, sign, re_present}, {1, fold, sign, im_present}, x);
    }
}

/* Loads, transforms of radix R1, twiddles. */
template <int N, class Sample>
CLVP_FAST_INLINE void first_stage(Shared<N> &shared, const Tile<Sample> &tile, Job job, Complex<float> (&x)[Shape<N>::R2]) {
    using S = Shape<N>;
    const int64_t frame = tile.first_frame + 2 * job.pair;
    bool re_present = frame < tile.true_frames, im_present = frame + 1 < tile.true_frames;
    const auto column_transforms = [&] {
        unroll<S::COLUMNS>([&](auto column) {
            Complex<float> down[S::R1];
            unroll<S::R1>([&](auto row) { down[row] = x[S::COLUMNS * row + column]; });
            dft<S::R1>(down);
            unroll<S::R1>([&](auto row) { x[S::COLUMNS * row + column] = down[row]; });
        });
    };
    /* The sum of a thread's samples shows one that is not finite. Its frame is marked, and this thread's part of it taken for
     * 0, so that the other frame of the pair stays what it is. */
    for (;;) {
        load<N>(shared, tile, job, re_present, im_present, x);
        if constexpr (S::FOLD == 1) column_transforms();
        Complex<float> sum = x[0];
        if constexpr (S::FOLD == 1) {
            if constexpr (S::COLUMNS == 2) sum = sum + x[1];
        } else {
            unroll<S::R2 - 1>([&](auto i) { sum = sum + x[i + 1]; });
        }
        const bool bad_re = !(fabsf(sum.re) < INFINITY), bad_im = !(fabsf(sum.im) < INFINITY);
        if (!(bad_re || bad_im) || job.kind == Job::QUARTER) break;
        if (bad_re) shared.not_finite[2 * job.pair] = 1, re_present = false;
        if (bad_im) shared.not_finite[2 * job.pair + 1] = 1, im_present = false;
    }
    if constexpr (S::FOLD > 1) {
        if (job.kind != Job::SUM) {
            const auto *twiddles = static_cast<const Complex<float> *>(tile.call->twiddles);
            const int step = S::T * job.residue;
            unroll<S::R2>([&](auto i) {
                const Complex<float> twiddle = read_only(twiddles + step * i);
                x[i] = multiply(x[i], twiddle.re, twiddle.im);
            });
        }
        column_transforms();
    }

    const auto &low = shared.low[job.kind];
    unroll<S::COLUMNS>([&](auto column) {
        const int n2 = job.thread + S::T * column;
        Complex<float> ones[4];
        unroll<4>([&](auto b) { ones[b] = low[b][n2]; });
        unroll<S::R1 / 4>([&](auto a) {
            const Complex<float> fours = shared.high[a][n2];
            unroll<4>([&](auto b) {
                constexpr int k1 = 4 * a.value + b.value;
                if constexpr (k1 == 0 && S::FOLD == 1) return;
                Complex<float> twiddle = ones[b];
                if constexpr (b.value == 0 && S::FOLD == 1) {
                    twiddle = fours;
                } else if constexpr (a.value > 0) {
                    twiddle = multiply(twiddle, fours.re, fours.im);
                }
                auto &value = x[S::COLUMNS * k1 + column];
                value = multiply(value, twiddle.re, twiddle.im);
            });
        });
    });
}

template <int N, int PART>
CLVP_FAST_INLINE void put(Shared<N> &shared, Job job, const Complex<float> (&x)[Shape<N>::R2]) {
    using S = Shape<N>;
    unroll<S::COLUMNS>([&](auto column) {
        unroll<S::R1>([&](auto k1) {
            const auto &value = x[S::COLUMNS * k1 + column];
            shared.power[exchange_cell<S>(job, k1, job.thread + S::T * column)] = PART == 0 ? value.re : value.im;
        });
    });
}

template <int N, int PART>
CLVP_FAST_INLINE void get(const Shared<N> &shared, Job job, Complex<float> (&x)[Shape<N>::R2]) {
    using S = Shape<N>;
    const float *own = shared.power + exchange_cell<S>(job, job.thread, 0);
    unroll<S::R2>([&](auto n2) { (PART == 0 ? x[n2].re : x[n2].im) = own[S::STRIDE * n2]; });
}

/* x[k2] of thread t is bin K = FOLD * (t + T * k2) + residue; bins from the last band's end on are left out. */
template <int N, class Run>
CLVP_FAST_INLINE void power(Run &run, Shared<N> &shared, Job job, Registers<N> &registers) {
    using S = Shape<N>;
    auto &x = registers.x;
    const int bins = int(shared.bins), t = job.thread, residue = job.residue;
    float *column = shared.power + 2 * job.pair;
    if (S::FOLD == 4 && job.kind == Job::QUARTER) {
        column += job.frame;
        unroll<S::R2>([&](auto k2) {
            constexpr bool mirrored = k2.value >= S::R2 / 2;
            constexpr int least = mirrored ? 4 * (S::M - S::T * (k2.value + 1)) + 3 : 4 * S::T * k2.value + 1;
            if (least >= bins) return;
            const int k = t + S::T * k2, bin = mirrored ? 4 * (S::M - 1 - k) + 3 : 4 * k + 1;
            column[S::STRIDE * bin] = 4 * (x[k2].re * x[k2].re + x[k2].im * x[k2].im);
        });
        return;
    }
    const bool own = job.kind == Job::SUM && t == 0;
    const int partner = job.kind == Job::SUM ? (S::T - t) % S::T : S::T - 1 - t;
    unroll<S::R2 / 2>([&](auto k2) {
        if (S::FOLD * S::T * k2 >= bins) return;
        Complex<float> mirrored = run.template from<S::T, S::R2 - 1 - k2.value>(registers, partner);
        if (own) mirrored = x[(S::R2 - k2) % S::R2];
        float *place = column + S::STRIDE * (S::FOLD * (t + S::T * k2) + residue);
        place[0] = power_of_real(x[k2], mirrored);
        place[1] = power_of_imaginary(x[k2], mirrored);
    });
    if (own && N / 2 < bins) {
        float *place = column + S::STRIDE * (N / 2);
        place[0] = power_of_real(x[S::R2 / 2], x[S::R2 / 2]);
        place[1] = power_of_imaginary(x[S::R2 / 2], x[S::R2 / 2]);
    }
}

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

/* Unsigned integers in the order of the numbers; 0 lies below them all. */
CLVP_FAST_INLINE uint32_t ordered(float value) {
    const uint32_t bits = bits_of(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
CLVP_FAST_INLINE float number_of(uint32_t ordered) {
    return float_of(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
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

CLVP_FAST_INLINE void store(const clvp_fast_log_mel &call, int64_t place, float value) {
    if (call.features_dtype == CLVP_FAST_FLOAT32) {
        static_cast<float *>(call.features)[place] = value;
    } else {
        static_cast<uint16_t *>(call.features)[place] =
            call.features_dtype == CLVP_FAST_FLOAT16 ? float16_of(value) : bfloat16_of(value);
    }
}
/* A feature that another block may have written. */
template <class Run>
CLVP_FAST_INLINE float stored(Run &run, const clvp_fast_log_mel &call, int64_t place) {
    if (call.features_dtype == CLVP_FAST_FLOAT32) return run.fresh(static_cast<const float *>(call.features) + place);
    const uint16_t bits = run.fresh(static_cast<const uint16_t *>(call.features) + place);
    return call.features_dtype == CLVP_FAST_FLOAT16 ? of_float16(bits) : float_of(uint32_t(bits) << 16);
}

/* All channels of the tile's frames. */
template <int N, class Sample>
CLVP_FAST_INLINE void mel(Shared<N> &shared, const Tile<Sample> &tile, int thread, Registers<N> &registers) {
    using S = Shape<N>;
    const clvp_fast_log_mel &call = *tile.call;
    const int lane = thread % S::FRAMES;
    const int64_t frame = tile.first_frame + lane;
    const bool true_frame = frame < tile.true_frames, finite = !shared.not_finite[lane];
    const auto *norms = static_cast<const float *>(call.mel_norms);
    /* Powers are four times too large, and those of integers not yet divided by 32768: all exact. */
    const float scale = sizeof(Sample) == 2 ? 0.25f / (32768.f * 32768.f) : 0.25f, floor = float(call.log_floor);
    uint32_t loudest = 0;
    for (int channel = thread / S::FRAMES; channel < call.num_mels; channel += S::THREADS / S::FRAMES) {
        const Band band = shared.bands[channel];
        const float *weights = static_cast<const float *>(call.mel_filters) + int64_t(S::BINS) * channel;
        float value = 0.f;
        if (true_frame) {
            CLVP_FAST_UNROLL(4)
            for (int k = band.first; k < band.last; ++k)
                value += read_only(weights + k) * shared.power[S::STRIDE * k + lane];
            value *= scale;
            value = value < floor ? floor : value;
            value = call.decibels ? 10.f * log10f(value) : logf(value);
            if (!finite) value = NAN;
            if (value == value && ordered(value) > loudest) loudest = ordered(value);
            if (norms) value /= read_only(norms + channel);
        }
        if (frame < call.frames) store(call, (tile.row * call.num_mels + channel) * call.frames + frame, value);
    }
    registers.loudest = loudest;
}

/* The features lie there divided by the norms; so is the bound. */
template <int N, class Run, class Sample>
CLVP_FAST_INLINE void clamp(Run &run, const Shared<N> &shared, const Tile<Sample> &tile, int thread) {
    const clvp_fast_log_mel &call = *tile.call;
    const auto *norms = static_cast<const float *>(call.mel_norms);
    const float least = number_of(shared.loudest) - float(call.top_db);
    for (int channel = thread / 32; channel < call.num_mels; channel += Shape<N>::THREADS / 32) {
        const float norm = norms ? read_only(norms + channel) : 1.f;
        const float bound = norms ? least / norm : least;
        const int64_t begin = (tile.row * call.num_mels + channel) * call.frames;
        for (int64_t frame = thread % 32; frame < tile.true_frames; frame += 32) {
            const float value = stored(run, call, begin + frame);
            if (norm < 0 ? value > bound : value < bound) store(call, begin + frame, bound);
        }
    }
}

/* Everything that one block does with the tiles `column` of the rows first_row, first_row + row_step, ... */
template <int N, class Sample, class Run>
CLVP_FAST_INLINE void block(
    Run &run, Shared<N> *shared, const clvp_fast_log_mel *call, int64_t column, int64_t columns, int64_t first_row, int64_t row_step) {
    using S = Shape<N>;
    using R = Registers<N>;
    run.template phase<Barrier::BLOCK>([=](auto &, int thread, R &) {
        if (thread == 0) shared->bins = 0;
    });
    run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) { prepare<N>(run, *shared, *call, thread); });

    for (int64_t row = first_row; row < call->batch; row += row_step) {
        int64_t length = call->lengths ? read_only(call->lengths + row) : call->time;
        length = length < 1 ? 1 : length > call->time ? call->time : length;
        const Tile<Sample> tile = {call, static_cast<const Sample *>(call->samples) + row * call->samples_stride,
                                   row, length, column * S::FRAMES, 1 + length / call->hop_length};
        run.template phase<Barrier::BLOCK>([=](auto &, int thread, R &) {
            if (thread < S::FRAMES) shared->not_finite[thread] = 0;
            if (thread == 0) shared->loudest = 0;
        });
        CLVP_FAST_UNROLL(1)
        for (int round = 0; round < S::ROUNDS; ++round) {
            run.template phase<Barrier::WARP>([=](auto &, int thread, R &registers) {
                if (!idle<S>(tile, thread, round)) first_stage<N>(*shared, tile, job_of<S>(thread, round), registers.x);
            });
            run.template phase<Barrier::WARP>([=](auto &, int thread, R &registers) {
                if (!idle<S>(tile, thread, round)) put<N, 0>(*shared, job_of<S>(thread, round), registers.x);
            });
            run.template phase<Barrier::WARP>([=](auto &, int thread, R &registers) {
                if (!idle<S>(tile, thread, round)) get<N, 0>(*shared, job_of<S>(thread, round), registers.x);
            });
            run.template phase<Barrier::WARP>([=](auto &, int thread, R &registers) {
                if (!idle<S>(tile, thread, round)) put<N, 1>(*shared, job_of<S>(thread, round), registers.x);
            });
            /* The powers of a pair lie where its jobs exchanged, and a folded frame is several warps' work. */
            constexpr Barrier exchanged = S::FOLD == 1 ? Barrier::WARP : Barrier::BLOCK;
            run.template phase<exchanged>([=](auto &, int thread, R &registers) {
                if (idle<S>(tile, thread, round)) return;
                get<N, 1>(*shared, job_of<S>(thread, round), registers.x);
                dft<S::R2>(registers.x);
            });
            run.template phase<Barrier::WARP>([=](auto &run, int thread, R &registers) {
                if (!idle<S>(tile, thread, round)) power<N>(run, *shared, job_of<S>(thread, round), registers);
            });
        }
        run.template phase<Barrier::BLOCK>([](auto &, int, R &) {});
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &registers) {
            mel<N>(*shared, tile, thread, registers);
            if (call->top_db >= 0) {
                run.max(&shared->loudest, registers.loudest, thread);
                run.publish();
            }
        });
        if (call->top_db >= 0) {
            run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) {
                if (thread != 0) return;
                uint32_t *maxima = call->clip_maxima + 2 * row;
                shared->last_block = run.finish(maxima, shared->loudest) == columns - 1;
                shared->loudest = run.fresh(maxima);
            });
            run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) {
                if (shared->last_block) clamp<N>(run, *shared, tile, thread);
            });
        }
    }
}

} // namespace clvp_fast
