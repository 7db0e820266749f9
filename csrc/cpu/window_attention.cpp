/* Attention in windows, on a CPU: an item is one head of one window. Compiled once for each instruction set, as
 * log_mel.cpp is. */
#include "window_attention.h"

#include "dispatch.h"

namespace clvp_fast {
namespace {

Windows windows_of(const clvp_fast_window_attention *call) {
    return {call->height, call->width, call->window, call->shift, call->num_heads, call->head_dim, call->scale};
}

/* Where the channels of a head begin, place by place of a window. */
template <class In>
struct Rows {
    const clvp_fast_window_attention *call;
    const Window &window;
    int64_t image, head;
    const In *row(const void *from, const int64_t *strides, int64_t place) const {
        const Place &at = window.at[place];
        return (const In *)from + image * strides[0] + at.row * strides[1] + at.column * strides[2] + head * strides[3];
    }
    const In *q(int64_t place) const { return row(call->q, call->q_strides, place); }
    const In *k(int64_t place) const { return row(call->k, call->k_strides, place); }
    const In *v(int64_t place) const { return row(call->v, call->v_strides, place); }
    In *out(int64_t place) const {
        const Place &at = window.at[place];
        const int64_t row = (image * call->height + at.row) * call->width + at.column;
        return (In *)call->out + (row * call->num_heads + head) * call->head_dim;
    }
};

template <class In>
void run(const clvp_fast_window_attention *call, const float *packed, int64_t item, float *scratch) {
    const Windows windows = windows_of(call);
    const int64_t head = item % windows.heads, number = item / windows.heads;
    const Window window(windows, number % windows.count());
    const Rows<In> rows = {call, window, number / windows.count(), head};
    attend<In>(windows, window, rows, packed + head * Bias<In>::packed_size(windows), scratch);
}

size_t packed_bytes(const clvp_fast_window_attention *call) {
    return sizeof(float) * call->num_heads * Bias<float>::packed_size(windows_of(call));
}

size_t scratch_bytes(const clvp_fast_window_attention *call) {
    const Windows windows = windows_of(call);
    return sizeof(float) *
           (call->dtype == CLVP_FAST_FLOAT32 ? scratch_of<float>(windows).size : scratch_of<uint16_t>(windows).size);
}

int64_t items(const clvp_fast_window_attention *call) {
    return call->batch * windows_of(call).count() * call->num_heads;
}

/* The bias of a head. */
int64_t groups(const clvp_fast_window_attention *call) { return call->num_heads; }

void pack_any(const clvp_fast_window_attention *call, int64_t head, void *packed) {
    const Windows windows = windows_of(call);
    float *const to = (float *)packed + head * Bias<float>::packed_size(windows);
    if (call->bias_dtype == CLVP_FAST_FLOAT32)
        Bias<float>{(const float *)call->bias, call->bias_strides}.pack(windows, head, to);
    else
        Bias<uint16_t>{(const uint16_t *)call->bias, call->bias_strides}.pack(windows, head, to);
}

void run_any(const clvp_fast_window_attention *call, const void *packed, int64_t item, void *scratch) {
    if (call->dtype == CLVP_FAST_FLOAT32)
        run<float>(call, (const float *)packed, item, (float *)scratch);
    else
        run<uint16_t>(call, (const float *)packed, item, (float *)scratch);
}

}  // namespace

const PackingKernel<clvp_fast_window_attention> CLVP_FAST_OF(window_attention, CLVP_FAST_ISA) = {
    items, packed_bytes, scratch_bytes, groups, pack_any, run_any};

}  // namespace clvp_fast
