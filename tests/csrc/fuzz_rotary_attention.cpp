/* Random and hostile attentions with rotary positions on every instruction set: every array is an allocation of exactly
 * its size. A call that must be refused is, and leaves the result as it was; any other gives what sums in float64 are,
 * and a ragged one leaves rows of no sequence as they were. */
#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "matrix.h"

namespace {

void spoil(clvp_fast_rotary_attention &call) {
    switch (draw(0, 12)) {
        case 0: call.q = nullptr; break;
        case 1: call.v = nullptr; break;
        case 2: call.out = nullptr; break;
        case 3: call.k = (const char *)call.k + 1; break;
        case 4: call.head_dim = draw(0, 1) ? 0 : 129; break;
        case 5: call.rotary_dim = draw(0, 1) ? 3 : call.head_dim + 2; break;
        case 6: call.batch = draw(0, 1) ? -1 : INT64_MAX; break;
        case 7: call.q_len = draw(0, 1) ? -1 : INT64_MAX; break;
        case 8: call.item_queries = draw(0, 1) ? 0 : INT64_MAX; break;
        case 9: call.query_offset = draw(0, 1) ? -1 : INT64_MAX, call.causal = 1; break;
        case 10: call.num_heads = draw(0, 1) ? 0 : INT32_MAX; break;
        case 11: call.dtype = draw(0, 1) ? CLVP_FAST_FLOAT16 : 77; break;
        default: call.cos = (const float *)call.q, call.sin = nullptr;
    }
}

/* The sizes of a call, its angles, mask and sequences. */
struct Scene {
    int64_t batch = draw(1, 3), q_len = draw(0, 4) ? draw(1, 40) : draw(120, 140), k_len = draw(1, 70);
    int64_t heads = draw(1, 3), dim = draw(0, 1) ? 16 * draw(1, 8) : draw(1, 128), rotary = 2 * draw(0, dim / 2);
    int64_t offset = 0;
    bool ragged = draw(0, 3) == 0, causal = draw(0, 1), masked = !ragged && draw(0, 1);
    std::vector<int32_t> bounds;
    std::vector<uint8_t> mask;
    std::vector<float> cos, sin;
    Scene() {
        if (ragged) {
            int64_t row = draw(0, 2);
            for (int64_t i = 0; i <= batch; ++i) bounds.push_back(row), row += draw(0, q_len);
            if (!draw(0, 4)) bounds[draw(0, batch)] = draw(0, 1) ? draw(-50, q_len + 50) : INT32_MAX;
        } else if (causal || rotary) {
            k_len = std::max(k_len, q_len), offset = draw(0, k_len - q_len);
        }
        for (int64_t i = 0; masked && i < batch * k_len; ++i) mask.push_back(draw(0, 3) > 0);
        for (int64_t i = 0; i < batch * k_len * rotary; ++i) {
            const float angle = draw(-30, 30) / 10.0f;
            cos.push_back(cosf(angle)), sin.push_back(sinf(angle));
        }
    }
    /* Calls body(sequence, its first row, queries, keys) for those that the interface does not leave out. */
    template <class Body>
    void each(const Body &body) const {
        int64_t behind = 0;
        for (int64_t i = 0; i < batch; ++i) {
            if (!ragged) {
                body(i, 0, q_len, k_len);
            } else if (bounds[i] >= behind && bounds[i] < bounds[i + 1] && bounds[i + 1] <= q_len) {
                behind = bounds[i + 1];
                if (!rotary || behind - bounds[i] <= k_len) body(0, bounds[i], behind - bounds[i], behind - bounds[i]);
            }
        }
    }
};

/* A row of a head with its first channels turned, rounded as the kernel rounds it. */
std::vector<double> turned(const Matrix &x, int64_t row, const Scene &scene, int64_t sequence, int64_t place) {
    std::vector<double> found;
    for (int64_t c = 0; c < scene.dim; ++c) found.push_back(x.at(row, c));
    const int64_t half = scene.rotary / 2, angle = (sequence * scene.k_len + place) * scene.rotary;
    for (int64_t c = 0; c < half; ++c) {
        const double first = found[c], second = found[half + c];
        found[c] = first * scene.cos[angle + c] - second * scene.sin[angle + c];
        found[half + c] = second * scene.cos[angle + half + c] + first * scene.sin[angle + half + c];
    }
    for (double &number : found)
        if (x.dtype == CLVP_FAST_BFLOAT16 && scene.rotary) {
            uint32_t bits;
            const float single = number;
            memcpy(&bits, &single, 4);
            number = to_float((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
    return found;
}

bool one_case() {
    const Scene scene;
    const int32_t dtype = draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16;
    const int64_t heads = scene.heads, dim = scene.dim, tensors = scene.ragged ? 1 : scene.batch;
    const int64_t keys = scene.ragged ? scene.q_len : scene.k_len, rows = tensors * scene.q_len * heads;
    const Matrix q(rows, dim, dim + draw(0, 3), dtype), k(tensors * keys * heads, dim, dim, dtype);
    const Matrix v(tensors * keys * heads, dim, dim, dtype), out(rows, dim, dim, dtype);
    clvp_fast_rotary_attention call = {};
    call.q = q.first(), call.k = k.first(), call.v = v.first(), call.out = out.first();
    if (scene.rotary) call.cos = scene.cos.data(), call.sin = scene.sin.data();
    if (scene.masked) call.key_mask = scene.mask.data();
    if (scene.ragged) call.cu_seqlens = scene.bounds.data();
    call.q_strides[2] = q.stride, call.q_strides[1] = heads * q.stride,
    call.q_strides[0] = scene.q_len * heads * q.stride;
    for (auto *to : {call.k_strides, call.v_strides}) to[2] = dim, to[1] = heads * dim, to[0] = keys * heads * dim;
    call.angle_stride = scene.ragged ? 0 : scene.k_len * scene.rotary;
    call.batch = scene.batch, call.q_len = scene.q_len, call.k_len = scene.k_len, call.query_offset = scene.offset;
    call.item_queries = draw(0, 1) ? 128 : draw(1, 4) * 16;
    call.num_heads = heads, call.head_dim = dim, call.rotary_dim = scene.rotary, call.causal = scene.causal;
    call.dtype = dtype, call.scale = 1 / sqrtf((float)dim);
    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    std::vector<unsigned char> expected(out.first(), out.first() + rows * dim * out.size());
    if (draw(1, 6) == 1) {
        clvp_fast_rotary_attention spoilt = call;
        spoil(spoilt);
        return clvp_fast_rotary_attention_cpu(&spoilt, threads, isa) < 0 &&
               std::equal(expected.begin(), expected.end(), out.first());
    }
    const int code = clvp_fast_rotary_attention_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;
    bool good = true;
    scene.each([&](int64_t sequence, int64_t start, int64_t queries, int64_t seen) {
        const int64_t q_first = sequence * scene.q_len + start, k_first = sequence * keys + start;
        const int64_t row_bytes = heads * dim * out.size();
        std::copy_n(out.first() + q_first * row_bytes, queries * row_bytes, &expected[q_first * row_bytes]);
        for (int i = 0; i < 6; ++i) {
            const int64_t place = draw(0, queries - 1), head = draw(0, heads - 1),
                          row = (q_first + place) * heads + head;
            const auto query = turned(q, row, scene, sequence, scene.offset + place);
            std::vector<double> weights(seen), mixed(dim);
            double sum = 0;
            bool any = false;
            const auto allowed = [&](int64_t key) {
                return (!scene.causal || key <= scene.offset + place) &&
                       (!scene.masked || scene.mask[sequence * scene.k_len + key]);
            };
            for (int64_t key = 0; key < seen; ++key) any = any || allowed(key);
            for (int64_t key = 0; key < seen; ++key) {
                const auto other = turned(k, (k_first + key) * heads + head, scene, sequence, key);
                double score = 0;
                for (int64_t c = 0; c < dim; ++c) score += query[c] * other[c];
                sum += weights[key] = !any ? 1 : allowed(key) ? exp(score * call.scale) : 0;
            }
            for (int64_t key = 0; key < seen; ++key) {
                const auto value = turned(v, (k_first + key) * heads + head, scene, sequence, key);
                for (int64_t c = 0; c < dim; ++c) mixed[c] += weights[key] / sum * value[c];
            }
            for (int64_t c = 0; c < dim; ++c)
                good = good && fabs(out.at(row, c) - mixed[c]) <=
                                   (dtype == CLVP_FAST_FLOAT32 ? 2e-5 : 2e-2) * (1 + fabs(mixed[c]));
        }
    });
    return good && std::equal(expected.begin(), expected.end(), out.first());
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_rotary_attention(int cases, unsigned seed) {
    return run_cases("rotary_attention", clvp_fast_rotary_attention_cpu, one_case, cases, seed);
}
