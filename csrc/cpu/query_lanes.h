/* Attention of one head with many queries of the same keys, on a CPU. The lanes of a vector are queries: their largest
 * score, the sum of their weights and the division by it then need no shuffles, and keys and values are numbers for all
 * lanes. Scores, softmax and sums are float32; weights are rounded to bfloat16 where the CPU multiplies that. */
#pragma once

#include <string.h>

#include "products.h"

namespace clvp_fast {
namespace {

/* Keys whose scores are computed side by side. */
constexpr int KEYS_AT_ONCE = 8;
/* The terms of a sum, over channels or keys. Such sums are added: one of a thousand terms is several times as far from
 * float64. */
constexpr int64_t CHAIN = 16;

constexpr int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

/* The scratch memory for queries and keys of a head, in 32 bits. */
template <class In>
struct AttentionScratch {
    int64_t queries, keys, channels, query_lanes, key_lanes, width;
    /* q [width][query_lanes], k [width][key_lanes], v [key_lanes / UNIT_FACTORS][width * UNIT_FACTORS]; of LANES
     * queries, scores [key_lanes][LANES] and weights [key_lanes / UNIT_FACTORS][LANES]. */
    int64_t q, k, v, scores, weights, size;
    AttentionScratch(int64_t of_queries, int64_t of_keys, int64_t of_channels)
        : queries(of_queries),
          keys(of_keys),
          channels(of_channels),
          query_lanes(round_up(queries, LANES)),
          key_lanes(round_up(keys, LANES > KEYS_AT_ONCE ? LANES : KEYS_AT_ONCE)),
          width(round_up(channels, LANES * UNIT_FACTORS<In>) / UNIT_FACTORS<In>) {
        int64_t used = 0;
        const auto take = [&](int64_t count) { return (used += count) - count; };
        q = take(width * query_lanes), k = take(width * key_lanes), v = take(width * key_lanes);
        scores = take(key_lanes * LANES), weights = take(key_lanes * LANES);
        size = used;
    }
};

/* Turns rows 0 .. count - 1, whose channels begin at row(place), so that places lie side by side: [width][lanes]. */
template <class In, class Row>
CLVP_FAST_INLINE void turn(const Row &row, int64_t count, int64_t lanes, int64_t channels, float *to) {
    constexpr int64_t STEP = LANES * UNIT_FACTORS<In>;
    for (int64_t channel = 0; channel < channels; channel += STEP)
        for (int64_t first = 0; first < lanes; first += LANES) {
            const int64_t some = channels - channel < STEP ? channels - channel : STEP;
            Floats square[LANES];
            for (int64_t lane = 0; lane < LANES; ++lane)
                square[lane] = first + lane < count ? load_units<In>(row(first + lane) + channel, some) : Floats{};
            transpose<float>(square);
            float *const place = to + channel / UNIT_FACTORS<In> * lanes + first;
            for (int i = 0; i < LANES; ++i) store_floats(place + i * lanes, square[i]);
        }
}

/* Lays out values as they are multiplied: those of UNIT_FACTORS keys side by side. */
template <class In, class Row>
CLVP_FAST_INLINE void pair_values(const AttentionScratch<In> &space, const Row &row, float *v) {
    for (int64_t key = 0; key < space.keys; key += UNIT_FACTORS<In>)
        for (int64_t channel = 0; channel < space.channels; channel += LANES) {
            const int64_t some = space.channels - channel < LANES ? space.channels - channel : LANES;
            Floats value[2] = {};
            for (int i = 0; i < UNIT_FACTORS<In>; ++i)
                if (key + i < space.keys) value[i] = load_floats(row(key + i) + channel, some);
            float *const to = v + key / UNIT_FACTORS<In> * space.width * UNIT_FACTORS<In> + channel;
            if constexpr (UNIT_FACTORS<In> == 2)
                store_floats(to, (Floats)((Integers)value[1] | (((Integers)value[0] >> 16) & 0xffff)));
            else
                store_floats(to, value[0]);
        }
}

/* Brings queries, keys and values of a head into scratch memory, from where rows.q(place), rows.k(place) and
 * rows.v(place) point. */
template <class In, class Rows>
void turn_all(const AttentionScratch<In> &space, const Rows &rows, float *scratch) {
    const auto q = [&](int64_t place) { return rows.q(place); };
    const auto k = [&](int64_t place) { return rows.k(place); };
    turn<In>(q, space.queries, space.query_lanes, space.channels, scratch + space.q);
    turn<In>(k, space.keys, space.key_lanes, space.channels, scratch + space.k);
    pair_values<In>(space, [&](int64_t place) { return rows.v(place); }, scratch + space.v);
}

/* Sums over keys of COUNT channels for LANES queries, times `scale`, to the queries' places of the result. */
template <class In, int COUNT>
CLVP_FAST_INLINE void mix(const Factor<In> *values, int64_t stride, const float *weights, int64_t units, Floats scale,
                          In *const *out, int64_t queries, int64_t channels) {
    Floats totals[LANES] = {};
    for (int64_t first = 0; first < units; first += CHAIN) {
        const int64_t some = units - first < CHAIN ? units - first : CHAIN;
        Floats sums[COUNT] = {};
        for (int64_t unit = 0; unit < some; ++unit, values += stride, weights += LANES) {
            const Floats weight = load_floats(weights);
            unroll<COUNT>([&](auto i)
                              CLVP_FAST_INLINED { sums[i] = dot(sums[i], values + i * UNIT_FACTORS<In>, weight); });
        }
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { totals[i] += sums[i]; });
    }
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { totals[i] *= scale; });
    transpose<float>(totals);
    for (int query = 0; query < LANES && query < queries; ++query) store_floats(out[query], totals[query], channels);
}

