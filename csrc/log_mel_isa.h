/* What csrc/log_mel_isa.cpp offers, compiled once for each instruction set; log_mel_cpu.cpp chooses one at run time. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "clvp_fast.h"

/* frames: how many frames a task computes at once. scratch_bytes: memory that a task needs, aligned to 64 bytes.
 * run: computes frames first_frame .. of a row of which `length` samples and `row_frames` frames are true, before
 * top_db. num_bins: one past the last bin of any band. */
struct clvp_fast_isa {
    const char *name;
    int64_t (*frames)(const struct clvp_fast_log_mel *call);
    size_t (*scratch_bytes)(const struct clvp_fast_log_mel *call);
    void (*run)(const struct clvp_fast_log_mel *call, int64_t row, int64_t length, int64_t row_frames,
                int64_t first_frame, int num_bins, void *scratch);
};

extern const struct clvp_fast_isa clvp_fast_isa_portable;
#ifndef CLVP_FAST_PORTABLE_ONLY
extern const struct clvp_fast_isa clvp_fast_isa_avx2;
extern const struct clvp_fast_isa clvp_fast_isa_avx512;
#endif
