/* The items of work of calls on a CPU, and of calls that are made together. */
#pragma once

#include "../check.h"
#include "dispatch.h"

namespace clvp_fast {

/* The items of most calls are those of their kernel. */
template <class Call>
struct Items {
    const Kernel<Call> &kernel;
    const Call *call;
    int64_t count() const { return kernel.items(call); }
    size_t scratch_bytes() const { return kernel.scratch_bytes(call); }
    void operator()(void *scratch, int64_t item) const { kernel.run(call, item, scratch); }
};

/* Those of a decode step are candidates, with some of their heads. */
struct DecodeItems {
    const PagedDecodeKernel &kernel;
    const clvp_fast_paged_decode *call;
    int32_t threads; /* that the step is worth */
    int64_t heads, parts;
    DecodeItems(const PagedDecodeKernel &of, const clvp_fast_paged_decode *step, int32_t num_threads)
        : kernel(of), call(step) {
        /* A thread costs as much as attending to some ten thousand channels. */
        const int64_t tokens = int64_t{call->page_size} * (call->max_pages + call->max_prefix_pages);
        const int64_t worth = 1 + call->num_candidates * call->num_heads * tokens * call->head_dim / (1 << 18);
        threads = static_cast<int32_t>(worth < num_threads ? worth : num_threads);
        /* Heads of a token lie side by side, and long runs are read fastest: as many of a candidate stay together as
         * leaves each thread two items. */
        const int64_t most = call->num_candidates ? 1 + (2 * threads - 1) / call->num_candidates : 1;
        heads = (call->num_heads + most - 1) / most;
        parts = (call->num_heads + heads - 1) / heads;
    }
    int64_t count() const { return call->num_candidates * parts; }
    size_t scratch_bytes() const { return kernel.scratch_bytes(call); }
    void operator()(void *scratch, int64_t item) const {
        const int64_t first = item % parts * heads, end = first + heads;
        kernel.run(call, item / parts, first, end < call->num_heads ? end : call->num_heads, scratch);
    }
};

/* The kernel of a linear layer, which may be null. */
inline const Kernel<clvp_fast_linear> *Kernels::*kernel_of(const clvp_fast_linear *call) {
    if (!call || !call->panels) return &Kernels::linear;
    return call->int8_x ? &Kernels::int8_linear : &Kernels::panel_linear;
}

/* One of the calls that are made together. */
struct Part {
    const Kernels *kernels;
    const clvp_fast_call *of;
    int32_t num_threads;
    int check() const {
        switch (of->operation) {
            case CLVP_FAST_PAGED_DECODE: return clvp_fast_check_paged_decode(of->paged_decode);
            case CLVP_FAST_LINEAR: return clvp_fast_check_linear(of->linear);
            case CLVP_FAST_NORM: return clvp_fast_check_norm(of->norm);
        }
        return CLVP_FAST_BAD_SIZE;
    }
    /* Calls use(items), where they were checked. */
    template <class Use>
    void with_items(const Use &use) const {
        switch (of->operation) {
            case CLVP_FAST_PAGED_DECODE: return use(DecodeItems(*kernels->paged_decode, of->paged_decode, num_threads));
            case CLVP_FAST_LINEAR: return use(Items<clvp_fast_linear>{*(kernels->*kernel_of(of->linear)), of->linear});
            case CLVP_FAST_NORM: return use(Items<clvp_fast_norm>{*kernels->norm, of->norm});
        }
    }
    void operator()(void *scratch, int64_t item) const {
        with_items([&](const auto &items) { items(scratch, item); });
    }
};

}  // namespace clvp_fast
