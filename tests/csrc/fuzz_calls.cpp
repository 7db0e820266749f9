/* Random and hostile lists of calls, made together on every instruction set. A list with a call that must be refused
 * leaves all results as they were; any other gives each result the bits that its call gives alone, also where a call
 * reads what an earlier one wrote. */
#include <string.h>

#include <vector>

#include "matrix.h"

namespace {

constexpr int64_t COLUMNS = 64;

/* Layers, each of a norm and a product of what it wrote. */
struct Layers {
    const int64_t rows = draw(0, 1) ? draw(1, 9) : draw(100, 200);
    const Matrix weight{1, COLUMNS, COLUMNS, CLVP_FAST_FLOAT32}, matrix{COLUMNS, COLUMNS, COLUMNS, CLVP_FAST_FLOAT32};
    std::vector<Matrix> values;
    std::vector<clvp_fast_norm> norms;
    std::vector<clvp_fast_linear> products;
    std::vector<clvp_fast_call> calls;
    explicit Layers(size_t count) : norms(count), products(count) {
        for (size_t i = 0; i < 2 * count + 1; ++i) values.emplace_back(rows, COLUMNS, COLUMNS, CLVP_FAST_FLOAT32);
        for (size_t i = 0; i < count; ++i) {
            clvp_fast_norm &norm = norms[i] = {};
            norm.x = values[2 * i].first(), norm.weight = weight.first(), norm.out = values[2 * i + 1].first();
            norm.x_stride = norm.columns = COLUMNS, norm.rows = rows, norm.eps = 0.25f;
            clvp_fast_linear &product = products[i] = {};
            product.x = values[2 * i + 1].first(), product.weight = matrix.first();
            product.out = values[2 * i + 2].first(), product.rows = rows;
            product.x_stride = product.weight_stride = product.in_features = product.out_features = COLUMNS;
            clvp_fast_call of_norm = {CLVP_FAST_NORM, {}}, of_product = {CLVP_FAST_LINEAR, {}};
            of_norm.norm = &norm, of_product.linear = &product;
            calls.push_back(of_norm), calls.push_back(of_product);
        }
    }
    std::vector<unsigned char> results() const {
        std::vector<unsigned char> all;
        for (const Matrix &value : values)
            all.insert(all.end(), value.first(), value.first() + rows * COLUMNS * value.size());
        return all;
    }
};

/* Makes a list that must be refused. */
int spoilt(Layers &layers, int32_t threads, const char *isa) {
    const int64_t count = layers.calls.size();
    switch (draw(0, 5)) {
        case 0: return clvp_fast_calls_cpu(nullptr, count, threads, isa);
        case 1: return clvp_fast_calls_cpu(layers.calls.data(), draw(0, 1) ? -1 : INT64_MAX, threads, isa);
        case 2: layers.calls[draw(0, count - 1)].operation = draw(0, 1) ? -1 : 3; break;
        case 3: layers.calls[draw(0, count - 1)].linear = nullptr; break;
        case 4: layers.norms.back().columns = 0; break;
        default: layers.products.back().out = nullptr;
    }
    return clvp_fast_calls_cpu(layers.calls.data(), count, threads, isa);
}

bool one_case() {
    Layers layers(draw(1, 9));
    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    const auto before = layers.results();
    if (draw(1, 6) == 1) return spoilt(layers, threads, isa) < 0 && layers.results() == before;
    const int code = clvp_fast_calls_cpu(layers.calls.data(), layers.calls.size(), threads, isa);
    if (code != CLVP_FAST_OK) return code == CLVP_FAST_NO_ISA && isa;
    const auto together = layers.results();
    for (size_t i = 0; i < layers.norms.size(); ++i) {
        memset(layers.values[2 * i + 1].first(), 0, layers.rows * COLUMNS * sizeof(float));
        if (clvp_fast_norm_cpu(&layers.norms[i], 1, isa) || clvp_fast_linear_cpu(&layers.products[i], 1, isa))
            return false;
    }
    return layers.results() == together;
}

int alone(const clvp_fast_call *calls, int32_t threads, const char *isa) {
    return clvp_fast_calls_cpu(calls, 1, threads, isa);
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_calls(int cases, unsigned seed) { return run_cases("calls", alone, one_case, cases, seed); }
