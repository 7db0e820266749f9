/* Linear layers of many rows, on a CPU: one behind another, or one alone, and a layer norm before them. Normed rows
 * and the values between two layers stay in the second-level cache. Compiled once for each instruction set, as
 * log_mel.cpp is. */
#include "dispatch.h"
#include "layers.h"
#include "rows.h"

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
    int64_t size() const { return first.size() + gates.size() + second.size(); }
};

/* Scratch memory, in 32 bits, of an item's rows, behind its sums: values between two layers, and x where it is normed
 * or widened. */
template <class In>
int64_t inner_stride(const clvp_fast_mlp *call) {
    return call->w_out ? (call->inner_features / UNIT_FACTORS<In> + LANES - 1) / LANES * LANES + GAP : 0;
}
template <class In>
int64_t x_stride(const clvp_fast_mlp *call) {
    return std::is_same_v<In, Factor<In>> && !call->norm_weight ? 0 : call->in_features / UNIT_FACTORS<In> + GAP;
}

template <class In, class Out>
void run(const clvp_fast_mlp *call, const In *panels, int64_t first_row, int64_t count, void *memory) {
    using Mid = Factor<In>;
    Sums &sums = *(Sums *)memory;
    float *scratch = (float *)(&sums + 1);
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
    if (!call->w_out) return apply<In>(call->activation, layers.first, panels, x, count, residual, out, sums);
    const int64_t stride = inner_stride<In>(call) * UNIT_FACTORS<In>;
    const Matrix<Mid> inner = {(Mid *)scratch, stride};
    const Matrix<const Mid> values = {inner.first, stride};
    const int32_t activation = call->gated ? CLVP_FAST_NO_ACTIVATION : call->activation;
    apply<In, ADDED, Mid>(activation, layers.first, panels, x, count, {}, inner, sums);
    panels += layers.first.size();
    if (call->gated) apply<In, MULTIPLIED, Mid>(call->activation, layers.gates, panels, x, count, values, inner, sums);
    panels += layers.gates.size();
    apply<In>(CLVP_FAST_NO_ACTIVATION, layers.second, panels, values, count, residual, out, sums);
}

size_t packed_bytes(const clvp_fast_mlp *call) {
    const bool wide = call->dtype == CLVP_FAST_FLOAT32;
    return wide ? Layers<float>(call).size() * sizeof(float) : Layers<uint16_t>(call).size() * sizeof(uint16_t);
}

size_t scratch_bytes(const clvp_fast_mlp *call) {
    const bool wide = call->dtype == CLVP_FAST_FLOAT32;
    const int64_t stride = wide ? inner_stride<float>(call) + x_stride<float>(call)
                                : inner_stride<uint16_t>(call) + x_stride<uint16_t>(call);
    return sizeof(Sums) + sizeof(float) * call->item_rows * stride;
}

int64_t items(const clvp_fast_mlp *call) {
    return call->out_features ? (call->rows + call->item_rows - 1) / call->item_rows : 0;
}

int64_t groups(const clvp_fast_mlp *call) { return Layers<float>(call).groups(); }

template <class In>
void pack(const clvp_fast_mlp *call, int64_t group, In *panels) {
    const Layers<In> layers(call);
    for (const Layer *layer : {&layers.first, &layers.gates, &layers.second}) {
        if (group < layer->groups()) return pack_group(*layer, group, panels);
        group -= layer->groups();
        panels += layer->size();
    }
}

void pack_any(const clvp_fast_mlp *call, int64_t group, void *packed) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        pack(call, group, (float *)packed);
    else
        pack(call, group, (uint16_t *)packed);
}

void run_any(const clvp_fast_mlp *call, const void *packed, int64_t item, void *scratch) {
    const int64_t first = item * call->item_rows, left = call->rows - first;
    const int64_t count = left < call->item_rows ? left : call->item_rows;
    if (call->dtype == CLVP_FAST_FLOAT32)
        run<float, float>(call, (const float *)packed, first, count, scratch);
    else if (call->out_dtype == CLVP_FAST_FLOAT32)
        run<uint16_t, float>(call, (const uint16_t *)packed, first, count, scratch);
    else
        run<uint16_t, uint16_t>(call, (const uint16_t *)packed, first, count, scratch);
}

}  // namespace

const PackingKernel<clvp_fast_mlp> CLVP_FAST_OF(mlp, CLVP_FAST_ISA) = {items,  packed_bytes, scratch_bytes,
                                                                       groups, pack_any,     run_any};

}  // namespace clvp_fast
