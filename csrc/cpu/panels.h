/* The product of rows of x and weights that are packed into panels: ITEM_COLUMNS rows of weights, column by column, as
 * tiles of sums read them, one panel behind another. A row of x has a sum for each chain of columns, and the chains are
 * added one by one, so that its bits depend only on the number of columns. */
#pragma once

#include <string.h>

#include "fetch.h"
#include "products.h"
#include "sums.h"

namespace clvp_fast {
namespace {

/* A tile of sums, for which there are registers: rows, and vectors of a group of columns. */
constexpr int ROWS = LANES == 16 ? 8 : 4, VECTORS = 3, COLUMNS = VECTORS * LANES;
/* The number of weights in a unit of 32 bits: they are packed as they are, and widened where they are multiplied.
 */
template <class In>
constexpr int UNIT_WEIGHTS = sizeof(float) / sizeof(In);

/* Weights as they are multiplied: 32 bits of columns, or where the CPU has no products of bfloat16 one of the two. */
template <class In, int WHICH>
CLVP_FAST_INLINE Floats factors(const float *units) {
    if constexpr (UNIT_FACTORS<In> == UNIT_WEIGHTS<In>) return load_floats(units);
    Integers pairs;
    memcpy(&pairs, units, sizeof pairs);
    if constexpr (!WHICH) return (Floats)(pairs << 16);
#if defined(__AVX2__) && !defined(__AVX512F__)
    alignas(32) static const int32_t upper[8] = {-65536, -65536, -65536, -65536, -65536, -65536, -65536, -65536};
    asm volatile("vpand %1, %0, %0" : "+x"(pairs) : "m"(upper));
    return (Floats)pairs;
#else
    return (Floats)(pairs & -65536);
#endif
}

/* sums[j] + a * b[j], for 32 bits of a row. */
template <class In>
CLVP_FAST_INLINE void add_products(Floats (&sums)[VECTORS], const Factor<In> *a, const Floats (&b)[VECTORS]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    /* With the sums and three weights, there is a register for one number of a row: compilers load several before they
     * multiply, and let sums go through memory. */
    Floats factor;
    asm volatile(
        "vbroadcastss %4, %3\n\t"
        "vfmadd231ps %5, %3, %0\n\t"
        "vfmadd231ps %6, %3, %1\n\t"
        "vfmadd231ps %7, %3, %2"
        : "+x"(sums[0]), "+x"(sums[1]), "+x"(sums[2]), "=&x"(factor)
        : "m"(*a), "x"(b[0]), "x"(b[1]), "x"(b[2]));
#else
    unroll<VECTORS>([&](auto j) CLVP_FAST_INLINED { sums[j] = dot(sums[j], a, b[j]); });
#endif
}

/* The same sum for a single vector, rounded once as above even where a compiler does not optimise. */
template <class In>
CLVP_FAST_INLINE Floats add_product(Floats sum, const Factor<In> *a, Floats b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Floats)_mm256_fmadd_ps(_mm256_set1_ps(*a), (__m256)b, (__m256)sum);
#else
    return dot(sum, a, b);
#endif
}

/* Columns of a chain: its part of a panel stays in the first-level cache while the tiles of all rows read it. */
constexpr int64_t BLOCK = 64;
/* For the sums of a panel and so many rows of x there are registers; converting int8 takes some of them. */
template <class Weight>
constexpr int WHOLE_ROWS = LANES == 16 || std::is_same_v<Weight, int8_t> ? 1 : 2;

CLVP_FAST_INLINE Integers widen(const int16_t *from) {
#if defined(__AVX512F__)
    return (Integers)_mm512_maskz_cvtepi16_epi32(0xffff, _mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
    return (Integers)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    typedef int16_t Halves __attribute__((vector_size(2 * LANES)));
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Integers);
#endif
}

/* Weights of a panel: a unit is one float32, or two narrower ones of neighbouring columns, beside those of the other
 * rows. It is multiplied in STEPS, of as many columns as Factor<In> puts into 32 bits. */
template <class In, class Weight>
struct Units {
    static constexpr int WEIGHTS = sizeof(Weight) == 4 ? 1 : 2, STEPS = WEIGHTS / UNIT_FACTORS<In>;
    /* Those of LANES rows, which begin at `from`. */
    template <int STEP>
    CLVP_FAST_INLINE Floats load(const Weight *from) {
        if constexpr (!std::is_same_v<Weight, int8_t>) {
            return factors<In, STEP>((const float *)from);
        } else if constexpr (STEPS == 2) {
            const Integers pairs = widen((const int16_t *)from);
            return __builtin_convertvector(STEP ? pairs >> 8 : pairs << 24 >> 24, Floats);
        } else {
#if defined(__AVX512BF16__)
            return (Floats)Pairs::load(from);
#endif
        }
    }
};

/* True if the weights of a chain are widened once for more than two tiles of rows. Widening to pairs of bfloat16 takes
 * longer than to store and load them; widening to float32 does not. */
template <class In, class Weight>
constexpr bool WIDENS = std::is_same_v<Weight, int8_t> && UNIT_FACTORS<In> == 2;

/* Bytes of a unit of all rows of a panel. */
template <class Kind, class Weight>
constexpr int UNIT_BYTES = ITEM_COLUMNS * Kind::WEIGHTS * sizeof(Weight);

/* totals[i][...] += x W^T for some columns of x, R rows of it, and as many rows of weights as V vectors have lanes. */
template <class In, class Kind, int R, int V, int LINES, class Weight>
CLVP_FAST_INLINE void tile(const Weight *weights, const Factor<In> *const *rows, int64_t columns, bool first,
                           Fetch &fetch, float *totals) {
    Floats sums[R][V] = {};
    for (int64_t k = 0; k < columns; k += Kind::WEIGHTS, weights += ITEM_COLUMNS * Kind::WEIGHTS) {
        fetch_some<LINES, UNIT_BYTES<Kind, Weight>>(weights, fetch);
        unroll<Kind::STEPS>([&](auto step) CLVP_FAST_INLINED {
            const auto weight = [&](auto j) CLVP_FAST_INLINED {
                return Kind::template load<step>(weights + j * LANES * Kind::WEIGHTS);
            };
            const auto x = [&](auto i) CLVP_FAST_INLINED { return rows[i] + k + step * UNIT_FACTORS<In>; };
            if constexpr (V == VECTORS) {
                const Floats some[VECTORS] = {weight(Index<0>{}), weight(Index<1>{}), weight(Index<2>{})};
                unroll<R>([&](auto i) CLVP_FAST_INLINED { add_products<In>(sums[i], x(i), some); });
            } else { /* there are no registers for so many weights at once */
                unroll<V>([&](auto j) CLVP_FAST_INLINED {
                    const Floats one = weight(j);
                    unroll<R>([&](auto i) CLVP_FAST_INLINED { sums[i][j] = add_product<In>(sums[i][j], x(i), one); });
                });
            }
        });
    }
    unroll<R * V>([&](auto n) CLVP_FAST_INLINED {
        float *const to = totals + n / V * ITEM_COLUMNS + n % V * LANES;
        store_floats(to, first ? sums[n / V][n % V] : load_floats(to) + sums[n / V][n % V]);
    });
}

/* Counts the tiles of `count` rows of x and a panel. */
template <class Weight>
int64_t tiles(int64_t count) {
    return count <= WHOLE_ROWS<Weight> ? 1 : (count + ROWS - 1) / ROWS * (ITEM_COLUMNS / COLUMNS);
}

/* The same for any number of rows and all rows of weights of a panel. */
template <class In, class Kind, int LINES, class Weight>
void multiply(const Weight *weights, const Factor<In> *x, int64_t stride, int64_t count, int64_t columns, bool first,
              Fetch fetch, float *totals) {
    for (int64_t m = 0; m < count; m += ROWS) {
        const Factor<In> *rows[ROWS];
        for (int i = 0; i < ROWS; ++i) rows[i] = x + (m + i < count ? m + i : count - 1) * stride;
        const int64_t left = count - m < ROWS ? count - m : ROWS;
        float *const to = totals + m * ITEM_COLUMNS;
        if (LINES == ALL && count <= WHOLE_ROWS<Weight>) {
            unroll<WHOLE_ROWS<Weight>>([&](auto i) CLVP_FAST_INLINED {
                if (i + 1 == left)
                    tile<In, Kind, i + 1, ITEM_COLUMNS / LANES, ALL>(weights, rows, columns, first, fetch, to);
            });
            continue;
        }
        for (int n = 0; n < ITEM_COLUMNS; n += COLUMNS) {
            const Weight *const some = weights + n * Kind::WEIGHTS;
            unroll<ROWS>([&](auto i) CLVP_FAST_INLINED {
                if (i + 1 == left) tile<In, Kind, i + 1, VECTORS, LINES>(some, rows, columns, first, fetch, to + n);
            });
        }
    }
}

/* Sums of an item, and the widened weights of one chain. */
struct Sums {
    alignas(64) float totals[ITEM_ROWS * ITEM_COLUMNS];
    alignas(64) uint16_t widened[BLOCK * ITEM_COLUMNS];
};

/* sums.totals[i][...] = x W^T for up to ITEM_ROWS rows of x and the rows of weights of a panel. */
template <class In, class Weight>
void multiply_panel(const Weight *weights, int64_t columns, Matrix<const Factor<In>> x, int64_t rows, Sums &sums) {
    using Kind = Units<In, Weight>;
    constexpr int BYTES = UNIT_BYTES<Kind, Weight>, HALF = (BYTES / 2 + 63) / 64;
    for (int64_t k = 0; k < columns; k += BLOCK) {
        const int64_t some = columns - k < BLOCK ? columns - k : BLOCK, size = some * ITEM_COLUMNS;
        const Fetch fetch = {(const char *)(weights + size), BYTES / tiles<Weight>(rows)};
        const auto chain = [&](auto kind, auto lines, const auto *from) {
            multiply<In, decltype(kind), lines>(from, x.first + k, x.stride, rows, some, k == 0, fetch, sums.totals);
        };
        if (WIDENS<In, Weight> && rows > 2 * ROWS) {
            In *const widened = (In *)sums.widened;
            for (int64_t n = 0; n < size; n += LANES * Kind::WEIGHTS)
                store_floats((float *)(widened + n), Kind::template load<0>(weights + n));
            chain(Units<In, In>(), Index<1>(), (const In *)widened);
        } else if (tiles<Weight>(rows) == 1) {
            chain(Kind(), Index<ALL>(), weights);
        } else if (tiles<Weight>(rows) == 2) {
            chain(Kind(), Index<HALF>(), weights);
        } else {
            chain(Kind(), Index<1>(), weights);
        }
        weights += size;
    }
}

/* Packs up to ITEM_COLUMNS rows of weights into a panel, and zeros for those that there are not. */
template <class In>
void pack_panel(Matrix<const In> weights, int64_t rows, int64_t columns, In *panel) {
    constexpr int64_t STEP = LANES * UNIT_WEIGHTS<In>;
    for (int first = 0; first < ITEM_COLUMNS; first += LANES) /* in turn: a CPU fetches some rows ahead, and not all */
        for (int64_t k = 0; k < columns; k += STEP) {
            Floats square[LANES] = {};
            for (int lane = 0; lane < LANES && first + lane < rows; ++lane)
                memcpy(square + lane, weights.row(first + lane) + k, sizeof *square);
            transpose<float>(square);
            float *const units = (float *)(panel + k * ITEM_COLUMNS) + first;
            for (int unit = 0; unit < LANES; ++unit) store_floats(units + unit * ITEM_COLUMNS, square[unit]);
        }
}

}  // namespace
}  // namespace clvp_fast
