/* Linear layers of many rows, on a CPU. The weights are packed once a call into the order in which tiles of sums read
 * them; bias, activation and residual are applied to sums that are still in the first-level cache. The order of a sum
 * follows from the number of columns, so that a row has the same bits whatever rows are computed beside it. */
#pragma once

#include <math.h>
#include <string.h>

#include "../clvp_fast.h"
#include "products.h"

namespace clvp_fast {
namespace {

/* A tile of sums, for which there are registers: rows, and vectors of a group of columns. */
constexpr int ROWS = LANES == 16 ? 8 : 4, VECTORS = 3, COLUMNS = VECTORS * LANES;
/* Rows of values in scratch memory lie so much further apart than they are long, in 32 bits: strides of 4 KB would fall
 * on one set of the first-level cache. */
constexpr int64_t GAP = 16;

/* The number of columns that are summed one behind another: longer sums are made of several chains, as float32 has more
 * to lose. */
template <class In>
constexpr int64_t CHAIN = std::is_same_v<In, float> ? 256 : 1024;

/* The number of weights in a unit of 32 bits: they are packed as they are, and widened where they are multiplied.
 */
template <class In>
constexpr int UNIT_WEIGHTS = sizeof(float) / sizeof(In);

struct Layer {
    const void *weight, *bias;
    int64_t stride, columns, outs;
    int64_t groups() const { return (outs + COLUMNS - 1) / COLUMNS; }
    /* Of a packed group, in 32 bits: its biases in float32, then the weights, VECTORS vectors for a unit of columns. */
    template <class In>
    int64_t group_size() const {
        return COLUMNS + columns / UNIT_WEIGHTS<In> * COLUMNS;
    }
    template <class In>
    int64_t size() const {
        return groups() * group_size<In>();
    }
};

template <class In>
void pack_group(const Layer &layer, int64_t group, float *to) {
    const int64_t first = group * COLUMNS;
    for (int64_t n = 0; n < COLUMNS; ++n) {
        In given[LANES] = {};
        if (layer.bias && first + n < layer.outs) given[0] = ((const In *)layer.bias)[first + n];
        to[n] = load_floats(given)[0];
    }
    to += COLUMNS;
    constexpr int64_t STEP = LANES * UNIT_WEIGHTS<In>;
    for (int vector = 0; vector < VECTORS; ++vector) /* in turn: a CPU fetches some rows ahead, and not all of them */
        for (int64_t k = 0; k < layer.columns; k += STEP) {
            Floats square[LANES];
            for (int lane = 0; lane < LANES; ++lane) {
                const int64_t row = first + vector * LANES + lane;
                square[lane] = Floats{};
                if (row < layer.outs)
                    memcpy(square + lane, (const In *)layer.weight + row * layer.stride + k, sizeof *square);
            }
            transpose<float>(square);
            float *const units = to + k / UNIT_WEIGHTS<In> * COLUMNS + vector * LANES;
            for (int unit = 0; unit < LANES; ++unit) store_floats(units + unit * COLUMNS, square[unit]);
        }
}

template <int ACTIVATION, class Out>
CLVP_FAST_INLINE Floats activate(Floats x) {
    if constexpr (ACTIVATION == CLVP_FAST_GELU_TANH) return gelu_tanh(x);
    if constexpr (ACTIVATION == CLVP_FAST_GELU) return std::is_same_v<Out, float> ? gelu(x) : gelu_for_half(x);
    return x;
}

/* Where rows begin, and how far apart. */
template <class T>
struct Matrix {
    T *first;
    int64_t stride;
    T *row(int64_t i) const { return first + i * stride; }
};

/* The operation that joins an activation's result with another value. */
enum Join { ADDED, MULTIPLIED };

template <int JOIN>
CLVP_FAST_INLINE Floats join(Floats x, Floats other) {
    return JOIN == MULTIPLIED ? x * other : x + other;
}

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

/* A tile of out = activation(x W^T + b) + other, or times it: up to ROWS rows, of which `x`, `other` (which may be
 * `out`) and `out` hold the first, and up to COLUMNS columns. */
template <class In, int ACTIVATION, int JOIN, class Out>
void tile(const float *packed, int64_t columns, Matrix<const Factor<In>> x, Matrix<const Out> other, Matrix<Out> out,
          int64_t count, int64_t outs) {
    const Factor<In> *rows[ROWS];
    for (int i = 0; i < ROWS; ++i) rows[i] = x.row(i < count ? i : count - 1);
    Floats sums[ROWS][VECTORS] = {};
    const float *weights = packed + COLUMNS;
    const auto sum_chain = [&](int64_t k) CLVP_FAST_INLINED {
        const int64_t end = columns - k < CHAIN<In> ? columns : k + CHAIN<In>;
        for (; k < end; k += UNIT_WEIGHTS<In>, weights += COLUMNS)
            unroll<UNIT_WEIGHTS<In> / UNIT_FACTORS<In>>([&](auto which) CLVP_FAST_INLINED {
                Floats weight[VECTORS];
                unroll<VECTORS>([&](auto j) CLVP_FAST_INLINED { weight[j] = factors<In, which>(weights + j * LANES); });
                unroll<ROWS>([&](auto i) CLVP_FAST_INLINED {
                    add_products<In>(sums[i], rows[i] + k + which * UNIT_FACTORS<In>, weight);
                });
            });
    };
    sum_chain(0);
    if (columns > CHAIN<In>) {
        Floats totals[ROWS][VECTORS];
        memcpy(totals, sums, sizeof totals);
        for (int64_t k = CHAIN<In>; k < columns; k += CHAIN<In>) {
            unroll<ROWS * VECTORS>([&](auto i) CLVP_FAST_INLINED { sums[i / VECTORS][i % VECTORS] = Floats{}; });
            sum_chain(k);
            unroll<ROWS * VECTORS>(
                [&](auto i) CLVP_FAST_INLINED { totals[i / VECTORS][i % VECTORS] += sums[i / VECTORS][i % VECTORS]; });
        }
        unroll<ROWS * VECTORS>(
            [&](auto i) CLVP_FAST_INLINED { sums[i / VECTORS][i % VECTORS] = totals[i / VECTORS][i % VECTORS]; });
    }
    unroll<ROWS>([&](auto i) CLVP_FAST_INLINED {
        if (i >= count) return;
        const Out *const joined = other.first ? other.row(i) : nullptr;
        unroll<VECTORS>([&](auto j) CLVP_FAST_INLINED {
            constexpr int n = j * LANES;
            const Floats y = activate<ACTIVATION, Out>(sums[i][j] + load_floats(packed + n));
            if (outs - n >= LANES)
                store_floats(out.row(i) + n, joined ? join<JOIN>(y, load_floats(joined + n)) : y);
            else if (outs > n)
                store_floats(out.row(i) + n, joined ? join<JOIN>(y, load_floats(joined + n, outs - n)) : y, outs - n);
        });
    });
}

/* The same for any number of rows and columns. */
template <class In, int ACTIVATION, int JOIN, class Out>
void apply(const Layer &layer, const float *packed, Matrix<const Factor<In>> x, int64_t count, Matrix<const Out> other,
           Matrix<Out> out) {
    for (int64_t n = 0; n < layer.outs; n += COLUMNS, packed += layer.group_size<In>())
        for (int64_t m = 0; m < count; m += ROWS)
            tile<In, ACTIVATION, JOIN, Out>(packed, layer.columns, {x.row(m), x.stride},
                                            {other.first ? other.row(m) + n : nullptr, other.stride},
                                            {out.row(m) + n, out.stride}, count - m, layer.outs - n);
}

template <class In, int JOIN = ADDED, class Out>
void apply(int32_t activation, const Layer &layer, const float *packed, Matrix<const Factor<In>> x, int64_t count,
           Matrix<const Out> other, Matrix<Out> out) {
    if (activation == CLVP_FAST_GELU)
        apply<In, CLVP_FAST_GELU, JOIN>(layer, packed, x, count, other, out);
    else if (activation == CLVP_FAST_GELU_TANH)
        apply<In, CLVP_FAST_GELU_TANH, JOIN>(layer, packed, x, count, other, out);
    else
        apply<In, CLVP_FAST_NO_ACTIVATION, JOIN>(layer, packed, x, count, other, out);
}

CLVP_FAST_INLINE float total(Floats x) {
    float lanes[LANES];
    store_floats(lanes, x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

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
    Floats sum = {}, squares = {};
    for (int64_t k = 0; k < columns; k += LANES) sum += load_floats(row + k);
    const float mean = total(sum) / columns;
    for (int64_t k = 0; k < columns; k += LANES) {
        const Floats centred = load_floats(row + k) - mean;
        squares += centred * centred;
    }
    const float factor = 1 / sqrtf(total(squares) / columns + norm.eps);
    for (int64_t k = 0; k < columns; k += LANES) {
        Floats x = (load_floats(row + k) - mean) * factor * load_floats(norm.weight + k);
        if (norm.bias) x += load_floats(norm.bias + k);
        store_floats(to + k, x);
    }
}

}  // namespace
}  // namespace clvp_fast
