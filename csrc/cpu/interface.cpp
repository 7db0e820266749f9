/* The functions of the C interface for a CPU: checks, the choice of an instruction set, the work shared out over
 * threads. */
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../check.h"
#include "dispatch.h"
#include "threads.h"

#define CLVP_FAST_EXPORT extern "C" __attribute__((visibility("default")))

using clvp_fast::share_out;

namespace {

#define CLVP_FAST_USABLE(name, isa, products)   \
    {name,                                      \
     &CLVP_FAST_OF(log_mel, isa),               \
     &CLVP_FAST_OF(linear, products),           \
     &CLVP_FAST_OF(mlp, products),              \
     &CLVP_FAST_OF(window_attention, products), \
     &CLVP_FAST_OF(window_block, products),     \
     CLVP_FAST_OF(attend, products),            \
     CLVP_FAST_OF(sample, isa)}

/* Those that this is compiled with and this CPU has, the best first. */
std::vector<clvp_fast_isa> usable_isas() {
    std::vector<clvp_fast_isa> usable;
#if defined(CLVP_FAST_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
#if defined(CLVP_FAST_HAS_AVX512BF16)
        if (__builtin_cpu_supports("avx512bf16")) usable.push_back(CLVP_FAST_USABLE("avx512bf16", avx512, avx512bf16));
#endif
        usable.push_back(CLVP_FAST_USABLE("avx512", avx512, avx512));
    }
#endif
#if defined(CLVP_FAST_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        usable.push_back(CLVP_FAST_USABLE("avx2", avx2, avx2));
#endif
    usable.push_back(CLVP_FAST_USABLE("portable", portable, portable));
    return usable;
}

/* Packs what a kernel's items share, and runs the items. */
template <class Call>
int run_packed(const clvp_fast_packing_isa<Call> &kernel, const Call *call, int64_t items, int32_t num_threads) {
    void *const packed = std::aligned_alloc(64, (kernel.packed_bytes(call) + 63) / 64 * 64);
    if (!packed) return CLVP_FAST_NO_MEMORY;
    share_out(kernel.groups(call), num_threads, 0, [&](void *, int64_t group) { kernel.pack(call, group, packed); });
    const auto run = [&](void *scratch, int64_t item) { kernel.run(call, packed, item, scratch); };
    const bool done = share_out(items, num_threads, kernel.scratch_bytes(call), run);
    std::free(packed);
    return done ? CLVP_FAST_OK : CLVP_FAST_NO_MEMORY;
}

int64_t length_of(const clvp_fast_log_mel &call, int64_t row) { return call.lengths ? call.lengths[row] : call.time; }

/* Raises what lies more than top_db under the loudest value of a row's true frames to it, and divides by the norms. */
template <class Real, class Feature>
void limit_range(const clvp_fast_log_mel &call, int64_t row) {
    Feature *features = static_cast<Feature *>(call.features) + row * call.num_mels * call.frames;
    const Real *norms = static_cast<const Real *>(call.mel_norms);
    const int64_t row_frames = 1 + length_of(call, row) / call.hop_length;
    Feature loudest = -INFINITY;
    for (int64_t mel = 0; mel < call.num_mels; ++mel)
        for (int64_t frame = 0; frame < row_frames; ++frame)
            loudest = std::fmax(loudest, features[mel * call.frames + frame]); /* of a number and NaN, the number */
    const Feature lowest = loudest - static_cast<Feature>(call.top_db);
    for (int64_t mel = 0; mel < call.num_mels; ++mel)
        for (int64_t frame = 0; frame < row_frames; ++frame) {
            Feature &value = features[mel * call.frames + frame];
            if (value < lowest) value = lowest;
            if (norms) value /= static_cast<Feature>(norms[mel]);
        }
}

}  // namespace

/* What calls that name no instruction set take; null for the machine's best. */
static std::atomic<const clvp_fast_isa *> chosen{nullptr};

const clvp_fast_isa *clvp_fast_find_isa(const char *name) {
    static const std::vector<clvp_fast_isa> usable = usable_isas();
    if (!name) {
        const clvp_fast_isa *const isa = chosen;
        return isa ? isa : &usable[0];
    }
    for (const clvp_fast_isa &isa : usable)
        if (!std::strcmp(name, isa.name)) return &isa;
    return nullptr;
}

