/* The work of one thread block of the CUDA kernel: log-mel of FRAMES consecutive frames of one clip.
 *
 *   prepare      tables of twiddles, clamped bands
 *   first_stage  samples * window, transforms of radix R1 in registers, twiddles     |
 *   put, get     exchange through shared memory: real parts, then imaginary parts    | T threads of a warp a transform
 *   dft          transforms of radix R2 in registers                                 |
 *   power        Z[k] and Z[N - k] become the power spectra of two frames            |
 *   mel          bands, floor, logarithm, division, coalesced stores: a lane a frame, a warp a channel
 *   clamp        top_db: the last block of a row to finish raises values that are too low
 *
 * Everything here runs on the host too, thread by thread (tests/csrc/log_mel_emulator.cpp): `block` is the one text of
 * the phases and barriers, and `Run` maps it to threads. */
#pragma once

#include "log_mel_features.cuh"
#include "log_mel_transform.cuh"

namespace clvp_fast {

enum class Barrier { WARP, BLOCK };

/* Tables, once for all ranges of a block; shared.bins is zero before. */
template <int N, class Run>
CLVP_FAST_INLINE void prepare(Run &run, Shared<N> &shared, const clvp_fast_log_mel &call, int thread) {
    using L = Layout<N>;
    const auto *twiddles = static_cast<const Complex<float> *>(call.twiddles);
    CLVP_FAST_UNROLL(1)
    for (int entry = thread; entry < (4 * L::KINDS + L::R1 / 4) * L::R2; entry += L::THREADS) {
        const int n2 = entry % L::R2, row = entry / L::R2, kind = row / 4;
        if (kind < L::KINDS) {
            shared.low[kind][row % 4][n2] = read_only(twiddles + n2 * (L::FOLD * (row % 4) + residue_of<L>(kind)));
        } else {
            const int a = row - 4 * L::KINDS;
            shared.high[a][n2] = read_only(twiddles + n2 * L::FOLD * 4 * a);
        }
    }
    Band band = {0, 0};
    if (thread < call.num_mels) {
        const int first = read_only(call.bands + 2 * thread), last = read_only(call.bands + 2 * thread + 1);
        if (last > 0 && first < last) band = {first < 0 ? 0 : first, last > L::BINS ? L::BINS : last};
        if (band.first >= band.last) band = {0, 0};
        shared.bands[thread] = band;
    }
    run.max(&shared.bins, uint32_t(band.last), thread);
}

/* The range of frames `column` of a row; one thread calls it. */
template <int N, class Sample>
CLVP_FAST_INLINE void begin_range(Shared<N> &shared, const clvp_fast_log_mel &call, int64_t row, int64_t column) {
    constexpr int FRAMES = Layout<N>::FRAMES;
    int64_t length = call.lengths ? read_only(call.lengths + row) : call.time;
    length = length < 1 ? 1 : length > call.time ? call.time : length;
    const int64_t first = column * FRAMES, left = 1 + length / call.hop_length - first;
    shared.range.samples = static_cast<const Sample *>(call.samples) + row * call.samples_stride;
    shared.range.row = row;
    shared.range.length = length;
    shared.range.first_frame = first;
    shared.range.begin = first * call.hop_length - N / 2;
    shared.range.true_frames = left < 0 ? 0 : left < FRAMES ? int(left) : FRAMES;
    shared.loudest = 0;
}

/* Does all the work of one block: the range of frames `column` of `columns`, of the rows first_row, first_row +
 * row_step, ... */
template <int N, class Sample, class Run>
CLVP_FAST_INLINE void block(Run &run, Shared<N> *shared, const clvp_fast_log_mel *call, int64_t column, int64_t columns,
                            int64_t first_row, int64_t row_step) {
    using L = Layout<N>;
    using R = Registers<N>;
    run.template phase<Barrier::BLOCK>([=](auto &, int thread, R &) {
        if (thread != 0) return;
        shared->bins = 0;
        shared->log_floor = float(call->log_floor);
    });
    for (int64_t row = first_row; row < call->batch; row += row_step) {
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) {
            if (row == first_row) prepare<N>(run, *shared, *call, thread);
            if (thread < L::FRAMES) shared->not_finite[thread] = 0;
            if (thread == 0) begin_range<N, Sample>(*shared, *call, row, column);
        });
        CLVP_FAST_UNROLL(1)
        for (int round = 0; round < L::ROUNDS; ++round) {
            run.template phase<Barrier::WARP>([=](auto &, int thread, R &registers) {
                if (idle(*shared, thread, round)) return;
                first_stage<N, Sample>(*shared, *call, job_of<L>(thread, round), registers.x);
            });
            run.template phase<Barrier::WARP>([=](auto &, int thread, R &registers) {
                if (!idle(*shared, thread, round)) put<N, 0>(*shared, job_of<L>(thread, round), registers.x);
            });
            run.template phase<Barrier::WARP>([=](auto &, int thread, R &registers) {
                if (!idle(*shared, thread, round)) get<N, 0>(*shared, job_of<L>(thread, round), registers.x);
            });
            run.template phase<Barrier::WARP>([=](auto &, int thread, R &registers) {
                if (!idle(*shared, thread, round)) put<N, 1>(*shared, job_of<L>(thread, round), registers.x);
            });
            /* The powers of a pair lie where its jobs exchanged, and a folded frame is several warps' work. */
            constexpr Barrier exchanged = L::FOLD == 1 ? Barrier::WARP : Barrier::BLOCK;
            run.template phase<exchanged>([=](auto &, int thread, R &registers) {
                if (idle(*shared, thread, round)) return;
                get<N, 1>(*shared, job_of<L>(thread, round), registers.x);
                dft<L::R2>(registers.x);
            });
            run.template phase<Barrier::WARP>([=](auto &run, int thread, R &registers) {
                power<N>(run, *shared, job_of<L>(thread, round), !idle(*shared, thread, round), registers);
            });
        }
        run.template phase<Barrier::BLOCK>([](auto &, int, R &) {});
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &registers) {
            mel<N, Sample>(*shared, *call, thread, registers);
            if (call->top_db < 0) return;
            run.max(&shared->loudest, registers.loudest, thread);
            run.publish();
        });
        if (call->top_db < 0) continue;
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) {
            if (thread != 0) return;
            uint32_t *maxima = call->clip_maxima + 2 * row;
            shared->last_block = run.finish(maxima, shared->loudest) == columns - 1;
            shared->loudest = run.fresh(maxima);
        });
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) {
            if (shared->last_block) clamp<N>(run, *shared, *call, thread);
        });
    }
}

}  // namespace clvp_fast
