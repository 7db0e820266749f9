/* Every function of the C interface for a CPU, with fixed inputs, against the answers of plain loops in float64. Prints
 * one line a function; the exit status is how many are wrong. For machines whose Python side nobody has proved. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "../../csrc/clvp_fast.h"

namespace {

/* Halves of small whole numbers, which repeat after a prime number of steps. */
std::vector<float> numbers(size_t count, int step) {
    std::vector<float> made(count);
    for (size_t i = 0; i < count; ++i) made[i] = ((int)(i * step % 23) - 11) / 8.0f;
    return made;
}

int failed = 0;

template <class Values>
void report(const char *name, int code, const Values &found, const std::vector<double> &expected, double room) {
    double worst = code == CLVP_FAST_OK ? 0 : INFINITY;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double error = fabs(found[i] - expected[i]) / (1 + fabs(expected[i]));
        if (!(error <= worst)) worst = error; /* NaN too */
    }
    const bool right = worst <= room;
    failed += !right;
    printf("%-18s %s, off by %.1e: %s\n", name, right ? "right" : "WRONG", worst, clvp_fast_error(code));
}

/* [rows, outs] of x [rows, columns] times w [outs, columns], and a bias. */
std::vector<double> product(const std::vector<double> &x, const std::vector<float> &w, const std::vector<float> &bias,
                            size_t columns) {
    const size_t rows = x.size() / columns, outs = bias.size();
    std::vector<double> out(rows * outs);
    for (size_t m = 0; m < rows; ++m)
        for (size_t n = 0; n < outs; ++n) {
            out[m * outs + n] = bias[n];
            for (size_t k = 0; k < columns; ++k) out[m * outs + n] += x[m * columns + k] * w[n * columns + k];
        }
    return out;
}

std::vector<double> wide(const std::vector<float> &x) { return {x.begin(), x.end()}; }

void linear() {
    const auto x = numbers(3 * 64, 5), w = numbers(50 * 64, 7), bias = numbers(50, 3);
    std::vector<float> out(3 * 50);
    clvp_fast_linear call = {};
    call.x = x.data(), call.weight = w.data(), call.bias = bias.data(), call.out = out.data();
    call.x_stride = call.weight_stride = call.in_features = 64, call.rows = 3, call.out_features = 50;
    report("linear", clvp_fast_linear_cpu(&call, 2, nullptr), out, product(wide(x), w, bias, 64), 1e-5);
}

void mlp() {
    const auto x = numbers(9 * 32, 5), w_in = numbers(64 * 32, 7), b_in = numbers(64, 3);
    const auto w_out = numbers(33 * 64, 9), b_out = numbers(33, 2);
    std::vector<float> out(9 * 33);
    clvp_fast_mlp call = {};
    call.x = x.data(), call.w_in = w_in.data(), call.b_in = b_in.data(), call.w_out = w_out.data();
    call.b_out = b_out.data(), call.out = out.data(), call.x_stride = call.w_in_stride = call.in_features = 32;
    call.w_out_stride = call.inner_features = 64, call.rows = 9, call.out_features = 33, call.item_rows = 8;
    call.activation = CLVP_FAST_GELU;
    std::vector<double> inner = product(wide(x), w_in, b_in, 32);
    for (double &value : inner) value *= 0.5 * (1 + erf(value / sqrt(2)));
    report("mlp", clvp_fast_mlp_cpu(&call, 2, nullptr), out, product(inner, w_out, b_out, 64), 1e-5);
}

/* Attention of one query to keys and values of `channels`, whose scores have `bias` added. */
template <class At>
void attend(const std::vector<double> &scores, size_t channels, double *out, const At &value) {
    double sum = 0;
    for (const double score : scores) sum += exp(score);
    for (size_t c = 0; c < channels; ++c) {
        out[c] = 0;
        for (size_t t = 0; t < scores.size(); ++t) out[c] += exp(scores[t]) / sum * value(t, c);
    }
}

/* Windows of 2 x 2 in an image of 4 x 4, one head, not shifted. */
size_t place_of(size_t window, size_t place) { return (window / 2 * 2 + place / 2) * 4 + window % 2 * 2 + place % 2; }

