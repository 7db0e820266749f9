/* Statistics of a row, in float32; their bits depend on that row alone. */
#pragma once

#include <math.h>

#include "floats.h"

namespace clvp_fast {
namespace {

CLVP_FAST_INLINE float total(Floats x) {
    float lanes[LANES];
    store_floats(lanes, x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* The sum of value(column, lanes) over all columns; the last lanes may be less than a vector has. */
template <class Value>
CLVP_FAST_INLINE float sum_over(int64_t columns, const Value &value) {
    constexpr int AT_A_TIME = 4; /* sums that do not wait for each other */
    Floats sums[AT_A_TIME] = {};
    int64_t k = 0;
    for (; k + AT_A_TIME * LANES <= columns; k += AT_A_TIME * LANES)
        unroll<AT_A_TIME>([&](auto i) CLVP_FAST_INLINED { sums[i] += value(k + i * LANES, LANES); });
    for (; k + LANES <= columns; k += LANES) sums[0] += value(k, LANES);
    if (k < columns) {
        float rest[LANES] = {};
        store_floats(rest, value(k, columns - k), columns - k);
        sums[1] += load_floats(rest);
    }
    return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* The sum of value(x) over the numbers of a row. */
template <class In, class Value>
CLVP_FAST_INLINE float sum_of(const In *row, int64_t columns, const Value &value) {
    return sum_over(columns,
                    [&](int64_t k, int64_t count) CLVP_FAST_INLINED { return value(load_some(row + k, count)); });
}

template <class In>
float mean_of(const In *row, int64_t columns) {
    return sum_of(row, columns, [](Floats x) CLVP_FAST_INLINED { return x; }) / columns;
}

/* 1 / sqrt(variance + eps). */
template <class In>
float layer_factor(const In *row, int64_t columns, float mean, float eps) {
    const auto squared = [&](Floats x) CLVP_FAST_INLINED { return (x - mean) * (x - mean); };
    return 1 / sqrtf(sum_of(row, columns, squared) / columns + eps);
}

}  // namespace
}  // namespace clvp_fast
