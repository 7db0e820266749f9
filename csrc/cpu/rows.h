/* Rows of x as they are multiplied: widened, or normed. */
#pragma once

#include "norms.h"
#include "products.h"

namespace clvp_fast {
namespace {

/* Rows of values in scratch memory lie so much further apart than they are long, in 32 bits: strides of 4 KB would fall
 * on one set of the first-level cache. */
constexpr int64_t GAP = 16;

/* A row of a multiple of 32 columns, as it is multiplied. */
template <class In>
void widen(const In *row, int64_t columns, Factor<In> *to) {
    for (int64_t k = 0; k < columns; k += LANES) store_floats(to + k, load_floats(row + k));
}

/* The parameters of a norm: its weight, and a bias or null. */
template <class In>
struct Norm {
    const In *weight, *bias;
    float eps;
};

/* The layer norm of such a row, as it is multiplied: statistics in float32, rounded once. */
template <class In>
void layer_norm(const In *row, const Norm<In> &norm, int64_t columns, Factor<In> *to) {
    const float mean = mean_of(row, columns), factor = layer_factor(row, columns, mean, norm.eps);
    for (int64_t k = 0; k < columns; k += LANES) {
        Floats x = (load_floats(row + k) - mean) * factor * load_floats(norm.weight + k);
        if (norm.bias) x += load_floats(norm.bias + k);
        store_floats(to + k, x);
    }
}

}  // namespace
}  // namespace clvp_fast
