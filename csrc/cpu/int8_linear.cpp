/* Linear layers over int8 weights in panels whose rows of x are rounded to 8 bits, and multiplied in integers. Compiled
 * once for each instruction set, as log_mel.cpp is. */
#include "dispatch.h"
#include "int8_panels.h"
#include "linear_items.h"

namespace clvp_fast {
namespace {

/* Rows of x lie so much further apart than they are long, in bytes: strides of 4 KB would fall on one set of the
 * first-level cache. */
constexpr int64_t GAP = 64;

/* A thread's scratch memory: sums, and rows of x as they are multiplied. */
struct Scratch {
    int64_t prepared_end; /* one past the last row of x that was prepared */
    Rounded rows[ITEM_ROWS];
    alignas(64) int32_t totals[ITEM_ROWS * ITEM_COLUMNS];
    alignas(64) float sums[ITEM_ROWS * ITEM_COLUMNS];
    alignas(64) Stored x[];
};

int64_t prepared_stride(const clvp_fast_linear *call) { return call->in_features + GAP / sizeof(Stored); }

size_t scratch_bytes(const clvp_fast_linear *call) {
    const int64_t rows = call->rows < ITEM_ROWS ? call->rows : ITEM_ROWS;
    return sizeof(Scratch) + rows * prepared_stride(call) * sizeof(Stored);
}

template <class In>
void run(const clvp_fast_linear *call, const Item &item, Scratch *scratch) {
    const int64_t columns = call->in_features, stride = prepared_stride(call), end = item.first_row + item.rows;
    if (scratch->prepared_end != end) {
        scratch->prepared_end = end;
        for (int64_t row = 0; row < item.rows; ++row) {
            const In *const given = (const In *)call->x + (item.first_row + row) * call->x_stride;
            scratch->rows[row] = round_row(given, columns, scratch->x + row * stride);
        }
    }
    const uint8_t *const weights = (const uint8_t *)call->panels + item.first * columns;
    multiply_panel(weights, columns, {scratch->x, stride}, item.rows, scratch->totals);
    for (int64_t row = 0; row < item.rows; ++row) {
        const Rounded rounded = scratch->rows[row];
        for (int64_t n = row * ITEM_COLUMNS; n < (row + 1) * ITEM_COLUMNS; n += LANES) {
            const Integers totals = load_integers(scratch->totals + n) - ADDED_TO_WEIGHTS * rounded.total;
            store_floats(scratch->sums + n, __builtin_convertvector(totals, Floats) * rounded.step);
        }
    }
    finish_item<In>(call, item, scratch->sums);
}

void run_any(const clvp_fast_linear *call, int64_t number, void *scratch) {
    const Item item(call, number);
    if (call->dtype == CLVP_FAST_FLOAT32)
        run<float>(call, item, (Scratch *)scratch);
    else
        run<uint16_t>(call, item, (Scratch *)scratch);
}

}  // namespace

const Kernel<clvp_fast_linear> CLVP_FAST_OF(int8_linear, CLVP_FAST_ISA) = {items, scratch_bytes, run_any};

}  // namespace clvp_fast
