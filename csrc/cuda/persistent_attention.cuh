/* Attention of the persistent decode step: a warp has 32 keys and values of a head in registers; four warps make a
 * part, and every block that needs the result merges the parts. */
#pragma once

#include "persistent_products.cuh"

namespace clvp_fast {

/* Which keys a warp attends to: `begin` .. of one candidate and head; candidate -1: none. */
struct Keys {
    int candidate, head, part, begin;
};

/* 8 channels of each of a thread's keys, which place_of counts. */
struct KeysAndValues {
    Halves k[KEY_LANES], v[KEY_LANES];
    uint32_t there; /* a bit for each of the keys that exist */
};

CLVP_FAST_INLINE int num_keys(const Candidate &candidate) { return candidate.prefix + candidate.own; }
CLVP_FAST_INLINE int num_parts(const Candidate &candidate) { return (num_keys(candidate) + PART_KEYS - 1) / PART_KEYS; }

/* Returns the keys of this warp's team in a round. */
template <int N, class Run>
CLVP_FAST_INLINE Keys keys_of_warp(const Run &run, const PersistentShared<N> &shared, int num_heads, int round) {
    const int warp = run.thread / 32;
    int piece = (round * TEAMS + warp / TEAM_WARPS) * run.blocks + run.block;
    for (int n = 0; n < N; ++n) {
        const int parts = num_parts(shared.candidates[n]), pieces = num_heads * parts;
        if (piece < pieces)
            return {n, piece / parts, piece % parts, piece % parts * PART_KEYS + warp % TEAM_WARPS * WARP_KEYS};
        piece -= pieces;
    }
    return {-1, 0, 0, 0};
}

template <int N, class Run>
CLVP_FAST_INLINE int num_rounds(const Run &run, const PersistentShared<N> &shared, int num_heads) {
    int pieces = 0;
    for (int n = 0; n < N; ++n) pieces += num_heads * num_parts(shared.candidates[n]);
    return (pieces + TEAMS * run.blocks - 1) / (TEAMS * run.blocks);
}

/* The place of a lane's i-th key among the candidate's; lanes of a group of KEY_LANES hold the same key. */
template <class Run>
CLVP_FAST_INLINE int place_of(const Run &run, const Keys &keys, int i) {
    return keys.begin + i * (32 / KEY_LANES) + run.thread % 32 / KEY_LANES;
}

/* The page of a key; -1: there is none. */
template <class Run>
CLVP_FAST_INLINE int page_of(Run &run, const clvp_fast_persistent_decode &call, const Candidate &candidate, int place) {
    const bool own = place >= candidate.prefix;
    const int at = own ? place - candidate.prefix : place;
    const int page = run.constant((own ? candidate.own_pages : candidate.prefix_pages) + at / call.page_size);
    return page >= 0 && page < call.num_pages ? page : -1;
}

/* Where a key's page has the lane's channels. */
template <class Run>
CLVP_FAST_INLINE int64_t offset_of(const Run &run, const clvp_fast_persistent_decode &call, const Candidate &candidate,
                                   int head, int place, int page) {
    const int at = place >= candidate.prefix ? place - candidate.prefix : place;
    return page * call.page_strides[0] + at % call.page_size * call.page_strides[1] + head * call.page_strides[2] +
           run.thread % KEY_LANES * HALVES;
}

/* Loads the stored keys: all but the new token's, which this step computes. */
template <int N, class Run>
CLVP_FAST_INLINE void fetch(Run &run, const clvp_fast_persistent_decode &call, const PersistentShared<N> &shared,
                            const clvp_fast_decoder_layer &layer, const Keys &keys, KeysAndValues &held) {
    held.there = 0;
    if (keys.candidate < 0) return;
    const Candidate &candidate = shared.candidates[keys.candidate];
    int pages[KEY_LANES];
    unroll<KEY_LANES>([&](auto i) {
        const int place = place_of(run, keys, i);
        pages[i] = place < candidate.stored ? page_of(run, call, candidate, place) : -1;
    });
    run.settle();
    unroll<KEY_LANES>([&](auto i) {
        held.k[i] = held.v[i] = Halves{};
        if (pages[i] >= 0) {
            const int64_t offset = offset_of(run, call, candidate, keys.head, place_of(run, keys, i), pages[i]);
            held.there |= 1u << i;
            /* Earlier launches wrote these, and this one does not: they are constant. */
            held.k[i] = load_halves(run, static_cast<const uint16_t *>(layer.k_pages) + offset);
            held.v[i] = load_halves(run, static_cast<const uint16_t *>(layer.v_pages) + offset);
        }
        run.settle();
    });
}

/* Brings the keys and values of the first round towards the L2 cache. */
template <int N, class Run>
CLVP_FAST_INLINE void prefetch(Run &run, const clvp_fast_persistent_decode &call, const PersistentShared<N> &shared,
                               const clvp_fast_decoder_layer &layer) {
    const Keys keys = keys_of_warp(run, shared, call.hidden_size / HEAD_DIM, 0);
    if (keys.candidate < 0) return;
    const Candidate &candidate = shared.candidates[keys.candidate];
    const int place = keys.begin + run.thread % WARP_KEYS;
    const int page = place < candidate.stored ? page_of(run, call, candidate, place) : -1;
    if (page < 0) return;
    const int64_t offset = offset_of(run, call, candidate, keys.head, place, page);
    run.prefetch(static_cast<const uint16_t *>(layer.k_pages) + offset);
    run.prefetch(static_cast<const uint16_t *>(layer.v_pages) + offset);
}

/* Adds the new token's key and value to the stored ones, and stores them, if the token has a place and a page. */
template <class Run>
CLVP_FAST_INLINE void append(Run &run, const clvp_fast_persistent_decode &call, const Candidate &candidate,
                             const clvp_fast_decoder_layer &layer, const Keys &keys, const uint16_t *qkv,
                             KeysAndValues &held) {
    const int last = candidate.stored;
    if (last == num_keys(candidate) || last < keys.begin || last >= keys.begin + WARP_KEYS) return;
    unroll<KEY_LANES>([&](auto i) {
        if (place_of(run, keys, i) != last) return;
        const int page = page_of(run, call, candidate, last);
        if (page < 0) return;
        const auto *key = qkv + call.hidden_size + keys.head * HEAD_DIM + run.thread % KEY_LANES * HALVES;
        held.there |= 1u << i;
        held.k[i] = run.fresh(reinterpret_cast<const Halves *>(key));
        held.v[i] = run.fresh(reinterpret_cast<const Halves *>(key + call.hidden_size));
        const int64_t offset = offset_of(run, call, candidate, keys.head, last, page);
        *reinterpret_cast<Halves *>(static_cast<uint16_t *>(layer.k_pages) + offset) = held.k[i];
        *reinterpret_cast<Halves *>(static_cast<uint16_t *>(layer.v_pages) + offset) = held.v[i];
    });
}

/* One warp's keys: their largest score, the sum of exp(score - top), and the sum of values so weighted. */
template <class T, int N, class Run>
CLVP_FAST_INLINE void attend(Run &run, const clvp_fast_persistent_decode &call, PersistentShared<N> &shared,
                             const Keys &keys, const uint16_t *qkv, const KeysAndValues &held) {
    const int warp = run.thread / 32, lane = run.thread % 32;
    const auto *query = qkv + keys.head * HEAD_DIM + lane % KEY_LANES * HALVES;
    const Halves q = run.fresh(reinterpret_cast<const Halves *>(query));
    float scores[KEY_LANES];
    unroll<KEY_LANES>([&](auto i) {
        scores[i] = 0.f;
        unroll<HALVES>([&](auto d) { scores[i] += element<T>(q, d) * element<T>(held.k[i], d); });
    });
    scatter_sum<KEY_LANES, KEY_LANES / 2, 1>(run, scores);
    /* Now lane j of a group holds the score of the group's j-th key, in units of log2. */
    const bool there = held.there >> lane % KEY_LANES & 1;
    const float score = there ? scores[0] * (call.scale * 1.44269504088896341f) : -INFINITY;
    float top = score;
    unroll<5>([&](auto bit) {
        const float other = run.exchange(top, 16 >> bit);
        top = other > top ? other : top;
    });
    const float weight = there ? exp2f(score - top) : 0.f;
    float total = weight;
    unroll<5>([&](auto bit) { total += run.exchange(total, 16 >> bit); });

    float mixed[HALVES] = {};
    unroll<KEY_LANES>([&](auto i) {
        const float w = run.from_lane(weight, lane / KEY_LANES * KEY_LANES + i);
        unroll<HALVES>([&](auto d) { mixed[d] += w * element<T>(held.v[i], d); });
    });
    scatter_sum<HALVES, 16, KEY_LANES>(run, mixed);
    constexpr int KEPT = HALVES * KEY_LANES / 32; /* channels that a lane has in the end */
    unroll<KEPT>(
        [&](auto d) { shared.mixed[warp][lane % KEY_LANES * HALVES + lane / KEY_LANES * KEPT + d] = mixed[d]; });
    if (lane == 0) shared.found[warp] = {top, total};
}

/* Adds one part of a softmax to the sum so far. */
CLVP_FAST_INLINE void merge(Found &sum, float &mixed, const Found &found, float part) {
    if (found.total == 0.f) return;
    const float top = found.top > sum.top ? found.top : sum.top;
    const float keep = exp2f(sum.top - top), add = exp2f(found.top - top);
    sum = {top, sum.total * keep + found.total * add};
    mixed = mixed * keep + part * add;
}

/* All parts of this block, written to the workspace. */
template <class T, int N, class Run>
CLVP_FAST_INLINE void attention(Run &run, const clvp_fast_persistent_decode &call, PersistentShared<N> &shared,
                                const clvp_fast_decoder_layer &layer) {
    const int num_heads = call.hidden_size / HEAD_DIM, most = most_parts(call);
    const int rounds = num_rounds(run, shared, num_heads);
    CLVP_FAST_UNROLL(1)
    for (int round = 0; round < rounds; ++round) {
        const Keys keys = keys_of_warp(run, shared, num_heads, round);
        KeysAndValues held;
        fetch(run, call, shared, layer, keys, held);
        if (keys.candidate >= 0) {
            const uint16_t *qkv = shared.qkv + 3 * keys.candidate * call.hidden_size;
            append(run, call, shared.candidates[keys.candidate], layer, keys, qkv, held);
            attend<T>(run, call, shared, keys, qkv, held);
        }
        run.sync();
        const int channel = run.thread % (32 * TEAM_WARPS);
        if (keys.candidate >= 0 && channel < HEAD_DIM) {
            const int first = run.thread / (32 * TEAM_WARPS) * TEAM_WARPS;
            Found sum = {-INFINITY, 0.f};
            float mixed = 0.f;
            for (int warp = first; warp < first + TEAM_WARPS; ++warp)
                merge(sum, mixed, shared.found[warp], shared.mixed[warp][channel]);
            const int64_t place = (int64_t(keys.candidate) * num_heads + keys.head) * most + keys.part;
            shared.mixed_parts[place * HEAD_DIM + channel] = mixed;
            if (channel == 0) shared.found_parts[place] = sum;
        }
        run.sync(); /* what was found may be overwritten */
    }
}

/* Merges the parts of every head into the out-projection's input [N, hidden_size]; zeros for an inactive candidate. */
template <class T, int N, class Run>
CLVP_FAST_INLINE void write_attended(Run &run, const clvp_fast_persistent_decode &call,
                                     const PersistentShared<N> &shared, uint16_t *input) {
    const int hidden = call.hidden_size, most = most_parts(call);
    CLVP_FAST_UNROLL(1)
    for (int index = run.thread; index < N * hidden; index += THREADS) {
        const int n = index / hidden, channel = index % hidden;
        const int64_t first = (int64_t(n) * (hidden / HEAD_DIM) + channel / HEAD_DIM) * most;
        Found sum = {-INFINITY, 0.f};
        float mixed = 0.f;
        const int count = num_parts(shared.candidates[n]);
        CLVP_FAST_UNROLL(4)
        for (int part = 0; part < count; ++part)
            merge(sum, mixed, run.fresh(shared.found_parts + first + part),
                  run.fresh(shared.mixed_parts + (first + part) * HEAD_DIM + channel % HEAD_DIM));
        input[index] = T::narrow(sum.total > 0.f ? mixed / sum.total : 0.f);
    }
    run.sync();
}

}  // namespace clvp_fast
