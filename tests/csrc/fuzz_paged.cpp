/* Random and hostile decode steps over pages on every instruction set: every array is an allocation of exactly its
 * size. A call that must be refused is, and leaves the result as it was; any other stores the new keys and values and
 * nothing else, and gives what sums in float64 are, each candidate with the same bits as alone. */
#include <math.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "matrix.h"

namespace {

void spoil(clvp_fast_paged_decode &call) {
    switch (draw(0, 13)) {
        case 0: call.q = nullptr; break;
        case 1: call.v_new = nullptr; break;
        case 2: call.k_pages = nullptr; break;
        case 3: call.out = nullptr; break;
        case 4: call.seq_lens = nullptr; break;
        case 5: call.q = (const char *)call.q + 1; break;
        case 6: call.v_pages = (char *)call.v_pages + 1; break;
        case 7: call.block_table = (const int32_t *)((const char *)call.block_table + 2); break;
        case 8: call.head_dim = draw(0, 1) ? 8 : call.head_dim + 4; break;
        case 9: call.page_size = draw(0, 1) ? 0 : 1025; break;
        case 10: call.num_candidates = draw(0, 1) ? -1 : INT64_MAX; break;
        case 11: call.max_pages = draw(0, 1) ? 0 : INT32_MAX; break;
        case 12: call.dtype = draw(0, 1) ? CLVP_FAST_FLOAT16 : 77; break;
        default: call.prefix_table = call.block_table, call.prefix_lens = nullptr;
    }
}

/* The inputs of a step, beside the pages themselves. */
struct Step {
    int64_t candidates = draw(1, 4), heads = draw(0, 4) ? draw(1, 3) : draw(4, 20), dim = 16 * draw(1, 8),
            page_size = draw(1, 7);
    int64_t max_pages = draw(1, 5), prefixes = draw(0, 2), max_prefix_pages = draw(1, 4);
    int64_t num_pages = candidates * max_pages + prefixes * max_prefix_pages + draw(0, 3);
    std::vector<int32_t> pages, table, lens, prefix_table, prefix_lens, prefix_index;

