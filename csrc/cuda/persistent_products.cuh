/* Products of the persistent decode step: rows of weights, which a block holds in registers before it waits for their
 * input, times the input of all candidates in shared memory. */
#pragma once

#include "persistent_layout.cuh"

namespace clvp_fast {

/* Sums COUNT values over the lanes that differ in the bits FIRST, FIRST / 2, ... LAST of their number. The sum of value
 * (lane * COUNT / (2 * FIRST)) % COUNT is then in values[0]; with more values than such lanes, a lane holds several, in
 * values[0] onwards. Halving what is exchanged costs COUNT exchanges instead of COUNT for each bit. */
template <int COUNT, int FIRST, int LAST, class Run>
CLVP_FAST_INLINE void scatter_sum(Run &run, float *values) {
    if constexpr (COUNT > 1) {
        const bool upper = run.thread & FIRST;
        unroll<COUNT / 2>([&](auto i) {
            const float low = values[i], high = values[i + COUNT / 2];
            values[i] = (upper ? high : low) + run.exchange(upper ? low : high, FIRST);
        });
    } else {
        values[0] += run.exchange(values[0], FIRST);
    }
    if constexpr (FIRST > LAST) scatter_sum<(COUNT > 1 ? COUNT / 2 : 1), FIRST / 2, LAST>(run, values);
}

/* Loads eight numbers that stay the same during the launch. */
template <class Run>
CLVP_FAST_INLINE Halves load_halves(Run &run, const uint16_t *place) {
    return run.constant(reinterpret_cast<const Halves *>(place));
}

struct Linear {
    const void *weight, *bias; /* [rows, columns], [rows] or null */
    int rows, columns;
};

/* A thread's share of a product: its block's rows, its warp's slice of the columns and every `groups`th row
 * from `group` on; a warp with no slice has no rows. */
struct Share {
    int first, count, slices, groups, slice, group;
};

/* In 32 bits: at most 2^20 rows and 2^12 blocks. */
CLVP_FAST_INLINE int first_row(int rows, int block, int blocks) {
    return int(uint32_t(rows) * uint32_t(block) / uint32_t(blocks));
}

template <class Run>
CLVP_FAST_INLINE Share share_of(const Run &run, int rows, int columns) {
    const int warp = run.thread / 32;
    Share share;
    share.first = first_row(rows, run.block, run.blocks);
    share.count = first_row(rows, run.block + 1, run.blocks) - share.first;
    share.slices = (columns + SLICE - 1) / SLICE;
    share.groups = WARPS / share.slices;
    share.slice = warp % share.slices;
    share.group = warp / share.slices;
    return share;
}

/* A thread's weights of one batch of rows. */
struct HeldWeights {
    Halves rows[HELD_ROWS][PASSES];
};

/* The first channel of a lane's eight. */
template <class Run>
CLVP_FAST_INLINE int channel_of(const Run &run, const Share &share, int pass) {
    return share.slice * SLICE + pass * (SLICE / PASSES) + run.thread % 32 * HALVES;
}

template <class Run>
CLVP_FAST_INLINE void fetch(Run &run, HeldWeights &held, const Linear &linear, const Share &share, int batch) {
    const auto *weight = static_cast<const uint16_t *>(linear.weight) + int64_t(share.first) * linear.columns;
    unroll<HELD_ROWS>([&](auto r) {
        const int row = (batch * HELD_ROWS + r) * share.groups + share.group;
        unroll<PASSES>([&](auto pass) {
            const int channel = channel_of(run, share, pass);
            const bool there = share.group < share.groups && row < share.count && channel < linear.columns;
            held.rows[r][pass] = there ? load_halves(run, weight + int64_t(row) * linear.columns + channel) : Halves{};
        });
    });
}

template <class Run>
CLVP_FAST_INLINE void fetch(Run &run, HeldWeights &held, const Linear &linear) {
    fetch(run, held, linear, share_of(run, linear.rows, linear.columns), 0);
}

/* Brings this block's rows of weights towards the L2 cache. */
template <class Run>
CLVP_FAST_INLINE void prefetch(Run &run, const Linear &linear) {
    const Share share = share_of(run, linear.rows, linear.columns);
    const auto *weight = static_cast<const char *>(linear.weight) + 2 * int64_t(share.first) * linear.columns;
    const int lines = int((2 * int64_t(share.count) * linear.columns + 127) / 128);
    CLVP_FAST_UNROLL(1)
    for (int line = run.thread; line < lines; line += THREADS) run.prefetch(weight + 128 * int64_t(line));
}

/* The same of a whole vector, by all blocks together. */
template <class Run>
CLVP_FAST_INLINE void prefetch(Run &run, const void *vector, int count) {
    const int line = run.thread * run.blocks + run.block;
    if (vector && 64 * line < count) run.prefetch(static_cast<const char *>(vector) + 128 * line);
}

/* y[n, row] = sum over k of weight[row, k] * input[n, k], for the block's rows: done(row, n, y + bias) in one thread.
 * `held` holds the first batch of rows; all threads see `input` [N, columns] already. */
template <class T, int N, class Run, class Done>
CLVP_FAST_INLINE void product(Run &run, PersistentShared<N> &shared, const uint16_t *input, HeldWeights &held,
                              const Linear &linear, int num_candidates, Done done) {
    constexpr int VALUES = HELD_ROWS * N;
    CLVP_FAST_UNROLL(1)
    for (int batch = 0;; ++batch) {
        const Share share = share_of(run, linear.rows, linear.columns);
        const int lane = run.thread % 32, batch_rows = HELD_ROWS * share.groups;
        if (batch * batch_rows >= share.count) break;
        if (batch > 0) fetch(run, held, linear, share, batch);
        /* The thread that ends a row's sum. */
        const int mine = run.thread / N, n = run.thread % N, local = batch * batch_rows + mine;
        const bool ends = mine < batch_rows && local < share.count && n < num_candidates;
        const int row = share.first + local;
        float bias = 0.f;
        if (ends && linear.bias) bias = T::widen(run.constant(static_cast<const uint16_t *>(linear.bias) + row));

        float sums[VALUES] = {};
        unroll<PASSES>([&](auto pass) {
            const int channel = channel_of(run, share, pass);
            if (channel >= linear.columns) return;
            constexpr int AT_ONCE = N < 2 ? N : 2; /* candidates whose input has room in registers */
            unroll<N / AT_ONCE>([&](auto part) {
                float x[AT_ONCE][HALVES];
                unroll<AT_ONCE>([&](auto n) {
                    const uint16_t *place = input + (part * AT_ONCE + n) * linear.columns + channel;
                    const Halves halves = *reinterpret_cast<const Halves *>(place);
                    unroll<HALVES>([&](auto i) { x[n][i] = element<T>(halves, i); });
                });
                unroll<HELD_ROWS>([&](auto r) {
                    unroll<HALVES>([&](auto i) {
                        const float weight = element<T>(held.rows[r][pass], i);
                        unroll<AT_ONCE>([&](auto n) { sums[r * N + part * AT_ONCE + n] += weight * x[n][i]; });
                    });
                });
                run.settle();
            });
        });
        scatter_sum<VALUES, 16, 1>(run, sums);
        constexpr int HOLDERS = 32 / VALUES; /* lanes that hold the same sum */
        if (lane % HOLDERS == 0 && share.group < share.groups)
            shared.sums[(share.slice * share.groups + share.group) * VALUES + lane / HOLDERS] = sums[0];
        run.sync();
        if (ends) {
            const float *parts = shared.sums + mine % share.groups * VALUES + mine / share.groups * N + n;
            float total = 0.f;
            for (int slice = 0; slice < share.slices; ++slice) total += parts[slice * share.groups * VALUES];
            done(row, n, total + bias);
        }
        run.sync(); /* sums and input may be overwritten */
        run.settle();
    }
}

}  // namespace clvp_fast
