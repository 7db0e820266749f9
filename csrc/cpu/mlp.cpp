/* Linear layers of many rows, on a CPU: one behind another, or one alone, and a layer norm before them. Normed rows
 * and the values between two layers stay in the second-level cache. Compiled once for each instruction set, as
 * log_mel.cpp is. */
#include "dispatch.h"
#include "packed_layers.h"

namespace clvp_fast {
namespace {

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
    int64_t size() const { return first.size<In>() + gates.size<In>() + second.size<In>(); }
};

/* Scratch memory, in 32 bits, of an item's rows: values between two layers, and x where it is normed or widened. */
template <class In>
int64_t inner_stride(const clvp_fast_mlp *call) {
    return call->w_out ? (call->inner_features / UNIT_FACTORS<In> + LANES - 1) / LANES * LANES + GAP : 0;
}
template <class In>
int64_t x_stride(const clvp_fast_mlp *call) {
    return std::is_same_v<In, Factor<In>> && !call->norm_weight ? 0 : call->in_features / UNIT_FACTORS<In> + GAP;
}

template <class In, class Out>
void run(const clvp_fast_mlp *call, const float *packed, int64_t first_row, int64_t count, float *scratch) {
    using Mid = Factor<In>;
    const Layers<In> layers(call);
    const Matrix<const In> given = {(const In *)call->x + first_row * call->x_stride, call->x_stride};
    const int64_t outs = call->out_features, at = first_row * outs;
    const Matrix<Out> out = {(Out *)call->out + at, outs};
    const Matrix<const Out> residual = {call->residual ? (const Out *)call->residual + at : nullptr, outs};

    const Norm<In> norm = {(const In *)call->norm_weight, (const In *)call->norm_bias, call->eps};
    Matrix<const Mid> x;
    if constexpr (std::is_same_v<In, Mid>) x = given;
    if (const int64_t stride = x_stride<In>(call)) {
        const Matrix<Mid> prepared = {(Mid *)scratch, stride * UNIT_FACTORS<In>};
        for (int64_t row = 0; row < count; ++row)
            if (norm.weight)
                layer_norm(given.row(row), norm, call->in_features, prepared.row(row));
            else
                widen(given.row(row), call->in_features, prepared.row(row));
        x = {prepared.first, prepared.stride};
        scratch += call->item_rows * stride;
    }
    if (!call->w_out) return apply<In, ADDED, Out>(call->activation, layers.first, packed, x, count, residual, out);
    const int64_t stride = inner_stride<In>(call) * UNIT_FACTORS<In>;
    const Matrix<Mid> inner = {(Mid *)scratch, stride};
    const Matrix<const Mid> values = {inner.first, stride};
    const int32_t activation = call->gated ? CLVP_FAST_NO_ACTIVATION : call->activation;
    apply<In, ADDED, Mid>(activation, layers.first, packed, x, count, {}, inner);
    packed += layers.first.template size<In>();
    if (call->gated) apply<In, MULTIPLIED, Mid>(call->activation, layers.gates, packed, x, count, values, inner);
    packed += layers.gates.template size<In>();
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

int64_t items(const clvp_fast_mlp *call) {
    return call->out_features ? (call->rows + call->item_rows - 1) / call->item_rows : 0;
}

int64_t groups(const clvp_fast_mlp *call) { return Layers<float>(call).groups(); }

template <class In>
void pack(const clvp_fast_mlp *call, int64_t group, float *packed) {
    const Layers<In> layers(call);
    for (const Layer *layer : {&layers.first, &layers.gates, &layers.second}) {
        if (group < layer->groups()) return pack_group<In>(*layer, group, packed + group * layer->group_size<In>());
        group -= layer->groups();
        packed += layer->size<In>();
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

const PackingKernel<clvp_fast_mlp> CLVP_FAST_OF(mlp, CLVP_FAST_ISA) = {items,  packed_bytes, scratch_bytes,
                                                                       groups, pack_any,     run_any};

}  // namespace clvp_fast
