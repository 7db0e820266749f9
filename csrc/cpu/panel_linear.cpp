/* Linear layers over weights that were packed once, into panels: 48 rows of weights, column by column, as tiles of sums
 * read them, one panel behind another. A row of x has a sum for each chain of columns, and the chains are added one by
 * one, so that its bits depend only on the number of columns. Compiled once for each instruction set, as
 * log_mel.cpp is. */
#include "dispatch.h"
#include "linear_items.h"
#include "packed_layers.h"

namespace clvp_fast {
namespace {

/* Columns of a chain: its part of a panel stays in the first-level cache while the tiles of all rows read it. */
constexpr int64_t BLOCK = 64;
/* For the sums of a panel and so many rows of x there are registers. */
constexpr int WHOLE_ROWS = LANES == 16 ? 1 : 2;

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

/* The fetches of a tile at each unit, into the second-level cache, which waits for more lines at a time than the first.
 * The only tile of a chain fetches what it will read AHEAD bytes later. Of several each fetches its share of the next
 * chain, so that memory is read all the time: LINES lines from `next` on, which then moves by `step` bytes. */
constexpr int64_t AHEAD = 6144;
constexpr int ALL = 0;
struct Fetch {
    const char *next;
    int64_t step;
};

template <int LINES, int BYTES>
CLVP_FAST_INLINE void fetch_some(const void *weights, Fetch &fetch) {
    const char *const from = LINES == ALL ? (const char *)weights + AHEAD : fetch.next;
    unroll<LINES == ALL ? (BYTES + 63) / 64 : LINES>(
        [&](auto line) CLVP_FAST_INLINED { __builtin_prefetch(from + line * 64, 0, 2); });
    if (LINES != ALL) fetch.next += fetch.step;
}

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
                    unroll<R>([&](auto i) CLVP_FAST_INLINED { sums[i][j] = dot(sums[i][j], x(i), one); });
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
int64_t tiles(int64_t count) { return count <= WHOLE_ROWS ? 1 : (count + ROWS - 1) / ROWS * (ITEM_COLUMNS / COLUMNS); }

/* The same for any number of rows and all rows of weights of a panel. */
template <class In, class Kind, int LINES, class Weight>
void multiply(const Weight *weights, const Factor<In> *x, int64_t stride, int64_t count, int64_t columns, bool first,
              Fetch fetch, float *totals) {
    for (int64_t m = 0; m < count; m += ROWS) {
        const Factor<In> *rows[ROWS];
        for (int i = 0; i < ROWS; ++i) rows[i] = x + (m + i < count ? m + i : count - 1) * stride;
        const int64_t left = count - m < ROWS ? count - m : ROWS;
        float *const to = totals + m * ITEM_COLUMNS;
        if (LINES == ALL && count <= WHOLE_ROWS) {
            unroll<WHOLE_ROWS>([&](auto i) CLVP_FAST_INLINED {
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

/* A thread's scratch memory: sums, the widened weights of one chain, and rows of x as they are multiplied. */
struct Scratch {
    int64_t prepared_end; /* one past the last row of x that was prepared */
    alignas(64) float totals[ITEM_ROWS * ITEM_COLUMNS];
    alignas(64) uint16_t widened[BLOCK * ITEM_COLUMNS];
    alignas(64) float x[];
};

template <class In>
int64_t prepared_stride(const clvp_fast_linear *call) {
    return call->in_features + GAP * UNIT_FACTORS<In>;
}

/* Few rows of what is multiplied are read where they lie. */
template <class In>
bool prepares(const clvp_fast_linear *call) {
    return !std::is_same_v<In, Factor<In>> || call->rows > ROWS;
}

size_t scratch_bytes(const clvp_fast_linear *call) {
    const int64_t rows = call->rows < ITEM_ROWS ? call->rows : ITEM_ROWS;
    return sizeof(Scratch) + rows * (call->in_features + GAP) * sizeof(float);
}

template <class In, class Weight>
void run(const clvp_fast_linear *call, const Item &item, Scratch *scratch) {
    using Kind = Units<In, Weight>;
    constexpr int BYTES = UNIT_BYTES<Kind, Weight>;
    const int64_t columns = call->in_features, first_row = item.first_row, rows = item.rows;

    const Factor<In> *x = (const Factor<In> *)((const In *)call->x + first_row * call->x_stride);
    int64_t stride = call->x_stride;
    if (prepares<In>(call)) {
        Factor<In> *const prepared = (Factor<In> *)scratch->x;
        stride = prepared_stride<In>(call);
        if (scratch->prepared_end != first_row + rows) {
            scratch->prepared_end = first_row + rows;
            for (int64_t row = 0; row < rows; ++row) {
                const In *const given = (const In *)call->x + (first_row + row) * call->x_stride;
                if constexpr (std::is_same_v<In, Factor<In>>)
                    memcpy(prepared + row * stride, given, columns * sizeof *given);
                else
                    widen(given, columns, prepared + row * stride);
            }
        }
        x = prepared;
    }

    const Weight *weights = (const Weight *)call->panels + item.first * columns;
    for (int64_t k = 0; k < columns; k += BLOCK) {
        const int64_t some = columns - k < BLOCK ? columns - k : BLOCK, size = some * ITEM_COLUMNS;
        const Fetch fetch = {(const char *)(weights + size), BYTES / tiles(rows)};
        if (WIDENS<In, Weight> && rows > 2 * ROWS) {
            In *const widened = (In *)scratch->widened;
            for (int64_t n = 0; n < size; n += LANES * Kind::WEIGHTS)
                store_floats((float *)(widened + n), Kind::template load<0>(weights + n));
            multiply<In, Units<In, In>, 1>(widened, x + k, stride, rows, some, k == 0, fetch, scratch->totals);
        } else if (tiles(rows) == 1) {
            multiply<In, Kind, ALL>(weights, x + k, stride, rows, some, k == 0, fetch, scratch->totals);
        } else if (tiles(rows) == 2) {
            constexpr int HALF = (BYTES / 2 + 63) / 64;
            multiply<In, Kind, HALF>(weights, x + k, stride, rows, some, k == 0, fetch, scratch->totals);
        } else {
            multiply<In, Kind, 1>(weights, x + k, stride, rows, some, k == 0, fetch, scratch->totals);
        }
        weights += size;
    }
    finish_item<In>(call, item, scratch->totals);
}

void run_any(const clvp_fast_linear *call, int64_t number, void *scratch) {
    with_types(call, [&](auto in, auto weight) {
        run<decltype(in), decltype(weight)>(call, Item(call, number), (Scratch *)scratch);
    });
}

}  // namespace

const Kernel<clvp_fast_linear> CLVP_FAST_OF(panel_linear, CLVP_FAST_ISA) = {items, scratch_bytes, run_any};

}  // namespace clvp_fast
