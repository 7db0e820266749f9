/* Residual addition and norms of rows, on a CPU: an item is some rows, one after another. Compiled once for each
 * instruction set, as log_mel.cpp is. */
#include <algorithm>

#include "dispatch.h"
#include "norms.h"

namespace clvp_fast {
namespace {

/* So many rows are worth a thread. */
constexpr int64_t ITEM_ROWS = 32;

template <class Out>
CLVP_FAST_INLINE Floats rounded_to(Floats x) {
    return std::is_same_v<Out, float> ? x : rounded_to_half(x);
}

/* Calls some(column, lanes) for all columns; the last lanes may be less than a vector has. */
template <class Some>
CLVP_FAST_INLINE void over_columns(int64_t columns, const Some &some) {
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES) some(k, LANES); /* a known size takes no branches */
    if (k < columns) some(k, columns - k);
}

/* The terms of the first sum over a row: squares for an rms norm, the numbers themselves for a layer norm. */
template <bool RMS>
CLVP_FAST_INLINE Floats first_term(Floats x) {
    return RMS ? x * x : x;
}

/* Adds a row to the residual, and returns the first sum over what it stores. */
template <bool RMS, class In, class Sum>
float add_row(const In *x, const Sum *residual, int64_t columns, Sum *sum) {
    return sum_over(columns, [&](int64_t k, int64_t count) CLVP_FAST_INLINED {
        const Floats added = load_some(x + k, count) + load_some(residual + k, count);
        store_floats(sum + k, added, count);
        return first_term<RMS>(rounded_to<Sum>(added));
    });
}

/* Calls finish(normalised lanes, column) for a row, and stores what it returns. */
template <class In, class Out, class Finish>
CLVP_FAST_INLINE void norm_lanes(const In *row, float mean, float factor, int64_t columns, Out *out,
                                 const Finish &finish) {
    over_columns(columns, [&](int64_t k, int64_t count) CLVP_FAST_INLINED {
        store_floats(out + k, finish((load_some(row + k, count) - mean) * factor, k, count), count);
    });
}

/* The row, as it is in memory, by the first sum over it; statistics are float32. A layer norm is rounded once; of an
 * rms norm the normalised row is rounded to its own type, and its product with the weight to the wider one of both, as
 * transformers does. */
template <bool RMS, class In, class Affine, class Out>
void norm_row(const clvp_fast_norm *call, const In *row, float first, Out *out) {
    using Wider = std::conditional_t<std::is_same_v<In, float>, float, Affine>;
    const Affine *const weight = (const Affine *)call->weight, *const bias = (const Affine *)call->bias;
    const int64_t columns = call->columns;
    const auto scaled = [&](Floats x, int64_t k, int64_t count)
                            CLVP_FAST_INLINED { return x * load_some(weight + k, count); };
    if constexpr (RMS) {
        const auto finish = [&](Floats x, int64_t k, int64_t count)
                                CLVP_FAST_INLINED { return rounded_to<Wider>(scaled(rounded_to<In>(x), k, count)); };
        return norm_lanes(row, 0.0f, 1 / sqrtf(first / columns + call->eps), columns, out, finish);
    } else {
        const auto finish = [&](Floats x, int64_t k, int64_t count) CLVP_FAST_INLINED {
            return bias ? scaled(x, k, count) + load_some(bias + k, count) : scaled(x, k, count);
        };
        const float mean = first / columns;
        norm_lanes(row, mean, layer_factor(row, columns, mean, call->eps), columns, out, finish);
    }
}

template <bool RMS, class In>
void norm_any(const clvp_fast_norm *call, const In *row, float first, int64_t index) {
    const int64_t place = index * call->columns;
    const bool wide_weight = call->affine_dtype == CLVP_FAST_FLOAT32, wide = call->out_dtype == CLVP_FAST_FLOAT32;
    if (wide_weight && wide) return norm_row<RMS, In, float>(call, row, first, (float *)call->out + place);
    if (wide_weight) return norm_row<RMS, In, float>(call, row, first, (uint16_t *)call->out + place);
    if (wide) return norm_row<RMS, In, uint16_t>(call, row, first, (float *)call->out + place);
    return norm_row<RMS, In, uint16_t>(call, row, first, (uint16_t *)call->out + place);
}

template <bool RMS, class In, class Sum>
void run_row(const clvp_fast_norm *call, int64_t index) {
    const In *const row = (const In *)call->x + index * call->x_stride;
    if (!call->residual) {
        const auto term = [](Floats x) CLVP_FAST_INLINED { return first_term<RMS>(x); };
        return norm_any<RMS>(call, row, sum_of(row, call->columns, term), index);
    }
    const int64_t place = index * call->columns;
    Sum *const sum = (Sum *)call->sum + place;
    const float first = add_row<RMS>(row, (const Sum *)call->residual + place, call->columns, sum);
    norm_any<RMS>(call, (const Sum *)sum, first, index);
}

template <bool RMS>
void run_rows(const clvp_fast_norm *call, int64_t first, int64_t end) {
    const bool wide = call->dtype == CLVP_FAST_FLOAT32, wide_sum = call->sum_dtype == CLVP_FAST_FLOAT32;
    const auto of_types = wide       ? run_row<RMS, float, float>
                          : wide_sum ? run_row<RMS, uint16_t, float>
                                     : run_row<RMS, uint16_t, uint16_t>;
    for (int64_t index = first; index < end; ++index) of_types(call, index);
}

int64_t items(const clvp_fast_norm *call) { return (call->rows + ITEM_ROWS - 1) / ITEM_ROWS; }

size_t scratch_bytes(const clvp_fast_norm *) { return 0; }

void run(const clvp_fast_norm *call, int64_t item, void *) {
    const int64_t first = item * ITEM_ROWS, end = std::min(call->rows, first + ITEM_ROWS);
    call->rms ? run_rows<true>(call, first, end) : run_rows<false>(call, first, end);
}

}  // namespace

const Kernel<clvp_fast_norm> CLVP_FAST_OF(norm, CLVP_FAST_ISA) = {items, scratch_bytes, run};

}  // namespace clvp_fast
