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
    /* True if weights are multiplied in the type that memory holds. */
    static constexpr bool PLAIN = STEPS == 1 && sizeof(Weight) == sizeof(Factor<In>);
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

/* The same after they were widened, once for many rows. */
template <class In>
struct Widened {
    static constexpr int WEIGHTS = UNIT_FACTORS<In>, STEPS = 1;
    template <int STEP>
    CLVP_FAST_INLINE Floats load(const Factor<In> *from) {
        return load_floats((const float *)from);
    }
};

/* Fetches what lies AHEAD bytes behind `from`, BYTES of it, into the second-level cache: so far that
 * memory has answered when it is read, and across the end of a chain, where a CPU would not do it by itself. */
constexpr int64_t AHEAD = 6144;
template <int BYTES>
CLVP_FAST_INLINE void fetch(const void *from) {
    unroll<(BYTES + 63) / 64>(
        [&](auto line) CLVP_FAST_INLINED { __builtin_prefetch((const char *)from + AHEAD + line * 64, 0, 2); });
}

/* totals[i][...] += x W^T for some columns of x, R rows of it, and as many rows of weights as V vectors have lanes. */
template <class In, class Kind, int R, int V, bool FETCHES, class Weight>
CLVP_FAST_INLINE void tile(const Weight *weights, const Factor<In> *const *rows, int64_t columns, bool first,
                           float *totals) {
    Floats sums[R][V] = {};
    for (int64_t k = 0; k < columns; k += Kind::WEIGHTS, weights += ITEM_COLUMNS * Kind::WEIGHTS) {
        if constexpr (FETCHES) fetch<ITEM_COLUMNS * Kind::WEIGHTS * sizeof(Weight)>(weights);
        unroll<Kind::STEPS>([&](auto step) CLVP_FAST_INLINED {
            Floats weight[V];
            unroll<V>([&](auto j) CLVP_FAST_INLINED {
                weight[j] = Kind::template load<step>(weights + j * LANES * Kind::WEIGHTS);
            });
            unroll<R>([&](auto i) CLVP_FAST_INLINED {
                const Factor<In> *const x = rows[i] + k + step * UNIT_FACTORS<In>;
                if constexpr (V == VECTORS)
                    add_products<In>(sums[i], x, weight);
                else
                    unroll<V>([&](auto j) CLVP_FAST_INLINED { sums[i][j] = dot(sums[i][j], x, weight[j]); });
            });
        });
    }
    unroll<R * V>([&](auto n) CLVP_FAST_INLINED {
        float *const to = totals + n / V * ITEM_COLUMNS + n % V * LANES;
        store_floats(to, first ? sums[n / V][n % V] : load_floats(to) + sums[n / V][n % V]);
    });
}

/* The same for any number of rows and all rows of weights of a panel. FETCHES: each tile fetches what comes, as a CPU
 * drops fetches while it waits for many. */
template <class In, class Kind, bool FETCHES, class Weight>
void multiply(const Weight *weights, const Factor<In> *x, int64_t stride, int64_t count, int64_t columns, bool first,
              float *totals) {
    for (int64_t m = 0; m < count; m += ROWS) {
        const Factor<In> *rows[ROWS];
        for (int i = 0; i < ROWS; ++i) rows[i] = x + (m + i < count ? m + i : count - 1) * stride;
        const int64_t left = count - m < ROWS ? count - m : ROWS;
        float *const to = totals + m * ITEM_COLUMNS;
        if (count == 1) {
            tile<In, Kind, 1, ITEM_COLUMNS / LANES, FETCHES>(weights, rows, columns, first, to);
            continue;
        }
        for (int n = 0; n < ITEM_COLUMNS; n += COLUMNS) {
            const Weight *const some = weights + n * Kind::WEIGHTS;
            unroll<ROWS>([&](auto i) CLVP_FAST_INLINED {
                if (i + 1 == left) tile<In, Kind, i + 1, VECTORS, FETCHES>(some, rows, columns, first, to + n);
            });
        }
    }
}

/* A thread's scratch memory: sums, the widened weights of one chain, and rows of x as they are multiplied. */
struct Scratch {
    int64_t prepared_end; /* one past the last row of x that was prepared */
    alignas(64) float totals[ITEM_ROWS * ITEM_COLUMNS];
    alignas(64) float widened[BLOCK * ITEM_COLUMNS];
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
        if (Kind::PLAIN || rows <= ROWS) {
            multiply<In, Kind, true>(weights, x + k, stride, rows, some, k == 0, scratch->totals);
        } else {
            Factor<In> *to = (Factor<In> *)scratch->widened;
            for (int64_t n = 0; n < size; n += ITEM_COLUMNS * Kind::WEIGHTS) {
                fetch<ITEM_COLUMNS * Kind::WEIGHTS * sizeof(Weight)>(weights + n);
                unroll<Kind::STEPS>([&](auto step) CLVP_FAST_INLINED {
                    unroll<ITEM_COLUMNS / LANES>([&](auto j) CLVP_FAST_INLINED {
                        const Weight *const from = weights + n + j * LANES * Kind::WEIGHTS;
                        store_floats((float *)to + j * LANES, Kind::template load<step>(from));
                    });
                    to += ITEM_COLUMNS * UNIT_FACTORS<In>;
                });
            }
            multiply<In, Widened<In>, false>((const Factor<In> *)scratch->widened, x + k, stride, rows, some, k == 0,
                                             scratch->totals);
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
