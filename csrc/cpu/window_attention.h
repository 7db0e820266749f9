/* Attention of one head within one window of an image, on a CPU. The lanes of a vector are queries: their largest
 * score, the sum of their weights and the division by it then need no shuffles, and keys and values are numbers for all
 * lanes. Scores, softmax and sums are float32; weights are rounded to bfloat16 where the CPU multiplies that. */
#pragma once

#include <string.h>

#include "../clvp_fast.h"
#include "products.h"

namespace clvp_fast {
namespace {

/* The term added to scores between places that only the shift has brought together: SEAM of ops/window_attention.py. */
constexpr float SEAM = -100;
/* Keys whose scores are computed side by side. */
constexpr int KEYS_AT_ONCE = 8;

constexpr int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

/* An image cut into windows, and the heads that attend in them. */
struct Windows {
    int64_t height, width, size, shift, heads, channels; /* size: of a window; channels: of a head */
    float scale;
    int64_t places() const { return size * size; }
    int64_t lanes() const { return round_up(places(), LANES > KEYS_AT_ONCE ? LANES : KEYS_AT_ONCE); }
    int64_t across() const { return width / size; }
    int64_t count() const { return across() * (height / size); }
};

/* The scratch memory of a window, in 32 bits. */
template <class In>
struct AttentionScratch {
    int64_t places, lanes, width;
    /* q and k [width][lanes]; v [lanes / UNIT_FACTORS][width * UNIT_FACTORS]; of LANES queries, scores [lanes][LANES]
     * and weights [lanes / UNIT_FACTORS][LANES]. */
    int64_t q, k, v, scores, weights, size;
    explicit AttentionScratch(const Windows &windows)
        : places(windows.places()),
          lanes(windows.lanes()),
          width(round_up(windows.channels, LANES * UNIT_FACTORS<In>) / UNIT_FACTORS<In>) {
        int64_t used = 0;
        const auto take = [&](int64_t count) { return (used += count) - count; };
        q = take(width * lanes), k = take(width * lanes), v = take(width * lanes);
        scores = take(lanes * LANES), weights = take(lanes * LANES);
        size = used;
    }
};

/* Of a head, [head][query][key] by strides; packed: [key][lanes], queries side by side, float32. */
template <class In>
struct Bias {
    const In *first;
    const int64_t *strides;
    static int64_t packed_size(const Windows &windows) { return windows.places() * windows.lanes(); }
    void pack(const Windows &windows, int64_t head, float *to) const {
        const int64_t places = windows.places(), lanes = windows.lanes();
        const In *const from = first + head * strides[0];
        for (int64_t key = 0; key < places; ++key, to += lanes)
            for (int64_t query = 0; query < lanes; query += LANES) {
                In given[LANES] = {};
                for (int lane = 0; lane < LANES && query + lane < places; ++lane)
                    given[lane] = from[(query + lane) * strides[1] + key * strides[2]];
                store_floats(to + query, load_floats(given));
            }
    }
};

struct Place {
    int32_t row, column;
};

/* The places of a window, and the band of the image that each is from. */
struct Window {
    Place at[1024];
    float bands[1024];
    bool seam; /* whether there are several bands */

    Window(const Windows &all, int64_t number) {
        const int64_t size = all.size, row = number / all.across() * size, column = number % all.across() * size;
        const auto around = [&](int64_t place, int64_t end) {
            return (int32_t)(place + all.shift < end ? place + all.shift : place + all.shift - end);
        };
        const auto band = [&](int64_t place, int64_t end) {
            return (place >= end - size ? 1 : 0) + (place >= end - all.shift ? 1 : 0);
        };
        int64_t place = 0;
        for (int64_t i = row; i < row + size; ++i)
            for (int64_t j = column; j < column + size; ++j, ++place) {
                at[place] = {around(i, all.height), around(j, all.width)};
                bands[place] = band(i, all.height) * 3 + band(j, all.width);
            }
        for (; place < all.lanes(); ++place) bands[place] = 0;
        seam = all.shift && (row + size == all.height || column + size == all.width);
    }
};

/* Sums over keys of COUNT channels for LANES queries, times `scale`, to the queries' places of the result. */
template <class In, int COUNT>
CLVP_FAST_INLINE void mix(const Factor<In> *values, int64_t stride, const float *weights, int64_t units, Floats scale,
                          In *const *out, int64_t queries, int64_t channels) {
    Floats sums[LANES] = {};
    for (int64_t unit = 0; unit < units; ++unit, values += stride, weights += LANES) {
        const Floats weight = load_floats(weights);
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { sums[i] = dot(sums[i], values + i * UNIT_FACTORS<In>, weight); });
    }
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { sums[i] *= scale; });
    transpose<float>(sums);
    for (int query = 0; query < LANES && query < queries; ++query) store_floats(out[query], sums[query], channels);
}

/* Weights of two keys, or of one, as they are multiplied. */
CLVP_FAST_INLINE void store_weights(float *to, Floats weight) { store_floats(to, weight); }
CLVP_FAST_INLINE void store_weights(float *to, Floats first, Floats second) {
    const Integers low = (Integers)first + 0x8000, high = (Integers)second + 0x8000;
    store_floats(to, (Floats)(((low >> 16) & 0xffff) | (high & (int32_t)0xffff0000)));
}

