/* Random and hostile calls of attention in windows on every instruction set: every array is an allocation of exactly
 * its size. A call that must be refused is, and leaves the result as it was; any other is what float64 gives. */
#include <math.h>
#include <string.h>

#include <vector>

#include "matrix.h"

namespace {

void spoil(clvp_fast_window_attention &call) {
    switch (draw(0, 10)) {
        case 0: call.q = nullptr; break;
        case 1: call.bias = nullptr; break;
        case 2: call.out = nullptr; break;
        case 3: call.v = (const char *)call.v + 1; break;
        case 4: call.head_dim = draw(0, 1) ? 0 : 129; break;
        case 5: call.shift = draw(0, 1) ? -1 : call.window; break;
        case 6: call.batch = draw(0, 1) ? -1 : INT64_MAX; break;
        case 7: call.window = draw(0, 1) ? 0 : 33; break;
        case 8: call.dtype = draw(0, 1) ? CLVP_FAST_FLOAT16 : 77; break;
        case 9: call.bias_dtype = CLVP_FAST_INT8; break;
        default:
            call.height += 1, call.window += call.window == 1; /* which then divides no more */
            call.shift = 0;
            if (call.height % call.window == 0) call.height = -1;
    }
}

bool one_case() {
    const int32_t dtype = draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16;
    const int64_t window = draw(0, 3) ? draw(1, 5) : 8, shift = draw(0, window - 1), places = window * window;
    const int64_t batch = draw(1, 2), height = window * draw(1, 3), width = window * draw(1, 2), heads = draw(1, 3);
    const int64_t channels = draw(0, 1) ? 8 * draw(1, 5) : draw(1, 40), rows = batch * height * width;
    /* Queries, keys and values of a place lie side by side, or far apart. */
    const bool together = draw(0, 1);
    const int64_t across = heads * channels, parts = together ? 3 : 1;
    const Matrix packed(rows, parts * across, parts * across, dtype), other(rows, across, across, dtype);
    const Matrix bias(heads * places, places, places, draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16);
    const Matrix out(rows, across, across, dtype);
    const Matrix *const from[3] = {&packed, together ? &packed : &other, together ? &packed : &other};
    clvp_fast_window_attention call = {};
    const void **const pointers[3] = {&call.q, &call.k, &call.v};
    int64_t *const strides[3] = {call.q_strides, call.k_strides, call.v_strides};
    for (int i = 0; i < 3; ++i) {
        *pointers[i] = from[i]->first() + (together ? i * across * from[i]->size() : 0);
        const int64_t step = from[i]->stride, given[4] = {height * width * step, width * step, step, channels};
        memcpy(strides[i], given, sizeof given);
    }
    call.bias = bias.first(), call.out = out.first();
    call.bias_strides[0] = places * places, call.bias_strides[1] = places, call.bias_strides[2] = 1;
    call.batch = batch, call.height = height, call.width = width, call.num_heads = heads, call.head_dim = channels;
    call.window = window, call.shift = shift, call.dtype = dtype, call.bias_dtype = bias.dtype;
    call.scale = 1 / sqrt((double)channels);
    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    if (draw(1, 6) == 1) {
        clvp_fast_window_attention spoilt = call;
        spoil(spoilt);
        const std::vector<unsigned char> before(out.first(), out.first() + rows * across * out.size());
        return clvp_fast_window_attention_cpu(&spoilt, threads, isa) < 0 &&
               !memcmp(before.data(), out.first(), before.size());
    }
    const int code = clvp_fast_window_attention_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;
    const auto row_of = [&](int64_t image, int64_t row, int64_t column) {
        return (image * height + (row + shift) % height) * width + (column + shift) % width;
    };
    const auto band = [&](int64_t place, int64_t size) { return (place >= size - window) + (place >= size - shift); };
    std::vector<double> weights(places);
    for (int64_t image = 0; image < batch; ++image)
        for (int64_t row = 0; row < height; ++row)
            for (int64_t column = 0; column < width; ++column)
                for (int64_t head = 0; head < heads; ++head) {
                    const int64_t top = row / window * window, left = column / window * window;
                    const int64_t query = (row - top) * window + column - left, at = row_of(image, row, column);
                    const auto part = [&](int which, int64_t place, int64_t channel) {
                        return from[which]->at(place, (together ? which * across : 0) + head * channels + channel);
                    };
                    double sum = 0;
                    for (int64_t key = 0; key < places; ++key) {
                        const int64_t r = top + key / window, c = left + key % window, place = row_of(image, r, c);
                        double score = 0;
                        for (int64_t channel = 0; channel < channels; ++channel)
                            score += part(0, at, channel) * part(1, place, channel);
                        score = score * call.scale + bias.at(head * places + query, key);
                        if (band(r, height) != band(row, height) || band(c, width) != band(column, width)) score -= 100;
                        sum += weights[key] = exp(score);
                    }
                    for (int64_t channel = 0; channel < channels; ++channel) {
                        double expected = 0;
                        for (int64_t key = 0; key < places; ++key)
                            expected += weights[key] / sum *
                                        part(2, row_of(image, top + key / window, left + key % window), channel);
                        const double room = dtype == CLVP_FAST_FLOAT32 ? 2e-5 : 2e-2;
                        if (!(fabs(out.at(at, head * channels + channel) - expected) <= room)) return false;
                    }
                }
    return true;
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_window_attention(int cases, unsigned seed) {
    return run_cases("window_attention", clvp_fast_window_attention_cpu, one_case, cases, seed);
}
