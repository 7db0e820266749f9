/* The functions of the C interface for a CPU: checks, and the work of a call shared out over threads. */
#include <cstdlib>
#include <memory>
#include <new>

#include "../check.h"
#include "calls.h"
#include "dispatch.h"
#include "threads.h"

#define CLVP_FAST_EXPORT extern "C" __attribute__((visibility("default")))

using namespace clvp_fast;

namespace {

/* Finds the kernels that a call runs on, by the result of its check, or returns why it is refused. */
int kernels_for(int refused, int32_t num_threads, const char *isa, const Kernels *&kernels) {
    if (refused) return refused;
    kernels = find_kernels(isa);
    if (!kernels) return CLVP_FAST_NO_ISA;
    return num_threads < 1 ? CLVP_FAST_BAD_SIZE : CLVP_FAST_OK;
}

template <class Call>
int run_items(const Kernel<Call> &kernel, const Call *call, int64_t items, int32_t num_threads) {
    const Items<Call> work = {kernel, call};
    return share_out(items, num_threads, work.scratch_bytes(), work) ? CLVP_FAST_OK : CLVP_FAST_NO_MEMORY;
}

template <class Call>
int run_items(const PackingKernel<Call> &kernel, const Call *call, int64_t items, int32_t num_threads) {
    void *const packed = std::aligned_alloc(64, (kernel.packed_bytes(call) + 63) / 64 * 64);
    if (!packed) return CLVP_FAST_NO_MEMORY;
    share_out(kernel.groups(call), num_threads, 0, [&](void *, int64_t group) { kernel.pack(call, group, packed); });
    const auto run = [&](void *scratch, int64_t item) { kernel.run(call, packed, item, scratch); };
    const bool done = share_out(items, num_threads, kernel.scratch_bytes(call), run);
    std::free(packed);
    return done ? CLVP_FAST_OK : CLVP_FAST_NO_MEMORY;
}

/* A whole call, by the result of its check and the kernel that serves it. */
template <class KernelOfCall, class Call>
int serve(int refused, const KernelOfCall *Kernels::*which, const Call *call, int32_t num_threads, const char *isa) {
    const Kernels *kernels;
    if (const int code = kernels_for(refused, num_threads, isa, kernels)) return code;
    const KernelOfCall &kernel = *(kernels->*which);
    const int64_t items = kernel.items(call);
    return items ? run_items(kernel, call, items, num_threads) : CLVP_FAST_OK;
}

/* Checks the values of bands and lengths, which check.h does not read. */
int check_values(const clvp_fast_log_mel &call) {
    for (int32_t mel = 0; call.batch && mel < call.num_mels; ++mel) {
        const int32_t first = call.bands[2 * mel], end = call.bands[2 * mel + 1];
        const int32_t bins = call.n_fft / 2 + 1;
        if (first < 0 || first > bins || end < 0 || end > bins) return CLVP_FAST_BAD_BAND;
    }
    for (int64_t row = 0; call.lengths && row < call.batch; ++row)
        if (call.lengths[row] < 1 || call.lengths[row] > call.time) return CLVP_FAST_BAD_LENGTH;
    return CLVP_FAST_OK;
}

}  // namespace

CLVP_FAST_EXPORT const char *clvp_fast_cpu_isa(void) { return find_kernels(nullptr)->isa; }

CLVP_FAST_EXPORT int clvp_fast_has_isa(const char *name) { return name && find_kernels(name); }

CLVP_FAST_EXPORT int clvp_fast_choose_isa(const char *name) {
    const Kernels *const kernels = name ? find_kernels(name) : nullptr;
    if (name && !kernels) return CLVP_FAST_NO_ISA;
    choose_kernels(kernels);
    return CLVP_FAST_OK;
}

CLVP_FAST_EXPORT int clvp_fast_log_mel_cpu(const clvp_fast_log_mel *call, int32_t num_threads, const char *isa) {
    const Kernels *kernels;
    if (const int code = kernels_for(clvp_fast_check_log_mel(call, 0), num_threads, isa, kernels)) return code;
    if (const int code = check_values(*call)) return code;
    const LogMelKernel &kernel = *kernels->log_mel;
    if (const int code = run_items(kernel, call, kernel.items(call), num_threads)) return code;
    if (call->top_db >= 0)
        share_out(call->batch, num_threads, 0, [&](void *, int64_t row) { kernel.limit(call, row); });
    return CLVP_FAST_OK;
}

