/* Attention of one candidate over pages of keys and values, on a CPU. A vector holds channels while keys
 * and values are read, and keys while their scores are turned into weights. Sums are float32, and their order depends
 * on the candidate's own tokens alone. Compiled once for each instruction set, as log_mel.cpp is. */
#include <string.h>

#include "dispatch.h"
#include "products.h"

namespace clvp_fast {
namespace {

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

/* The product of a query and a key, which is the sum of the lanes. */
template <class Stored>
CLVP_FAST_INLINE Floats multiply(const Stored *q, const Stored *key, int channels) {
    Floats product = {};
    int channel = 0;
    using Products = ProductsOf<Stored>;
    if constexpr (Products::COUNT > LANES)
        for (; channel + Products::COUNT <= channels; channel += Products::COUNT)
            product = Products::dot(product, Products::load(q + channel), Products::load(key + channel));
    for (; channel < channels; channel += LANES) product += load_floats(q + channel) * load_floats(key + channel);
    return product;
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

/* Some heads of a candidate: queries, keys and values of the first of them, results, and how many. Keys of a head lie
 * at `offsets`, as do its values. */
template <class Stored>
struct Heads {
    const Stored *q, *k_pages, *v_pages;
    Stored *out;
    int64_t q_stride, page_stride, count; /* strides: of a head */
    int channels;
    const int64_t *offsets;
    int64_t tokens; /* at least one */
};

/* A head of a token, in the order in which they lie in memory: heads side by side, token after token. */
struct Place {
    int64_t token = 0, head = 0;
    CLVP_FAST_INLINED void advance(int64_t heads) {
        if (++head == heads) head = 0, ++token;
    }
};

/* Brings keys, then values, into the caches, in their order and AHEAD bytes before they are read. A CPU looks ahead
 * within a page of memory at most. */
template <class Stored>
struct Fetch {
    static constexpr int64_t AHEAD = 16384;
    const Heads<Stored> &heads;
    const Stored *pages;
    bool values = false;
    Place place;
    explicit Fetch(const Heads<Stored> &all) : heads(all), pages(all.k_pages) {
        const int64_t size = heads.channels * sizeof(Stored);
        for (int64_t ahead = 0; ahead < AHEAD; ahead += size) one();
    }
    /* Fetches another head of a token. */
    CLVP_FAST_INLINED void one() {
        if (place.token == heads.tokens) {
            if (values) return;
            values = true, pages = heads.v_pages, place = {};
        }
        const char *const from = (const char *)(pages + heads.offsets[place.token] + place.head * heads.page_stride);
        for (int byte = 0; byte < heads.channels * (int)sizeof(Stored); byte += 64)
            __builtin_prefetch(from + byte, 0, 3);
        place.advance(heads.count);
    }
};

/* scores[head][token], `stride` from one head to the next, and behind them what gives no weight to a last vector. */
template <class Stored>
void score(const Heads<Stored> &heads, float scale, Fetch<Stored> &fetch, float *scores, int64_t stride) {
    Place place;
    for (int64_t left = heads.tokens * heads.count; left > 0; left -= LANES) {
        const int64_t some = left < LANES ? left : LANES;
        float *to[LANES];
        Floats products[LANES] = {};
        unroll<LANES>([&](auto i) CLVP_FAST_INLINED {
            if (i >= some) return;
            fetch.one();
            const Stored *const key = heads.k_pages + place.head * heads.page_stride + heads.offsets[place.token];
            products[i] = multiply(heads.q + place.head * heads.q_stride, key, heads.channels);
            to[i] = scores + place.head * stride + place.token;
            place.advance(heads.count);
        });
        const Floats sums = fold<LANES>(products) * scale;
        for (int64_t i = 0; i < some; ++i) *to[i] = sums[i];
    }
    for (int64_t head = 0; head < heads.count; ++head)
        store_floats(scores + head * stride + heads.tokens, Floats{} - __builtin_inff());
}

/* Makes weights of a head's scores, up to the factor that is returned: 1 / their sum. */
float weigh(float *scores, int64_t tokens) {
    Floats largest = Floats{} - __builtin_inff();
    for (int64_t first = 0; first < tokens; first += LANES) {
        const Floats score = load_floats(scores + first);
        largest = score > largest ? score : largest;
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
    return 1 / sum;
}

/* sums[COUNT vectors] += sum of weights[t] * values[offsets[t]]; COUNT is 1 or even. */
template <int COUNT, int MOST, class Stored>
CLVP_FAST_INLINE void mix(float *sums, const Stored *values, const int64_t *offsets, const float *weights,
                          int64_t tokens) {
    Floats mixed[COUNT];
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { mixed[i] = load_floats(sums + LANES * i); });
    unroll<MOST>([&](auto token) CLVP_FAST_INLINED {
        if (token >= tokens) return;
        Floats value[COUNT];
        load_channels(values + offsets[token], value);
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { mixed[i] += value[i] * weights[token]; });
    });
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { store_floats(sums + LANES * i, mixed[i]); });
}

/* out[COUNT vectors] = sums * scale, sums being in the order of load_channels. */
template <int COUNT, class Stored>
CLVP_FAST_INLINE void finish(const float *sums, float scale, Stored *out) {
    Floats mixed[COUNT];
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { mixed[i] = load_floats(sums + LANES * i); });
    in_order(out, mixed);
    unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { store_floats(out + LANES * i, mixed[i] * scale); });
}

/* Calls body(channel, how many vectors of channels) for all channels of a head. */
template <class Body>
CLVP_FAST_INLINE void each_channel(int channels, const Body &body) {
    int channel = 0;
    for (; channel + 4 * LANES <= channels; channel += 4 * LANES) body(channel, Index<4>());
    for (; channel < channels; channel += LANES) body(channel, Index<1>());
}

