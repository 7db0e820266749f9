/* The sequences of a ragged batch, whose queries are shared out in blocks. */
#pragma once

#include <stdint.h>

#include "../inline.h"

namespace clvp_fast {
namespace {

/* Calls body(sequence, first row, one past the last) for each sequence that has rows and begins behind the one before;
 * others are left out. */
template <class Body>
CLVP_FAST_INLINE void each_sequence(const int32_t *cu_seqlens, int64_t count, int64_t rows, const Body &body) {
    int64_t behind = 0;
    for (int64_t sequence = 0; sequence < count; ++sequence) {
        const int64_t start = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
        if (start < behind || end <= start || end > rows) continue;
        body(sequence, start, end);
        behind = end;
    }
}

/* Up to `size` rows of a sequence, from `first` to before `end`; the sequence begins at `start`. */
struct Block {
    int64_t sequence, start, first, end;
};

inline int64_t blocks_of(int64_t rows, int64_t size) { return (rows + size - 1) / size; }

inline int64_t count_blocks(const int32_t *cu_seqlens, int64_t count, int64_t rows, int64_t size) {
    int64_t blocks = 0;
    each_sequence(cu_seqlens, count, rows, [&](int64_t, int64_t start, int64_t end) CLVP_FAST_INLINED {
        blocks += blocks_of(end - start, size);
    });
    return blocks;
}

inline Block find_block(const int32_t *cu_seqlens, int64_t count, int64_t rows, int64_t size, int64_t number) {
    Block found = {};
    int64_t left = number; /* behind the blocks of the sequences before */
    each_sequence(cu_seqlens, count, rows, [&](int64_t sequence, int64_t start, int64_t end) CLVP_FAST_INLINED {
        const int64_t blocks = blocks_of(end - start, size);
        if (left >= 0 && left < blocks) {
            const int64_t first = start + left * size;
            found = {sequence, start, first, end - first < size ? end : first + size};
        }
        left -= blocks;
    });
    return found;
}

inline int64_t longest_sequence(const int32_t *cu_seqlens, int64_t count, int64_t rows) {
    int64_t longest = 0;
    each_sequence(cu_seqlens, count, rows, [&](int64_t, int64_t start, int64_t end) CLVP_FAST_INLINED {
        longest = end - start > longest ? end - start : longest;
    });
    return longest;
}

}  // namespace
}  // namespace clvp_fast
