/* Attention of one head within one window of an image, on a CPU. */
#pragma once

#include "../clvp_fast.h"
#include "query_lanes.h"

namespace clvp_fast {
namespace {

/* The term added to scores between places that only the shift has brought together: SEAM of ops/window_attention.py. */
constexpr float SEAM = -100;

/* An image cut into windows, and the heads that attend in them. */
struct Windows {
    int64_t height, width, size, shift, heads, channels; /* size: of a window; channels: of a head */
    float scale;
    int64_t places() const { return size * size; }
    int64_t lanes() const { return round_up(places(), LANES > KEYS_AT_ONCE ? LANES : KEYS_AT_ONCE); }
    int64_t across() const { return width / size; }
    int64_t count() const { return across() * (height / size); }
};

/* The scratch memory of a window. */
template <class In>
AttentionScratch<In> scratch_of(const Windows &windows) {
    return {windows.places(), windows.places(), windows.channels};
}

/* Of a head, [head][query][key] by strides; packed: [key][lanes], queries side by side, float32. */
template <class In>
struct Bias {
    const In *first;
    const int64_t *strides;
    static int64_t packed_size(const Windows &windows) { return windows.places() * windows.lanes(); }
    void pack(const Windows &windows, int64_t head, float *to) const {
        const int64_t places = windows.places(), lanes = windows.lanes();
        const In *const from = first + head * strides[0];
        for (int64_t key = 0; key < places; ++key, to += lanes)
            for (int64_t query = 0; query < lanes; query += LANES) {
                In given[LANES] = {};
                for (int lane = 0; lane < LANES && query + lane < places; ++lane)
                    given[lane] = from[(query + lane) * strides[1] + key * strides[2]];
                store_floats(to + query, load_floats(given));
            }
    }
};

struct Place {
    int32_t row, column;
};

/* The places of a window, and the band of the image that each is from. */
struct Window {
    Place at[1024];
    float bands[1024];
    bool seam; /* whether there are several bands */

    Window(const Windows &all, int64_t number) {
        const int64_t size = all.size, row = number / all.across() * size, column = number % all.across() * size;
        const auto around = [&](int64_t place, int64_t end) {
            return (int32_t)(place + all.shift < end ? place + all.shift : place + all.shift - end);
        };
        const auto band = [&](int64_t place, int64_t end) {
            return (place >= end - size ? 1 : 0) + (place >= end - all.shift ? 1 : 0);
        };
        int64_t place = 0;
        for (int64_t i = row; i < row + size; ++i)
            for (int64_t j = column; j < column + size; ++j, ++place) {
                at[place] = {around(i, all.height), around(j, all.width)};
                bands[place] = band(i, all.height) * 3 + band(j, all.width);
            }
        for (; place < all.lanes(); ++place) bands[place] = 0;
        seam = all.shift && (row + size == all.height || column + size == all.width);
    }
};

/* Of a head: its packed bias, and where channels of a place begin, rows.q(place) to rows.out(place), which may lie
 * where its queries do. */
template <class In, class Rows>
void attend(const Windows &windows, const Window &window, const Rows &rows, const float *packed, float *scratch) {
    const AttentionScratch<In> space = scratch_of<In>(windows);
    const int64_t lanes = windows.lanes();
    turn_all<In>(space, rows, scratch);
    for (int64_t first = 0; first < space.keys; first += LANES) {
        const Floats band = load_floats(window.bands + first);
        const float *const bias = packed + first, *const bands = window.seam ? window.bands : nullptr;
        const auto biased = [=](int64_t key, Floats score) CLVP_FAST_INLINED {
            score += load_floats(bias + key * lanes);
            if (bands) score += band != bands[key] ? Floats{} + SEAM : Floats{};
            return score;
        };
        attend_lanes<In>(space, rows, first, space.keys, windows.scale, biased, scratch);
    }
}

}  // namespace
}  // namespace clvp_fast
