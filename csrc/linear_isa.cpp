/* Linear layers for the few rows of a decode step, on a CPU: dot products of rows of x with rows of the weights as they
 * lie in memory, which is read once. A sum's order depends on nothing but the number of columns, so that a row has the
 * same bits whatever rows are computed beside it. Compiled once for each instruction set, as log_mel_isa.cpp is. */
#include <string.h>

#include "floats.h"
#include "isa.h"

namespace clvp_fast {
namespace {

/* A tile of sums in registers. Their number is a multiple of LANES, see `fold`. */
constexpr int TILE_ROWS = 4;
constexpr int TILE_COLUMNS = LANES == 16 ? 4 : 2;
/* What one item computes: as many columns, and rows of which x stays in the second-level cache. */
constexpr int ITEM_COLUMNS = 48;
constexpr int ITEM_TILES = 32;

/* What products are made of: float32 from anything. */
struct Single {
    typedef Floats Unit;
    typedef float Stored;
    static constexpr int COUNT = LANES;
    template <class From>
    CLVP_FAST_INLINE Unit load(const From *from) {
        return load_floats(from);
    }
    CLVP_FAST_INLINE Floats dot(Floats sum, Unit a, Unit b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
/* Pairs of bfloat16, which hold whole numbers up to 256 exactly; their products are summed in float32. */
struct Pairs {
    typedef __m512bh Unit;
    typedef uint16_t Stored;
    static constexpr int COUNT = 2 * LANES;
    CLVP_FAST_INLINE Unit load(const uint16_t *from) { return (Unit)_mm512_loadu_si512(from); }
    CLVP_FAST_INLINE Unit load(const int8_t *from) {
        return _mm512_cvtne2ps_pbh((__m512)load_floats(from + LANES), (__m512)load_floats(from));
    }
    CLVP_FAST_INLINE Floats dot(Floats sum, Unit a, Unit b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
template <class In>
using ProductsOf = std::conditional_t<std::is_same_v<In, uint16_t>, Pairs, Single>;
#else
template <class In>
using ProductsOf = Single;
#endif

/* Sums over the lanes of each of COUNT vectors; COUNT is a multiple of LANES. */
template <int COUNT>
CLVP_FAST_INLINE void fold(const Floats *sums, float *to) {
    using Lane = std::make_integer_sequence<int, LANES>;
    unroll<COUNT / LANES>([&](auto group) CLVP_FAST_INLINED {
        Floats x[LANES];
        unroll<LANES>([&](auto i) CLVP_FAST_INLINED { x[i] = sums[group * LANES + i]; });
#pragma GCC unroll 4
        for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < half; ++i)
                x[i] =
                    interleave<float, 0>(x[i], x[i + half], Lane{}) + interleave<float, 1>(x[i], x[i + half], Lane{});
        store_floats(to + group * LANES, x[0]);
    });
}

/* Rows of weights that will be wanted soon, `stride` bytes apart. They are fetched into the second-level cache, which
 * waits for more of them at a time than the first. */
struct Ahead {
    const char *first;
    int64_t stride;
};

/* sums[row][column] of a tile: x is packed, weights are rows. AHEAD rows are fetched meanwhile. */
template <class Products, int AHEAD>
CLVP_FAST_INLINE void multiply(const typename Products::Stored *x,
                               const typename Products::Stored *const (&weights)[TILE_COLUMNS], const Ahead &ahead,
                               int64_t columns, float *to) {
    Floats sums[TILE_ROWS * TILE_COLUMNS] = {};
    for (int64_t k = 0; k < columns; k += Products::COUNT, x += TILE_ROWS * Products::COUNT) {
        typename Products::Unit weight[TILE_COLUMNS];
        unroll<TILE_COLUMNS>([&](auto j) CLVP_FAST_INLINED { weight[j] = Products::load(weights[j] + k); });
        unroll<AHEAD>([&](auto j) CLVP_FAST_INLINED {
            __builtin_prefetch(ahead.first + j * ahead.stride + k * (int64_t)sizeof(typename Products::Stored), 0, 2);
        });
        unroll<TILE_ROWS>([&](auto i) CLVP_FAST_INLINED {
            const typename Products::Unit row = Products::load(x + i * Products::COUNT);
            unroll<TILE_COLUMNS>([&](auto j) CLVP_FAST_INLINED {
                sums[i * TILE_COLUMNS + j] = Products::dot(sums[i * TILE_COLUMNS + j], row, weight[j]);
            });
        });
    }
    fold<TILE_ROWS * TILE_COLUMNS>(sums, to);
}

/* Scale, bias and activation of the sums of one row, and the rounding. */
template <class In>
CLVP_FAST_INLINE void finish(const clvp_fast_linear *call, const float *sums, int64_t row, int64_t first,
                             int64_t count) {
    In *const out = (In *)call->out + row * call->out_features + first;
    for (int64_t n = 0; n < count; n += LANES) {
        float scale[LANES] = {}, bias[LANES] = {};
        const int64_t lanes = count - n < LANES ? count - n : LANES;
        Floats y = load_floats(sums + n);
        if (call->scale) {
            memcpy(scale, call->scale + first + n, lanes * sizeof(float));
            y *= load_floats(scale);
        }
        if (call->bias) {
            In given[LANES] = {};
            memcpy(given, (const In *)call->bias + first + n, lanes * sizeof(In));
            store_floats(bias, load_floats(given));
            y += load_floats(bias);
        }
        if (call->activation == CLVP_FAST_GELU_TANH) y = gelu_tanh(y);
        store_floats(out + n, y, lanes);
    }
}

int64_t tiles_of(const clvp_fast_linear *call) { return (call->rows + TILE_ROWS - 1) / TILE_ROWS; }

/* x by tiles: [tile][unit of columns][row], zeros for rows that there are not. */
template <class In>
void pack(const clvp_fast_linear *call, void *packed) {
    using Products = ProductsOf<In>;
    typename Products::Stored *to = (typename Products::Stored *)packed;
    for (int64_t first = 0; first < call->rows; first += TILE_ROWS)
        for (int64_t k = 0; k < call->in_features; k += Products::COUNT)
            for (int64_t row = first; row < first + TILE_ROWS; ++row, to += Products::COUNT) {
                typename Products::Unit unit = {};
                if (row < call->rows) unit = Products::load((const In *)call->x + row * call->x_stride + k);
                memcpy(to, &unit, sizeof unit);
            }
}

template <class In, class Weight>
void run(const clvp_fast_linear *call, const void *packed, int64_t item, void *scratch) {
    using Products = ProductsOf<In>;
    using Stored = typename Products::Stored;
    constexpr bool STAGED = !std::is_same_v<Weight, Stored>;
    const int64_t columns = call->in_features, groups = (call->out_features + ITEM_COLUMNS - 1) / ITEM_COLUMNS;
    const int64_t first = item % groups * ITEM_COLUMNS, first_tile = item / groups * ITEM_TILES;
    const int64_t count = call->out_features - first < ITEM_COLUMNS ? call->out_features - first : ITEM_COLUMNS;
    const int64_t end_tile = first_tile + ITEM_TILES < tiles_of(call) ? first_tile + ITEM_TILES : tiles_of(call);
    const int64_t ahead = call->weight_stride * TILE_COLUMNS * (int64_t)sizeof(Weight);
    float *const sums = (float *)scratch; /* [rows of the item][ITEM_COLUMNS] */
    Stored *const staged = (Stored *)(sums + ITEM_TILES * TILE_ROWS * ITEM_COLUMNS);

    for (int64_t n = 0; n < count; n += TILE_COLUMNS) {
        const Stored *rows[TILE_COLUMNS];
        for (int j = 0; j < TILE_COLUMNS; ++j) {
            const int64_t column = first + (n + j < count ? n + j : count - 1);
            const Weight *const weight = (const Weight *)call->weight + column * call->weight_stride;
            if constexpr (STAGED) {
                for (int64_t k = 0; k < columns; k += Products::COUNT) {
                    const typename Products::Unit unit = Products::load(weight + k);
                    memcpy(staged + j * columns + k, &unit, sizeof unit);
                    __builtin_prefetch((const char *)(weight + k) + ahead, 0, 2);
                }
                rows[j] = staged + j * columns;
            } else {
                rows[j] = weight;
            }
        }
        /* The tiles share out the fetching of the next group's rows, so that memory is read all the time. */
        const int64_t tiles = end_tile - first_tile, share = STAGED ? 0 : (TILE_COLUMNS + tiles - 1) / tiles;
        for (int64_t tile = first_tile; tile < end_tile; ++tile) {
            float products[TILE_ROWS * TILE_COLUMNS];
            const Stored *const x = (const Stored *)packed + tile * TILE_ROWS * columns;
            const int64_t fetched = (tile - first_tile) * share, stride = call->weight_stride * (int64_t)sizeof(Weight);
            const Ahead next = {(const char *)rows[0] + (TILE_COLUMNS + fetched) * stride, stride};
            if (fetched >= TILE_COLUMNS || share == 0)
                multiply<Products, 0>(x, rows, next, columns, products);
            else if (share == 1)
                multiply<Products, 1>(x, rows, next, columns, products);
            else if (share == 2)
                multiply<Products, 2>(x, rows, next, columns, products);
            else
                multiply<Products, TILE_COLUMNS>(x, rows, next, columns, products);
            for (int row = 0; row < TILE_ROWS; ++row)
                memcpy(sums + ((tile - first_tile) * TILE_ROWS + row) * ITEM_COLUMNS + n, products + row * TILE_COLUMNS,
                       TILE_COLUMNS * sizeof(float));
        }
    }
    for (int64_t row = first_tile * TILE_ROWS; row < end_tile * TILE_ROWS && row < call->rows; ++row)
        finish<In>(call, sums + (row - first_tile * TILE_ROWS) * ITEM_COLUMNS, row, first, count);
}

size_t packed_bytes(const clvp_fast_linear *call) {
    return tiles_of(call) * TILE_ROWS * call->in_features * sizeof(float);
}

size_t scratch_bytes(const clvp_fast_linear *call) {
    return (ITEM_TILES * TILE_ROWS * ITEM_COLUMNS + TILE_COLUMNS * call->in_features) * sizeof(float);
}

int64_t items(const clvp_fast_linear *call) {
    return (call->out_features + ITEM_COLUMNS - 1) / ITEM_COLUMNS * ((tiles_of(call) + ITEM_TILES - 1) / ITEM_TILES);
}

void pack_any(const clvp_fast_linear *call, void *packed) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        pack<float>(call, packed);
    else
        pack<uint16_t>(call, packed);
}

void run_any(const clvp_fast_linear *call, const void *packed, int64_t item, void *scratch) {
    const bool int8 = call->weight_dtype == CLVP_FAST_INT8;
    if (call->dtype == CLVP_FAST_FLOAT32)
        int8 ? run<float, int8_t>(call, packed, item, scratch) : run<float, float>(call, packed, item, scratch);
    else
        int8 ? run<uint16_t, int8_t>(call, packed, item, scratch)
             : run<uint16_t, uint16_t>(call, packed, item, scratch);
}

}  // namespace
}  // namespace clvp_fast

const clvp_fast_linear_isa CLVP_FAST_OF(linear, CLVP_FAST_ISA) = {
    clvp_fast::packed_bytes, clvp_fast::scratch_bytes, clvp_fast::items, clvp_fast::pack_any, clvp_fast::run_any};