CLVP_FAST_EXPORT int clvp_fast_paged_decode_cpu(const clvp_fast_paged_decode *call, int32_t num_threads,
                                                const char *isa) {
    const Kernels *kernels;
    if (const int code = kernels_for(clvp_fast_check_paged_decode(call), num_threads, isa, kernels)) return code;
    const DecodeItems items(*kernels->paged_decode, call, num_threads);
    const bool done = share_out(items.count(), num_threads, items.threads, items.scratch_bytes(), items);
    return done ? CLVP_FAST_OK : CLVP_FAST_NO_MEMORY;
}

CLVP_FAST_EXPORT int clvp_fast_paged_prefill_cpu(const clvp_fast_paged_prefill *call, int32_t num_threads,
                                                 const char *isa) {
    return serve(clvp_fast_check_paged_prefill(call), &Kernels::paged_prefill, call, num_threads, isa);
}

CLVP_FAST_EXPORT int clvp_fast_rotary_attention_cpu(const clvp_fast_rotary_attention *call, int32_t num_threads,
                                                    const char *isa) {
    return serve(clvp_fast_check_rotary_attention(call), &Kernels::rotary_attention, call, num_threads, isa);
}

CLVP_FAST_EXPORT int clvp_fast_linear_cpu(const clvp_fast_linear *call, int32_t num_threads, const char *isa) {
    return serve(clvp_fast_check_linear(call), kernel_of(call), call, num_threads, isa);
}

CLVP_FAST_EXPORT int clvp_fast_mlp_cpu(const clvp_fast_mlp *call, int32_t num_threads, const char *isa) {
    return serve(clvp_fast_check_mlp(call), &Kernels::mlp, call, num_threads, isa);
}

CLVP_FAST_EXPORT int clvp_fast_norm_cpu(const clvp_fast_norm *call, int32_t num_threads, const char *isa) {
    return serve(clvp_fast_check_norm(call), &Kernels::norm, call, num_threads, isa);
}

CLVP_FAST_EXPORT int clvp_fast_window_attention_cpu(const clvp_fast_window_attention *call, int32_t num_threads,
                                                    const char *isa) {
    return serve(clvp_fast_check_window_attention(call), &Kernels::window_attention, call, num_threads, isa);
}

CLVP_FAST_EXPORT int clvp_fast_window_block_cpu(const clvp_fast_window_block *call, int32_t num_threads,
                                                const char *isa) {
    return serve(clvp_fast_check_window_block(call), &Kernels::window_block, call, num_threads, isa);
}

CLVP_FAST_EXPORT int clvp_fast_sample_cpu(const clvp_fast_sample *call, int32_t num_threads, const char *isa) {
    return serve(clvp_fast_check_sample(call), &Kernels::sample, call, num_threads, isa);
}

CLVP_FAST_EXPORT int clvp_fast_calls_cpu(const clvp_fast_call *calls, int64_t count, int32_t num_threads,
                                         const char *isa) {
    const Kernels *kernels;
    const int refused = !calls                         ? CLVP_FAST_NULL_POINTER
                        : count < 0 || count > 1 << 20 ? CLVP_FAST_BAD_SIZE
                                                       : CLVP_FAST_OK;
    if (const int code = kernels_for(refused, num_threads, isa, kernels)) return code;
    const std::unique_ptr<Part[]> parts(new (std::nothrow) Part[count]);
    const std::unique_ptr<Task[]> tasks(new (std::nothrow) Task[count]);
    if (!parts || !tasks) return CLVP_FAST_NO_MEMORY;
    for (int64_t i = 0; i < count; ++i) {
        parts[i] = {kernels, calls + i, num_threads};
        if (const int code = parts[i].check()) return code;
        parts[i].with_items([&](const auto &items) { tasks[i].set(items.count(), items.scratch_bytes(), parts[i]); });
    }
    return share_out(tasks.get(), count, num_threads, num_threads) ? CLVP_FAST_OK : CLVP_FAST_NO_MEMORY;
}

CLVP_FAST_EXPORT const char *clvp_fast_error(int code) {
    switch (code) {
        case CLVP_FAST_OK: return "no error";
        case CLVP_FAST_NULL_POINTER: return "a pointer that must be set is null";
        case CLVP_FAST_MISALIGNED: return "a pointer is not a multiple of its element's size";
        case CLVP_FAST_BAD_SIZE: return "a size, stride, floor or number of threads is out of range";
        case CLVP_FAST_BAD_DTYPE: return "a dtype is not one that the function takes";
        case CLVP_FAST_BAD_LENGTH: return "a row's length is not in 1 .. time";
        case CLVP_FAST_BAD_BAND: return "a channel's band does not lie within the bins";
        case CLVP_FAST_NO_MEMORY: return "memory could not be had";
        case CLVP_FAST_NO_ISA: return "this machine does not have the instruction set that was named";
    }
    return "an unknown code";
}
