/* Random and hostile calls of log_mel (those of other functions are in fuzz_linear.cpp and its like), on a CPU and in
 * the emulator of the CUDA kernel, for the sanitizers of addresses and undefined behaviour: every array is an
 * allocation of exactly its size. A call that must be refused is, and leaves the features as they were; any other
 * writes them all, and both implementations agree. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/clvp_fast.h"

int fuzz_linear(int cases, unsigned seed);
int fuzz_mlp(int cases, unsigned seed);
int fuzz_window_attention(int cases, unsigned seed);
int fuzz_window_block(int cases, unsigned seed);
int fuzz_norm(int cases, unsigned seed);
int fuzz_sample(int cases, unsigned seed);
int fuzz_paged(int cases, unsigned seed);
int fuzz_prefill(int cases, unsigned seed);
int fuzz_rotary_attention(int cases, unsigned seed);
int fuzz_calls(int cases, unsigned seed);
extern "C" int emulate_log_mel(const clvp_fast_log_mel *call, uint32_t seed, int64_t most_blocks, int32_t in_parts);

#define REQUIRE(condition)                                                       \
    if (!(condition)) {                                                          \
        fprintf(stderr, "case %d, line %d: %s\n", number, __LINE__, #condition); \
        exit(1);                                                                 \
    }

namespace {

std::mt19937_64 engine;
int number; /* of the case */

int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine); }
bool once_in(int64_t times) { return draw(1, times) == 1; }
template <class T>
T one_of(std::initializer_list<T> values) {
    return *(values.begin() + draw(0, values.size() - 1));
}

/* An allocation of exactly `count` elements. */
template <class T>
std::unique_ptr<T[]> exactly(size_t count) {
    return std::unique_ptr<T[]>(new T[count]);
}
void fill(float *values, size_t count, float scale) {
    for (size_t i = 0; i < count; ++i) values[i] = scale * float(draw(-1000, 1000)) / 1000;
}

constexpr uint32_t UNWRITTEN = 0x7fa5a5a5; /* a NaN that nothing computes; its halves are float16 and bfloat16 NaN */

/* A call that is in order, and what it points to. */
struct Case {
    clvp_fast_log_mel call = {};
    std::unique_ptr<float[]> samples, window, twiddles, filters, norms;
    std::unique_ptr<int16_t[]> integers;
    std::unique_ptr<int64_t[]> lengths;
    std::unique_ptr<int32_t[]> bands;
    std::unique_ptr<uint32_t[]> maxima;
    std::unique_ptr<unsigned char[]> features;
    size_t feature_bytes;
    bool finite = true, bad_length = false, bad_band = false;