std::vector<double> windows(const std::vector<double> &q, const std::vector<double> &k, const std::vector<double> &v,
                            const std::vector<float> &bias, size_t dim, double scale) {
    std::vector<double> out(16 * dim);
    for (size_t window = 0; window < 4; ++window)
        for (size_t query = 0; query < 4; ++query) {
            const size_t at = place_of(window, query) * dim;
            std::vector<double> scores(4);
            for (size_t key = 0; key < 4; ++key) {
                scores[key] = bias[query * 4 + key];
                for (size_t c = 0; c < dim; ++c) scores[key] += scale * q[at + c] * k[place_of(window, key) * dim + c];
            }
            attend(scores, dim, &out[at], [&](size_t t, size_t c) { return v[place_of(window, t) * dim + c]; });
        }
    return out;
}

void window_attention() {
    const size_t dim = 20;
    const auto q = numbers(16 * dim, 5), k = numbers(16 * dim, 7), v = numbers(16 * dim, 9), bias = numbers(16, 3);
    std::vector<float> out(16 * dim);
    clvp_fast_window_attention call = {};
    call.q = q.data(), call.k = k.data(), call.v = v.data(), call.bias = bias.data(), call.out = out.data();
    const int64_t strides[4] = {16 * (int64_t)dim, 4 * (int64_t)dim, (int64_t)dim, (int64_t)dim};
    for (auto *to : {call.q_strides, call.k_strides, call.v_strides}) memcpy(to, strides, sizeof strides);
    call.bias_strides[0] = 16, call.bias_strides[1] = 4, call.bias_strides[2] = 1;
    call.batch = 1, call.height = call.width = 4, call.num_heads = 1, call.head_dim = dim, call.window = 2;
    call.scale = 0.25;
    const int code = clvp_fast_window_attention_cpu(&call, 2, nullptr);
    report("window_attention", code, out, windows(wide(q), wide(k), wide(v), bias, dim, 0.25), 1e-5);
}

void window_block() {
    const size_t dim = 32;
    const auto x = numbers(16 * dim, 5), weight = numbers(dim, 7), w_qkv = numbers(3 * dim * dim, 9);
    const auto b_qkv = numbers(3 * dim, 2), bias = numbers(16, 3), w_out = numbers(dim * dim, 6),
               b_out = numbers(dim, 4);
    std::vector<float> out(16 * dim);
    clvp_fast_window_block call = {};
    call.x = x.data(), call.norm_weight = weight.data(), call.w_qkv = w_qkv.data(), call.b_qkv = b_qkv.data();
    call.bias = bias.data(), call.w_out = w_out.data(), call.b_out = b_out.data(), call.out = out.data();
    call.w_qkv_stride = call.w_out_stride = dim, call.bias_strides[0] = 16, call.bias_strides[1] = 4;
    call.bias_strides[2] = 1, call.batch = 1, call.height = call.width = 4, call.num_heads = 1, call.head_dim = dim;
    call.window = 2, call.eps = 0.125;
    std::vector<double> normed = wide(x);
    for (size_t row = 0; row < 16; ++row) {
        double mean = 0, variance = 0, *const first = &normed[row * dim];
        for (size_t c = 0; c < dim; ++c) mean += first[c] / dim;
        for (size_t c = 0; c < dim; ++c) variance += (first[c] - mean) * (first[c] - mean) / dim;
        for (size_t c = 0; c < dim; ++c) first[c] = (first[c] - mean) / sqrt(variance + 0.125) * weight[c];
    }
    const std::vector<double> qkv = product(normed, w_qkv, b_qkv, dim);
    std::vector<double> parts[3];
    for (size_t part = 0; part < 3; ++part)
        for (size_t place = 0; place < 16; ++place)
            for (size_t c = 0; c < dim; ++c) parts[part].push_back(qkv[place * 3 * dim + part * dim + c]);
    std::vector<double> expected =
        product(windows(parts[0], parts[1], parts[2], bias, dim, 1 / sqrt(32.0)), w_out, b_out, dim);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += x[i];
    report("window_block", clvp_fast_window_block_cpu(&call, 2, nullptr), out, expected, 1e-4);
}

