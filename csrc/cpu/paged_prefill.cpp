/* Causal attention within the sequences of a ragged batch, whose keys and values go into pages, on a CPU. An item is
 * one head of some queries of a sequence, and lays out the keys before them for itself. Compiled once for each
 * instruction set, as log_mel.cpp is. */
#include "dispatch.h"
#include "query_lanes.h"
#include "sequences.h"

namespace clvp_fast {
namespace {

/* The queries of an item: so many that keys are laid out few times. */
constexpr int64_t QUERIES = 128;

int64_t items(const clvp_fast_paged_prefill *call) {
    return count_blocks(call->cu_seqlens, call->num_sequences, call->rows, QUERIES) * call->num_heads;
}

/* A block of queries, and the head that attends with them. */
struct Item : Block {
    int64_t head;
    Item(const clvp_fast_paged_prefill *call, int64_t number)
        : Block(find_block(call->cu_seqlens, call->num_sequences, call->rows, QUERIES, number / call->num_heads)),
          head(number % call->num_heads) {}
};

/* Where the channels of the item's head begin: of queries from its first, of keys from the sequence's. */
template <class In>
struct Rows {
    const clvp_fast_paged_prefill *call;
    const Item &item;
    const In *row(const void *from, const int64_t *strides, int64_t row) const {
        return (const In *)from + row * strides[0] + item.head * strides[1];
    }
    const In *q(int64_t place) const { return row(call->q, call->q_strides, item.first + place); }
    const In *k(int64_t place) const { return row(call->k, call->k_strides, item.start + place); }
    const In *v(int64_t place) const { return row(call->v, call->v_strides, item.start + place); }
    In *out(int64_t place) const {
        return (In *)call->out + ((item.first + place) * call->num_heads + item.head) * call->head_dim;
    }
};

/* Stores the keys and values of the item's own rows; places without a page are left out. */
template <class In>
void store(const clvp_fast_paged_prefill *call, const Item &item, const Rows<In> &rows) {
    const int32_t *const pages = call->block_table + item.sequence * call->block_table_stride;
    for (int64_t place = item.first - item.start; place < item.end - item.start; ++place) {
        const int64_t page = place / call->page_size;
        if (page >= call->max_pages || pages[page] < 0 || pages[page] >= call->num_pages) continue;
        const int64_t at = pages[page] * call->page_strides[0] + place % call->page_size * call->page_strides[1] +
                           item.head * call->page_strides[2];
        memcpy((In *)call->k_pages + at, rows.k(place), call->head_dim * sizeof(In));
        memcpy((In *)call->v_pages + at, rows.v(place), call->head_dim * sizeof(In));
    }
}

template <class In>
void run(const clvp_fast_paged_prefill *call, int64_t number, float *scratch) {
    const Item item(call, number);
    const Rows<In> rows = {call, item};
    const AttentionScratch<In> space(item.end - item.first, item.end - item.start, call->head_dim);
    turn_all<In>(space, rows, scratch);
    Floats lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int64_t first = 0; first < space.queries; first += LANES) {
        const int64_t place = item.first - item.start + first; /* of the first lane's query */
        const auto causal = [=](int64_t key, Floats score) CLVP_FAST_INLINED {
            return key > place ? (lane < (float)(key - place) ? Floats{} - __builtin_inff() : score) : score;
        };
        const int64_t keys = place + LANES < space.keys ? place + LANES : space.keys;
        attend_lanes<In>(space, rows, first, keys, call->scale, causal, scratch);
    }
    store<In>(call, item, rows);
}

void run_any(const clvp_fast_paged_prefill *call, int64_t number, void *scratch) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        run<float>(call, number, (float *)scratch);
    else
        run<uint16_t>(call, number, (float *)scratch);
}

size_t scratch_bytes(const clvp_fast_paged_prefill *call) {
    const int64_t longest = longest_sequence(call->cu_seqlens, call->num_sequences, call->rows);
    const int64_t queries = longest < QUERIES ? longest : QUERIES, channels = call->head_dim;
    return sizeof(float) * (call->dtype == CLVP_FAST_FLOAT32
                                ? AttentionScratch<float>(queries, longest, channels).size
                                : AttentionScratch<uint16_t>(queries, longest, channels).size);
}

}  // namespace

const Kernel<clvp_fast_paged_prefill> CLVP_FAST_OF(paged_prefill, CLVP_FAST_ISA) = {items, scratch_bytes, run_any};

}  // namespace clvp_fast