    /* A page of no other candidate, or now and then one that there is not. */
    int32_t next_page() {
        const int32_t page = pages.back();
        pages.pop_back();
        return draw(0, 20) ? page : draw(0, 1) ? -1 : (int32_t)num_pages;
    }
    Step() : pages(num_pages) {
        std::iota(pages.begin(), pages.end(), 0);
        std::shuffle(pages.begin(), pages.end(), engine);
        for (int64_t i = 0; i < candidates * max_pages; ++i) table.push_back(next_page());
        for (int64_t i = 0; i < prefixes * max_prefix_pages; ++i) prefix_table.push_back(next_page());
        for (int64_t i = 0; i < prefixes; ++i) prefix_lens.push_back(draw(0, max_prefix_pages * page_size));
        for (int64_t i = 0; i < candidates; ++i) {
            lens.push_back(draw(0, 5) ? draw(0, max_pages * page_size) : -1);
            prefix_index.push_back(draw(-1, prefixes));
        }
    }
    /* Where the first `tokens` of a row of pages lie, counted in tokens of all pages; those that lie nowhere are left
     * out. */
    void find(const int32_t *row, int64_t row_pages, int64_t tokens, std::vector<int64_t> &places) const {
        for (int64_t token = 0; token < tokens && token < row_pages * page_size; ++token) {
            const int64_t page = row[token / page_size];
            if (page >= 0 && page < num_pages) places.push_back(page * page_size + token % page_size);
        }
    }
    std::vector<int64_t> places_of(int64_t n) const {
        std::vector<int64_t> places;
        if (lens[n] < 0) return places;
        const int64_t prefix = prefix_index[n];
        if (prefix >= 0 && prefix < prefixes)
            find(&prefix_table[prefix * max_prefix_pages], max_prefix_pages, prefix_lens[prefix], places);
        find(&table[n * max_pages], max_pages, lens[n] + 1, places);
        return places;
    }
};

bool one_case() {
    const Step step;
    const int32_t dtype = draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16;
    const int64_t heads = step.heads, dim = step.dim, rows = step.candidates * heads;
    const Matrix q(rows, dim, dim + draw(0, 3), dtype), k_new(rows, dim, dim, dtype), v_new(rows, dim, dim, dtype);
    const Matrix k(step.num_pages * step.page_size * heads, dim, dim, dtype);
    const Matrix v(step.num_pages * step.page_size * heads, dim, dim, dtype);
    const Matrix out(rows, dim, dim, dtype), alone(heads, dim, dim, dtype);
    clvp_fast_paged_decode call = {};
    call.q = q.first(), call.k_new = k_new.first(), call.v_new = v_new.first(), call.out = out.first();
    call.k_pages = k.first(), call.v_pages = v.first();
    call.block_table = step.table.data(), call.seq_lens = step.lens.data();
    if (step.prefixes) {
        call.prefix_table = step.prefix_table.data(), call.prefix_lens = step.prefix_lens.data();
        call.prefix_index = step.prefix_index.data(), call.max_prefix_pages = step.max_prefix_pages;
    }
    call.q_strides[0] = heads * q.stride, call.q_strides[1] = q.stride;
    call.k_new_strides[0] = call.v_new_strides[0] = heads * dim, call.k_new_strides[1] = call.v_new_strides[1] = dim;
    call.page_strides[2] = dim, call.page_strides[1] = heads * dim;
    call.page_strides[0] = step.page_size * heads * dim;
    call.block_table_stride = step.max_pages, call.prefix_table_stride = step.max_prefix_pages;
    call.num_candidates = step.candidates, call.num_pages = step.num_pages, call.num_prefixes = step.prefixes;
    call.num_heads = heads, call.head_dim = dim, call.page_size = step.page_size, call.max_pages = step.max_pages;
    call.dtype = dtype, call.scale = 1 / sqrtf((float)dim);
    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    if (draw(1, 6) == 1) {
        clvp_fast_paged_decode spoilt = call;
        spoil(spoilt);
        const std::vector<unsigned char> before(out.first(), out.first() + rows * dim * out.size());
        return clvp_fast_paged_decode_cpu(&spoilt, threads, isa) < 0 &&
               !memcmp(before.data(), out.first(), before.size());
    }
    const int64_t row_bytes = dim * k.size(), bytes = k.rows * row_bytes;
    std::vector<unsigned char> expected_k(k.first(), k.first() + bytes), expected_v(v.first(), v.first() + bytes);
    const int code = clvp_fast_paged_decode_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;

    for (int64_t n = 0; n < step.candidates; ++n) {
        const int64_t length = step.lens[n], slot = length / step.page_size;
        const int64_t page = length >= 0 && slot < step.max_pages ? step.table[n * step.max_pages + slot] : -1;
        if (page < 0 || page >= step.num_pages) continue;
        const int64_t to = (page * step.page_size + length % step.page_size) * heads * row_bytes;
        memcpy(&expected_k[to], k_new.first() + n * heads * row_bytes, heads * row_bytes);
        memcpy(&expected_v[to], v_new.first() + n * heads * row_bytes, heads * row_bytes);
    }
    if (memcmp(expected_k.data(), k.first(), bytes) || memcmp(expected_v.data(), v.first(), bytes)) return false;

    for (int64_t n = 0; n < step.candidates; ++n) {
        const std::vector<int64_t> places = step.places_of(n);
        for (int64_t head = 0; head < heads; ++head) {
            std::vector<double> weights(places.size());
            double sum = 0;
            for (size_t t = 0; t < places.size(); ++t) {
                double score = 0;
                for (int64_t c = 0; c < dim; ++c)
                    score += q.at(n * heads + head, c) * k.at(places[t] * heads + head, c);
                sum += weights[t] = exp(score * call.scale);
            }
            for (int64_t c = 0; c < dim; ++c) {
                double mixed = 0;
                for (size_t t = 0; t < places.size(); ++t)
                    mixed += weights[t] / sum * v.at(places[t] * heads + head, c);
                const double room = dtype == CLVP_FAST_FLOAT32 ? 1e-5 : 4e-3;
                if (!(fabs(out.at(n * heads + head, c) - mixed) <= room * (1 + fabs(mixed)))) return false;
            }
        }
    }
    const int64_t n = draw(0, step.candidates - 1), at = n * heads;
    call.q = q.first() + at * q.stride * q.size(), call.out = alone.first(), call.num_candidates = 1;
    call.k_new = k_new.first() + at * row_bytes, call.v_new = v_new.first() + at * row_bytes;
    call.block_table += n * step.max_pages, call.seq_lens += n;
    if (step.prefixes) call.prefix_index += n;
    if (clvp_fast_paged_decode_cpu(&call, 1, isa) != CLVP_FAST_OK) return false;
    return !memcmp(alone.first(), out.first() + at * row_bytes, heads * row_bytes);
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_paged(int cases, unsigned seed) {
    return run_cases("paged", clvp_fast_paged_decode_cpu, one_case, cases, seed);
}