void paged_decode() {
    const size_t dim = 48; /* two candidates of 0 and 5 tokens, pages of 3, one head */
    const auto q = numbers(2 * dim, 5), k_new = numbers(2 * dim, 7), v_new = numbers(2 * dim, 9);
    auto k = numbers(4 * 3 * dim, 3), v = numbers(4 * 3 * dim, 11);
    const int32_t table[] = {2, 0, 3, 1}, lens[] = {0, 5};
    std::vector<float> out(2 * dim);
    clvp_fast_paged_decode call = {};
    call.q = q.data(), call.k_new = k_new.data(), call.v_new = v_new.data(), call.out = out.data();
    call.k_pages = k.data(), call.v_pages = v.data(), call.block_table = table, call.seq_lens = lens;
    for (auto *to : {call.q_strides, call.k_new_strides, call.v_new_strides}) to[0] = to[1] = dim;
    call.page_strides[0] = 3 * dim, call.page_strides[1] = call.page_strides[2] = dim, call.block_table_stride = 2;
    call.num_candidates = 2, call.num_pages = 4, call.num_heads = 1, call.head_dim = dim, call.page_size = 3;
    call.max_pages = 2, call.scale = 0.125;
    const int code = clvp_fast_paged_decode_cpu(&call, 2, nullptr);
    std::vector<double> expected(2 * dim);
    for (size_t n = 0; n < 2; ++n) {
        const auto place = [&](size_t token) { return (table[2 * n + token / 3] * 3 + token % 3) * dim; };
        std::vector<double> scores(lens[n] + 1);
        for (size_t t = 0; t < scores.size(); ++t)
            for (size_t c = 0; c < dim; ++c)
                scores[t] += 0.125 * q[n * dim + c] * ((int)t == lens[n] ? k_new[n * dim + c] : k[place(t) + c]);
        attend(scores, dim, &expected[n * dim],
               [&](size_t t, size_t c) { return (int)t == lens[n] ? v_new[n * dim + c] : v[place(t) + c]; });
    }
    report("paged_decode", code, out, expected, 1e-5);
}

void rotary_attention() {
    const size_t dim = 20, rows = 9, turning = 8; /* one sequence of one head, causal; the first 8 channels turn */
    const auto q = numbers(rows * dim, 5), k = numbers(rows * dim, 7), v = numbers(rows * dim, 9);
    const auto cos = numbers(rows * turning, 3), sin = numbers(rows * turning, 11);
    std::vector<float> out(rows * dim);
    clvp_fast_rotary_attention call = {};
    call.q = q.data(), call.k = k.data(), call.v = v.data(), call.out = out.data(), call.cos = cos.data();
    call.sin = sin.data();
    for (auto *to : {call.q_strides, call.k_strides, call.v_strides}) to[1] = to[2] = dim;
    call.batch = 1, call.q_len = call.k_len = rows, call.item_queries = 128, call.num_heads = 1, call.head_dim = dim;
    call.rotary_dim = turning, call.causal = 1, call.scale = 0.125;
    const int code = clvp_fast_rotary_attention_cpu(&call, 2, nullptr);
    const auto turned = [&](const std::vector<float> &x, size_t row, size_t c) -> double {
        const size_t half = turning / 2, at = row * turning + c;
        if (c >= turning) return x[row * dim + c];
        const double other = c < half ? -x[row * dim + c + half] : x[row * dim + c - half];
        return x[row * dim + c] * cos[at] + other * sin[at];
    };
    std::vector<double> expected(rows * dim);
    for (size_t row = 0; row < rows; ++row) {
        std::vector<double> scores(row + 1);
        for (size_t t = 0; t <= row; ++t)
            for (size_t c = 0; c < dim; ++c) scores[t] += 0.125 * turned(q, row, c) * turned(k, t, c);
        attend(scores, dim, &expected[row * dim], [&](size_t t, size_t c) { return turned(v, t, c); });
    }
    report("rotary_attention", code, out, expected, 1e-5);
}

void paged_prefill() {
    const size_t dim = 48, rows = 20; /* one sequence in pages of 8, of one head */
    const auto q = numbers(rows * dim, 5), k = numbers(rows * dim, 7), v = numbers(rows * dim, 9);
    std::vector<float> k_pages(4 * 8 * dim), v_pages(4 * 8 * dim), out(rows * dim);
    const int32_t table[] = {2, 0, 3}, bounds[] = {0, rows};
    clvp_fast_paged_prefill call = {};
    call.q = q.data(), call.k = k.data(), call.v = v.data(), call.out = out.data();
    call.k_pages = k_pages.data(), call.v_pages = v_pages.data(), call.cu_seqlens = bounds, call.block_table = table;
    for (auto *to : {call.q_strides, call.k_strides, call.v_strides}) to[0] = to[1] = dim;
    call.page_strides[0] = 8 * dim, call.page_strides[1] = call.page_strides[2] = dim, call.block_table_stride = 3;
    call.rows = rows, call.num_sequences = 1, call.num_pages = 4, call.num_heads = 1, call.head_dim = dim;
    call.page_size = 8, call.max_pages = 3, call.scale = 0.125;
    const int code = clvp_fast_paged_prefill_cpu(&call, 2, nullptr);
    std::vector<double> expected(rows * dim), places(rows * dim);
    for (size_t row = 0; row < rows; ++row) {
        std::vector<double> scores(row + 1);
        for (size_t t = 0; t <= row; ++t)
            for (size_t c = 0; c < dim; ++c) scores[t] += 0.125 * q[row * dim + c] * k[t * dim + c];
        attend(scores, dim, &expected[row * dim], [&](size_t t, size_t c) { return v[t * dim + c]; });
        for (size_t c = 0; c < dim; ++c) places[row * dim + c] = v[row * dim + c];
    }
    report("paged_prefill", code, out, expected, 1e-5);
    std::vector<float> stored;
    for (size_t row = 0; row < rows; ++row)
        for (size_t c = 0; c < dim; ++c) stored.push_back(v_pages[(table[row / 8] * 8 + row % 8) * dim + c]);
    report("paged_prefill's pages", code, stored, places, 0);
}

