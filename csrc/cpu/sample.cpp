/* The next token of one candidate, on a CPU: the processors and the draw of kernels/sampling.py, whose order and ties
 * these are. Nothing is sorted: sorting would find one threshold, the smallest score up to which the weights of a row
 * add up to a bound, and the order of floats is that of their bits. Sums are of doubles. Compiled once for each
 * instruction set, as log_mel.cpp is. */
#include <math.h>

#include "dispatch.h"
#include "floats.h"

namespace clvp_fast {
namespace {

using Doubles = Vector<double>;
constexpr int DOUBLE_LANES = Lanes<double>::COUNT;

CLVP_FAST_INLINE double sum_of(Doubles x) {
    double sum = 0;
    for (int lane = 0; lane < DOUBLE_LANES; ++lane) sum += x[lane];
    return sum;
}

/* The scores of a row in float32, and weights exp(score - largest) of those that may be drawn. Behind the vocabulary,
 * up to a multiple of LANES, scores are -inf and weights 0. */
struct Row {
    float *scores, *weights;
    int64_t size;
    float largest;
};

/* Sum of the weights from `first` to `end`, a vector of weight(i) at a time, whose lanes kept(i) lets through. */
template <class Weight, class Kept>
CLVP_FAST_INLINE double sum_where(int64_t first, int64_t end, const Weight &weight, const Kept &kept) {
    Doubles sum = {};
    for (int64_t i = first; i < end; i += DOUBLE_LANES) sum += kept(i) ? weight(i) : Doubles{};
    return sum_of(sum);
}

/* The float32 at a place in the order of all floats. */
float float_of_rank(uint32_t rank) {
    const uint32_t bits = rank & 0x80000000u ? rank ^ 0x80000000u : ~rank;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

constexpr uint32_t RANK_OF_INFINITY = 0xff800000u;

/* The smallest float up to which the weights of the values add up to `bound` (STRICT: to more); +inf if none does. */
template <bool STRICT, class Weight>
float threshold(const float *values, int64_t size, const Weight &weight, double bound) {
    uint32_t low = 0, high = RANK_OF_INFINITY;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        const double limit = float_of_rank(middle);
        const double sum =
            sum_where(0, size, weight, [&](int64_t i) CLVP_FAST_INLINED { return load<double>(values + i) <= limit; });
        const bool short_of = STRICT ? !(sum > bound) : !(sum >= bound);
        short_of ? low = middle + 1 : high = middle;
    }
    return float_of_rank(low);
}

template <class In>
void read_scores(const clvp_fast_sample *call, int64_t row, bool drawn, Row &to) {
    const In *const logits = (const In *)call->logits + row * call->logits_stride;
    float *const scores = to.scores;
    const int64_t vocab_size = call->vocab_size;
    int64_t i = 0;
    for (; i + LANES <= vocab_size; i += LANES) store_floats(scores + i, load_floats(logits + i));
    for (; i < to.size; ++i) {
        In last[LANES] = {};
        if (i < vocab_size) last[0] = logits[i];
        scores[i] = i < vocab_size ? load_floats(last)[0] : -INFINITY;
    }
    if (call->repetition_penalty) {
        const float penalty = (float)call->repetition_penalty[row];
        const int32_t *const seen = call->seen + row * call->seen_stride;
        for (int64_t word = 0; word * 32 < vocab_size; ++word)
            for (uint32_t bits = (uint32_t)seen[word]; bits; bits &= bits - 1) {
                const int64_t token = word * 32 + __builtin_ctz(bits);
                if (token < vocab_size)
                    scores[token] = scores[token] < 0 ? scores[token] * penalty : scores[token] / penalty;
            }
    }
    const float temperature = drawn && call->temperature ? (float)call->temperature[row] : 1.0f;
    Floats largest = Floats{} - INFINITY;
    for (i = 0; i < to.size; i += LANES) {
        const Floats score = load_floats(scores + i) / temperature;
        store_floats(scores + i, score);
        largest = score > largest ? score : largest;
    }
    to.largest = largest[0];
    for (int lane = 1; lane < LANES; ++lane) to.largest = largest[lane] > to.largest ? largest[lane] : to.largest;
}

void keep_top_k(Row &row, int64_t vocab_size, int64_t top_k) {
    /* Scores behind the vocabulary are -inf and counted, at the low end. */
    const auto one = [](int64_t) CLVP_FAST_INLINED { return Doubles{} + 1.0; };
    const float bound = threshold<false>(row.scores, row.size, one, double(row.size + 1 - top_k));
    for (int64_t i = 0; i < vocab_size; ++i)
        if (row.scores[i] < bound) row.scores[i] = -INFINITY;
}

/* Takes the least weights that together stay within 1 - mass; at least the last largest one is kept. */
void keep_top_p(Row &row, double mass) {
    const auto weight = [&](int64_t i) CLVP_FAST_INLINED { return load<double>(row.weights + i); };
    const auto all = [](int64_t) CLVP_FAST_INLINED { return Doubles{} == Doubles{}; };
    /* 1 - mass is rounded to float32, as transformers' comparison does. */
    const double spare = (float)(1 - mass) * sum_where(0, row.size, weight, all);
    const float found = threshold<true>(row.scores, row.size, weight, spare);
    const float bound = found < row.largest ? found : row.largest;
    const double wide_bound = bound;
    const double below = sum_where(
        0, row.size, weight, [&](int64_t i) CLVP_FAST_INLINED { return load<double>(row.scores + i) < wide_bound; });
    const Floats tied = Floats{} + bound;
    Integers ties_of_lane = {};
    for (int64_t i = 0; i < row.size; i += LANES) {
        const Floats score = load_floats(row.scores + i), kept = load_floats(row.weights + i);
        store_floats(row.weights + i, score < tied ? Floats{} : kept);
        ties_of_lane -= score == tied;
    }
    int64_t ties = 0;
    for (int lane = 0; lane < LANES; ++lane) ties += ties_of_lane[lane];
    const float tie = exponential(tied - row.largest)[0];
    if (!(tie > 0)) return;
    /* Of equal scores the first tokens go, as many as still fit. */
    const double fitting = (spare - below) / tie;
    int64_t removed = fitting < double(ties - 1) ? int64_t(fitting) : ties - 1;
    for (int64_t i = 0; i < row.size && removed > 0; ++i)
        if (row.scores[i] == bound) row.weights[i] = 0, --removed;
}

/* Keeps the weights whose surprise is nearest to the entropy, up to `mass`. The scores turn into distances. With l the
 * logarithm of a weight, surprise less entropy is the mean of l less l: what normalises them cancels. */
void keep_typical(Row &row, double mass) {
    const double largest = row.largest;
    const auto weight = [&](int64_t i) CLVP_FAST_INLINED { return load<double>(row.weights + i); };
    const auto drawable = [&](int64_t i) CLVP_FAST_INLINED { return weight(i) > 0.0; };
    const double total = sum_where(0, row.size, weight, drawable);
    const auto logarithm = [&](int64_t i)
                               CLVP_FAST_INLINED { return weight(i) * (load<double>(row.scores + i) - largest); };
    const double mean = sum_where(0, row.size, logarithm, drawable) / total;
    for (int64_t i = 0; i < row.size; ++i)
        row.scores[i] = row.weights[i] > 0 ? (float)fabs(mean - ((double)row.scores[i] - largest)) : INFINITY;
    const float bound = threshold<false>(row.scores, row.size, weight, (float)mass * total);
    for (int64_t i = 0; i < row.size; ++i)
        if (row.scores[i] > bound) row.weights[i] = 0;
}

/* The first word of Philox-4x32-10 (Salmon et al., 2011). */
uint32_t philox(uint64_t key, uint64_t low, uint64_t high) {
    uint32_t c0 = (uint32_t)low, c1 = (uint32_t)(low >> 32), c2 = (uint32_t)high, c3 = (uint32_t)(high >> 32);
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c0;
}

/* The first token whose cumulated weight exceeds `share` of all, or the last that may be drawn. */
int64_t draw(const Row &row, int64_t vocab_size, double share) {
    constexpr int64_t SPAN = 64;
    const auto weight = [&](int64_t i) CLVP_FAST_INLINED { return load<double>(row.weights + i); };
    const auto all = [](int64_t) CLVP_FAST_INLINED { return Doubles{} == Doubles{}; };
    const double target = share * sum_where(0, row.size, weight, all);
    double before = 0;
    int64_t last = 0;
    for (int64_t first = 0; first < vocab_size; first += SPAN) {
        const int64_t end = first + SPAN < row.size ? first + SPAN : row.size;
        const double sum = sum_where(first, end, weight, all);
        if (sum > 0) {
            double cumulated = before;
            for (int64_t i = first; before + sum > target && i < end; ++i) {
                cumulated += row.weights[i];
                if (cumulated > target) return i;
            }
            last = first;
        }
        before += sum;
    }
    /* Rounding alone kept the sum from the target. */
    for (int64_t i = last; i < row.size && i < last + SPAN; ++i)
        if (row.weights[i] > 0) last = i;
    return last;
}

int64_t sample_row(const clvp_fast_sample *call, int64_t index, Row &row) {
    const bool drawn = call->sampled ? call->sampled[index] : call->do_sample;
    if (call->dtype == CLVP_FAST_FLOAT32)
        read_scores<float>(call, index, drawn, row);
    else
        read_scores<uint16_t>(call, index, drawn, row);
    const int64_t vocab_size = call->vocab_size;
    if (!drawn) {
        for (int64_t i = 0; i < vocab_size; ++i)
            if (row.scores[i] == row.largest) return i;
        return 0;
    }
    const int64_t top_k = call->top_k ? call->top_k[index] : 0;
    if (top_k > 0 && top_k < vocab_size) keep_top_k(row, vocab_size, top_k);
    for (int64_t i = 0; i < row.size; i += LANES)
        store_floats(row.weights + i, exponential(load_floats(row.scores + i) - row.largest));
    if (call->top_p && call->top_p[index] < 1) keep_top_p(row, call->top_p[index]);
    if (call->min_p) {
        const float least = (float)call->min_p[index]; /* The largest weight is 1. */
        for (int64_t i = 0; i < row.size; ++i)
            if (row.weights[i] < least) row.weights[i] = 0;
    }
    if (call->typical_p && call->typical_p[index] < 1) keep_typical(row, call->typical_p[index]);
    const uint32_t bits = philox(call->seed[index], call->step[index], call->candidate[index]);
    return draw(row, vocab_size, (bits + 0.5) / 4294967296.0);
}

int64_t items(const clvp_fast_sample *call) { return call->rows; }

int64_t padded_size(const clvp_fast_sample *call) { return (call->vocab_size + LANES - 1) / LANES * LANES; }

/* Scores and weights. */
size_t scratch_bytes(const clvp_fast_sample *call) { return 2 * sizeof(float) * padded_size(call); }

void run(const clvp_fast_sample *call, int64_t index, void *scratch) {
    const int64_t size = padded_size(call);
    Row row = {(float *)scratch, (float *)scratch + size, size, 0};
    call->tokens[index] = call->done[index] ? call->pad_token : sample_row(call, index, row);
}

}  // namespace

const Kernel<clvp_fast_sample> CLVP_FAST_OF(sample, CLVP_FAST_ISA) = {items, scratch_bytes, run};

}  // namespace clvp_fast
