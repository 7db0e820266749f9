/* The code that is compiled once for each instruction set, and the choice among them at run time. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../clvp_fast.h"

/* Log-mel of a block of frames of one row. */
struct clvp_fast_log_mel_isa {
    /* How many frames a block has. */
    int64_t (*frames)(const struct clvp_fast_log_mel *call);
    /* Scratch memory that a block needs, aligned to 64 bytes. */
    size_t (*scratch_bytes)(const struct clvp_fast_log_mel *call);
    /* Computes frames first_frame .. of a row of which `length` samples and `row_frames` frames are true, before
     * top_db. num_bins: one past the last bin of any band. */
    void (*run)(const struct clvp_fast_log_mel *call, int64_t row, int64_t length, int64_t row_frames,
                int64_t first_frame, int num_bins, void *scratch);
};

/* Stores the new keys and values of heads first_head .. end_head - 1 of a candidate, and attends with their queries.
 * scratch: see clvp_fast_attend_scratch. */
typedef void (*clvp_fast_attend)(const struct clvp_fast_paged_decode *call, int64_t candidate, int64_t first_head,
                                 int64_t end_head, void *scratch);

/* A linear layer, whose items are computed in any order. */
struct clvp_fast_linear_isa {
    /* Scratch memory that a thread needs, as `share_out` gives it. */
    size_t (*scratch_bytes)(const struct clvp_fast_linear *call);
    int64_t (*items)(const struct clvp_fast_linear *call);
    void (*run)(const struct clvp_fast_linear *call, int64_t item, void *scratch);
};

/* A kernel whose items share what is packed: groups of it are packed once in any order, then items are computed in any
 * order. */
template <class Call>
struct clvp_fast_packing_isa {
    size_t (*packed_bytes)(const Call *call);
    /* Scratch memory that a thread needs, aligned to 64 bytes, as `packed` is. */
    size_t (*scratch_bytes)(const Call *call);
    int64_t (*groups)(const Call *call);
    void (*pack)(const Call *call, int64_t group, void *packed);
    void (*run)(const Call *call, const void *packed, int64_t item, void *scratch);
};

/* Groups of the weights' columns; items of item_rows rows. */
using clvp_fast_mlp_isa = clvp_fast_packing_isa<clvp_fast_mlp>;
/* The bias of a head; for each image, for each window, each head. */
using clvp_fast_window_attention_isa = clvp_fast_packing_isa<clvp_fast_window_attention>;
/* The bias of a head, or a group of the weights' columns; for each image, each window. */
using clvp_fast_window_block_isa = clvp_fast_packing_isa<clvp_fast_window_block>;

/* Draws the token of a row. scratch: two floats for each token of the vocabulary, which is rounded up to 16. */
typedef void (*clvp_fast_sample_row)(const struct clvp_fast_sample *call, int64_t row, void *scratch);

struct clvp_fast_isa {
    const char *name;
    const struct clvp_fast_log_mel_isa *log_mel;
    const struct clvp_fast_linear_isa *linear;
    const clvp_fast_mlp_isa *mlp;
    const clvp_fast_window_attention_isa *window_attention;
    const clvp_fast_window_block_isa *window_block;
    clvp_fast_attend attend;
    clvp_fast_sample_row sample;
};

/* The instruction set called `name`, the machine's best for null; null where the machine lacks it. */
const struct clvp_fast_isa *clvp_fast_find_isa(const char *name);

/* Name of what one instruction set offers: CLVP_FAST_OF(log_mel, avx2) is clvp_fast_log_mel_avx2. */
#define CLVP_FAST_JOIN(what, isa) clvp_fast_##what##_##isa
#define CLVP_FAST_OF(what, isa) CLVP_FAST_JOIN(what, isa)

#define CLVP_FAST_DECLARE(isa)                                                                                       \
    extern const struct clvp_fast_log_mel_isa CLVP_FAST_OF(log_mel, isa);                                            \
    extern const struct clvp_fast_linear_isa CLVP_FAST_OF(linear, isa);                                              \
    extern const clvp_fast_mlp_isa CLVP_FAST_OF(mlp, isa);                                                           \
    extern const clvp_fast_window_attention_isa CLVP_FAST_OF(window_attention, isa);                                 \
    extern const clvp_fast_window_block_isa CLVP_FAST_OF(window_block, isa);                                         \
    void CLVP_FAST_OF(attend, isa)(const struct clvp_fast_paged_decode *call, int64_t candidate, int64_t first_head, \
                                   int64_t end_head, void *scratch);                                                 \
    void CLVP_FAST_OF(sample, isa)(const struct clvp_fast_sample *call, int64_t row, void *scratch);
CLVP_FAST_DECLARE(portable)
CLVP_FAST_DECLARE(avx2)
CLVP_FAST_DECLARE(avx512)
CLVP_FAST_DECLARE(avx512bf16) /* of which products of bfloat16 alone are compiled */