CLVP_FAST_EXPORT const char *clvp_fast_cpu_isa(void) { return clvp_fast_find_isa(nullptr)->name; }

CLVP_FAST_EXPORT int clvp_fast_has_isa(const char *name) { return name && clvp_fast_find_isa(name); }

CLVP_FAST_EXPORT int clvp_fast_choose_isa(const char *name) {
    const clvp_fast_isa *const isa = name ? clvp_fast_find_isa(name) : nullptr;
    if (name && !isa) return CLVP_FAST_NO_ISA;
    chosen = isa;
    return CLVP_FAST_OK;
}

CLVP_FAST_EXPORT int clvp_fast_log_mel_cpu(const clvp_fast_log_mel *given, int32_t num_threads, const char *isa_name) {
    if (const int refused = clvp_fast_check_log_mel(given, 0)) return refused;
    const clvp_fast_isa *const isa = clvp_fast_find_isa(isa_name);
    if (!isa) return CLVP_FAST_NO_ISA;
    const clvp_fast_log_mel &call = *given;
    if (num_threads < 1) return CLVP_FAST_BAD_SIZE;
    int num_bins = 1;
    for (int32_t mel = 0; call.batch && mel < call.num_mels; ++mel) {
        const int32_t first = call.bands[2 * mel], end = call.bands[2 * mel + 1];
        const int32_t bins = call.n_fft / 2 + 1;
        if (first < 0 || first > bins || end < 0 || end > bins) return CLVP_FAST_BAD_BAND;
        if (end > num_bins) num_bins = end;
    }
    for (int64_t row = 0; row < call.batch; ++row)
        if (length_of(call, row) < 1 || length_of(call, row) > call.time) return CLVP_FAST_BAD_LENGTH;

    const int64_t block = isa->log_mel->frames(&call), blocks = (call.frames + block - 1) / block;
    const auto transform = [&](void *scratch, int64_t item) {
        const int64_t row = item / blocks, length = length_of(call, row);
        isa->log_mel->run(&call, row, length, 1 + length / call.hop_length, item % blocks * block, num_bins, scratch);
    };
    if (!share_out(call.batch * blocks, num_threads, isa->log_mel->scratch_bytes(&call), transform))
        return CLVP_FAST_NO_MEMORY;
    if (call.top_db >= 0) {
        const auto limit = [&](void *, int64_t row) {
            if (call.compute_dtype == CLVP_FAST_FLOAT32)
                limit_range<float, float>(call, row);
            else if (call.features_dtype == CLVP_FAST_FLOAT32)
                limit_range<double, float>(call, row);
            else
                limit_range<double, double>(call, row);
        };
        share_out(call.batch, num_threads, 0, limit);
    }
    return CLVP_FAST_OK;
}

CLVP_FAST_EXPORT int clvp_fast_paged_decode_cpu(const clvp_fast_paged_decode *call, int32_t num_threads,
                                                const char *isa_name) {
    if (const int refused = clvp_fast_check_paged_decode(call)) return refused;
    const clvp_fast_isa *const isa = clvp_fast_find_isa(isa_name);
    if (!isa) return CLVP_FAST_NO_ISA;
    if (num_threads < 1) return CLVP_FAST_BAD_SIZE;
    /* A thread costs as much as attending to some ten thousand channels. */
    const int64_t tokens = int64_t{call->page_size} * (call->max_pages + call->max_prefix_pages);
    const int64_t worth = 1 + call->num_candidates * call->num_heads * tokens * call->head_dim / (1 << 18);
    const int32_t threads = static_cast<int32_t>(worth < num_threads ? worth : num_threads);
    /* Heads of a token lie side by side, and the kernel fetches the next one's ahead: as many of a candidate stay
     * together as leaves each thread some items. */
    const int64_t parts = call->num_candidates ? 1 + (8 * threads - 1) / call->num_candidates : 1;
    const int64_t heads = (call->num_heads + parts - 1) / parts, items = (call->num_heads + heads - 1) / heads;
    const auto attend = [&](void *scratch, int64_t item) {
        const int64_t first = item % items * heads, end = first + heads;
        isa->attend(call, item / items, first, end < call->num_heads ? end : call->num_heads, scratch);
    };
    const bool done =
        share_out(call->num_candidates * items, num_threads, threads, clvp_fast_attend_scratch(call), attend);
    return done ? CLVP_FAST_OK : CLVP_FAST_NO_MEMORY;
}