    Case() {
        const int n_fft = call.n_fft = 256 << draw(0, 4), bins = n_fft / 2 + 1;
        const int mels = call.num_mels = once_in(8) ? 256 : draw(1, 12);
        const int64_t batch = call.batch = once_in(20) ? 0 : draw(1, 4);
        const int64_t time = call.time = once_in(4) ? draw(1, 5) : draw(1, 3 * n_fft);
        call.hop_length = once_in(8) ? INT64_MAX - draw(0, 9) : draw(1 + time / 70, 2 * n_fft);
        call.frames = 1 + time / call.hop_length;
        call.samples_stride = once_in(4) ? draw(-time, time) : time;
        const int64_t first = std::min<int64_t>(0, call.samples_stride * (batch - 1));
        const size_t span = batch ? time + std::abs(call.samples_stride) * (batch - 1) : 0;
        if (once_in(3)) {
            call.samples_dtype = CLVP_FAST_INT16;
            integers = exactly<int16_t>(span);
            for (size_t i = 0; i < span; ++i) integers[i] = draw(-32768, 32767);
            call.samples = integers.get() - first;
        } else {
            samples = exactly<float>(span);
            fill(samples.get(), span, 1);
            for (int bad = once_in(4) ? draw(1, 3) : 0; bad > 0 && span > 0; --bad) {
                samples[draw(0, span - 1)] = one_of({NAN, INFINITY, -INFINITY, 3e38f});
                finite = false;
            }
            call.samples = samples.get() - first;
        }
        window = exactly<float>(n_fft);
        fill(window.get(), n_fft, 1);
        twiddles = exactly<float>(2 * n_fft);
        for (int k = 0; k < n_fft; ++k) {
            twiddles[2 * k] = float(cos(2 * M_PI * k / n_fft));
            twiddles[2 * k + 1] = float(-sin(2 * M_PI * k / n_fft));
        }
        filters = exactly<float>(mels * bins);
        for (int i = 0; i < mels * bins; ++i) filters[i] = float(draw(1, 1000)) / 1000;
        bands = exactly<int32_t>(2 * mels);
        const bool hostile = once_in(4);
        for (int m = 0; m < mels; ++m) {
            bands[2 * m] = draw(0, bins);
            bands[2 * m + 1] = draw(0, bins);
            if (hostile && once_in(3)) bands[2 * m + draw(0, 1)] = one_of({INT32_MIN, -1, bins + 1, INT32_MAX});
            for (int i = 2 * m; i < 2 * m + 2; ++i) bad_band |= batch > 0 && (bands[i] < 0 || bands[i] > bins);
        }
        if (once_in(2)) {
            lengths = exactly<int64_t>(batch);
            for (int64_t b = 0; b < batch; ++b) {
                lengths[b] = once_in(12) ? one_of({INT64_MIN, int64_t(0), time + 1, INT64_MAX}) : draw(1, time);
                bad_length |= lengths[b] < 1 || lengths[b] > time;
            }
        }
        if (once_in(2)) {
            norms = exactly<float>(mels);
            for (int m = 0; m < mels; ++m) norms[m] = one_of({-1.f, 1.f}) * float(draw(500, 2000)) / 1000;
        }
        call.decibels = draw(0, 1);
        call.top_db = call.decibels && once_in(2) ? double(draw(0, 80)) : -1;
        call.log_floor = 1e-5;
        maxima = exactly<uint32_t>(2 * batch);
        std::fill_n(maxima.get(), 2 * batch, 0);
        call.window = window.get();
        call.twiddles = twiddles.get();
        call.mel_filters = filters.get();
        call.bands = bands.get();
        call.lengths = lengths.get();
        call.mel_norms = norms.get();
        call.clip_maxima = maxima.get();
        feature_bytes = batch * mels * call.frames * sizeof(float);
        features = exactly<unsigned char>(feature_bytes);
        poison();
    }

    size_t count() const { return call.batch * call.num_mels * call.frames; }
    void poison() {
        for (size_t i = 0; i < feature_bytes; i += 4) memcpy(features.get() + i, &UNWRITTEN, 4);
        call.features = features.get();
    }
    uint32_t word(size_t place) const {
        uint32_t bits;
        memcpy(&bits, features.get() + 4 * place, 4);
        return bits;
    }
    bool all_written() const {
        for (size_t i = 0; i < count(); ++i)
            if (word(i) == UNWRITTEN) return false;
        return true;
    }
    bool untouched() const {
        for (size_t i = 0; i < feature_bytes / 4; ++i)
            if (word(i) != UNWRITTEN) return false;
        return true;
    }
    std::vector<float> values() const {
        std::vector<float> values(count());
        if (count()) memcpy(values.data(), features.get(), feature_bytes);
        return values;
    }
};

/* Spoils one thing. */
void spoil(clvp_fast_log_mel &call) {
    const int64_t hostile = one_of({INT64_MIN, int64_t(-1), int64_t(0), INT64_MAX});
    const auto misalign = [](auto &pointer) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(uintptr_t(pointer) + 1);
    };
    switch (draw(0, 20)) {
        case 0: call.samples = nullptr; break;
        case 1: call.window = nullptr; break;
        case 2: call.twiddles = nullptr; break;
        case 3: call.mel_filters = nullptr; break;
        case 4: call.bands = nullptr; break;
        case 5: call.features = nullptr; break;
        case 6: misalign(call.samples); break;
        case 7: misalign(call.window); break;
        case 8: call.twiddles = static_cast<const char *>(call.twiddles) + 4; break;
        case 9: misalign(call.mel_filters); break;
        case 10: misalign(call.bands); break;
        case 11: misalign(call.features); break;
        case 12: call.batch = one_of({INT64_MIN, int64_t(-1), INT64_MAX}); break;
        case 13: call.time = hostile; break;
        case 14: call.hop_length = one_of({INT64_MIN, int64_t(-1), int64_t(0)}); break;
        case 15: call.frames = one_of({hostile, call.frames + 1, call.frames - 1}); break;
        case 16: call.n_fft = one_of({INT32_MIN, 0, 128, 257, 768, 8192, INT32_MAX}); break;
        case 17: call.num_mels = one_of({INT32_MIN, -1, 0, 257, INT32_MAX}); break;
        case 18: call.samples_dtype = one_of({-1, 3, 4, 5, INT32_MAX}); break;
        case 19: call.samples_stride = one_of({INT64_MIN, INT64_MAX}); break;
        default: call.log_floor = one_of({0.0, -1.0, double(NAN)}); break;
    }
}

