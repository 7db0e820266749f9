/* Attention of one head of one candidate over pages of keys and values, on a CPU. A vector holds channels while keys
 * and values are read, and keys while their scores are turned into weights. Sums are float32, and their order depends
 * on the candidate's own tokens alone. Compiled once for each instruction set, as log_mel_isa.cpp is. */
#include <string.h>

#include "floats.h"
#include "isa.h"

namespace clvp_fast {
namespace {

/* Brings `count` elements into the second-level cache, if there is memory at that place. */
template <class Stored>
CLVP_FAST_INLINE void fetch(const Stored *from, int count) {
    for (int byte = 0; byte < count * (int)sizeof(Stored); byte += 64)
        __builtin_prefetch((const char *)from + byte, 0, 2);
}

/* Where the tokens of a candidate lie: offsets of their channels of one head, from the first page; returns how many. */
int64_t find_tokens(const clvp_fast_paged_decode *call, const int32_t *pages, int64_t max_pages, int64_t tokens,
                    int64_t head, int64_t *offsets) {
    int64_t found = 0;
    for (int64_t first = 0, page = 0; first < tokens && page < max_pages; first += call->page_size, ++page) {
        if (pages[page] < 0 || pages[page] >= call->num_pages) continue;
        const int64_t end = tokens - first < call->page_size ? tokens - first : call->page_size;
        const int64_t start = pages[page] * call->page_strides[0] + head * call->page_strides[2];
        for (int64_t token = 0; token < end; ++token) offsets[found++] = start + token * call->page_strides[1];
    }
    return found;
}

/* out[.. COUNT vectors] = sum of weights[t] * values[offsets[t]]. */
template <int COUNT, class Stored>
CLVP_FAST_INLINE void mix(Stored *out, const Stored *values, const int64_t *offsets, const float *weights,
                          int64_t tokens, float scale) {
    Floats sum[COUNT] = {};
    for (int64_t token = 0; token < tokens; ++token) {
        const Stored *value = values + offsets[token];
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { sum[i] += load_floats(value + LANES * i) * weights[token]; });
    }
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { store_floats(out + LANES * i, sum[i] * scale); });
}

template <class Stored>
void attend(const clvp_fast_paged_decode *call, int64_t candidate, int64_t head, void *scratch) {
    const int channels = call->head_dim;
    Stored *const out = (Stored *)call->out + (candidate * call->num_heads + head) * channels;
    const int64_t length = call->seq_lens[candidate];
    if (length < 0) {
        memset(out, 0, channels * sizeof(Stored));
        return;
    }
    Stored *const k_pages = (Stored *)call->k_pages, *const v_pages = (Stored *)call->v_pages;
    const int32_t *const own = call->block_table + candidate * call->block_table_stride;
    const int64_t place = length / call->page_size;
    if (place < call->max_pages && own[place] >= 0 && own[place] < call->num_pages) {
        const int64_t to = own[place] * call->page_strides[0] + length % call->page_size * call->page_strides[1] +
                           head * call->page_strides[2];
        const int64_t k = candidate * call->k_new_strides[0] + head * call->k_new_strides[1];
        const int64_t v = candidate * call->v_new_strides[0] + head * call->v_new_strides[1];
        memcpy(k_pages + to, (const Stored *)call->k_new + k, channels * sizeof(Stored));
        memcpy(v_pages + to, (const Stored *)call->v_new + v, channels * sizeof(Stored));
    }

    float *const scores = (float *)scratch;
    const int64_t room = (int64_t)call->page_size * ((int64_t)call->max_pages + call->max_prefix_pages) + 64;
    int64_t *const offsets = (int64_t *)(scores + room);
    int64_t tokens = 0;
    const int64_t prefix = call->prefix_table ? call->prefix_index[candidate] : -1;
    if (prefix >= 0 && prefix < call->num_prefixes)
        tokens = find_tokens(call, call->prefix_table + prefix * call->prefix_table_stride, call->max_prefix_pages,
                             call->prefix_lens[prefix], head, offsets);
    tokens += find_tokens(call, own, call->max_pages, length + 1, head, offsets + tokens);
    if (tokens == 0) {
        memset(out, 0, channels * sizeof(Stored));
        return;
    }

    /* Scores, a vector of keys at a time: the last vector repeats a key, whose score is then taken out. */
    const Stored *const q = (const Stored *)call->q + candidate * call->q_strides[0] + head * call->q_strides[1];
    const int64_t last = tokens - 1;
    Floats largest = Floats{} - __builtin_inff();
    for (int64_t first = 0; first < tokens; first += LANES) {
        const Stored *key[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const int64_t offset = offsets[first + lane < last ? first + lane : last];
            key[lane] = k_pages + offset;
            /* Tokens lie too far apart for the CPU to see what comes next: this head's values, the next one's keys. */
            fetch(v_pages + offset, channels);
            fetch(key[lane] + call->page_strides[2], channels);
        }
        Floats products[LANES] = {};
        for (int channel = 0; channel < channels; channel += LANES) {
            const Floats query = load_floats(q + channel);
            unroll<LANES>([&](auto lane)
                              CLVP_FAST_INLINED { products[lane] += query * load_floats(key[lane] + channel); });
        }
        transpose<float>(products);
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) products[i] += products[i + half];
        Floats score = products[0] * call->scale;
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

}  // namespace
}  // namespace clvp_fast

void CLVP_FAST_OF(attend, CLVP_FAST_ISA)(const clvp_fast_paged_decode *call, int64_t candidate, int64_t head,
                                         void *scratch) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        clvp_fast::attend<float>(call, candidate, head, scratch);
    else
        clvp_fast::attend<uint16_t>(call, candidate, head, scratch);
}
