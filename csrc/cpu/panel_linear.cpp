/* Linear layers over weights that were packed once, into panels. Compiled once for each instruction set, as log_mel.cpp
 * is. */
#include "dispatch.h"
#include "linear_items.h"
#include "panels.h"
#include "rows.h"

namespace clvp_fast {
namespace {

/* A thread's scratch memory: sums, and rows of x as they are multiplied. */
struct Scratch {
    int64_t prepared_end; /* one past the last row of x that was prepared */
    Sums sums;
    alignas(64) float x[];
};

template <class In>
int64_t prepared_stride(const clvp_fast_linear *call) {
    return call->in_features + GAP * UNIT_FACTORS<In>;
}

/* Few rows of what is multiplied are read where they lie. */
template <class In>
bool prepares(const clvp_fast_linear *call) {
    return !std::is_same_v<In, Factor<In>> || call->rows > ROWS;
}

size_t scratch_bytes(const clvp_fast_linear *call) {
    const int64_t rows = call->rows < ITEM_ROWS ? call->rows : ITEM_ROWS;
    return sizeof(Scratch) + rows * (call->in_features + GAP) * sizeof(float);
}

template <class In, class Weight>
void run(const clvp_fast_linear *call, const Item &item, Scratch *scratch) {
    const int64_t columns = call->in_features, first_row = item.first_row, rows = item.rows;

    const Factor<In> *x = (const Factor<In> *)((const In *)call->x + first_row * call->x_stride);
    int64_t stride = call->x_stride;
    if (prepares<In>(call)) {
        Factor<In> *const prepared = (Factor<In> *)scratch->x;
        stride = prepared_stride<In>(call);
        if (scratch->prepared_end != first_row + rows) {
            scratch->prepared_end = first_row + rows;
            for (int64_t row = 0; row < rows; ++row) {
                const In *const given = (const In *)call->x + (first_row + row) * call->x_stride;
                if constexpr (std::is_same_v<In, Factor<In>>)
                    memcpy(prepared + row * stride, given, columns * sizeof *given);
                else
                    widen(given, columns, prepared + row * stride);
            }
        }
        x = prepared;
    }

    const Weight *const weights = (const Weight *)call->panels + item.first * columns;
    multiply_panel<In>(weights, columns, {x, stride}, rows, scratch->sums);
    finish_item<In>(call, item, scratch->sums.totals);
}

void run_any(const clvp_fast_linear *call, int64_t number, void *scratch) {
    with_types(call, [&](auto in, auto weight) {
        run<decltype(in), decltype(weight)>(call, Item(call, number), (Scratch *)scratch);
    });
}

}  // namespace

const Kernel<clvp_fast_linear> CLVP_FAST_OF(panel_linear, CLVP_FAST_ISA) = {items, scratch_bytes, run_any};

}  // namespace clvp_fast
