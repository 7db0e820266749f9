/* Random and hostile calls of sample on every instruction set: every array is an allocation of exactly its size. A call
 * that must be refused is, and leaves the tokens as they were; any other gives tokens of the vocabulary, NaN or not,
 * and each row the one that it gets alone. */
#include <math.h>
#include <string.h>

#include <memory>
#include <vector>

#include "matrix.h"

namespace {

template <class Value>
std::unique_ptr<Value[]> filled(int64_t count, Value (*value)()) {
    std::unique_ptr<Value[]> made(new Value[count]);
    for (int64_t i = 0; i < count; ++i) made[i] = value();
    return made;
}

/* Few different numbers, so that many are equal, and now and then one that is none. */
float logit() {
    const float extremes[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f, -0.0f};
    return draw(0, 40) ? draw(-12, 12) / 4.0f : extremes[draw(0, 6)];
}

uint16_t half_logit() {
    const float value = logit();
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits >> 16;
}

double parameter() {
    const double extremes[] = {0, -1, 1, 1e-300, 1e300, NAN, INFINITY};
    return draw(0, 8) ? draw(1, 99) / 100.0 : extremes[draw(0, 6)];
}

int64_t number() { return draw(0, 3) ? draw(0, 50) : draw(INT64_MIN, INT64_MAX); }

void spoil(clvp_fast_sample &call) {
    switch (draw(0, 9)) {
        case 0: call.logits = nullptr; break;
        case 1: call.seen = nullptr; break;
        case 2: call.tokens = nullptr; break;
        case 3: call.logits = (const char *)call.logits + 1; break;
        case 4: call.tokens = (int64_t *)((char *)call.tokens + 4); break;
        case 5: call.vocab_size = draw(0, 1) ? 0 : INT64_MAX; break;
        case 6: call.rows = draw(0, 1) ? -1 : INT64_MAX; break;
        case 7: call.dtype = draw(0, 1) ? CLVP_FAST_FLOAT16 : 77; break;
        case 8: call.seed = nullptr; break;
        default: call.done = nullptr;
    }
}

bool one_case() {
    const int64_t rows = draw(1, 5), vocab_size = draw(0, 3) ? draw(1, 140) : draw(1, 3000);
    const int64_t words = (vocab_size + 31) / 32, logits_stride = vocab_size + draw(0, 3),
                  seen_stride = words + draw(0, 2);
    const bool half = draw(0, 1);
    const int64_t span = logits_stride * (rows - 1) + vocab_size;
    const auto logits = filled<float>(half ? 0 : span, logit);
    const auto halves = filled<uint16_t>(half ? span : 0, half_logit);
    const auto seen =
        filled<int32_t>(seen_stride * (rows - 1) + words, [] { return (int32_t)draw(INT32_MIN, INT32_MAX); });
    const auto done = filled<uint8_t>(rows, [] { return (uint8_t)(draw(0, 5) == 0); });
    const auto sampled = filled<uint8_t>(rows, [] { return (uint8_t)draw(0, 1); });
    std::unique_ptr<double[]> reals[5];
    for (auto &real : reals) real = filled<double>(rows, parameter);
    std::unique_ptr<int64_t[]> numbers[4];
    for (auto &each : numbers) each = filled<int64_t>(rows, number);
    std::vector<int64_t> tokens(rows, -7);

    clvp_fast_sample call = {};
    call.logits = half ? (const void *)halves.get() : logits.get();
    call.seen = seen.get(), call.done = done.get(), call.sampled = draw(0, 1) ? sampled.get() : nullptr;
    const double **const places[] = {&call.temperature, &call.top_p, &call.typical_p, &call.min_p,
                                     &call.repetition_penalty};
    for (int i = 0; i < 5; ++i) *places[i] = draw(0, 1) ? reals[i].get() : nullptr;
    call.top_k = draw(0, 1) ? numbers[0].get() : nullptr;
    call.seed = numbers[1].get(), call.candidate = numbers[2].get(), call.step = numbers[3].get();
    call.tokens = tokens.data(), call.logits_stride = logits_stride, call.seen_stride = seen_stride;
    call.rows = rows, call.vocab_size = vocab_size, call.pad_token = 123456;
    call.dtype = half ? CLVP_FAST_BFLOAT16 : CLVP_FAST_FLOAT32, call.do_sample = draw(0, 3) > 0;

    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    if (draw(1, 6) == 1) {
        clvp_fast_sample spoilt = call;
        spoil(spoilt);
        return clvp_fast_sample_cpu(&spoilt, threads, isa) < 0 && tokens == std::vector<int64_t>(rows, -7);
    }
    const int code = clvp_fast_sample_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;
    for (int64_t row = 0; row < rows; ++row)
        if (done[row] ? tokens[row] != 123456 : tokens[row] < 0 || tokens[row] >= vocab_size) return false;

    const int64_t row = draw(0, rows - 1);
    int64_t token = -7;
    call.logits = half ? (const void *)(halves.get() + row * logits_stride) : logits.get() + row * logits_stride;
    call.seen += row * seen_stride, call.done += row;
    if (call.sampled) call.sampled += row;
    for (const double **place : places)
        if (*place) *place += row;
    if (call.top_k) call.top_k += row;
    call.seed += row, call.candidate += row, call.step += row;
    call.tokens = &token, call.rows = 1;
    return clvp_fast_sample_cpu(&call, 1, isa) == CLVP_FAST_OK && token == tokens[row];
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_sample(int cases, unsigned seed) { return run_cases("sample", clvp_fast_sample_cpu, one_case, cases, seed); }