CLVP_FAST_EXPORT int clvp_fast_linear_cpu(const clvp_fast_linear *call, int32_t num_threads, const char *isa_name) {
    if (const int refused = clvp_fast_check_linear(call)) return refused;
    const clvp_fast_isa *const isa = clvp_fast_find_isa(isa_name);
    if (!isa) return CLVP_FAST_NO_ISA;
    if (num_threads < 1) return CLVP_FAST_BAD_SIZE;
    if (call->rows == 0 || call->out_features == 0) return CLVP_FAST_OK;
    const auto run = [&](void *scratch, int64_t item) { isa->linear->run(call, item, scratch); };
    const bool done = share_out(isa->linear->items(call), num_threads, isa->linear->scratch_bytes(call), run);
    return done ? CLVP_FAST_OK : CLVP_FAST_NO_MEMORY;
}

CLVP_FAST_EXPORT int clvp_fast_mlp_cpu(const clvp_fast_mlp *call, int32_t num_threads, const char *isa_name) {
    if (const int refused = clvp_fast_check_mlp(call)) return refused;
    const clvp_fast_isa *const isa = clvp_fast_find_isa(isa_name);
    if (!isa) return CLVP_FAST_NO_ISA;
    if (num_threads < 1) return CLVP_FAST_BAD_SIZE;
    if (call->rows == 0 || call->out_features == 0) return CLVP_FAST_OK;
    const int64_t items = (call->rows + call->item_rows - 1) / call->item_rows;
    return run_packed(*isa->mlp, call, items, num_threads);
}

CLVP_FAST_EXPORT int clvp_fast_window_attention_cpu(const clvp_fast_window_attention *call, int32_t num_threads,
                                                    const char *isa_name) {
    if (const int refused = clvp_fast_check_window_attention(call)) return refused;
    const clvp_fast_isa *const isa = clvp_fast_find_isa(isa_name);
    if (!isa) return CLVP_FAST_NO_ISA;
    if (num_threads < 1) return CLVP_FAST_BAD_SIZE;
    const int64_t windows = (call->height / call->window) * (call->width / call->window);
    const int64_t items = call->batch * windows * call->num_heads;
    if (items == 0) return CLVP_FAST_OK;
    return run_packed(*isa->window_attention, call, items, num_threads);
}

CLVP_FAST_EXPORT int clvp_fast_window_block_cpu(const clvp_fast_window_block *call, int32_t num_threads,
                                                const char *isa_name) {
    if (const int refused = clvp_fast_check_window_block(call)) return refused;
    const clvp_fast_isa *const isa = clvp_fast_find_isa(isa_name);
    if (!isa) return CLVP_FAST_NO_ISA;
    if (num_threads < 1) return CLVP_FAST_BAD_SIZE;
    const int64_t items = call->batch * (call->height / call->window) * (call->width / call->window);
    if (items == 0) return CLVP_FAST_OK;
    return run_packed(*isa->window_block, call, items, num_threads);
}

CLVP_FAST_EXPORT int clvp_fast_sample_cpu(const clvp_fast_sample *call, int32_t num_threads, const char *isa_name) {
    if (const int refused = clvp_fast_check_sample(call)) return refused;
    const clvp_fast_isa *const isa = clvp_fast_find_isa(isa_name);
    if (!isa) return CLVP_FAST_NO_ISA;
    if (num_threads < 1) return CLVP_FAST_BAD_SIZE;
    const auto draw = [&](void *scratch, int64_t row) { isa->sample(call, row, scratch); };
    const size_t scratch_bytes = 2 * sizeof(float) * ((call->vocab_size + 15) / 16 * 16);
    return share_out(call->rows, num_threads, scratch_bytes, draw) ? CLVP_FAST_OK : CLVP_FAST_NO_MEMORY;
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