/* The parts of a thread's scratch memory: places of tokens, and of each head scores, sums and a factor. */
struct Scratch {
    int64_t *offsets, scores_stride;
    float *scores, *sums, *factors;
    static int64_t most_tokens(const clvp_fast_paged_decode *call) { /* and room for the last vectors */
        return (int64_t)call->page_size * ((int64_t)call->max_pages + call->max_prefix_pages) + 64;
    }
    static size_t bytes(const clvp_fast_paged_decode *call) {
        const int64_t tokens = most_tokens(call);
        return tokens * sizeof(int64_t) + call->num_heads * (tokens + call->head_dim + 1) * sizeof(float);
    }
    Scratch(const clvp_fast_paged_decode *call, void *memory)
        : offsets((int64_t *)memory),
          scores_stride(most_tokens(call)),
          scores((float *)(offsets + scores_stride)),
          sums(scores + call->num_heads * scores_stride),
          factors(sums + call->num_heads * call->head_dim) {}
};

/* The tokens whose values are added at a time. */
constexpr int TOKENS = 4;

template <class Stored>
void attend(const Heads<Stored> &heads, float scale, const Scratch &scratch) {
    const int64_t stride = scratch.scores_stride;
    Fetch<Stored> fetch(heads);
    score(heads, scale, fetch, scratch.scores, stride);
    for (int64_t head = 0; head < heads.count; ++head)
        scratch.factors[head] = weigh(scratch.scores + head * stride, heads.tokens);
    memset(scratch.sums, 0, heads.count * heads.channels * sizeof(float));
    for (int64_t first = 0; first < heads.tokens; first += TOKENS) {
        const int64_t count = heads.tokens - first < TOKENS ? heads.tokens - first : TOKENS;
        for (int64_t head = 0; head < heads.count; ++head) {
            unroll<TOKENS>([&](auto) CLVP_FAST_INLINED { fetch.one(); });
            const Stored *const values = heads.v_pages + head * heads.page_stride;
            const float *const weights = scratch.scores + head * stride + first;
            float *const sums = scratch.sums + head * heads.channels;
            each_channel(heads.channels, [&](int channel, auto vectors) CLVP_FAST_INLINED {
                mix<vectors, TOKENS>(sums + channel, values + channel, heads.offsets + first, weights, count);
            });
        }
    }
    for (int64_t head = 0; head < heads.count; ++head) {
        const float *const sums = scratch.sums + head * heads.channels;
        Stored *const out = heads.out + head * heads.channels;
        each_channel(heads.channels, [&](int channel, auto vectors) CLVP_FAST_INLINED {
            finish<vectors>(sums + channel, scratch.factors[head], out + channel);
        });
    }
}

template <class Stored>
void run(const clvp_fast_paged_decode *call, int64_t candidate, int64_t first_head, int64_t end_head, void *memory) {
    const Scratch scratch(call, memory);
    const int channels = call->head_dim;
    const int64_t length = call->seq_lens[candidate], place = length / call->page_size;
    const int32_t *const own = call->block_table + candidate * call->block_table_stride;
    int64_t stored_at = -1, tokens = 0;
    if (length >= 0 && place < call->max_pages && own[place] >= 0 && own[place] < call->num_pages)
        stored_at = own[place] * call->page_strides[0] + length % call->page_size * call->page_strides[1];
    const int64_t prefix = length >= 0 && call->prefix_table ? call->prefix_index[candidate] : -1;
    if (prefix >= 0 && prefix < call->num_prefixes)
        tokens = find_tokens(call, call->prefix_table + prefix * call->prefix_table_stride, call->max_prefix_pages,
                             call->prefix_lens[prefix], scratch.offsets);
    tokens += find_tokens(call, own, call->max_pages, length + 1, scratch.offsets + tokens);

    Stored *const k_pages = (Stored *)call->k_pages, *const v_pages = (Stored *)call->v_pages;
    for (int64_t head = first_head; head < end_head && stored_at >= 0; ++head) {
        const int64_t at = stored_at + head * call->page_strides[2];
        const int64_t k = candidate * call->k_new_strides[0] + head * call->k_new_strides[1];
        const int64_t v = candidate * call->v_new_strides[0] + head * call->v_new_strides[1];
        memcpy(k_pages + at, (const Stored *)call->k_new + k, channels * sizeof(Stored));
        memcpy(v_pages + at, (const Stored *)call->v_new + v, channels * sizeof(Stored));
    }
    const int64_t at = first_head * call->page_strides[2], count = end_head - first_head;
    const Stored *const q = (const Stored *)call->q + candidate * call->q_strides[0] + first_head * call->q_strides[1];
    Stored *const out = (Stored *)call->out + (candidate * call->num_heads + first_head) * channels;
    if (tokens > 0)
        attend<Stored>({q, k_pages + at, v_pages + at, out, call->q_strides[1], call->page_strides[2], count, channels,
                        scratch.offsets, tokens},
                       call->scale, scratch);
    else
        memset(out, 0, count * channels * sizeof(Stored));
}

void run_any(const clvp_fast_paged_decode *call, int64_t candidate, int64_t first_head, int64_t end_head,
             void *scratch) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        run<float>(call, candidate, first_head, end_head, scratch);
    else
        run<uint16_t>(call, candidate, first_head, end_head, scratch);
}

}  // namespace

const PagedDecodeKernel CLVP_FAST_OF(paged_decode, CLVP_FAST_ISA) = {Scratch::bytes, run_any};

}  // namespace clvp_fast
