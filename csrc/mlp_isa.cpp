/* Linear layers of many rows, on a CPU: one behind another, or one alone. The weights are packed once a call into the
 * order in which tiles of sums read them; bias, activation and residual are applied to sums that are still in the
 * first-level cache, and the values between two layers stay in the second-level one. The order of a sum
 * follows from the number of columns, so that a row has the same bits whatever rows are computed beside it. Compiled
 * once for each instruction set, as log_mel_isa.cpp is. */
#include <string.h>

#include "isa.h"
#include "products.h"

namespace clvp_fast {
namespace {

/* A tile of sums, for which there are registers: rows, and vectors of a group of columns. */
constexpr int ROWS = LANES == 16 ? 8 : 4, VECTORS = 3, COLUMNS = VECTORS * LANES;
/* Rows of values in scratch memory lie so much further apart than they are long, in 32 bits: strides of 4 KB would fall
 * on one set of the first-level cache. */
constexpr int64_t GAP = 16;

/* Columns that are summed one behind another: longer sums are made of parts, of which float32 has more to lose. */
template <class In>
constexpr int64_t PART = std::is_same_v<In, float> ? 256 : 1024;

struct Layer {
    const void *weight, *bias;
    int64_t stride, columns, outs;
    int64_t groups() const { return (outs + COLUMNS - 1) / COLUMNS; }
    /* Of a packed group: its biases, then the weights, VECTORS vectors for 32 bits of columns; in float32. */
    template <class In>
    int64_t group_size() const {
        return COLUMNS + columns / UNIT<In> * COLUMNS;
    }
};

/* The layers of a call, one behind another as they are packed; gates and the second layer may have no columns. */
template <class In>
struct Layers {
    Layer first, gates, second;
    explicit Layers(const clvp_fast_mlp *call)
        : first{call->w_in, call->b_in, call->w_in_stride, call->in_features, call->inner_features},
          gates{first},
          second{call->w_out, call->b_out, call->w_out_stride, call->inner_features,
                 call->w_out ? call->out_features : 0} {
        gates.outs = call->gated ? first.outs : 0;
        gates.weight = (const In *)first.weight + gates.outs * first.stride;
        if (first.bias) gates.bias = (const In *)first.bias + gates.outs;
    }
    int64_t groups() const { return first.groups() + gates.groups() + second.groups(); }
    static int64_t size(const Layer &layer) { return layer.groups() * layer.group_size<In>(); }
    int64_t size() const { return size(first) + size(gates) + size(second); }
};

template <class In>
void pack(const Layer &layer, int64_t group, float *to) {
    const int64_t first = group * COLUMNS;
    for (int64_t n = 0; n < COLUMNS; ++n) {
        In given[LANES] = {};
        if (layer.bias && first + n < layer.outs) given[0] = ((const In *)layer.bias)[first + n];
        to[n] = load_floats(given)[0];
    }
    to += COLUMNS;
    constexpr int64_t STEP = LANES * UNIT<In>;
    for (int64_t k = 0; k < layer.columns; k += STEP, to += LANES * COLUMNS)
        for (int vector = 0; vector < VECTORS; ++vector) {
            Floats block[LANES];
            for (int lane = 0; lane < LANES; ++lane) {
                const int64_t row = first + vector * LANES + lane;
                block[lane] =
                    row < layer.outs ? load_units<In>((const In *)layer.weight + row * layer.stride + k) : Floats{};
            }
            transpose<float>(block);
            for (int unit = 0; unit < LANES; ++unit) store_floats(to + unit * COLUMNS + vector * LANES, block[unit]);
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

/* What an activation's result is joined with. */
enum Join { ADDED, MULTIPLIED };

template <int JOIN>
CLVP_FAST_INLINE Floats join(Floats x, Floats other) {
    return JOIN == MULTIPLIED ? x * other : x + other;
}

/* A tile of out = activation(x W^T + b) + other, or times it: up to ROWS rows, of which `x`, `other` (which may be
 * `out`) and `out` hold the first, and up to COLUMNS columns. */
template <class In, int ACTIVATION, int JOIN, class Out>
void tile(const float *packed, int64_t columns, Matrix<const Product<In>> x, Matrix<const Out> other, Matrix<Out> out,
          int64_t count, int64_t outs) {
    const Product<In> *rows[ROWS];
    for (int i = 0; i < ROWS; ++i) rows[i] = x.row(i < count ? i : count - 1);
    Floats sums[ROWS][VECTORS] = {};
    const float *weights = packed + COLUMNS;
    const auto sum_part = [&](int64_t k) CLVP_FAST_INLINED {
        const int64_t end = columns - k < PART<In> ? columns : k + PART<In>;
        for (; k < end; k += UNIT<In>, weights += COLUMNS) {
            Floats weight[VECTORS];
            unroll<VECTORS>([&](auto j) CLVP_FAST_INLINED { weight[j] = load_floats(weights + j * LANES); });
            unroll<ROWS * VECTORS>([&](auto i) CLVP_FAST_INLINED {
                constexpr int row = i / VECTORS, j = i % VECTORS;
                sums[row][j] = dot(sums[row][j], rows[row] + k, weight[j]);
            });
        }
    };
    sum_part(0);
    if (columns > PART<In>) {
        Floats totals[ROWS][VECTORS];
        memcpy(totals, sums, sizeof totals);
        for (int64_t k = PART<In>; k < columns; k += PART<In>) {
            unroll<ROWS * VECTORS>([&](auto i) CLVP_FAST_INLINED { sums[i / VECTORS][i % VECTORS] = Floats{}; });
            sum_part(k);
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
void apply(const Layer &layer, const float *packed, Matrix<const Product<In>> x, int64_t count, Matrix<const Out> other,
           Matrix<Out> out) {
    for (int64_t n = 0; n < layer.outs; n += COLUMNS, packed += layer.group_size<In>())
        for (int64_t m = 0; m < count; m += ROWS)
            tile<In, ACTIVATION, JOIN, Out>(packed, layer.columns, {x.row(m), x.stride},
                                            {other.first ? other.row(m) + n : nullptr, other.stride},
                                            {out.row(m) + n, out.stride}, count - m, layer.outs - n);
}

template <class In, int JOIN = ADDED, class Out>
void apply(int32_t activation, const Layer &layer, const float *packed, Matrix<const Product<In>> x, int64_t count,
           Matrix<const Out> other, Matrix<Out> out) {
    if (activation == CLVP_FAST_GELU)
        apply<In, CLVP_FAST_GELU, JOIN>(layer, packed, x, count, other, out);
    else if (activation == CLVP_FAST_GELU_TANH)
        apply<In, CLVP_FAST_GELU_TANH, JOIN>(layer, packed, x, count, other, out);
    else
        apply<In, CLVP_FAST_NO_ACTIVATION, JOIN>(layer, packed, x, count, other, out);
}

/* Scratch memory, in 32 bits, of an item's rows: values between two layers, and x where it has to be widened. */
template <class In>
int64_t inner_stride(const clvp_fast_mlp *call) {
    return call->w_out ? (call->inner_features / UNIT<In> + LANES - 1) / LANES * LANES + GAP : 0;
}
template <class In>
int64_t x_stride(const clvp_fast_mlp *call) {
    return std::is_same_v<In, Product<In>> ? 0 : call->in_features + GAP;
}

template <class In, class Out>
void run(const clvp_fast_mlp *call, const float *packed, int64_t first_row, int64_t count, float *scratch) {
    using Mid = Product<In>;
    const Layers<In> layers(call);
    const Matrix<const In> given = {(const In *)call->x + first_row * call->x_stride, call->x_stride};
    const int64_t outs = call->out_features, at = first_row * outs;
    const Matrix<Out> out = {(Out *)call->out + at, outs};
    const Matrix<const Out> residual = {call->residual ? (const Out *)call->residual + at : nullptr, outs};

    Matrix<const Mid> x;
    if constexpr (std::is_same_v<In, Mid>) {
        x = given;
    } else {
        x = {scratch, x_stride<In>(call)};
        for (int64_t row = 0; row < count; ++row)
            for (int64_t k = 0; k < call->in_features; k += LANES)
                store_floats(scratch + row * x.stride + k, load_floats(given.row(row) + k));
        scratch += call->item_rows * x.stride;
    }
    if (!call->w_out) return apply<In, ADDED, Out>(call->activation, layers.first, packed, x, count, residual, out);
    const int64_t stride = inner_stride<In>(call) * UNIT<In>;
    const Matrix<Mid> inner = {(Mid *)scratch, stride};
    const Matrix<const Mid> values = {inner.first, stride};
    const int32_t activation = call->gated ? CLVP_FAST_NO_ACTIVATION : call->activation;
    apply<In, ADDED, Mid>(activation, layers.first, packed, x, count, {}, inner);
    packed += layers.size(layers.first);
    if (call->gated) apply<In, MULTIPLIED, Mid>(call->activation, layers.gates, packed, x, count, values, inner);
    packed += layers.size(layers.gates);
    apply<In, ADDED, Out>(CLVP_FAST_NO_ACTIVATION, layers.second, packed, values, count, residual, out);
}

size_t packed_bytes(const clvp_fast_mlp *call) {
    const bool wide = call->dtype == CLVP_FAST_FLOAT32;
    return sizeof(float) * (wide ? Layers<float>(call).size() : Layers<uint16_t>(call).size());
}

size_t scratch_bytes(const clvp_fast_mlp *call) {
    const bool wide = call->dtype == CLVP_FAST_FLOAT32;
    return sizeof(float) * call->item_rows *
           (wide ? inner_stride<float>(call) + x_stride<float>(call)
                 : inner_stride<uint16_t>(call) + x_stride<uint16_t>(call));
}

int64_t groups(const clvp_fast_mlp *call) { return Layers<float>(call).groups(); }

template <class In>
void pack(const clvp_fast_mlp *call, int64_t group, float *packed) {
    const Layers<In> layers(call);
    for (const Layer *layer : {&layers.first, &layers.gates, &layers.second}) {
        if (group < layer->groups()) return pack<In>(*layer, group, packed + group * layer->group_size<In>());
        group -= layer->groups();
        packed += layers.size(*layer);
    }
}

void pack_any(const clvp_fast_mlp *call, int64_t group, void *packed) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        pack<float>(call, group, (float *)packed);
    else
        pack<uint16_t>(call, group, (float *)packed);
}

void run_any(const clvp_fast_mlp *call, const void *packed, int64_t item, void *scratch) {
    const int64_t first = item * call->item_rows, left = call->rows - first;
    const int64_t count = left < call->item_rows ? left : call->item_rows;
    const float *const weights = (const float *)packed;
    if (call->dtype == CLVP_FAST_FLOAT32)
        run<float, float>(call, weights, first, count, (float *)scratch);
    else if (call->out_dtype == CLVP_FAST_FLOAT32)
        run<uint16_t, float>(call, weights, first, count, (float *)scratch);
    else
        run<uint16_t, uint16_t>(call, weights, first, count, (float *)scratch);
}

}  // namespace
}  // namespace clvp_fast

const clvp_fast_mlp_isa CLVP_FAST_OF(mlp, CLVP_FAST_ISA) = {clvp_fast::packed_bytes, clvp_fast::scratch_bytes,
                                                            clvp_fast::groups, clvp_fast::pack_any, clvp_fast::run_any};
