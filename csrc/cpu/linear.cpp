/* Linear layers for the few rows of a decode step, on a CPU: dot products of rows of x with rows of the weights as they
 * lie in memory, which is read once. A sum's order depends only on the number of columns, so that a row has the
 * same bits whatever rows are computed beside it. Compiled once for each instruction set, as log_mel.cpp is. */
#include <string.h>

#include "dispatch.h"
#include "linear_items.h"
#include "products.h"

namespace clvp_fast {
namespace {

/* A tile of sums has as many rows and columns as there are registers for, and few enough rows for a tile of x to stay
 * in the first-level cache. */
template <class Products>
struct Tile {
    static constexpr bool PAIRS = std::is_same_v<typename Products::Stored, uint16_t>;
    static constexpr int ROWS = PAIRS ? 8 : 4, COLUMNS = PAIRS ? 3 : LANES == 16 ? 6 : 2, SUMS = ROWS * COLUMNS;
};

/* Rows of weights that will be wanted soon, `stride` bytes apart. They are fetched into the second-level cache, which
 * waits for more of them at a time than the first. */
struct Ahead {
    const char *first;
    int64_t stride;
};

/* to[row][column] of a tile: x is packed, weights are rows. AHEAD rows are fetched meanwhile. */
template <class Products, int AHEAD, class Weight>
CLVP_FAST_INLINE void multiply_tile(const typename Products::Stored *x,
                                    const Weight *const (&weights)[Tile<Products>::COLUMNS], const Ahead &ahead,
                                    int64_t columns, float (&to)[Tile<Products>::SUMS]) {
    constexpr int COLUMNS = Tile<Products>::COLUMNS, COUNT = Products::COUNT, WHOLE = Tile<Products>::SUMS / LANES;
    Floats sums[Tile<Products>::SUMS] = {};
    for (int64_t k = 0; k < columns; k += COUNT, x += Tile<Products>::ROWS * COUNT) {
        typename Products::Factors weight[COLUMNS];
        unroll<COLUMNS>([&](auto j) CLVP_FAST_INLINED { weight[j] = Products::load(weights[j] + k); });
        unroll<AHEAD>([&](auto j) CLVP_FAST_INLINED {
            __builtin_prefetch(ahead.first + j * ahead.stride + k * (int64_t)sizeof(Weight), 0, 2);
        });
        unroll<Tile<Products>::ROWS>([&](auto i) CLVP_FAST_INLINED {
            const typename Products::Factors row = Products::load(x + i * COUNT);
            unroll<COLUMNS>([&](auto j) CLVP_FAST_INLINED {
                sums[i * COLUMNS + j] = Products::dot(sums[i * COLUMNS + j], row, weight[j]);
            });
        });
    }
    unroll<WHOLE>([&](auto i) CLVP_FAST_INLINED { store_floats(to + i * LANES, fold<LANES>(sums + i * LANES)); });
    if constexpr (Tile<Products>::SUMS % LANES)
        store_floats(to + WHOLE * LANES, fold<LANES / 2>(sums + WHOLE * LANES), LANES / 2);
}

/* The most rows of an item: so few that a second-level cache keeps them while they meet all weights. */
int64_t item_rows(const clvp_fast_linear *call) {
    const size_t size = call->dtype == CLVP_FAST_FLOAT32 ? sizeof(float) : sizeof(ProductsOf<uint16_t>::Stored);
    const int64_t rows = (512 << 10) / (call->in_features * (int64_t)size) / 8 * 8;
    return rows < 8 ? 8 : rows < ITEM_ROWS ? rows : ITEM_ROWS;
}

int64_t linear_items(const clvp_fast_linear *call) { return items_of(call, item_rows(call)); }

/* Rows of x by tiles: [tile][vector of columns][row], zeros for rows that there are not. */
template <class In>
void pack_rows(const clvp_fast_linear *call, int64_t first_row, int64_t end_row, typename ProductsOf<In>::Stored *to) {
    using Products = ProductsOf<In>;
    for (int64_t first = first_row; first < end_row; first += Tile<Products>::ROWS)
        for (int64_t k = 0; k < call->in_features; k += Products::COUNT)
            for (int64_t row = first; row < first + Tile<Products>::ROWS; ++row, to += Products::COUNT) {
                typename Products::Factors factors = {};
                if (row < call->rows) factors = Products::load((const In *)call->x + row * call->x_stride + k);
                memcpy(to, &factors, sizeof factors);
            }
}

/* A thread's scratch memory: sums, and the rows of x that it packed last; other threads' copies are in their caches. */
struct Scratch {
    int64_t packed_end; /* one past the last of these rows */
    alignas(64) float sums[ITEM_ROWS * ITEM_COLUMNS];
    alignas(64) float x[]; /* room for a whole tile of any kind, in float32 */
};

size_t scratch_bytes(const clvp_fast_linear *call) {
    const int64_t most = item_rows(call), rows = call->rows < most ? (call->rows + 7) / 8 * 8 : most;
    return sizeof(Scratch) + rows * call->in_features * sizeof(float);
}

template <class In, class Weight>
void run(const clvp_fast_linear *call, const Item &item, Scratch *scratch) {
    using Products = ProductsOf<In>;
    using Stored = typename Products::Stored;
    constexpr int COLUMNS = Tile<Products>::COLUMNS, ROWS = Tile<Products>::ROWS;
    const int64_t columns = call->in_features, stride = call->weight_stride * (int64_t)sizeof(Weight);
    const int64_t first = item.first, count = item.count, end_row = item.first_row + item.rows;
    const int64_t tiles = (item.rows + ROWS - 1) / ROWS;
    /* The tiles share out the fetching of the weights that come next, so that memory is read all the time. */
    const int64_t share = (COLUMNS + tiles - 1) / tiles;
    float *const sums = scratch->sums; /* [ITEM_ROWS][ITEM_COLUMNS] */
    if (scratch->packed_end != end_row) {
        scratch->packed_end = end_row;
        pack_rows<In>(call, item.first_row, end_row, (Stored *)scratch->x);
    }

    for (int64_t n = 0; n < count; n += COLUMNS) {
        const Weight *weights[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j)
            weights[j] =
                (const Weight *)call->weight + (first + (n + j < count ? n + j : count - 1)) * call->weight_stride;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            float products[Tile<Products>::SUMS];
            const Stored *const x = (const Stored *)scratch->x + tile * ROWS * columns;
            const int64_t fetched = tile * share, left = COLUMNS - fetched;
            const Ahead next = {(const char *)weights[0] + (COLUMNS + fetched) * stride, stride};
            const int64_t wanted = left < 0 ? 0 : left < share ? left : share;
            unroll<COLUMNS + 1>([&](auto ahead) CLVP_FAST_INLINED {
                if (ahead == wanted) multiply_tile<Products, ahead>(x, weights, next, columns, products);
            });
            for (int row = 0; row < ROWS; ++row)
                memcpy(sums + (tile * ROWS + row) * ITEM_COLUMNS + n, products + row * COLUMNS,
                       COLUMNS * sizeof(float));
        }
    }
    finish_item<In>(call, item, sums);
}

void run_any(const clvp_fast_linear *call, int64_t number, void *scratch) {
    with_types(call, [&](auto in, auto weight) {
        run<decltype(in), decltype(weight)>(call, Item(call, number, item_rows(call)), (Scratch *)scratch);
    });
}

}  // namespace

const Kernel<clvp_fast_linear> CLVP_FAST_OF(linear, CLVP_FAST_ISA) = {linear_items, scratch_bytes, run_any};

}  // namespace clvp_fast
