/* The first half of a Swin layer, on a CPU: layer norm, projections, attention in windows, the projection of its output
 * and the residual. An item is a window: all that lies between its rows of x and those of the result stays in the
 * second-level cache. Compiled once for each instruction set, as log_mel.cpp is. */
#include "dispatch.h"
#include "layers.h"
#include "rows.h"
#include "window_attention.h"

namespace clvp_fast {
namespace {

Windows windows_of(const clvp_fast_window_block *call) {
    const float scale = 1 / sqrtf((float)call->head_dim);
    return {call->height, call->width, call->window, call->shift, call->num_heads, call->head_dim, scale};
}

int64_t channels_of(const clvp_fast_window_block *call) { return (int64_t)call->num_heads * call->head_dim; }

/* The packed operands, one behind another: biases of the scores, query, key and value weights, those of the output.
 * Places are in bytes. */
template <class In>
struct Parts {
    Layer qkv, out;
    int64_t heads, bias_size;
    explicit Parts(const clvp_fast_window_block *call)
        : qkv{call->w_qkv, call->b_qkv, call->w_qkv_stride, channels_of(call), 3 * channels_of(call)},
          out{call->w_out, call->b_out, call->w_out_stride, channels_of(call), channels_of(call)},
          heads(call->num_heads),
          bias_size(Bias<In>::packed_size(windows_of(call))) {}
    size_t qkv_at() const { return heads * bias_size * sizeof(float); }
    size_t out_at() const { return qkv_at() + qkv.size() * sizeof(In); }
    size_t size() const { return out_at() + out.size() * sizeof(In); }
};

/* The scratch memory of a window, in bytes: sums, its rows of x, as they are multiplied, queries, keys and values, and
 * what attention needs. */
template <class In>
struct Scratch {
    int64_t x_stride, factor_stride, qkv_stride; /* elements */
    size_t x, factors, qkv, attention, size;
    explicit Scratch(const clvp_fast_window_block *call) {
        const Windows windows = windows_of(call);
        const int64_t channels = channels_of(call), gap = GAP * sizeof(float);
        x_stride = channels + gap / sizeof(In), qkv_stride = 3 * channels + gap / sizeof(In);
        factor_stride = channels + gap / sizeof(Factor<In>);
        x = sizeof(Sums);
        factors = x + windows.places() * x_stride * sizeof(In);
        qkv = factors + windows.places() * factor_stride * sizeof(Factor<In>);
        attention = qkv + windows.places() * qkv_stride * sizeof(In);
        size = attention + sizeof(float) * scratch_of<In>(windows).size;
    }
};

/* Queries, keys and values of a head, side by side in the rows of a window; the result goes where the queries were. */
template <class In>
struct Rows {
    In *head;
    int64_t stride, channels;
    const In *q(int64_t place) const { return head + place * stride; }
    const In *k(int64_t place) const { return head + place * stride + channels; }
    const In *v(int64_t place) const { return head + place * stride + 2 * channels; }
    In *out(int64_t place) const { return head + place * stride; }
};

template <class In>
void run(const clvp_fast_window_block *call, const char *packed, int64_t item, char *scratch) {
    const Windows windows = windows_of(call);
    const Parts<In> parts(call);
    const Scratch<In> space(call);
    const int64_t channels = channels_of(call), places = windows.places(), image = item / windows.count();
    const Window window(windows, item % windows.count());
    const auto in_image = [&](int64_t place) {
        return ((image * windows.height + window.at[place].row) * windows.width + window.at[place].column) * channels;
    };
    const Norm<In> norm = {(const In *)call->norm_weight, (const In *)call->norm_bias, call->eps};
    Sums &sums = *(Sums *)scratch;
    const Matrix<In> x = {(In *)(scratch + space.x), space.x_stride};
    const Matrix<Factor<In>> factors = {(Factor<In> *)(scratch + space.factors), space.factor_stride};
    const Matrix<const Factor<In>> normed = {factors.first, factors.stride};
    for (int64_t place = 0; place < places; ++place) {
        memcpy(x.row(place), (const In *)call->x + in_image(place), channels * sizeof(In));
        layer_norm(x.row(place), norm, channels, factors.row(place));
    }
    const Matrix<In> qkv = {(In *)(scratch + space.qkv), space.qkv_stride};
    const auto multiply = [&](const Layer &layer, size_t at, Matrix<const Factor<In>> rows, Matrix<const In> added,
                              Matrix<In> out) {
        apply<In>(CLVP_FAST_NO_ACTIVATION, layer, (const In *)(packed + at), rows, places, added, out, sums);
    };
    multiply(parts.qkv, parts.qkv_at(), normed, {}, qkv);

    for (int64_t head = 0; head < windows.heads; ++head) {
        const Rows<In> rows = {qkv.first + head * windows.channels, qkv.stride, channels};
        attend<In>(windows, window, rows, (const float *)packed + head * parts.bias_size,
                   (float *)(scratch + space.attention));
    }
    Matrix<const Factor<In>> attended;
    if constexpr (std::is_same_v<In, Factor<In>>) {
        attended = {qkv.first, qkv.stride};
    } else {
        for (int64_t place = 0; place < places; ++place) widen(qkv.row(place), channels, factors.row(place));
        attended = normed;
    }
    multiply(parts.out, parts.out_at(), attended, {x.first, x.stride}, x);
    for (int64_t place = 0; place < places; ++place)
        memcpy((In *)call->out + in_image(place), x.row(place), channels * sizeof(In));
}

template <class In>
void pack(const clvp_fast_window_block *call, int64_t group, char *packed) {
    const Parts<In> parts(call);
    if (group < parts.heads) {
        const Bias<In> bias = {(const In *)call->bias, call->bias_strides};
        return bias.pack(windows_of(call), group, (float *)packed + group * parts.bias_size);
    }
    group -= parts.heads;
    if (group < parts.qkv.groups()) return pack_group(parts.qkv, group, (In *)(packed + parts.qkv_at()));
    pack_group(parts.out, group - parts.qkv.groups(), (In *)(packed + parts.out_at()));
}

bool is_float32(const clvp_fast_window_block *call) { return call->dtype == CLVP_FAST_FLOAT32; }

size_t packed_bytes(const clvp_fast_window_block *call) {
    return is_float32(call) ? Parts<float>(call).size() : Parts<uint16_t>(call).size();
}

size_t scratch_bytes(const clvp_fast_window_block *call) {
    return is_float32(call) ? Scratch<float>(call).size : Scratch<uint16_t>(call).size;
}

int64_t items(const clvp_fast_window_block *call) { return call->batch * windows_of(call).count(); }

/* The bias of a head, or a group of the weights' columns. */
int64_t groups(const clvp_fast_window_block *call) {
    const Parts<float> parts(call);
    return parts.heads + parts.qkv.groups() + parts.out.groups();
}

void pack_any(const clvp_fast_window_block *call, int64_t group, void *packed) {
    if (is_float32(call))
        pack<float>(call, group, (char *)packed);
    else
        pack<uint16_t>(call, group, (char *)packed);
}

void run_any(const clvp_fast_window_block *call, const void *packed, int64_t item, void *scratch) {
    if (is_float32(call))
        run<float>(call, (const char *)packed, item, (char *)scratch);
    else
        run<uint16_t>(call, (const char *)packed, item, (char *)scratch);
}

}  // namespace

const PackingKernel<clvp_fast_window_block> CLVP_FAST_OF(window_block, CLVP_FAST_ISA) = {
    items, packed_bytes, scratch_bytes, groups, pack_any, run_any};

}  // namespace clvp_fast