/* Weights of two keys, or of one, as they are multiplied. */
CLVP_FAST_INLINE void store_weights(float *to, Floats weight) { store_floats(to, weight); }
CLVP_FAST_INLINE void store_weights(float *to, Floats first, Floats second) {
    const Integers low = (Integers)first + 0x8000, high = (Integers)second + 0x8000;
    store_floats(to, (Floats)(((low >> 16) & 0xffff) | (high & (int32_t)0xffff0000)));
}

/* Scores of LANES queries from `first` on with keys 0 .. keys - 1, as `changed(key, score)` makes them; returns the
 * largest of each query. */
template <class In, class Changed>
CLVP_FAST_INLINE Floats score(const AttentionScratch<In> &space, int64_t first, int64_t keys, float scale,
                              const Changed &changed, float *scratch) {
    const float *const q = scratch + space.q, *const k = scratch + space.k;
    float *const scores = scratch + space.scores;
    const int64_t units = round_up(space.channels, UNIT_FACTORS<In>) / UNIT_FACTORS<In>;
    Floats largest = Floats{} - __builtin_inff();
    for (int64_t key = 0; key < keys; key += KEYS_AT_ONCE) {
        Floats totals[KEYS_AT_ONCE] = {};
        for (int64_t unit = 0; unit < units;) {
            Floats sums[KEYS_AT_ONCE] = {};
            for (const int64_t end = unit + CHAIN < units ? unit + CHAIN : units; unit < end; ++unit) {
                const Floats query = load_floats(q + unit * space.query_lanes + first);
                const Factor<In> *const some = (const Factor<In> *)(k + unit * space.key_lanes + key);
                unroll<KEYS_AT_ONCE>(
                    [&](auto i) CLVP_FAST_INLINED { sums[i] = dot(sums[i], some + i * UNIT_FACTORS<In>, query); });
            }
            unroll<KEYS_AT_ONCE>([&](auto i) CLVP_FAST_INLINED { totals[i] += sums[i]; });
        }
        unroll<KEYS_AT_ONCE>([&](auto i) CLVP_FAST_INLINED {
            if (key + i >= keys) return;
            const Floats score = changed(key + i, totals[i] * scale);
            largest = score > largest ? score : largest;
            store_floats(scores + (key + i) * LANES, score);
        });
    }
    return largest;
}

/* The exponential functions of LANES queries' scores, rounded as they are multiplied, and their sum. */
template <class In>
Floats weigh(int64_t keys, const float *scores, Floats largest, float *weights) {
    Floats sum = {}, total = {};
    for (int64_t key = 0; key < keys; key += UNIT_FACTORS<In>, weights += LANES) {
        if (key % CHAIN == 0) total += sum, sum = Floats{};
        Floats weight[2] = {};
        for (int i = 0; i < UNIT_FACTORS<In>; ++i)
            if (key + i < keys) {
                const Floats exponent = load_floats(scores + (key + i) * LANES) - largest;
                weight[i] = UNIT_FACTORS<In> == 2 ? exponential_for_half(exponent) : exponential(exponent);
                sum += weight[i];
            }
        if constexpr (UNIT_FACTORS<In> == 2)
            store_weights(weights, weight[0], weight[1]);
        else
            store_weights(weights, weight[0]);
    }
    return total + sum;
}

/* Attends with LANES queries from `first` on to keys 0 .. keys - 1, and stores results where rows.out(place) points. */
template <class In, class Rows, class Changed>
void attend_lanes(const AttentionScratch<In> &space, const Rows &rows, int64_t first, int64_t keys, float scale,
                  const Changed &changed, float *scratch) {
    float *const weights = scratch + space.weights;
    const Floats largest = score<In>(space, first, keys, scale, changed, scratch);
    const Floats sum = weigh<In>(keys, scratch + space.scores, largest, weights);
    const int64_t queries = space.queries - first, units = round_up(keys, UNIT_FACTORS<In>) / UNIT_FACTORS<In>,
                  stride = space.width * UNIT_FACTORS<In> * UNIT_FACTORS<In>;
    for (int64_t channel = 0; channel < space.channels; channel += LANES) {
        const Factor<In> *const values = (const Factor<In> *)(scratch + space.v + channel);
        const int64_t left = space.channels - channel;
        In *out[LANES];
        for (int64_t lane = 0; lane < LANES && lane < queries; ++lane) out[lane] = rows.out(first + lane) + channel;
        if (2 * left <= LANES)
            mix<In, LANES / 2>(values, stride, weights, units, 1 / sum, out, queries, left);
        else
            mix<In, LANES>(values, stride, weights, units, 1 / sum, out, queries, left);
    }
}

}  // namespace
}  // namespace clvp_fast
