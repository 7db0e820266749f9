/* Random and hostile prefills on every instruction set: every array is an allocation of exactly its size. A call that
 * must be refused is, and leaves the result as it was; any other stores keys and values of its sequences and nothing
 * else, and gives what sums in float64 are, each sequence with the same bits as alone. */
#include <math.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "matrix.h"

namespace {

void spoil(clvp_fast_paged_prefill &call) {
    switch (draw(0, 12)) {
        case 0: call.q = nullptr; break;
        case 1: call.v = nullptr; break;
        case 2: call.k_pages = nullptr; break;
        case 3: call.out = nullptr; break;
        case 4: call.cu_seqlens = nullptr; break;
        case 5: call.k = (const char *)call.k + 1; break;
        case 6: call.v_pages = (char *)call.v_pages + 1; break;
        case 7: call.block_table = (const int32_t *)((const char *)call.block_table + 2); break;
        case 8: call.head_dim = draw(0, 1) ? 8 : call.head_dim + 4; break;
        case 9: call.page_size = draw(0, 1) ? 0 : 1025; break;
        case 10: call.rows = draw(0, 1) ? -1 : INT64_MAX; break;
        case 11: call.max_pages = draw(0, 1) ? 0 : INT32_MAX; break;
        default: call.dtype = draw(0, 1) ? CLVP_FAST_FLOAT16 : 77;
    }
}

/* The sequences of a batch, some without rows, and now and then with bounds that make no sense. */
struct Batch {
    int64_t heads = draw(1, 3), dim = 16 * draw(1, 8), page_size = draw(1, 40), max_pages = draw(1, 5), sequences;
    int64_t rows = draw(0, 3), num_pages;
    std::vector<int32_t> bounds, table;
    Batch() : sequences(draw(1, 4)) {
        for (int64_t i = 0; i < sequences; ++i) {
            bounds.push_back(rows);
            rows += draw(0, 2) ? draw(0, 40) : draw(0, 1) ? 0 : draw(120, 140);
        }
        bounds.push_back(rows);
        rows += draw(0, 3); /* of no sequence */
        const int64_t senseless[] = {draw(-50, rows + 50), INT32_MIN, INT32_MAX};
        if (!draw(0, 5)) bounds[draw(0, sequences)] = senseless[draw(0, 2)];
        num_pages = sequences * max_pages + draw(0, 3);
        std::vector<int32_t> pages(num_pages);
        std::iota(pages.begin(), pages.end(), 0);
        std::shuffle(pages.begin(), pages.end(), engine);
        for (int64_t i = 0; i < sequences * max_pages; ++i)
            table.push_back(draw(0, 20) ? pages[i] : draw(0, 1) ? -1 : (int32_t)num_pages);
    }
    /* Calls body(sequence, first row, one past the last) for those that the interface does not leave out. */
    template <class Body>
    void each(const Body &body) const {
        int64_t behind = 0;
        for (int64_t i = 0; i < sequences; ++i)
            if (bounds[i] >= behind && bounds[i] < bounds[i + 1] && bounds[i + 1] <= rows)
                body(i, bounds[i], behind = bounds[i + 1]);
    }
    /* Where a place of a sequence lies, counted in tokens of all pages, or -1. */
    int64_t slot(int64_t sequence, int64_t place) const {
        const int64_t page = place / page_size < max_pages ? table[sequence * max_pages + place / page_size] : -1;
        return page >= 0 && page < num_pages ? page * page_size + place % page_size : -1;
    }
};

bool is_near(double got, double expected, double room) { return fabs(got - expected) <= room * (1 + fabs(expected)); }

/* Tells whether results of a query, with its keys `start` to `row`, are near those of sums in float64. */
bool right(const Matrix &q, const Matrix &k, const Matrix &v, const Matrix &out, int64_t heads, int64_t start,
           int64_t row, int64_t head, float scale, double room) {
    std::vector<double> weights(row - start + 1);
    double sum = 0;
    for (size_t t = 0; t < weights.size(); ++t) {
        double score = 0;
        for (int64_t c = 0; c < q.columns; ++c)
            score += q.at(row * heads + head, c) * k.at((start + t) * heads + head, c);
        sum += weights[t] = exp(score * scale);
    }
    for (int64_t c = 0; c < q.columns; ++c) {
        double mixed = 0;
        for (size_t t = 0; t < weights.size(); ++t) mixed += weights[t] / sum * v.at((start + t) * heads + head, c);
        if (!is_near(out.at(row * heads + head, c), mixed, room)) return false;
    }
    return true;
}

bool one_case() {
    const Batch batch;
    const int32_t dtype = draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16;
    const int64_t heads = batch.heads, dim = batch.dim, rows = batch.rows * heads;
    const Matrix q(rows, dim, dim + draw(0, 3), dtype), k(rows, dim, dim, dtype), v(rows, dim, dim, dtype);
    const Matrix k_pages(batch.num_pages * batch.page_size * heads, dim, dim, dtype);
    const Matrix v_pages(batch.num_pages * batch.page_size * heads, dim, dim, dtype);
    const Matrix out(rows, dim, dim, dtype), alone(rows, dim, dim, dtype);
    clvp_fast_paged_prefill call = {};
    call.q = q.first(), call.k = k.first(), call.v = v.first(), call.out = out.first();
    call.k_pages = k_pages.first(), call.v_pages = v_pages.first();
    call.cu_seqlens = batch.bounds.data(), call.block_table = batch.table.data();
    call.q_strides[0] = heads * q.stride, call.q_strides[1] = q.stride;
    call.k_strides[0] = call.v_strides[0] = heads * dim, call.k_strides[1] = call.v_strides[1] = dim;
    call.page_strides[2] = dim, call.page_strides[1] = heads * dim;
    call.page_strides[0] = batch.page_size * heads * dim;
    call.block_table_stride = batch.max_pages, call.rows = batch.rows, call.num_sequences = batch.sequences;
    call.num_pages = batch.num_pages, call.num_heads = heads, call.head_dim = dim, call.page_size = batch.page_size;
    call.max_pages = batch.max_pages, call.dtype = dtype, call.scale = 1 / sqrtf((float)dim);
    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    const int64_t row_bytes = dim * q.size(), page_bytes = k_pages.rows * row_bytes;
    const std::vector<unsigned char> before(out.first(), out.first() + rows * row_bytes);
    if (batch.rows && draw(1, 6) == 1) {
        clvp_fast_paged_prefill spoilt = call;
        spoil(spoilt);
        return clvp_fast_paged_prefill_cpu(&spoilt, threads, isa) < 0 &&
               std::equal(before.begin(), before.end(), out.first());
    }
    std::vector<unsigned char> expected_k(k_pages.first(), k_pages.first() + page_bytes);
    std::vector<unsigned char> expected_v(v_pages.first(), v_pages.first() + page_bytes), expected_out = before;
    const int code = clvp_fast_paged_prefill_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;

    bool good = true;
    clvp_fast_paged_prefill single = call;
    single.out = alone.first(), single.num_sequences = 1;
    batch.each([&](int64_t sequence, int64_t start, int64_t end) {
        for (int64_t row = start; row < end; ++row) {
            const int64_t slot = batch.slot(sequence, row - start), bytes = heads * row_bytes;
            if (slot >= 0) memcpy(&expected_k[slot * bytes], k.first() + row * bytes, bytes);
            if (slot >= 0) memcpy(&expected_v[slot * bytes], v.first() + row * bytes, bytes);
            memcpy(&expected_out[row * bytes], out.first() + row * bytes, bytes);
        }
        for (int i = 0; i < 8; ++i)
            good = good && right(q, k, v, out, heads, start, draw(start, end - 1), draw(0, heads - 1), call.scale,
                                 dtype == CLVP_FAST_FLOAT32 ? 1e-5 : 1e-2);
        const int32_t bounds[] = {(int32_t)start, (int32_t)end};
        single.cu_seqlens = bounds, single.block_table = call.block_table + sequence * batch.max_pages;
        good = good && clvp_fast_paged_prefill_cpu(&single, 1, isa) == CLVP_FAST_OK;
        const int64_t at = start * heads * row_bytes, bytes = (end - start) * heads * row_bytes;
        good = good && !memcmp(alone.first() + at, out.first() + at, bytes);
    });
    /* All else is as it was: rows of no sequence, and what lies in no slot of one. */
    return good && std::equal(expected_out.begin(), expected_out.end(), out.first()) &&
           std::equal(expected_k.begin(), expected_k.end(), k_pages.first()) &&
           std::equal(expected_v.begin(), expected_v.end(), v_pages.first());
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_prefill(int cases, unsigned seed) {
    return run_cases("prefill", clvp_fast_paged_prefill_cpu, one_case, cases, seed);
}
