/* Weights that the tiles of a panel will read soon. */
#pragma once

#include <stdint.h>

#include "../inline.h"

namespace clvp_fast {
namespace {

/* The fetches of a tile at each unit. The only tile of a chain fetches what it will read AHEAD bytes later, into the
 * second-level cache, which waits for more lines at a time than the first. Of several each fetches its share of the
 * next chain, so that memory is read all the time: LINES lines from `next` on, which then moves by `step` bytes, into
 * the first-level cache, which has room for two chains. */
constexpr int64_t AHEAD = 6144;
constexpr int ALL = 0;
struct Fetch {
    const char *next;
    int64_t step;
};

template <int LINES, int BYTES>
CLVP_FAST_INLINE void fetch_some(const void *weights, Fetch &fetch) {
    const char *const from = LINES == ALL ? (const char *)weights + AHEAD : fetch.next;
    unroll<LINES == ALL ? (BYTES + 63) / 64 : LINES>(
        [&](auto line) CLVP_FAST_INLINED { __builtin_prefetch(from + line * 64, 0, LINES == ALL ? 2 : 3); });
    if (LINES != ALL) fetch.next += fetch.step;
}

}  // namespace
}  // namespace clvp_fast
