/* The items of work of both kernels of linear layers, and the results of an item's sums. */
#pragma once

#include "../clvp_fast.h"
#include "sums.h"

namespace clvp_fast {
namespace {

inline int64_t groups_of(const clvp_fast_linear *call) {
    return (call->out_features + ITEM_COLUMNS - 1) / ITEM_COLUMNS;
}

/* The number of items of up to `item_rows` rows each. */
inline int64_t items_of(const clvp_fast_linear *call, int64_t item_rows) {
    return groups_of(call) * ((call->rows + item_rows - 1) / item_rows);
}

inline int64_t items(const clvp_fast_linear *call) { return items_of(call, ITEM_ROWS); }

/* The place of an item: `count` columns from `first` on, `rows` rows from `first_row` on. */
struct Item {
    int64_t first, count, first_row, rows;
    Item(const clvp_fast_linear *call, int64_t number, int64_t item_rows = ITEM_ROWS)
        : first(number % groups_of(call) * ITEM_COLUMNS),
          count(call->out_features - first < ITEM_COLUMNS ? call->out_features - first : ITEM_COLUMNS),
          first_row(number / groups_of(call) * item_rows),
          rows(call->rows - first_row < item_rows ? call->rows - first_row : item_rows) {}
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

/* Finishes the sums `[rows][ITEM_COLUMNS]` of an item. A residual is float32 and gives the result its type. */
template <class In>
void finish_item(const clvp_fast_linear *call, const Item &item, const float *sums) {
    const Affine affine(call->scale ? call->scale + item.first : nullptr,
                        call->bias ? (const In *)call->bias + item.first : nullptr, item.count);
    const int64_t stride = call->out_features, at = item.first_row * stride + item.first;
    const auto write = [&](auto *out, auto *residual) {
        using Out = std::remove_pointer_t<decltype(out)>;
        finish(call->activation, sums, item.rows, item.count, affine, Matrix<const Out>{residual, stride},
               Matrix<Out>{out + at, stride});
    };
    if (call->residual)
        write((float *)call->out, call->residual + at);
    else
        write((In *)call->out, (const In *)nullptr);
}

}  // namespace
}  // namespace clvp_fast
