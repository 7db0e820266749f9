/* The items of work of both kernels of linear layers, and the way from sums to results: scale, bias, activation,
 * residual and rounding. */
#pragma once

#include <string.h>

#include "../clvp_fast.h"
#include "floats.h"

namespace clvp_fast {
namespace {

/* The columns and rows of one item, for which x stays in the second-level cache. */
constexpr int ITEM_COLUMNS = 48, ITEM_ROWS = 128;

inline int64_t groups_of(const clvp_fast_linear *call) {
    return (call->out_features + ITEM_COLUMNS - 1) / ITEM_COLUMNS;
}

inline int64_t items(const clvp_fast_linear *call) {
    return groups_of(call) * ((call->rows + ITEM_ROWS - 1) / ITEM_ROWS);
}

/* The place of an item: `count` columns from `first` on, `rows` rows from `first_row` on. */
struct Item {
    int64_t first, count, first_row, rows;
    Item(const clvp_fast_linear *call, int64_t number)
        : first(number % groups_of(call) * ITEM_COLUMNS),
          count(call->out_features - first < ITEM_COLUMNS ? call->out_features - first : ITEM_COLUMNS),
          first_row(number / groups_of(call) * ITEM_ROWS),
          rows(call->rows - first_row < ITEM_ROWS ? call->rows - first_row : ITEM_ROWS) {}
};

/* Calls `run` with a value of the type of x and one of that of the weights. */
template <class Run>
void with_types(const clvp_fast_linear *call, Run run) {
    const bool int8 = call->weight_dtype == CLVP_FAST_INT8;
    if (call->dtype == CLVP_FAST_FLOAT32)
        int8 ? run(float(), int8_t()) : run(float(), float());
    else
        int8 ? run(uint16_t(), int8_t()) : run(uint16_t(), uint16_t());
}

/* Scales and biases of an item's columns as float32, 1 and 0 where there are none. */
template <class In>
struct Affine {
    float scale[ITEM_COLUMNS], bias[ITEM_COLUMNS];
    Affine(const clvp_fast_linear *call, int64_t first, int64_t count) {
        In given[ITEM_COLUMNS] = {};
        if (call->bias) memcpy(given, (const In *)call->bias + first, count * sizeof *given);
        for (int n = 0; n < ITEM_COLUMNS; n += LANES) store_floats(bias + n, load_floats(given + n));
        for (int n = 0; n < ITEM_COLUMNS; ++n) scale[n] = 1;
        if (call->scale) memcpy(scale, call->scale + first, count * sizeof *scale);
    }
};

/* Scale, bias, activation and residual of the sums of one row, which goes to places from `to` on, and the rounding. */
template <class In, class Out>
CLVP_FAST_INLINE void finish(const clvp_fast_linear *call, const float *sums, const Affine<In> &affine, int64_t to,
                             int64_t count) {
    Out *const out = (Out *)call->out + to;
    for (int64_t n = 0; n < count; n += LANES) {
        Floats y = load_floats(sums + n) * load_floats(affine.scale + n) + load_floats(affine.bias + n);
        if (call->activation == CLVP_FAST_GELU_TANH) y = gelu_tanh(y);
        const bool whole = count - n >= LANES; /* known sizes are copied without a call */
        if (call->residual && whole) {
            y += load_floats(call->residual + to + n);
        } else if (call->residual) {
            float given[LANES] = {};
            memcpy(given, call->residual + to + n, (count - n) * sizeof *given);
            y += load_floats(given);
        }
        if (whole)
            store_floats(out + n, y);
        else
            store_floats(out + n, y, count - n);
    }
}

/* The same of the sums `[rows][ITEM_COLUMNS]` of an item. */
template <class In>
void finish_item(const clvp_fast_linear *call, const Item &item, const float *sums) {
    const Affine<In> affine(call, item.first, item.count);
    for (int64_t row = 0; row < item.rows; ++row, sums += ITEM_COLUMNS) {
        const int64_t to = (item.first_row + row) * call->out_features + item.first;
        if (call->residual)
            finish<In, float>(call, sums, affine, to, item.count);
        else
            finish<In, In>(call, sums, affine, to, item.count);
    }
}

}  // namespace
}  // namespace clvp_fast
