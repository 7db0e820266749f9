/* Attention of one head within one window of an image, on a CPU. The lanes of a vector are queries: their largest
 * score, the sum of their weights and the division by it then need no shuffles, and keys and values are numbers for all
 * lanes. Scores, softmax and sums are float32; weights are rounded to bfloat16 where the CPU multiplies that. Compiled
 * once for each instruction set, as log_mel_isa.cpp is. */
#include <string.h>

#include "isa.h"
#include "products.h"

namespace clvp_fast {
namespace {

/* What is added to the scores of places that only the shift brought together: SEAM of ops/window_attention.py. */
constexpr float SEAM = -100;
/* Keys whose scores are computed side by side. */
constexpr int KEYS = 8;

constexpr int64_t up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

int64_t places_of(const clvp_fast_window_attention *call) { return (int64_t)call->window * call->window; }

/* The scratch memory of a window, in 32 bits. */
template <class In>
struct Room {
    int64_t places, queries, keys, width;
    /* q [width][queries]; k [keys][width]; v [keys / UNIT][width * UNIT]; of LANES queries, scores [keys][LANES] and
     * weights [keys / UNIT][LANES]; a band of each query; where each place lies, two numbers. */
    int64_t q, k, v, scores, weights, bands, at, size;
    explicit Room(const clvp_fast_window_attention *call)
        : places(places_of(call)),
          queries(up(places, LANES)),
          keys(up(places, KEYS)),
          width(up(call->head_dim, LANES * UNIT<In>) / UNIT<In>) {
        int64_t used = 0;
        const auto take = [&](int64_t count) { return (used += count) - count; };
        q = take(width * queries), k = take(keys * width), v = take(keys * width);
        scores = take(keys * LANES), weights = take(keys * LANES), bands = take(queries), at = take(2 * keys);
        size = used;
    }
};

/* Bias of the scores, packed: [head][key][queries], zeros behind the last query. */
template <class In>
void pack(const clvp_fast_window_attention *call, int64_t head, float *packed) {
    const int64_t places = places_of(call), queries = up(places, LANES);
    float *to = packed + head * places * queries;
    const In *const from = (const In *)call->bias + head * call->bias_strides[0];
    for (int64_t key = 0; key < places; ++key)
        for (int64_t query = 0; query < queries; ++query) {
            In given[LANES] = {};
            if (query < places) given[0] = from[query * call->bias_strides[1] + key * call->bias_strides[2]];
            *to++ = load_floats(given)[0];
        }
}

struct Place {
    int32_t row, column;
};

/* Where a window's places lie, and from which band of the image each is; whether there are several bands. */
bool find_places(const clvp_fast_window_attention *call, int64_t window_row, int64_t window_column, Place *places,
                 float *bands) {
    const int64_t window = call->window, height = call->height, width = call->width;
    const auto around = [&](int64_t place, int64_t size) {
        return (int32_t)(place + call->shift < size ? place + call->shift : place + call->shift - size);
    };
    const auto band = [&](int64_t place, int64_t size) {
        return (place >= size - window ? 1 : 0) + (place >= size - call->shift ? 1 : 0);
    };
    for (int64_t i = window_row * window; i < (window_row + 1) * window; ++i)
        for (int64_t j = window_column * window; j < (window_column + 1) * window; ++j) {
            *places++ = {around(i, height), around(j, width)};
            *bands++ = band(i, height) * 3 + band(j, width);
        }
    return call->shift && ((window_row + 1) * window == height || (window_column + 1) * window == width);
}

/* Sums over keys of COUNT channels for LANES queries, times `scale`, to the queries' places of the result. */
template <class In, int COUNT>
CLVP_FAST_INLINE void mix(const Product<In> *values, int64_t stride, const float *weights, int64_t units, Floats scale,
                          In *const *out, int64_t queries, int64_t channels) {
    Floats sums[LANES] = {};
    for (int64_t unit = 0; unit < units; ++unit, values += stride, weights += LANES) {
        const Floats weight = load_floats(weights);
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { sums[i] = dot(sums[i], values + i * UNIT<In>, weight); });
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

template <class In>
void attend(const clvp_fast_window_attention *call, const float *packed, int64_t item, float *scratch) {
    using Factor = Product<In>;
    const Room<In> room(call);
    const int64_t heads = call->num_heads, channels = call->head_dim, places = room.places;
    const int64_t across = call->width / call->window, windows = across * (call->height / call->window);
    const int64_t head = item % heads, window = item / heads % windows, image = item / heads / windows;
    Place *const at = (Place *)(scratch + room.at);
    float *const bands = scratch + room.bands;
    const bool seam = find_places(call, window / across, window % across, at, bands);

    float *const q = scratch + room.q, *const k = scratch + room.k, *const v = scratch + room.v;
    const auto row_of = [&](const void *from, const int64_t *strides, int64_t place) {
        return (const In *)from + image * strides[0] + at[place].row * strides[1] + at[place].column * strides[2] +
               head * strides[3];
    };
    constexpr int64_t STEP = LANES * UNIT<In>;
    for (int64_t channel = 0; channel < channels; channel += STEP) {
        const int64_t count = channels - channel < STEP ? channels - channel : STEP, unit = channel / UNIT<In>;
        for (int64_t first = 0; first < room.queries; first += LANES) {
            Floats block[LANES];
            for (int64_t lane = 0; lane < LANES; ++lane)
                block[lane] = first + lane < places
                                  ? load_units<In>(row_of(call->q, call->q_strides, first + lane) + channel, count)
                                  : Floats{};
            transpose<float>(block);
            for (int i = 0; i < LANES; ++i) store_floats(q + (unit + i) * room.queries + first, block[i]);
        }
        for (int64_t key = 0; key < room.keys; ++key)
            store_floats(
                k + key * room.width + unit,
                key < places ? load_units<In>(row_of(call->k, call->k_strides, key) + channel, count) : Floats{});
    }
    for (int64_t key = 0; key < room.keys; key += UNIT<In>)
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            const int64_t count = channels - channel < LANES ? channels - channel : LANES;
            Floats value[2] = {};
            for (int i = 0; i < UNIT<In>; ++i)
                if (key + i < places)
                    value[i] = load_floats(row_of(call->v, call->v_strides, key + i) + channel, count);
            float *const to = v + key / UNIT<In> * room.width * UNIT<In> + channel;
            if constexpr (UNIT<In> == 2)
                store_floats(to, (Floats)((Integers)value[1] | (((Integers)value[0] >> 16) & 0xffff)));
            else
                store_floats(to, value[0]);
        }

    float *const scores = scratch + room.scores, *const weights = scratch + room.weights;
    const int64_t units = (channels + UNIT<In> - 1) / UNIT<In>;
    for (int64_t first = 0; first < places; first += LANES) {
        const float *bias = packed + head * places * room.queries + first;
        const Floats band = load_floats(bands + first);
        Floats largest = Floats{} - __builtin_inff();
        for (int64_t key = 0; key < places; key += KEYS) {
            Floats sums[KEYS] = {};
            const Factor *const keys = (const Factor *)(k + key * room.width);
            for (int64_t unit = 0; unit < units; ++unit) {
                const Floats query = load_floats(q + unit * room.queries + first);
                unroll<KEYS>([&](auto i) CLVP_FAST_INLINED {
                    sums[i] = dot(sums[i], keys + (i * room.width + unit) * UNIT<In>, query);
                });
            }
            unroll<KEYS>([&](auto i) CLVP_FAST_INLINED {
                if (key + i >= places) return;
                Floats score = sums[i] * call->scale + load_floats(bias);
                if (seam) score += band != bands[key + i] ? Floats{} + SEAM : Floats{};
                largest = score > largest ? score : largest;
                store_floats(scores + (key + i) * LANES, score);
                bias += room.queries;
            });
        }
        Floats sum = {};
        for (int64_t key = 0; key < places; key += UNIT<In>) {
            Floats weight[2] = {};
            for (int i = 0; i < UNIT<In>; ++i)
                if (key + i < places) {
                    const Floats exponent = load_floats(scores + (key + i) * LANES) - largest;
                    weight[i] = UNIT<In> == 2 ? exponential_for_half(exponent) : exponential(exponent);
                    sum += weight[i];
                }
            float *const to = weights + key / UNIT<In> * LANES;
            if constexpr (UNIT<In> == 2)
                store_weights(to, weight[0], weight[1]);
            else
                store_weights(to, weight[0]);
        }
        In *out[LANES] = {};
        for (int64_t lane = 0; lane < LANES && first + lane < places; ++lane) {
            const Place &place = at[first + lane];
            const int64_t row = (image * call->height + place.row) * call->width + place.column;
            out[lane] = (In *)call->out + (row * heads + head) * channels;
        }
        const int64_t pairs = (places + UNIT<In> - 1) / UNIT<In>, stride = room.width * UNIT<In> * UNIT<In>;
        for (int64_t channel = 0; channel < channels; channel += LANES) {
            const Factor *const values = (const Factor *)(v + channel);
            const int64_t left = channels - channel;
            if (2 * left <= LANES)
                mix<In, LANES / 2>(values, stride, weights, pairs, 1 / sum, out, places - first, left);
            else
                mix<In, LANES>(values, stride, weights, pairs, 1 / sum, out, places - first, left);
            for (int64_t lane = 0; lane < LANES && first + lane < places; ++lane) out[lane] += LANES;
        }
    }
}

size_t packed_bytes(const clvp_fast_window_attention *call) {
    const int64_t places = places_of(call);
    return sizeof(float) * call->num_heads * places * up(places, LANES);
}

size_t scratch_bytes(const clvp_fast_window_attention *call) {
    return sizeof(float) * (call->dtype == CLVP_FAST_FLOAT32 ? Room<float>(call).size : Room<uint16_t>(call).size);
}

void pack_any(const clvp_fast_window_attention *call, int64_t head, void *packed) {
    if (call->bias_dtype == CLVP_FAST_FLOAT32)
        pack<float>(call, head, (float *)packed);
    else
        pack<uint16_t>(call, head, (float *)packed);
}

void run_any(const clvp_fast_window_attention *call, const void *packed, int64_t item, void *scratch) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        attend<float>(call, (const float *)packed, item, (float *)scratch);
    else
        attend<uint16_t>(call, (const float *)packed, item, (float *)scratch);
}

}  // namespace
}  // namespace clvp_fast

const clvp_fast_window_attention_isa CLVP_FAST_OF(window_attention, CLVP_FAST_ISA) = {
    clvp_fast::packed_bytes, clvp_fast::scratch_bytes, clvp_fast::pack_any, clvp_fast::run_any};
