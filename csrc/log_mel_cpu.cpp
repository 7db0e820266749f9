/* Log-mel on a CPU: checks, the choice of an instruction set, and the work shared out over threads. */
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "check.h"
#include "log_mel_isa.h"

#define CLVP_FAST_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

/* The instruction sets that this machine has, the best first. */
std::vector<const clvp_fast_isa *> usable_isas() {
    std::vector<const clvp_fast_isa *> usable;
#if !defined(CLVP_FAST_PORTABLE_ONLY)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        usable.push_back(&clvp_fast_isa_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable.push_back(&clvp_fast_isa_avx2);
#endif
    usable.push_back(&clvp_fast_isa_portable);
    return usable;
}

/* The one called `name`, the best for null, or null where the machine lacks it. */
const clvp_fast_isa *find_isa(const char *name) {
    static const std::vector<const clvp_fast_isa *> usable = usable_isas();
    for (const clvp_fast_isa *isa : usable)
        if (!name || !std::strcmp(name, isa->name)) return isa;
    return nullptr;
}

int64_t length_of(const clvp_fast_log_mel &call, int64_t row) { return call.lengths ? call.lengths[row] : call.time; }

/* Calls work(thread's scratch, item) for items 0 .. count - 1 on at most num_threads threads; false if memory is short.
 */
template <class Work>
bool share_out(int64_t count, int32_t num_threads, size_t scratch_bytes, const Work &work) {
    std::atomic<int64_t> next{0};
    /* A few items at a time, so that the threads do not wait for one another at the counter. */
    const int64_t step = 1 + count / (64 * (int64_t)num_threads);
    const auto loop = [&] {
        void *scratch = scratch_bytes ? std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64) : nullptr;
        if (scratch_bytes && !scratch) return; /* The other threads do all of the work, if there are any. */
        for (int64_t first; (first = next.fetch_add(step, std::memory_order_relaxed)) < count;)
            for (int64_t item = first; item < first + step && item < count; ++item) work(scratch, item);
        std::free(scratch);
    };
    std::vector<std::thread> threads;
    try {
        for (int64_t i = 1; i < num_threads && i < (count + step - 1) / step; ++i) threads.emplace_back(loop);
    } catch (const std::exception &) {
        /* The threads that there are do all of the work. */
    }
    loop();
    for (std::thread &thread : threads) thread.join();
    return next >= count;
}

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

CLVP_FAST_EXPORT const char *clvp_fast_cpu_isa(void) { return find_isa(nullptr)->name; }

CLVP_FAST_EXPORT int clvp_fast_log_mel_cpu(const clvp_fast_log_mel *call, int32_t num_threads) {
    return clvp_fast_log_mel_cpu_isa(call, num_threads, nullptr);
}

CLVP_FAST_EXPORT int clvp_fast_log_mel_cpu_isa(const clvp_fast_log_mel *given, int32_t num_threads,
                                               const char *isa_name) {
    if (const int refused = clvp_fast_check(given, 0)) return refused;
    const clvp_fast_isa *const isa = find_isa(isa_name);
    if (!isa) return CLVP_FAST_NO_ISA;
    const clvp_fast_log_mel &call = *given;
    if (num_threads < 1) return CLVP_FAST_BAD_SIZE;
    int num_bins = 1;
    for (int32_t mel = 0; call.batch && mel < call.num_mels; ++mel) {
        const int32_t first = call.bands[2 * mel], end = call.bands[2 * mel + 1];
        if (first < 0 || end > call.n_fft / 2 + 1) return CLVP_FAST_BAD_BAND;
        if (end > num_bins) num_bins = end;
    }
    for (int64_t row = 0; row < call.batch; ++row)
        if (length_of(call, row) < 1 || length_of(call, row) > call.time) return CLVP_FAST_BAD_LENGTH;

    const int64_t block = isa->frames(&call), blocks = (call.frames + block - 1) / block;
    const auto transform = [&](void *scratch, int64_t item) {
        const int64_t row = item / blocks, length = length_of(call, row);
        isa->run(&call, row, length, 1 + length / call.hop_length, item % blocks * block, num_bins, scratch);
    };
    if (!share_out(call.batch * blocks, num_threads, isa->scratch_bytes(&call), transform)) return CLVP_FAST_NO_MEMORY;
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
    return code > 0 ? "a CUDA error, see its number" : "an unknown code";
}
