/* Attention of one candidate over pages of keys and values, on a CPU. A vector holds channels while keys
 * and values are read, and keys while their scores are turned into weights. Sums are float32, and their order depends
 * on the candidate's own tokens alone. Compiled once for each instruction set, as log_mel.cpp is. */
#include <string.h>

#include "dispatch.h"
#include "products.h"

namespace clvp_fast {
namespace {

/* Brings `count` elements into the second-level cache, if there is memory at that place. */
template <class Stored>
CLVP_FAST_INLINE void prefetch(const Stored *from, int count) {
    for (int byte = 0; byte < count * (int)sizeof(Stored); byte += 64)
        __builtin_prefetch((const char *)from + byte, 0, 2);
}

/* Where tokens lie: offsets of their first channels, from the first page; returns how many there are. */
int64_t find_tokens(const clvp_fast_paged_decode *call, const int32_t *pages, int64_t max_pages, int64_t tokens,
                    int64_t *offsets) {
    int64_t found = 0;
    for (int64_t first = 0, page = 0; first < tokens && page < max_pages; first += call->page_size, ++page) {
        if (pages[page] < 0 || pages[page] >= call->num_pages) continue;
        const int64_t end = tokens - first < call->page_size ? tokens - first : call->page_size;
        const int64_t start = pages[page] * call->page_strides[0];
        for (int64_t token = 0; token < end; ++token) offsets[found++] = start + token * call->page_strides[1];
    }
    return found;
}

/* products[i], summed over its lanes, is the product of a query and keys[i]. */
template <class Stored>
CLVP_FAST_INLINE void add_products(const Stored *q, const Stored *const (&keys)[LANES], int channels,
                                   Floats (&products)[LANES]) {
    int channel = 0;
    using Products = ProductsOf<Stored>;
    if constexpr (Products::COUNT > LANES)
        for (; channel + Products::COUNT <= channels; channel += Products::COUNT) {
            const typename Products::Factors query = Products::load(q + channel);
            unroll<LANES>([&](auto i) CLVP_FAST_INLINED {
                products[i] = Products::dot(products[i], query, Products::load(keys[i] + channel));
            });
        }
    for (; channel < channels; channel += LANES) {
        const Floats query = load_floats(q + channel);
        unroll<LANES>([&](auto i) CLVP_FAST_INLINED { products[i] += query * load_floats(keys[i] + channel); });
    }
}

/* Channels as float32, in an order that costs little to load: `in_order` turns it back. */
template <int COUNT>
CLVP_FAST_INLINE void load_channels(const float *from, Floats (&to)[COUNT]) {
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { to[i] = load_floats(from + LANES * i); });
}
template <int COUNT>
CLVP_FAST_INLINE void in_order(const float *, Floats (&)[COUNT]) {}

/* Of bfloat16 a vector's even channels, then its odd ones. */
template <int COUNT>
CLVP_FAST_INLINE void load_channels(const uint16_t *from, Floats (&to)[COUNT]) {
    if constexpr (COUNT == 1) {
        to[0] = load_floats(from);
    } else {
        unroll<COUNT / 2>([&](auto i) CLVP_FAST_INLINED {
            Integers both;
            memcpy(&both, from + 2 * LANES * i, sizeof both);
            to[2 * i] = (Floats)(both << 16), to[2 * i + 1] = (Floats)(both & -65536);
        });
    }
}
template <int COUNT>
CLVP_FAST_INLINE void in_order(const uint16_t *, Floats (&x)[COUNT]) {
    using Lane = std::make_integer_sequence<int, LANES>;
    unroll<COUNT / 2>([&](auto i) CLVP_FAST_INLINED {
        const Floats even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = interleave<float, 0>(even, odd, Lane{}), x[2 * i + 1] = interleave<float, 1>(even, odd, Lane{});
    });
}

/* out[.. COUNT vectors] = sum of weights[t] * values[offsets[t]]; COUNT is 1 or even. */
template <int COUNT, class Stored>
CLVP_FAST_INLINE void mix(Stored *out, const Stored *values, const int64_t *offsets, const float *weights,
                          int64_t tokens, float scale) {
    Floats sums[COUNT] = {};
    for (int64_t token = 0; token < tokens; ++token) {
        Floats value[COUNT];
        load_channels(values + offsets[token], value);
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { sums[i] += value[i] * weights[token]; });
    }
    in_order(values, sums);
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { store_floats(out + LANES * i, sums[i] * scale); });
}

