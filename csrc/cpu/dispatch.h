/* Kernels, which are compiled once for each instruction set, and the choice among the sets at run time. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../clvp_fast.h"

namespace clvp_fast {

/* An operator on one instruction set: a call's work is items, which are computed in any order. Calls have passed their
 * check. */
template <class Call>
struct Kernel {
    int64_t (*items)(const Call *call);
    /* Scratch memory that a thread needs, as `share_out` gives it. */
    size_t (*scratch_bytes)(const Call *call);
    void (*run)(const Call *call, int64_t item, void *scratch);
};

/* `run` computes some frames of a row, `limit` brings all values of a row within top_db, after all items. */
struct LogMelKernel : Kernel<clvp_fast_log_mel> {
    void (*limit)(const clvp_fast_log_mel *call, int64_t row);
};

/* A kernel whose items share packed operands: groups of them are packed once, in any order, before the first item.
 * `packed` lies at a multiple of 64 bytes. */
template <class Call>
struct PackingKernel {
    int64_t (*items)(const Call *call);
    size_t (*packed_bytes)(const Call *call);
    size_t (*scratch_bytes)(const Call *call);
    int64_t (*groups)(const Call *call);
    void (*pack)(const Call *call, int64_t group, void *packed);
    void (*run)(const Call *call, const void *packed, int64_t item, void *scratch);
};

/* Stores the new keys and values of heads first_head .. end_head - 1 of a candidate, and attends with their queries. */
struct PagedDecodeKernel {
    size_t (*scratch_bytes)(const clvp_fast_paged_decode *call);
    void (*run)(const clvp_fast_paged_decode *call, int64_t candidate, int64_t first_head, int64_t end_head,
                void *scratch);
};

/* The kernels of one instruction set. */
struct Kernels {
    const char *isa;
    const LogMelKernel *log_mel;
    /* Over weights as they lie; over panels; over panels, with x in 8 bits. */
    const Kernel<clvp_fast_linear> *linear, *panel_linear, *int8_linear;
    const PackingKernel<clvp_fast_mlp> *mlp;
    const PackingKernel<clvp_fast_window_attention> *window_attention;
    const PackingKernel<clvp_fast_window_block> *window_block;
    const PagedDecodeKernel *paged_decode;
    const Kernel<clvp_fast_paged_prefill> *paged_prefill;
    const Kernel<clvp_fast_rotary_attention> *rotary_attention;
    const Kernel<clvp_fast_norm> *norm;
    const Kernel<clvp_fast_sample> *sample;
};

/* Returns the kernels of the instruction set `isa`, or null where the machine lacks it. For null it returns those that
 * were chosen, else those of the machine's best. */
const Kernels *find_kernels(const char *isa);
/* Chooses the kernels of later calls; null: the machine's best. */
void choose_kernels(const Kernels *kernels);

/* An operator's kernel on one instruction set by its name: CLVP_FAST_OF(linear, avx2) is linear_avx2. */
#define CLVP_FAST_JOIN(operator, isa) operator##_##isa
#define CLVP_FAST_OF(operator, isa) CLVP_FAST_JOIN(operator, isa)

#define CLVP_FAST_DECLARE(isa)                                                                  \
    extern const LogMelKernel CLVP_FAST_OF(log_mel, isa);                                       \
    extern const Kernel<clvp_fast_linear> CLVP_FAST_OF(linear, isa);                            \
    extern const Kernel<clvp_fast_linear> CLVP_FAST_OF(panel_linear, isa);                      \
    extern const Kernel<clvp_fast_linear> CLVP_FAST_OF(int8_linear, isa);                       \
    extern const PackingKernel<clvp_fast_mlp> CLVP_FAST_OF(mlp, isa);                           \
    extern const PackingKernel<clvp_fast_window_attention> CLVP_FAST_OF(window_attention, isa); \
    extern const PackingKernel<clvp_fast_window_block> CLVP_FAST_OF(window_block, isa);         \
    extern const PagedDecodeKernel CLVP_FAST_OF(paged_decode, isa);                             \
    extern const Kernel<clvp_fast_paged_prefill> CLVP_FAST_OF(paged_prefill, isa);              \
    extern const Kernel<clvp_fast_rotary_attention> CLVP_FAST_OF(rotary_attention, isa);        \
    extern const Kernel<clvp_fast_norm> CLVP_FAST_OF(norm, isa);                                \
    extern const Kernel<clvp_fast_sample> CLVP_FAST_OF(sample, isa);
CLVP_FAST_DECLARE(portable)
CLVP_FAST_DECLARE(avx2)
CLVP_FAST_DECLARE(avxvnni) /* of which products of 8 bits alone are compiled */
CLVP_FAST_DECLARE(avx512)
CLVP_FAST_DECLARE(avx512vnni) /* likewise */
CLVP_FAST_DECLARE(avx512bf16) /* of which products of bfloat16 alone are compiled */

}  // namespace clvp_fast
