/* A whole decode step of one to four candidates: the work of every block of one launch.
 *
 *   for each layer   norm, queries keys values  | the last part's sum of each block is ended by itself, and
 *                    attention, in parts        | | marks where all blocks wait for each other: five times a layer
 *                    merge, out-projection      |
 *                    norm, mlp in               |
 *                    mlp out                    |
 *   both norms, head
 *
 * Inputs that do not depend on other phases are loaded before the wait: a product's weights into registers,
 * the weights after those, and stored keys and values, into the L2 cache. So memory is busy while blocks wait. Every
 * block norms and merges for itself, which is cheaper than a further wait.
 *
 * Everything here runs on the host too, where tests/csrc/persistent_emulator.cpp lets threads take turns. */
#pragma once

#include "persistent_attention.cuh"

namespace clvp_fast {

/* Sums of each row over all threads of the block; which: of the two places. */
template <int N, class Run>
CLVP_FAST_INLINE void block_sum(Run &run, PersistentShared<N> &shared, float *values, int which) {
    const int warp = run.thread / 32, lane = run.thread % 32;
    scatter_sum<N, 16, 1>(run, values);
    if (lane % (32 / N) == 0) shared.statistics[which][warp][lane / (32 / N)] = values[0];
    run.sync();
    unroll<N>([&](auto n) {
        float sum = shared.statistics[which][lane % WARPS][n];
        unroll<4>([&](auto bit) { sum += run.exchange(sum, 8 >> bit); });
        values[n] = sum;
    });
}

/* values = (values - mean) / deviation * weight + bias; element i of a row is channel thread + i * THREADS. */
template <class T, int N, class Run>
CLVP_FAST_INLINE void layer_norm(Run &run, PersistentShared<N> &shared, float (&values)[N][NORM_ITEMS], int hidden,
                                 const void *weight, const void *bias, float eps) {
    float means[N], scales[N];
    unroll<N>([&](auto n) {
        means[n] = 0.f;
        unroll<NORM_ITEMS>([&](auto i) { means[n] += values[n][i]; }); /* zero past the end */
    });
    block_sum<N>(run, shared, means, 0);
    unroll<N>([&](auto n) {
        means[n] /= hidden;
        scales[n] = 0.f;
        unroll<NORM_ITEMS>([&](auto i) {
            const float off = values[n][i] - means[n];
            if (run.thread + i * THREADS < hidden) scales[n] += off * off;
        });
    });
    block_sum<N>(run, shared, scales, 1);
    unroll<N>([&](auto n) { scales[n] = 1.f / sqrtf(scales[n] / hidden + eps); });
    unroll<NORM_ITEMS>([&](auto i) {
        const int channel = run.thread + i * THREADS;
        if (channel >= hidden) return;
        const float gain = T::widen(run.constant(static_cast<const uint16_t *>(weight) + channel));
        const float offset = bias ? T::widen(run.constant(static_cast<const uint16_t *>(bias) + channel)) : 0.f;
        unroll<N>([&](auto n) { values[n][i] = (values[n][i] - means[n]) * scales[n] * gain + offset; });
    });
}

template <class T, int N, class Run>
CLVP_FAST_INLINE void write_input(Run &run, uint16_t *input, const float (&values)[N][NORM_ITEMS], int hidden) {
    unroll<NORM_ITEMS>([&](auto i) {
        const int channel = run.thread + i * THREADS;
        if (channel < hidden) unroll<N>([&](auto n) { input[n * hidden + channel] = T::narrow(values[n][i]); });
    });
    run.sync();
}

/* A thread's channels of the residual that all blocks wrote. */
template <int N, class Run>
CLVP_FAST_INLINE void read_residual(Run &run, const float *residual, float (&values)[N][NORM_ITEMS], int hidden,
                                    int num_candidates) {
    unroll<N>([&](auto n) {
        unroll<NORM_ITEMS>([&](auto i) {
            const int channel = run.thread + i * THREADS;
            const bool there = channel < hidden && n < num_candidates;
            values[n][i] = there ? run.fresh(residual + n * hidden + channel) : 0.f;
        });
    });
}

/* The residual that the first layer starts from. A block writes the channels that it will add to. */
template <class T, int N, class Run>
CLVP_FAST_INLINE void embed(Run &run, const clvp_fast_persistent_decode &call, const PersistentShared<N> &shared,
                            float (&values)[N][NORM_ITEMS]) {
    const int hidden = call.hidden_size;
    const Share share = share_of(run, hidden, hidden);
    unroll<N>([&](auto n) {
        const int token = shared.candidates[n].token, position = shared.candidates[n].position;
        unroll<NORM_ITEMS>([&](auto i) {
            const int channel = run.thread + i * THREADS;
            values[n][i] = 0.f;
            if (channel >= hidden || n >= call.num_candidates) return;
            const auto *tokens = static_cast<const uint16_t *>(call.token_table) + int64_t(token) * hidden;
            const auto *positions = static_cast<const uint16_t *>(call.position_table) + int64_t(position) * hidden;
            values[n][i] = token < 0 || position < 0
                               ? NAN
                               : T::widen(run.constant(tokens + channel)) + T::widen(run.constant(positions + channel));
            if (channel >= share.first && channel < share.first + share.count)
                shared.before[n * hidden + channel] = values[n][i];
        });
    });
}

/* The candidates of a step; one thread a candidate calls it. */
template <class Run>
CLVP_FAST_INLINE Candidate candidate_of(Run &run, const clvp_fast_persistent_decode &call, int n) {
    Candidate candidate = {};
    if (n >= call.num_candidates) return candidate;
    const int64_t token = run.constant(call.tokens + n);
    candidate.token = token >= 0 && token < call.vocab_size ? int(token) : -1;
    const int stored = run.constant(call.seq_lens + n), place = stored < 0 ? 0 : stored;
    const int64_t position = int64_t(place) + (!call.contiguous_positions && place > 0);
    candidate.position = position < call.num_positions ? int(position) : -1;
    const int request = stored < 0 || !call.prefix_table ? -1 : run.constant(call.prefix_index + n);
    if (request >= 0 && request < call.num_prefixes) {
        const int length = run.constant(call.prefix_lens + request), room = call.max_prefix_pages * call.page_size;
        candidate.prefix = length < 0 ? 0 : length < room ? length : room;
        candidate.prefix_pages = call.prefix_table + request * call.prefix_table_stride;
    }
    const int room = call.max_pages * call.page_size;
    candidate.own = stored < 0 ? 0 : stored < room ? stored + 1 : room;
    candidate.stored = candidate.prefix + (place < room ? place : room);
    candidate.own_pages = call.block_table + n * call.block_table_stride;
    return candidate;
}

CLVP_FAST_INLINE float gelu_tanh(float x) {
    return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

/* Does all the work of one block. */
template <class T, int N, class Run>
CLVP_FAST_INLINE void decode_step(Run &run, const clvp_fast_persistent_decode &call, char *memory) {
    const int hidden = call.hidden_size, inner = call.intermediate_size, candidates = call.num_candidates;
    auto &shared = *reinterpret_cast<PersistentShared<N> *>(memory);
    auto *input = reinterpret_cast<uint16_t *>(memory + aligned(sizeof(PersistentShared<N>)));
    auto *layers =
        reinterpret_cast<clvp_fast_decoder_layer *>(reinterpret_cast<char *>(input) + aligned(input_bytes<N>(call)));
    auto *counter = static_cast<uint32_t *>(call.workspace);

    constexpr int WORDS = sizeof(clvp_fast_decoder_layer) / 8;
    for (int word = run.thread; word < WORDS * call.num_layers; word += THREADS)
        reinterpret_cast<int64_t *>(layers)[word] = run.constant(reinterpret_cast<const int64_t *>(call.layers) + word);
    if (run.thread < N) shared.candidates[run.thread] = candidate_of(run, call, run.thread);
    if (run.thread == 0) {
        const Workspace at = workspace_of(call);
        auto *base = static_cast<char *>(call.workspace);
        shared.before = reinterpret_cast<float *>(base + at.before);
        shared.between = reinterpret_cast<float *>(base + at.between);
        shared.qkv = reinterpret_cast<uint16_t *>(base + at.qkv);
        shared.inner = reinterpret_cast<uint16_t *>(base + at.inner);
        shared.found_parts = reinterpret_cast<Found *>(base + at.found);
        shared.mixed_parts = reinterpret_cast<float *>(base + at.mixed);
    }
    run.sync();

    const Linear head = {call.head_weight, call.head_bias, call.vocab_size, hidden};
    const auto qkv_of = [&](int layer) -> Linear {
        if (layer == call.num_layers) return head;
        return {layers[layer].qkv_weight, layers[layer].qkv_bias, 3 * hidden, hidden};
    };
    const auto out_of = [&](int layer) -> Linear {
        return {layers[layer].out_weight, layers[layer].out_bias, hidden, hidden};
    };
    float values[N][NORM_ITEMS];
    HeldWeights held;
    fetch(run, held, qkv_of(0));
    CLVP_FAST_UNROLL(1)
    for (int index = 0; index < call.num_layers; ++index) {
        const clvp_fast_decoder_layer &layer = layers[index];
        const Linear mlp_in = {layer.mlp_in_weight, layer.mlp_in_bias, inner, hidden};
        const Linear mlp_out = {layer.mlp_out_weight, layer.mlp_out_bias, hidden, inner};

        /* Queries, keys and values. */
        if (index == 0) {
            embed<T>(run, call, shared, values);
        } else {
            read_residual(run, shared.before, values, hidden, candidates);
        }
        layer_norm<T>(run, shared, values, hidden, layer.input_norm_weight, layer.input_norm_bias, call.layer_eps);
        write_input<T>(run, input, values, hidden);
        product<T>(run, shared, input, held, qkv_of(index), candidates,
                   [&](int row, int n, float sum) { shared.qkv[3 * n * hidden + row] = T::narrow(sum); });
        prefetch(run, call, shared, layer);
        prefetch(run, out_of(index));
        prefetch(run, layer.out_bias, hidden);
        prefetch(run, layer.post_norm_weight, hidden);
        prefetch(run, layer.post_norm_bias, hidden);
        prefetch(run, layer.mlp_in_bias, inner);
        prefetch(run, layer.mlp_out_bias, hidden);
        run.grid_sync(counter);

        attention<T>(run, call, shared, layer);
        fetch(run, held, out_of(index));
        prefetch(run, mlp_in);
        run.grid_sync(counter);

        write_attended<T>(run, call, shared, input);
        product<T>(run, shared, input, held, out_of(index), candidates, [&](int row, int n, float sum) {
            const int place = n * hidden + row;
            shared.between[place] = run.fresh(shared.before + place) + T::widen(T::narrow(sum));
        });
        fetch(run, held, mlp_in);
        prefetch(run, mlp_out);
        run.grid_sync(counter);

        read_residual(run, shared.between, values, hidden, candidates);
        layer_norm<T>(run, shared, values, hidden, layer.post_norm_weight, layer.post_norm_bias, call.layer_eps);
        write_input<T>(run, input, values, hidden);
        product<T>(run, shared, input, held, mlp_in, candidates,
                   [&](int row, int n, float sum) { shared.inner[n * inner + row] = T::narrow(gelu_tanh(sum)); });
        fetch(run, held, mlp_out);
        prefetch(run, qkv_of(index + 1));
        if (index + 1 < call.num_layers) {
            prefetch(run, layers[index + 1].input_norm_weight, hidden);
            prefetch(run, layers[index + 1].input_norm_bias, hidden);
            prefetch(run, layers[index + 1].qkv_bias, 3 * hidden);
        } else {
            prefetch(run, call.first_norm_weight, hidden);
            prefetch(run, call.first_norm_bias, hidden);
            prefetch(run, call.final_norm_weight, hidden);
            prefetch(run, call.final_norm_bias, hidden);
            prefetch(run, call.head_bias, call.vocab_size);
        }
        run.grid_sync(counter);

        CLVP_FAST_UNROLL(1)
        for (int place = run.thread * HALVES; place < N * inner; place += THREADS * HALVES)
            *reinterpret_cast<Halves *>(input + place) =
                place < candidates * inner ? run.fresh(reinterpret_cast<const Halves *>(shared.inner + place))
                                           : Halves{};
        run.sync();
        product<T>(run, shared, input, held, mlp_out, candidates, [&](int row, int n, float sum) {
            const int place = n * hidden + row;
            shared.before[place] = run.fresh(shared.between + place) + sum;
        });
        fetch(run, held, qkv_of(index + 1));
        run.grid_sync(counter);
    }

    read_residual(run, shared.before, values, hidden, candidates);
    layer_norm<T>(run, shared, values, hidden, call.first_norm_weight, call.first_norm_bias, call.first_eps);
    layer_norm<T>(run, shared, values, hidden, call.final_norm_weight, call.final_norm_bias, call.final_eps);
    write_input<T>(run, input, values, hidden);
    for (int place = run.thread; run.block == 0 && place < candidates * hidden; place += THREADS)
        static_cast<uint16_t *>(call.hidden)[place] = input[place];
    product<T>(run, shared, input, held, head, candidates, [&](int row, int n, float sum) {
        static_cast<uint16_t *>(call.logits)[int64_t(n) * call.vocab_size + row] = T::narrow(sum);
    });
}

}  // namespace clvp_fast
