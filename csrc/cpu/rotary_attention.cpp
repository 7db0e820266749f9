/* Attention with rotary positions, on a CPU. An item is one head of some queries of a sequence; it turns the keys and
 * values that they see for itself. Compiled once for each instruction set, as log_mel.cpp is. */
#include <float.h>

#include "dispatch.h"
#include "query_lanes.h"
#include "sequences.h"

namespace clvp_fast {
namespace {

/* The queries of an item, and all keys of their sequence, of one head. */
struct Item {
    int64_t batch, head;
    int64_t q_row, k_row;           /* of the tensors: where the sequence begins */
    int64_t first, end, keys, last; /* places of the queries; how many keys there are, and are seen */

    Item(const clvp_fast_rotary_attention *call, int64_t number) : head(number % call->num_heads) {
        const int64_t block = number / call->num_heads, size = call->item_queries;
        if (call->cu_seqlens) {
            const Block found = find_block(call->cu_seqlens, call->batch, call->q_len, size, block);
            batch = 0, q_row = k_row = found.start, first = found.first - found.start, end = found.end - found.start;
            keys = call->cu_seqlens[found.sequence + 1] - found.start;
        } else {
            const int64_t blocks = blocks_of(call->q_len, size);
            batch = block / blocks, q_row = k_row = 0, first = block % blocks * size;
            end = call->q_len - first < size ? call->q_len : first + size, keys = call->k_len;
        }
        /* A query whose keys are all masked weighs every key of the sequence, also those ahead of it. */
        const int64_t ahead = call->query_offset + end;
        last = call->causal && !call->key_mask && ahead < keys ? ahead : keys;
    }
};

int64_t items(const clvp_fast_rotary_attention *call) {
    const int64_t size = call->item_queries;
    const int64_t blocks = call->cu_seqlens ? count_blocks(call->cu_seqlens, call->batch, call->q_len, size)
                                            : call->batch * blocks_of(call->q_len, size);
    return blocks * call->num_heads;
}

/* The first channels of a row turned by its angles, and the others, rounded once. */
template <class In>
CLVP_FAST_INLINE void rotate(const clvp_fast_rotary_attention *call, const In *row, const float *cos, const float *sin,
                             In *to) {
    const int64_t half = call->rotary_dim / 2, channels = call->head_dim;
    int64_t k = 0;
    for (; k < half; k += LANES) {
        const int64_t some = half - k < LANES ? half - k : LANES;
        const Floats first = load_floats(row + k, some), second = load_floats(row + half + k, some);
        store_floats(to + k, first * load_floats(cos + k, some) - second * load_floats(sin + k, some), some);
        const Floats turned = second * load_floats(cos + half + k, some) + first * load_floats(sin + half + k, some);
        store_floats(to + half + k, turned, some);
    }
    memcpy(to + 2 * half, row + 2 * half, (channels - 2 * half) * sizeof(In));
}

/* A thread's scratch memory in bytes: rotated queries, keys and values, and what attention needs. */
template <class In>
struct Memory {
    int64_t rows; /* of the rotated ones, queries first; 0 if nothing turns */
    AttentionScratch<In> space;
    Memory(const clvp_fast_rotary_attention *call, int64_t queries, int64_t keys)
        : rows(call->cos ? queries + 2 * keys : 0), space(queries, keys, call->head_dim) {}
    int64_t rotated() const { return round_up(rows * space.channels * sizeof(In), 64); }
    size_t bytes() const { return rotated() + sizeof(float) * space.size; }
};

/* Where rows of an item's head begin: those of the tensors, or their rotated copies. */
template <class In>
struct Rows {
    const In *first_q, *first_k, *first_v;
    int64_t q_stride, k_stride, v_stride;
    In *first_out;
    int64_t out_stride;
    const In *q(int64_t place) const { return first_q + place * q_stride; }
    const In *k(int64_t place) const { return first_k + place * k_stride; }
    const In *v(int64_t place) const { return first_v + place * v_stride; }
    In *out(int64_t place) const { return first_out + place * out_stride; }
};

template <class In>
Rows<In> rows_of(const clvp_fast_rotary_attention *call, const Item &item) {
    const auto begin = [&](const void *x, const int64_t *strides, int64_t row) {
        return (const In *)x + item.batch * strides[0] + row * strides[1] + item.head * strides[2];
    };
    const int64_t row = item.batch * call->q_len + item.q_row + item.first, width = call->num_heads * call->head_dim;
    return {begin(call->q, call->q_strides, item.q_row + item.first),
            begin(call->k, call->k_strides, item.k_row),
            begin(call->v, call->v_strides, item.k_row),
            call->q_strides[1],
            call->k_strides[1],
            call->v_strides[1],
            (In *)call->out + row * width + item.head * call->head_dim,
            width};
}

/* Rotates an item's rows into `to`, and lets `rows` point there. */
template <class In>
void rotate_all(const clvp_fast_rotary_attention *call, const Item &item, In *to, Rows<In> &rows) {
    const int64_t channels = call->head_dim;
    const float *const cos = call->cos + item.batch * call->angle_stride;
    const float *const sin = call->sin + item.batch * call->angle_stride;
    const auto rotated = [&](const In *from, int64_t stride, int64_t count, int64_t first) {
        const In *const begin = to;
        for (int64_t place = first; place < first + count; ++place, from += stride, to += channels)
            rotate(call, from, cos + place * call->rotary_dim, sin + place * call->rotary_dim, to);
        return begin;
    };
    rows.first_q = rotated(rows.first_q, rows.q_stride, item.end - item.first, call->query_offset + item.first);
    rows.first_k = rotated(rows.first_k, rows.k_stride, item.last, 0);
    rows.first_v = rotated(rows.first_v, rows.v_stride, item.last, 0);
    rows.q_stride = rows.k_stride = rows.v_stride = channels;
}

template <class In>
void run(const clvp_fast_rotary_attention *call, int64_t number, void *memory) {
    const Item item(call, number);
    if (call->cos && item.keys > call->k_len) return; /* there are no angles for it */
    const Memory<In> needed(call, item.end - item.first, item.last);
    const AttentionScratch<In> &space = needed.space;
    float *const scratch = (float *)((char *)memory + needed.rotated());
    Rows<In> rows = rows_of<In>(call, item);
    if (call->cos) rotate_all<In>(call, item, (In *)memory, rows);
    turn_all<In>(space, rows, scratch);
    Floats lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const uint8_t *const mask = call->key_mask ? call->key_mask + item.batch * call->k_len : nullptr;
    for (int64_t first = 0; first < space.queries; first += LANES) {
        /* The last key that the first lane's query sees. */
        const int64_t place = call->causal ? call->query_offset + item.first + first : item.keys;
        const auto seen = [=](int64_t key, Floats score) CLVP_FAST_INLINED {
            if (mask && !mask[key]) return Floats{} - FLT_MAX;
            return key > place ? (lane < (float)(key - place) ? Floats{} - FLT_MAX : score) : score;
        };
        const int64_t keys = mask || place + LANES > item.last ? item.last : place + LANES;
        attend_lanes<In>(space, rows, first, keys, call->scale, seen, scratch);
    }
}

void run_any(const clvp_fast_rotary_attention *call, int64_t number, void *memory) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        run<float>(call, number, memory);
    else
        run<uint16_t>(call, number, memory);
}

size_t scratch_bytes(const clvp_fast_rotary_attention *call) {
    const int64_t longest =
        call->cu_seqlens ? longest_sequence(call->cu_seqlens, call->batch, call->q_len) : call->q_len;
    const int64_t queries = longest < call->item_queries ? longest : call->item_queries;
    const int64_t keys = call->cu_seqlens ? longest : call->k_len;
    return call->dtype == CLVP_FAST_FLOAT32 ? Memory<float>(call, queries, keys).bytes()
                                            : Memory<uint16_t>(call, queries, keys).bytes();
}

}  // namespace

const Kernel<clvp_fast_rotary_attention> CLVP_FAST_OF(rotary_attention, CLVP_FAST_ISA) = {items, scratch_bytes,
                                                                                          run_any};

}  // namespace clvp_fast
