/* Random and hostile calls of the first half of a Swin layer on every instruction set: every array is an allocation of
 * exactly its size. A call that must be refused is, and leaves the result as it was; any other is what float64 gives.
 */
#include <math.h>
#include <string.h>

#include <vector>

#include "matrix.h"

namespace {

void spoil(clvp_fast_window_block &call) {
    switch (draw(0, 13)) {
        case 0: call.x = nullptr; break;
        case 1: call.bias = nullptr; break;
        case 2: call.out = nullptr; break;
        case 3: call.norm_weight = nullptr; break;
        case 4: call.w_qkv = nullptr; break;
        case 5: call.w_out = nullptr; break;
        case 6: call.w_out = (const char *)call.w_out + 1; break;
        case 7: call.head_dim = draw(0, 1) ? 0 : 160; break;
        case 8: call.shift = draw(0, 1) ? -1 : call.window; break;
        case 9: call.batch = draw(0, 1) ? -1 : INT64_MAX; break;
        case 10: call.window = draw(0, 1) ? 0 : 33; break;
        case 11: call.dtype = draw(0, 1) ? CLVP_FAST_FLOAT16 : 77; break;
        case 12: call.num_heads = draw(0, 1) ? 0 : -1; break;
        default: call.num_heads = 3, call.head_dim = 5; /* channels are no multiple of 32 */
    }
}

struct Operands {
    int64_t window, shift, places, batch, height, width, heads, head_dim, channels, rows;
    int32_t dtype;
    Matrix x, norm_weight, norm_bias, w_qkv, b_qkv, bias, w_out, b_out, out;
};

Operands random_operands() {
    const int32_t dtype = draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16;
    const int64_t window = draw(0, 3) ? draw(1, 5) : 8, places = window * window;
    const int64_t batch = draw(1, 2), height = window * draw(1, 3), width = window * draw(1, 2);
    const int64_t head_dims[] = {4, 8, 16, 24, 32}, head_dim = head_dims[draw(0, 4)];
    const int64_t heads = head_dim == 24 ? 4 : 32 / head_dim * draw(1, 2), channels = heads * head_dim;
    const int64_t rows = batch * height * width, wide = channels + draw(0, 5);
    return {window,
            draw(0, window - 1),
            places,
            batch,
            height,
            width,
            heads,
            head_dim,
            channels,
            rows,
            dtype,
            {rows, channels, channels, dtype},
            {1, channels, channels, dtype},
            {1, channels, channels, dtype},
            {3 * channels, channels, wide, dtype},
            {1, 3 * channels, 3 * channels, dtype},
            {heads * places, places, places, dtype},
            {channels, channels, wide, dtype},
            {1, channels, channels, dtype},
            {rows, channels, channels, dtype}};
}

/* The result in float64, [rows][channels]. */
std::vector<double> expected_of(const Operands &given, const clvp_fast_window_block &call) {
    const int64_t channels = given.channels, window = given.window;
    std::vector<double> qkv(given.rows * 3 * channels), out(given.rows * channels), row(channels);
    for (int64_t place = 0; place < given.rows; ++place) {
        for (int64_t k = 0; k < channels; ++k) row[k] = given.x.at(place, k);
        layer_norm(row, call.eps, [&](int64_t k, double value) {
            return value * given.norm_weight.at(0, k) + (call.norm_bias ? given.norm_bias.at(0, k) : 0);
        });
        for (int64_t n = 0; n < 3 * channels; ++n) {
            double sum = call.b_qkv ? given.b_qkv.at(0, n) : 0;
            for (int64_t k = 0; k < channels; ++k) sum += row[k] * given.w_qkv.at(n, k);
            qkv[place * 3 * channels + n] = sum;
        }
    }
    const auto band = [&](int64_t place, int64_t size) {
        return (place >= size - window) + (place >= size - given.shift);
    };
    std::vector<double> weights(given.places);
    for (int64_t image = 0; image < given.batch; ++image)
        for (int64_t i = 0; i < given.height; ++i)
            for (int64_t j = 0; j < given.width; ++j) {
                const auto place_of = [&](int64_t r, int64_t c) {
                    return (image * given.height + (r + given.shift) % given.height) * given.width +
                           (c + given.shift) % given.width;
                };
                const int64_t top = i / window * window, left = j / window * window, at = place_of(i, j);
                for (int64_t head = 0; head < given.heads; ++head) {
                    const double *const q = &qkv[at * 3 * channels + head * given.head_dim];
                    double sum = 0, largest = -INFINITY;
                    for (int64_t key = 0; key < given.places; ++key) {
                        const int64_t r = top + key / window, c = left + key % window;
                        const double *const k = &qkv[place_of(r, c) * 3 * channels + channels + head * given.head_dim];
                        double score = 0;
                        for (int64_t n = 0; n < given.head_dim; ++n) score += q[n] * k[n] / sqrt(given.head_dim);
                        score += given.bias.at(head * given.places + (i - top) * window + j - left, key);
                        if (band(r, given.height) != band(i, given.height) ||
                            band(c, given.width) != band(j, given.width))
                            score -= 100;
                        weights[key] = score, largest = fmax(largest, score);
                    }
                    for (double &weight : weights) sum += weight = exp(weight - largest);
                    for (int64_t n = 0; n < given.head_dim; ++n) {
                        double value = 0;
                        for (int64_t key = 0; key < given.places; ++key) {
                            const int64_t place = place_of(top + key / window, left + key % window);
                            value += weights[key] / sum *
                                     qkv[place * 3 * channels + 2 * channels + head * given.head_dim + n];
                        }
                        row[head * given.head_dim + n] = value;
                    }
                }
                for (int64_t n = 0; n < channels; ++n) {
                    double sum = given.x.at(at, n) + (call.b_out ? given.b_out.at(0, n) : 0);
                    for (int64_t k = 0; k < channels; ++k) sum += row[k] * given.w_out.at(n, k);
                    out[at * channels + n] = sum;
                }
            }
    return out;
}

bool one_case() {
    const Operands given = random_operands();
    clvp_fast_window_block call = {};
    call.x = given.x.first(), call.norm_weight = given.norm_weight.first(), call.w_qkv = given.w_qkv.first();
    call.bias = given.bias.first(), call.w_out = given.w_out.first(), call.out = given.out.first();
    call.norm_bias = draw(0, 1) ? given.norm_bias.first() : nullptr;
    call.b_qkv = draw(0, 1) ? given.b_qkv.first() : nullptr, call.b_out = draw(0, 1) ? given.b_out.first() : nullptr;
    call.w_qkv_stride = given.w_qkv.stride, call.w_out_stride = given.w_out.stride;
    call.bias_strides[0] = given.places * given.places, call.bias_strides[1] = given.places, call.bias_strides[2] = 1;
    call.batch = given.batch, call.height = given.height, call.width = given.width;
    call.num_heads = given.heads, call.head_dim = given.head_dim, call.window = given.window, call.shift = given.shift;
    call.dtype = given.dtype, call.eps = 64; /* so large that scores are not */
    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    if (draw(1, 6) == 1) {
        clvp_fast_window_block spoilt = call;
        spoil(spoilt);
        const size_t bytes = given.rows * given.channels * given.out.size();
        const std::vector<unsigned char> before(given.out.first(), given.out.first() + bytes);
        return clvp_fast_window_block_cpu(&spoilt, threads, isa) < 0 &&
               !memcmp(before.data(), given.out.first(), bytes);
    }
    const int code = clvp_fast_window_block_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;
    const std::vector<double> expected = expected_of(given, call);
    double error = 0, size = 0, largest = 0;
    for (int64_t i = 0; i < (int64_t)expected.size(); ++i) {
        const double off = given.out.at(i / given.channels, i % given.channels) - expected[i];
        if (!(off == off)) return false;
        error += off * off, size += expected[i] * expected[i];
        if (fabs(off) > largest) largest = fabs(off);
    }
    const double root = sqrt(size / expected.size());
    const bool half = given.dtype == CLVP_FAST_BFLOAT16;
    return sqrt(error / expected.size()) <= (half ? 0.04 : 4e-6) * root && largest <= (half ? 0.6 : 5e-5) * root;
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_window_block(int cases, unsigned seed) {
    return run_cases("window_block", clvp_fast_window_block_cpu, one_case, cases, seed);
}
