/* The way from sums of products to results: scale, bias, activation, another value, and the rounding. */
#pragma once

#include <string.h>

#include "../clvp_fast.h"
#include "floats.h"

namespace clvp_fast {
namespace {

/* The columns and rows of an item of work: its rows of x stay in the second-level cache. */
constexpr int ITEM_COLUMNS = 48, ITEM_ROWS = 128;

/* Where rows begin, and how far apart. */
template <class T>
struct Matrix {
    T *first;
    int64_t stride;
    T *row(int64_t i) const { return first + i * stride; }
};

/* Scales and biases of some columns as float32, 1 and 0 where there are none. */
struct Affine {
    float scale[ITEM_COLUMNS], bias[ITEM_COLUMNS];
    template <class In>
    Affine(const float *scales, const In *biases, int64_t count) {
        In given[ITEM_COLUMNS] = {};
        if (biases) memcpy(given, biases, count * sizeof *given);
        for (int n = 0; n < ITEM_COLUMNS; n += LANES) store_floats(bias + n, load_floats(given + n));
        for (int n = 0; n < ITEM_COLUMNS; ++n) scale[n] = 1;
        if (scales) memcpy(scale, scales, count * sizeof *scale);
    }
};

/* The operation that joins an activation's result with another value. */
enum Join { ADDED, MULTIPLIED };

template <int ACTIVATION, class Out>
CLVP_FAST_INLINE Floats activate(Floats x) {
    if constexpr (ACTIVATION == CLVP_FAST_GELU_TANH) return gelu_tanh(x);
    if constexpr (ACTIVATION == CLVP_FAST_GELU) return std::is_same_v<Out, float> ? gelu(x) : gelu_for_half(x);
    return x;
}

/* Finishes `count` columns of rows of sums, `[rows][ITEM_COLUMNS]`. `other`, which may be `out`, has no rows if its
 * first is null. */
template <int ACTIVATION, int JOIN, class Out>
void finish(const float *sums, int64_t rows, int64_t count, const Affine &affine, Matrix<const Out> other,
            Matrix<Out> out) {
    const auto some = [&](const Out *joined, Out *to, int n, int64_t lanes) CLVP_FAST_INLINED {
        Floats y = load_floats(sums + n) * load_floats(affine.scale + n) + load_floats(affine.bias + n);
        y = activate<ACTIVATION, Out>(y);
        if (joined) {
            const Floats value = lanes == LANES ? load_floats(joined + n) : load_floats(joined + n, lanes);
            y = JOIN == MULTIPLIED ? y * value : y + value;
        }
        store_floats(to + n, y, lanes);
    };
    for (int64_t row = 0; row < rows; ++row, sums += ITEM_COLUMNS) {
        const Out *const joined = other.first ? other.row(row) : nullptr;
        for (int n = 0; n < count; n += LANES)
            if (count - n >= LANES)
                some(joined, out.row(row), n, LANES); /* known sizes are copied without a call */
            else
                some(joined, out.row(row), n, count - n);
    }
}

template <int JOIN = ADDED, class Out>
void finish(int32_t activation, const float *sums, int64_t rows, int64_t count, const Affine &affine,
            Matrix<const Out> other, Matrix<Out> out) {
    if (activation == CLVP_FAST_GELU)
        finish<CLVP_FAST_GELU, JOIN>(sums, rows, count, affine, other, out);
    else if (activation == CLVP_FAST_GELU_TANH)
        finish<CLVP_FAST_GELU_TANH, JOIN>(sums, rows, count, affine, other, out);
    else
        finish<CLVP_FAST_NO_ACTIVATION, JOIN>(sums, rows, count, affine, other, out);
}

}  // namespace
}  // namespace clvp_fast