/* out[channels] of one head, whose pages and query these are, over tokens at `offsets`, at least one. */
template <class Stored>
void attend_head(const clvp_fast_paged_decode *call, const Stored *q, const Stored *k_pages, const Stored *v_pages,
                 const int64_t *offsets, int64_t tokens, float *scores, Stored *out) {
    const int channels = call->head_dim;
    /* Scores, a vector of keys at a time: the last vector repeats a key, whose score is then taken out. */
    const int64_t last = tokens - 1;
    Floats largest = Floats{} - __builtin_inff();
    for (int64_t first = 0; first < tokens; first += LANES) {
        const Stored *keys[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t offset = offsets[first + lane < last ? first + lane : last];
            keys[lane] = k_pages + offset;
            /* Tokens lie too far apart for the CPU to see what comes next: this head's values, the next one's keys. */
            prefetch(v_pages + offset, channels);
            prefetch(keys[lane] + call->page_strides[2], channels);
        }
        Floats products[LANES] = {};
        add_products(q, keys, channels, products);
        Floats score = fold<LANES>(products) * call->scale;
        for (int64_t lane = tokens - first; lane < LANES; ++lane) score[lane] = -__builtin_inff();
        largest = score > largest ? score : largest;
        store_floats(scores + first, score);
    }
    float top = largest[0];
    for (int lane = 1; lane < LANES; ++lane) top = largest[lane] > top ? largest[lane] : top;
    Floats sums = {};
    for (int64_t first = 0; first < tokens; first += LANES) {
        const Floats weight = exponential(load_floats(scores + first) - top);
        store_floats(scores + first, weight);
        sums += weight;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];

    int channel = 0;
    for (; channel + 4 * LANES <= channels; channel += 4 * LANES)
        mix<4>(out + channel, v_pages + channel, offsets, scores, tokens, 1 / sum);
    for (; channel < channels; channel += LANES)
        mix<1>(out + channel, v_pages + channel, offsets, scores, tokens, 1 / sum);
}

/* The most tokens of a candidate, and room for the last vectors. */
int64_t most_tokens(const clvp_fast_paged_decode *call) {
    return (int64_t)call->page_size * ((int64_t)call->max_pages + call->max_prefix_pages) + 64;
}

/* A score and a place of each token. */
size_t scratch_bytes(const clvp_fast_paged_decode *call) {
    return most_tokens(call) * (sizeof(float) + sizeof(int64_t));
}

template <class Stored>
void run(const clvp_fast_paged_decode *call, int64_t candidate, int64_t first_head, int64_t end_head, void *scratch) {
    const int channels = call->head_dim;
    const int64_t length = call->seq_lens[candidate], place = length / call->page_size;
    const int32_t *const own = call->block_table + candidate * call->block_table_stride;
    Stored *const k_pages = (Stored *)call->k_pages, *const v_pages = (Stored *)call->v_pages;
    int64_t stored_at = -1, tokens = 0;
    if (length >= 0 && place < call->max_pages && own[place] >= 0 && own[place] < call->num_pages)
        stored_at = own[place] * call->page_strides[0] + length % call->page_size * call->page_strides[1];

    int64_t *const offsets = (int64_t *)scratch;
    float *const scores = (float *)(offsets + most_tokens(call));
    const int64_t prefix = length >= 0 && call->prefix_table ? call->prefix_index[candidate] : -1;
    if (prefix >= 0 && prefix < call->num_prefixes)
        tokens = find_tokens(call, call->prefix_table + prefix * call->prefix_table_stride, call->max_prefix_pages,
                             call->prefix_lens[prefix], offsets);
    tokens += find_tokens(call, own, call->max_pages, length + 1, offsets + tokens);

    for (int64_t head = first_head; head < end_head; ++head) {
        const int64_t at = head * call->page_strides[2];
        if (stored_at >= 0) {
            const int64_t k = candidate * call->k_new_strides[0] + head * call->k_new_strides[1];
            const int64_t v = candidate * call->v_new_strides[0] + head * call->v_new_strides[1];
            memcpy(k_pages + stored_at + at, (const Stored *)call->k_new + k, channels * sizeof(Stored));
            memcpy(v_pages + stored_at + at, (const Stored *)call->v_new + v, channels * sizeof(Stored));
        }
        Stored *const out = (Stored *)call->out + (candidate * call->num_heads + head) * channels;
        const Stored *const q = (const Stored *)call->q + candidate * call->q_strides[0] + head * call->q_strides[1];
        if (tokens > 0)
            attend_head(call, q, k_pages + at, v_pages + at, offsets, tokens, scores, out);
        else
            memset(out, 0, channels * sizeof(Stored));
    }
}

void run_any(const clvp_fast_paged_decode *call, int64_t candidate, int64_t first_head, int64_t end_head,
             void *scratch) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        run<float>(call, candidate, first_head, end_head, scratch);
    else
        run<uint16_t>(call, candidate, first_head, end_head, scratch);
}

}  // namespace

const PagedDecodeKernel CLVP_FAST_OF(paged_decode, CLVP_FAST_ISA) = {scratch_bytes, run_any};

}  // namespace clvp_fast
