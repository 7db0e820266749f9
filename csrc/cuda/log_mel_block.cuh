/* The work of one thread block of the CUDA kernel: log-mel of tiles of FRAMES consecutive frames of one clip.
 *
 *   prepare      once a block: tables of twiddles, clamped bands, inverse norms
 *   first_stage  samples * window, transforms of radix R1 in registers, twiddles     |
 *   put, get     exchange through shared memory: real parts, then imaginary parts    | T threads of a warp a transform
 *   dft          transforms of radix R2 in registers                                 |
 *   power        Z[k] and Z[N - k] become the power spectra of two frames            |
 *   mel          bands, floor, logarithm, norms, coalesced stores: a lane a pair, as many lanes as pairs a channel
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
    Channel channel = {0, 0, 1.f};
    int end = 0;
    if (thread < call.num_mels) {
        const auto *norms = static_cast<const float *>(call.mel_norms);
        const int first = read_only(call.bands + 2 * thread), last = read_only(call.bands + 2 * thread + 1);
        if (last > 0 && first < last && first < L::BINS) {
            channel.first = first < 0 ? 0 : first;
            end = last > L::BINS ? L::BINS : last;
            channel.bins = end - channel.first;
        }
        if (norms) channel.inverse_norm = 1.f / read_only(norms + thread);
        shared.channels[thread] = channel;
    }
    run.max(&shared.bins, uint32_t(end), thread);
}

template <int N>
CLVP_FAST_INLINE int tiles_of_row(const clvp_fast_log_mel &call) {
    return int((call.frames + Layout<N>::FRAMES - 1) / Layout<N>::FRAMES);
}

/* The range of a tile's frames that is a block's; one thread calls it. */
template <int N, class Sample>
CLVP_FAST_INLINE void begin_range(Shared<N> &shared, const clvp_fast_log_mel &call) {
    constexpr int FRAMES = Layout<N>::FRAMES;
    const int row = shared.tile / shared.tiles_of_row, column = shared.tile % shared.tiles_of_row;
    const int most = FRAMES / shared.share.parts;
    int64_t length = call.lengths ? read_only(call.lengths + row) : call.time;
    length = length < 1 ? 1 : length > call.time ? call.time : length;
    const int64_t first = int64_t(column) * FRAMES + shared.share.part * most;
    const auto of_range = [&](int64_t frames) {
        return frames < first ? 0 : frames - first < most ? int(frames - first) : most;
    };
    shared.range.samples = static_cast<const Sample *>(call.samples) + row * call.samples_stride;
    shared.range.row = row;
    shared.range.length = length;
    shared.range.first_frame = first;
    shared.range.frames = of_range(call.frames);
    shared.range.begin = first < call.frames ? first * call.hop_length - N / 2 : 0; /* else it may overflow */
    shared.range.true_frames = of_range(1 + length / call.hop_length);
    shared.loudest = 0;
}

/* Does all the work of one block. */
template <int N, class Sample, class Run>
CLVP_FAST_INLINE void block(Run &run, Shared<N> *shared, const clvp_fast_log_mel *call, Share share) {
    using L = Layout<N>;
    using R = Registers<N>;
    run.template phase<Barrier::BLOCK>([=](auto &, int thread, R &) {
        if (thread != 0) return;
        shared->tiles_of_row = tiles_of_row<N>(*call);
        shared->tiles = shared->tiles_of_row * int(call->batch);
        shared->share = share;
        shared->tile = share.block;
        shared->bins = 0;
        shared->log_floor = float(call->log_floor);
        shared->log_unit = call->decibels ? 3.01029996f : 0.693147181f; /* 10 log10(2), ln(2) */
    });
    while (shared->tile < shared->tiles) {
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) {
            if (shared->tile == shared->share.block) prepare<N>(run, *shared, *call, thread);
            if (thread < L::PAIRS) shared->spoil[thread] = {};
            if (thread == 0) begin_range<N, Sample>(*shared, *call);
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
        run.template phase<Barrier::BLOCK>([=](auto &, int thread, R &) {
            if (thread == 0) shared->tile += shared->share.blocks;
        });
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &registers) {
            mel<N, Sample>(*shared, *call, thread, registers);
            if (call->top_db < 0) return;
            run.max(&shared->loudest, registers.loudest, thread);
        });
        if (call->top_db < 0) continue;
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) {
            if (thread != 0) return;
            uint32_t *maxima = call->clip_maxima + 2 * shared->range.row;
            shared->last_block =
                run.finish(maxima, shared->loudest) == uint32_t(shared->tiles_of_row * shared->share.parts - 1);
            shared->loudest = run.fresh(maxima);
        });
        run.template phase<Barrier::BLOCK>([=](auto &run, int thread, R &) {
            if (shared->last_block) clamp<N>(run, *shared, *call, thread);
        });
    }
}

}  // namespace clvp_fast
