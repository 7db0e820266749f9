/* The choice of an instruction set. */
#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <vector>

namespace clvp_fast {
namespace {

/* The set by its name, with the kernels of others where it has none of its own: products are of floating-point numbers,
 * integers of 8 bits. */
#define CLVP_FAST_KERNELS(name, isa, products, integers) \
    {name,                                               \
     &CLVP_FAST_OF(log_mel, isa),                        \
     &CLVP_FAST_OF(linear, products),                    \
     &CLVP_FAST_OF(panel_linear, products),              \
     &CLVP_FAST_OF(int8_linear, integers),               \
     &CLVP_FAST_OF(mlp, products),                       \
     &CLVP_FAST_OF(window_attention, products),          \
     &CLVP_FAST_OF(window_block, products),              \
     &CLVP_FAST_OF(paged_decode, products),              \
     &CLVP_FAST_OF(paged_prefill, products),             \
     &CLVP_FAST_OF(rotary_attention, products),          \
     &CLVP_FAST_OF(norm, products),                      \
     &CLVP_FAST_OF(sample, isa)}

/* Returns the kernels of the instruction sets that are compiled in and that this CPU has, the best first. */
std::vector<Kernels> usable_kernels() {
    std::vector<Kernels> usable;
#if defined(CLVP_FAST_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
#if defined(CLVP_FAST_HAS_AVX512VNNI)
        if (__builtin_cpu_supports("avx512vnni")) {
#if defined(CLVP_FAST_HAS_AVX512BF16)
            if (__builtin_cpu_supports("avx512bf16"))
                usable.push_back(CLVP_FAST_KERNELS("avx512bf16", avx512, avx512bf16, avx512vnni));
#endif
            usable.push_back(CLVP_FAST_KERNELS("avx512vnni", avx512, avx512, avx512vnni));
        }
#endif
        usable.push_back(CLVP_FAST_KERNELS("avx512", avx512, avx512, avx512));
    }
#endif
#if defined(CLVP_FAST_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
#if defined(CLVP_FAST_HAS_AVXVNNI)
        if (__builtin_cpu_supports("avxvnni")) usable.push_back(CLVP_FAST_KERNELS("avxvnni", avx2, avx2, avxvnni));
#endif
        usable.push_back(CLVP_FAST_KERNELS("avx2", avx2, avx2, avx2));
    }
#endif
    usable.push_back(CLVP_FAST_KERNELS("portable", portable, portable, portable));
    return usable;
}

std::atomic<const Kernels *> chosen{nullptr};

}  // namespace

const Kernels *find_kernels(const char *isa) {
    static const std::vector<Kernels> usable = usable_kernels();
    if (!isa) {
        const Kernels *const kernels = chosen;
        return kernels ? kernels : &usable[0];
    }
    for (const Kernels &kernels : usable)
        if (!std::strcmp(isa, kernels.isa)) return &kernels;
    return nullptr;
}

void choose_kernels(const Kernels *kernels) { chosen = kernels; }

}  // namespace clvp_fast