void try_one() {
    Case it;
    const int threads = draw(1, 3);
    if (it.call.batch > 0 && once_in(2)) {
        clvp_fast_log_mel spoilt = it.call;
        spoil(spoilt);
        REQUIRE(clvp_fast_log_mel_cpu(&spoilt, threads, nullptr) < 0);
        REQUIRE(emulate_log_mel(&spoilt, number, 2, 0) < 0);
        REQUIRE(it.untouched());
        return;
    }
    const int code = clvp_fast_log_mel_cpu(&it.call, threads, nullptr);
    REQUIRE(code == (it.bad_band ? CLVP_FAST_BAD_BAND : it.bad_length ? CLVP_FAST_BAD_LENGTH : CLVP_FAST_OK));
    REQUIRE(code == CLVP_FAST_OK ? it.all_written() : it.untouched());
    const std::vector<float> cpu = it.values();

    it.poison();
    REQUIRE(emulate_log_mel(&it.call, number, draw(1, 4), once_in(2)) == CLVP_FAST_OK);
    REQUIRE(it.all_written());
    const std::vector<float> gpu = it.values();
    if (code != CLVP_FAST_OK || !it.finite) return;
    for (size_t i = 0; i < cpu.size(); ++i) REQUIRE(fabsf(cpu[i] - gpu[i]) < 2e-2f);
}

/* Features of 16 bits: half the memory. */
void try_half() {
    Case it;
    it.feature_bytes /= 2;
    it.features = exactly<unsigned char>(it.feature_bytes);
    memset(it.features.get(), 0xa5, it.feature_bytes);
    it.call.features = it.features.get();
    it.call.features_dtype = one_of({CLVP_FAST_FLOAT16, CLVP_FAST_BFLOAT16});
    REQUIRE(it.call.batch == 0 || clvp_fast_log_mel_cpu(&it.call, 1, nullptr) == CLVP_FAST_BAD_DTYPE);
    REQUIRE(emulate_log_mel(&it.call, number, 3, 0) == CLVP_FAST_OK);
}

}  // namespace

int main(int count, char **arguments) {
    const int cases = atoi(arguments[1]);
    engine.seed(count > 2 ? atoi(arguments[2]) : 0);
    REQUIRE(clvp_fast_log_mel_cpu(nullptr, 1, nullptr) == CLVP_FAST_NULL_POINTER);
    REQUIRE(emulate_log_mel(nullptr, 0, 1, 0) == CLVP_FAST_NULL_POINTER);
    for (number = 0; number < cases; ++number) {
        try_one();
        if (number % 8 == 0) try_half();
    }
    const unsigned seed = count > 2 ? atoi(arguments[2]) : 0;
    if (fuzz_linear(cases, seed) || fuzz_mlp(cases, seed) || fuzz_window_attention(cases, seed) ||
        fuzz_window_block(cases, seed) || fuzz_norm(cases, seed) || fuzz_sample(cases, seed) ||
        fuzz_paged(cases, seed) || fuzz_prefill(cases, seed) || fuzz_rotary_attention(cases, seed) ||
        fuzz_calls(cases, seed))
        return 1;
    for (int code = -50; code < 1000; ++code) REQUIRE(clvp_fast_error(code) != nullptr);
    printf("%d cases\n", cases);
}