/* Greedy: the first of the largest scores. */
void sample() {
    const size_t vocabulary = 70;
    auto logits = numbers(2 * vocabulary, 5);
    logits[40] = logits[60] = logits[vocabulary + 3] = 9;
    const std::vector<int32_t> seen(2 * 3);
    const uint8_t done[2] = {};
    const int64_t zeros[2] = {};
    std::vector<int64_t> tokens(2);
    clvp_fast_sample call = {};
    call.logits = logits.data(), call.seen = seen.data(), call.done = done, call.tokens = tokens.data();
    call.seed = call.candidate = call.step = zeros, call.logits_stride = call.vocab_size = vocabulary;
    call.seen_stride = 3, call.rows = 2;
    report("sample", clvp_fast_sample_cpu(&call, 2, nullptr), tokens, {40, 3}, 0);
}

void log_mel() {
    const int n_fft = 256, bins = 129, mels = 5, hop = 64, time = 700;
    const auto samples = numbers(time, 5), filters = numbers(mels * bins, 7);
    std::vector<float> window(n_fft), twiddles(2 * n_fft), weights(mels * bins);
    for (int i = 0; i < n_fft; ++i) {
        window[i] = 0.5 - 0.5 * cos(2 * M_PI * i / n_fft);
        twiddles[2 * i] = cos(2 * M_PI * i / n_fft), twiddles[2 * i + 1] = -sin(2 * M_PI * i / n_fft);
    }
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = fabsf(filters[i]);
    std::vector<int32_t> bands;
    for (int mel = 0; mel < mels; ++mel) bands.insert(bands.end(), {mel * 20, mel * 20 + 45});
    const int frames = 1 + time / hop;
    std::vector<float> features(mels * frames);
    std::vector<double> expected(mels * frames);
    for (int frame = 0; frame < frames; ++frame) {
        std::vector<double> power(bins);
        for (int bin = 0; bin < bins; ++bin) {
            double re = 0, im = 0;
            for (int i = 0; i < n_fft; ++i) {
                int place = frame * hop + i - n_fft / 2;
                if (place < 0) place = -place;
                if (place >= time) place = 2 * (time - 1) - place;
                const double value = (double)samples[place] * window[i];
                re += value * cos(2 * M_PI * bin * i / n_fft), im -= value * sin(2 * M_PI * bin * i / n_fft);
            }
            power[bin] = re * re + im * im;
        }
        for (int mel = 0; mel < mels; ++mel) {
            double sum = 0;
            for (int bin = bands[2 * mel]; bin < bands[2 * mel + 1]; ++bin)
                sum += weights[mel * bins + bin] * power[bin];
            expected[mel * frames + frame] = log(fmax(sum, 1e-5));
        }
    }
    clvp_fast_log_mel call = {};
    call.samples = samples.data(), call.window = window.data(), call.twiddles = twiddles.data();
    call.mel_filters = weights.data(), call.bands = bands.data(), call.features = features.data();
    call.batch = 1, call.time = call.samples_stride = time, call.hop_length = hop, call.frames = frames;
    call.n_fft = n_fft, call.num_mels = mels, call.log_floor = 1e-5, call.top_db = -1;
    report("log_mel", clvp_fast_log_mel_cpu(&call, 2, nullptr), features, expected, 1e-4);
}

}  // namespace

int main() {
    printf("on %s\n", clvp_fast_cpu_isa());
    linear(), mlp(), window_attention(), window_block(), paged_decode(), rotary_attention(), paged_prefill(), sample(),
        log_mel();
    return failed;
}
