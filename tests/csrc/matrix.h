/* Random matrices for calls of the C interface, each in exactly the memory that it needs. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <vector>

#include "../../csrc/clvp_fast.h"

namespace {

std::mt19937_64 engine;

int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine); }

/* An instruction set by name, which this machine may not have, or null for its best. */
const char *draw_isa() {
    const char *const names[] = {nullptr, "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "portable"};
    return names[draw(0, 6)];
}

float to_float(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
uint16_t to_half(float value) { /* of numbers that bfloat16 has */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits >> 16;
}

/* A strided matrix in exactly the memory that it needs. Its values are eighths, which every dtype holds. */
struct Matrix {
    int64_t rows, columns, stride;
    int32_t dtype;
    std::unique_ptr<unsigned char[]> memory;
    int64_t size() const { return dtype == CLVP_FAST_INT8 ? 1 : dtype == CLVP_FAST_FLOAT32 ? 4 : 2; }
    unsigned char *first() const { return memory.get() + (stride < 0 ? -stride * (rows - 1) * size() : 0); }
    Matrix(int64_t rows, int64_t columns, int64_t stride, int32_t dtype)
        : rows(rows), columns(columns), stride(stride), dtype(dtype) {
        const int64_t span = rows ? columns + llabs(stride) * (rows - 1) : 0;
        memory.reset(new unsigned char[span * size()]);
        for (int64_t i = 0; i < span; ++i) {
            const float value = draw(-16, 16) / (dtype == CLVP_FAST_INT8 ? 1.0f : 8.0f);
            const int8_t whole = (int8_t)value;
            const uint16_t half = to_half(value);
            unsigned char *const to = memory.get() + i * size();
            if (dtype == CLVP_FAST_INT8) memcpy(to, &whole, 1);
            if (dtype == CLVP_FAST_FLOAT32) memcpy(to, &value, 4);
            if (dtype == CLVP_FAST_BFLOAT16) memcpy(to, &half, 2);
        }
    }
    double at(int64_t row, int64_t column) const {
        const unsigned char *const from = first() + (row * stride + column) * size();
        if (dtype == CLVP_FAST_INT8) return (int8_t)*from;
        float value;
        uint16_t half;
        if (dtype == CLVP_FAST_FLOAT32) return memcpy(&value, from, 4), value;
        return memcpy(&half, from, 2), to_float(half);
    }
};

/* Norms a row, and gives affine(column, value) for each value. */
template <class Affine>
void layer_norm(std::vector<double> &row, double eps, const Affine &affine) {
    double mean = 0, variance = 0;
    for (const double value : row) mean += value / row.size();
    for (const double value : row) variance += (value - mean) * (value - mean) / row.size();
    for (size_t k = 0; k < row.size(); ++k) row[k] = affine(k, (row[k] - mean) / sqrt(variance + eps));
}

/* Runs cases of an operator by its function of the C interface, which must also refuse a call that is null. Returns 0,
 * or 1 after a case that failed. */
template <class Call>
int run_cases(const char *name, int (*function)(const Call *, int32_t, const char *), bool (*one_case)(), int cases,
              unsigned seed) {
    engine.seed(seed);
    if (function(nullptr, 1, nullptr) != CLVP_FAST_NULL_POINTER) return 1;
    for (int number = 0; number < cases; ++number)
        if (!one_case()) {
            fprintf(stderr, "%s: case %d\n", name, number);
            return 1;
        }
    return 0;
}

}  // namespace
