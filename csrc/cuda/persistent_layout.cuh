/* The layout of work, shared memory and workspace of the persistent decode step. */
#pragma once

#include <math.h>

#include "../clvp_fast.h"
#include "../inline.h"
#include "halves.cuh"

namespace clvp_fast {

/* A block is 16 warps, one block a multiprocessor. */
constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int HEAD_DIM = 64;

/* A product's rows are dealt to the blocks in one piece each. In a block, a warp has SLICE channels of several rows:
 * 16 bytes a lane, HELD_ROWS * PASSES of them in registers before its input is there. */
constexpr int HELD_ROWS = 4, PASSES = 2, HALVES = 8, SLICE = 32 * HALVES * PASSES;

/* Attention deals parts of PART_KEYS keys of a head to teams of four warps, each with WARP_KEYS keys. */
constexpr int WARP_KEYS = 32, TEAM_WARPS = 4, TEAMS = WARPS / TEAM_WARPS, PART_KEYS = WARP_KEYS * TEAM_WARPS;
constexpr int KEY_LANES = HEAD_DIM / HALVES; /* lanes that hold a key, and keys that a lane holds 8 channels of */

/* Channels of a row that a thread holds while the row is normed. */
constexpr int NORM_ITEMS = 4, MAX_HIDDEN = NORM_ITEMS * THREADS;

/* 16 bytes: 8 numbers of a half type. */
struct alignas(16) Halves {
    uint32_t words[4];
};

struct BFloat16 {
    static CLVP_FAST_HOST_DEVICE float widen(uint16_t bits) { return of_bfloat16(bits); }
    static CLVP_FAST_HOST_DEVICE uint16_t narrow(float value) { return bfloat16_of(value); }
};
struct Float16 {
    static CLVP_FAST_HOST_DEVICE float widen(uint16_t bits) { return of_float16(bits); }
    static CLVP_FAST_HOST_DEVICE uint16_t narrow(float value) { return float16_of(value); }
};

template <class T>
CLVP_FAST_INLINE float element(const Halves &halves, int index) {
    const uint32_t word = halves.words[index / 2];
    return T::widen(uint16_t(index % 2 ? word >> 16 : word));
}

/* The places of a candidate's tokens. */
struct Candidate {
    const int32_t *own_pages, *prefix_pages;
    int own, prefix; /* tokens in own pages, the new one last if the table has a place for it, and of the prefix */
    int stored;      /* both without the new one; all are 0 where the candidate is inactive */
    int token, position;
};

/* The softmax of a warp's keys; their values times the weights are one row of `mixed`. */
struct Found {
    float top, total;
};

/* Shared memory of a block that works for N candidates; their input of a product and the layers stand behind it. */
template <int N>
struct PersistentShared {
    Candidate candidates[N];
    float *before, *between; /* the residual before and between a layer's two parts, [num_candidates, hidden_size] */
    uint16_t *qkv, *inner;   /* [num_candidates, 3 * hidden_size], [num_candidates, intermediate_size] */
    Found *found_parts;      /* [num_candidates, num_heads, most_parts] */
    float *mixed_parts;      /* the same with HEAD_DIM channels each */
    float statistics[2][WARPS][N];
    float sums[WARPS * HELD_ROWS * N];
    Found found[WARPS];
    float mixed[WARPS][HEAD_DIM];
};

/* Places in the workspace, in bytes. */
struct Workspace {
    int64_t before, between, qkv, inner, found, mixed, end; /* the residual before and between a layer's two parts */
};

CLVP_FAST_INLINE int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

/* The most parts that a candidate's keys can have. */
CLVP_FAST_INLINE int most_parts(const clvp_fast_persistent_decode &call) {
    const int64_t pages = int64_t(call.max_pages) + (call.prefix_table ? call.max_prefix_pages : 0);
    return int((pages * call.page_size + PART_KEYS - 1) / PART_KEYS);
}

CLVP_FAST_INLINE Workspace workspace_of(const clvp_fast_persistent_decode &call) {
    const int64_t candidates = call.num_candidates, hidden = call.hidden_size;
    const int64_t parts = candidates * (hidden / HEAD_DIM) * most_parts(call);
    Workspace at;
    at.before = 256; /* the barrier's counter comes first */
    at.between = at.before + aligned(4 * candidates * hidden);
    at.qkv = at.between + aligned(4 * candidates * hidden);
    at.inner = at.qkv + aligned(2 * 3 * candidates * hidden);
    at.found = at.inner + aligned(2 * candidates * call.intermediate_size);
    at.mixed = at.found + aligned(int64_t(sizeof(Found)) * parts);
    at.end = at.mixed + aligned(4 * HEAD_DIM * parts);
    return at;
}

/* Bytes of the input of a product, of the widest one. */
template <int N>
CLVP_FAST_INLINE int64_t input_bytes(const clvp_fast_persistent_decode &call) {
    const int widest = call.hidden_size > call.intermediate_size ? call.hidden_size : call.intermediate_size;
    return 2 * int64_t(N) * widest;
}

template <int N>
CLVP_FAST_INLINE int64_t shared_bytes(const clvp_fast_persistent_decode &call) {
    return int64_t(aligned(sizeof(PersistentShared<N>))) + aligned(input_bytes<N>(call)) +
           int64_t(sizeof(clvp_fast_decoder_layer)) * call.num_layers;
}

}  // namespace clvp_fast
