/* Linear layers whose weights are packed in the call, for many rows. Bias, activation and another value are applied to
 * sums that are still in the first-level cache. */
#pragma once

#include "panels.h"

namespace clvp_fast {
namespace {

/* A layer as it lies in memory: weights `[outs][columns]` whose rows are `stride` apart, and a bias or null. */
struct Layer {
    const void *weight, *bias;
    int64_t stride, columns, outs;
    int64_t groups() const { return (outs + ITEM_COLUMNS - 1) / ITEM_COLUMNS; }
    /* Of a panel, and of all, in numbers. */
    int64_t panel_size() const { return ITEM_COLUMNS * columns; }
    int64_t size() const { return groups() * panel_size(); }
    int64_t panel_outs(int64_t first) const { return outs - first < ITEM_COLUMNS ? outs - first : ITEM_COLUMNS; }
};

/* Packs panel number `group` of a layer to its place behind `panels`. */
template <class In>
void pack_group(const Layer &layer, int64_t group, In *panels) {
    const int64_t first = group * ITEM_COLUMNS;
    const Matrix<const In> weights = {(const In *)layer.weight + first * layer.stride, layer.stride};
    pack_panel(weights, layer.panel_outs(first), layer.columns, panels + group * layer.panel_size());
}

/* out = activation(x W^T + b) + other, or times it, for `count` rows of x; `other` may be `out`. */
template <class In, int JOIN = ADDED, class Out>
void apply(int32_t activation, const Layer &layer, const In *panels, Matrix<const Factor<In>> x, int64_t count,
           Matrix<const Out> other, Matrix<Out> out, Sums &sums) {
    for (int64_t n = 0; n < layer.outs; n += ITEM_COLUMNS, panels += layer.panel_size()) {
        const int64_t outs = layer.panel_outs(n);
        const Affine affine(nullptr, layer.bias ? (const In *)layer.bias + n : nullptr, outs);
        for (int64_t m = 0; m < count; m += ITEM_ROWS) {
            const int64_t rows = count - m < ITEM_ROWS ? count - m : ITEM_ROWS;
            multiply_panel<In>(panels, layer.columns, {x.row(m), x.stride}, rows, sums);
            finish<JOIN, Out>(activation, sums.totals, rows, outs, affine,
                              {other.first ? other.row(m) + n : nullptr, other.stride}, {out.row(m) + n, out.stride});
        }
    }
}

}  // namespace
}  // namespace clvp_fast
