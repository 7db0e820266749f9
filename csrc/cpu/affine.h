/* What is done to the sums of a linear layer: scale, bias, activation, residual and rounding. */
#pragma once

#include <string.h>

#include "../clvp_fast.h"
#include "floats.h"

namespace clvp_fast {
namespace {

/* Columns that an item of work has. */
constexpr int ITEM_COLUMNS = 48;

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

}  // namespace
}  // namespace clvp_fast