/* Scores of LANES queries from `first` on, whose bias is `packed`; returns the largest of each query. */
template <class In>
Floats score(const Windows &windows, const Window &window, const float *packed, const float *q, const float *k,
             int64_t first, float *scores) {
    const int64_t places = windows.places(), lanes = windows.lanes(),
                  units = round_up(windows.channels, UNIT_FACTORS<In>) / UNIT_FACTORS<In>;
    const Floats band = load_floats(window.bands + first);
    Floats largest = Floats{} - __builtin_inff();
    for (int64_t key = 0; key < places; key += KEYS_AT_ONCE) {
        Floats sums[KEYS_AT_ONCE] = {};
        for (int64_t unit = 0; unit < units; ++unit) {
            const Floats query = load_floats(q + unit * lanes + first);
            const Factor<In> *const keys = (const Factor<In> *)(k + unit * lanes + key);
            unroll<KEYS_AT_ONCE>([&](auto i)
                                     CLVP_FAST_INLINED { sums[i] = dot(sums[i], keys + i * UNIT_FACTORS<In>, query); });
        }
        unroll<KEYS_AT_ONCE>([&](auto i) CLVP_FAST_INLINED {
            if (key + i >= places) return;
            Floats score = sums[i] * windows.scale + load_floats(packed + (key + i) * lanes + first);
            if (window.seam) score += band != window.bands[key + i] ? Floats{} + SEAM : Floats{};
            largest = score > largest ? score : largest;
            store_floats(scores + (key + i) * LANES, score);
        });
    }
    return largest;
}

/* The exponential functions of LANES queries' scores, rounded as they are multiplied, and their sum. */
template <class In>
Floats weigh(int64_t places, const float *scores, Floats largest, float *weights) {
    Floats sum = {};
    for (int64_t key = 0; key < places; key += UNIT_FACTORS<In>, weights += LANES) {
        Floats weight[2] = {};
        for (int i = 0; i < UNIT_FACTORS<In>; ++i)
            if (key + i < places) {
                const Floats exponent = load_floats(scores + (key + i) * LANES) - largest;
                weight[i] = UNIT_FACTORS<In> == 2 ? exponential_for_half(exponent) : exponential(exponent);
                sum += weight[i];
            }
        if constexpr (UNIT_FACTORS<In> == 2)
            store_weights(weights, weight[0], weight[1]);
        else
            store_weights(weights, weight[0]);
    }
    return sum;
}

/* Of a head: its packed bias, and where channels of a place begin, rows.q(place) to rows.out(place), which may lie
 * where its queries do. */
template <class In, class Rows>
void attend(const Windows &windows, const Window &window, const Rows &rows, const float *packed, float *scratch) {
    const AttentionScratch<In> space(windows);
    const int64_t channels = windows.channels, places = space.places;
    float *const q = scratch + space.q, *const k = scratch + space.k, *const v = scratch + space.v;
    constexpr int64_t STEP = LANES * UNIT_FACTORS<In>;
    for (int64_t channel = 0; channel < channels; channel += STEP)
        for (int64_t first = 0; first < space.lanes; first += LANES) {
            const int64_t count = channels - channel < STEP ? channels - channel : STEP;
            const auto turn = [&](const auto &row, float *to) CLVP_FAST_INLINED {
                Floats square[LANES];
                for (int64_t lane = 0; lane < LANES; ++lane)
                    square[lane] =
                        first + lane < places ? load_units<In>(row(first + lane) + channel, count) : Floats{};
                transpose<float>(square);
                to += channel / UNIT_FACTORS<In> * space.lanes + first;
                for (int i = 0; i < LANES; ++i) store_floats(to + i * space.lanes, square[i]);
            };
            turn([&](int64_t place) { return rows.q(place); }, q);
            turn([&](int64_t place) { return rows.k(place); }, k);
        }
    for (int64_t key = 0; key < places; key += UNIT_FACTORS<In>)
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            const int64_t count = channels - channel < LANES ? channels - channel : LANES;
            Floats value[2] = {};
            for (int i = 0; i < UNIT_FACTORS<In>; ++i)
                if (key + i < places) value[i] = load_floats(rows.v(key + i) + channel, count);
            float *const to = v + key / UNIT_FACTORS<In> * space.width * UNIT_FACTORS<In> + channel;
            if constexpr (UNIT_FACTORS<In> == 2)
                store_floats(to, (Floats)((Integers)value[1] | (((Integers)value[0] >> 16) & 0xffff)));
            else
                store_floats(to, value[0]);
        }

    float *const scores = scratch + space.scores, *const weights = scratch + space.weights;
    const int64_t pairs = round_up(places, UNIT_FACTORS<In>) / UNIT_FACTORS<In>,
                  stride = space.width * UNIT_FACTORS<In> * UNIT_FACTORS<In>;
    for (int64_t first = 0; first < places; first += LANES) {
        const int64_t queries = places - first;
        const Floats largest = score<In>(windows, window, packed, q, k, first, scores);
        const Floats sum = weigh<In>(places, scores, largest, weights);
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            const Factor<In> *const values = (const Factor<In> *)(v + channel);
            const int64_t left = channels - channel;
            In *out[LANES];
            for (int64_t lane = 0; lane < LANES && lane < queries; ++lane) out[lane] = rows.out(first + lane) + channel;
            if (2 * left <= LANES)
                mix<In, LANES / 2>(values, stride, weights, pairs, 1 / sum, out, queries, left);
            else
                mix<In, LANES>(values, stride, weights, pairs, 1 / sum, out, queries, left);
        }
    }
}

}  // namespace
}  // namespace clvp_fast
