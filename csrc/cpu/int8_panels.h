/* The product of rows of x and weights, both of 8 bits, over weights that are packed into panels: ITEM_COLUMNS rows of
 * weights, four columns of each side by side. The sums of 32 bits are exact, so that no order of them changes a bit.
 *
 * Panels have weights with 128 added, from 0 to 255: the instructions that multiply bytes take one factor without a
 * sign. So a sum is too large by 128 times that of the row of x. */
#pragma once

#include <string.h>

#include "fetch.h"
#include "int8_products.h"
#include "sums.h"

namespace clvp_fast {
namespace {

/* Columns that lie side by side, and what is added to their weights. */
constexpr int QUAD = 4, ADDED_TO_WEIGHTS = 128;
/* The bytes of four columns of a panel. */
constexpr int UNIT = ITEM_COLUMNS * QUAD;

CLVP_FAST_INLINE Integers load_integers(const void *from) {
    Integers loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

/* Columns of a chain: its part of a panel stays in the first-level cache while the tiles of all rows read it. */
constexpr int64_t BLOCK = 256;
/* For the sums of a whole panel and so many rows of x there are registers. */
constexpr int WHOLE_ROWS = 1;

/* totals[i][...] += x W^T for some columns of x, R rows of it, and as many rows of weights as V vectors have lanes. */
template <int R, int V, int LINES>
CLVP_FAST_INLINE void tile(const uint8_t *weights, const Stored *const *rows, int64_t columns, bool first, Fetch &fetch,
                           int32_t *totals) {
    Integers sums[R][V] = {};
    for (int64_t k = 0; k < columns; k += QUAD, weights += UNIT) {
        fetch_some<LINES, UNIT>(weights, fetch);
        unroll<V / VECTORS>([&](auto group) CLVP_FAST_INLINED {
            constexpr int FIRST = group * VECTORS;
            unroll<STEPS>([&](auto step) CLVP_FAST_INLINED {
                Integers some[VECTORS];
                unroll<VECTORS>([&](auto j) CLVP_FAST_INLINED {
                    some[j] = factors(load_integers(weights + (FIRST + j) * LANES * QUAD), step);
                });
                unroll<R>([&](auto i) CLVP_FAST_INLINED {
                    const Stored *const x = rows[i] + k + step * 2;
                    unroll<VECTORS>(
                        [&](auto j) CLVP_FAST_INLINED { sums[i][FIRST + j] = dot(sums[i][FIRST + j], x, some[j]); });
                });
            });
        });
    }
    unroll<R * V>([&](auto n) CLVP_FAST_INLINED {
        int32_t *const to = totals + n / V * ITEM_COLUMNS + n % V * LANES;
        const Integers sum = first ? sums[n / V][n % V] : load_integers(to) + sums[n / V][n % V];
        memcpy(to, &sum, sizeof sum);
    });
}

/* Counts the tiles of `count` rows of x and a panel. */
inline int64_t tiles(int64_t count) {
    return count <= WHOLE_ROWS ? 1 : (count + ROWS - 1) / ROWS * (ITEM_COLUMNS / (VECTORS * LANES));
}

/* The same for any number of rows and all rows of weights of a panel. */
template <int LINES>
void multiply(const uint8_t *weights, Matrix<const Stored> x, int64_t count, int64_t columns, bool first, Fetch fetch,
              int32_t *totals) {
    constexpr int COLUMNS = VECTORS * LANES;
    for (int64_t m = 0; m < count; m += ROWS) {
        const Stored *rows[ROWS];
        for (int i = 0; i < ROWS; ++i) rows[i] = x.row(m + i < count ? m + i : count - 1);
        const int64_t left = count - m < ROWS ? count - m : ROWS;
        int32_t *const to = totals + m * ITEM_COLUMNS;
        if (LINES == ALL && count <= WHOLE_ROWS) {
            tile<1, ITEM_COLUMNS / LANES, ALL>(weights, rows, columns, first, fetch, to);
            continue;
        }
        for (int n = 0; n < ITEM_COLUMNS; n += COLUMNS)
            unroll<ROWS>([&](auto i) CLVP_FAST_INLINED {
                if (i + 1 == left) tile<i + 1, VECTORS, LINES>(weights + n * QUAD, rows, columns, first, fetch, to + n);
            });
    }
}

/* totals[i][...] = x W^T for up to ITEM_ROWS rows of x and the rows of weights of a panel. */
inline void multiply_panel(const uint8_t *weights, int64_t columns, Matrix<const Stored> x, int64_t rows,
                           int32_t *totals) {
    for (int64_t k = 0; k < columns; k += BLOCK) {
        const int64_t some = columns - k < BLOCK ? columns - k : BLOCK, size = some * ITEM_COLUMNS;
        const Fetch fetch = {(const char *)(weights + size), UNIT / tiles(rows)};
        const auto chain = [&](auto lines) {
            multiply<lines>(weights, {x.first + k, x.stride}, rows, some, k == 0, fetch, totals);
        };
        if (tiles(rows) == 1)
            chain(Index<ALL>());
        else if (tiles(rows) == 2)
            chain(Index<2>());
        else
            chain(Index<1>());
        weights += size;
    }
}

}  // namespace
}  // namespace clvp_fast
