/* Random and hostile calls of norm on every instruction set: every array is an allocation of exactly its size. A call
 * that must be refused is, and leaves results as they were; any other is what the norm in float64 is, row by row with
 * the same bits as that row alone. */
#include <math.h>
#include <string.h>

#include <vector>

#include "matrix.h"

namespace {

void spoil(clvp_fast_norm &call) {
    switch (draw(0, 11)) {
        case 0: call.x = nullptr; break;
        case 1: call.weight = nullptr; break;
        case 2: call.out = nullptr; break;
        case 3: call.residual = call.x, call.sum = nullptr; break;
        case 4: call.x = (const char *)call.x + 1; break;
        case 5: call.out = (char *)call.out + 1; break;
        case 6: call.columns = draw(0, 1) ? 0 : INT64_MAX; break;
        case 7: call.rows = draw(0, 1) ? -1 : INT64_MAX; break;
        case 8: call.rms = 1, call.bias = call.weight; break;
        case 9: call.rms = draw(0, 1) ? -1 : 2, call.bias = nullptr; break;
        case 10: call.x_stride = draw(0, 1) ? INT64_MAX : INT64_MIN; break;
        default: *(draw(0, 1) ? &call.dtype : &call.out_dtype) = draw(0, 1) ? CLVP_FAST_FLOAT16 : 77;
    }
}

int32_t floating() { return draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16; }

std::vector<unsigned char> bytes_of(const Matrix &x) { return {x.first(), x.first() + x.rows * x.columns * x.size()}; }

/* Norms a row, and gives it its weight and bias. */
void norm(std::vector<double> &row, const clvp_fast_norm &call, const Matrix &weight, const Matrix &bias) {
    if (!call.rms) {
        const auto affine = [&](size_t k, double value) {
            return value * weight.at(0, k) + (call.bias ? bias.at(0, k) : 0);
        };
        return layer_norm(row, call.eps, affine);
    }
    double squares = 0;
    for (const double value : row) squares += value * value / row.size();
    for (size_t k = 0; k < row.size(); ++k) row[k] *= weight.at(0, k) / sqrt(squares + call.eps);
}

bool one_case() {
    const int64_t rows = draw(0, 8) ? draw(1, 9) : draw(60, 80), columns = draw(0, 1) ? draw(1, 40) : draw(1, 300);
    const int32_t dtype = floating(), sum_dtype = draw(0, 1) ? dtype : CLVP_FAST_FLOAT32, affine = floating();
    const Matrix x(rows, columns, draw(0, 2) ? columns : draw(-columns, 2 * columns), dtype);
    const Matrix residual(rows, columns, columns, sum_dtype);
    const Matrix weight(1, columns, columns, affine), bias(1, columns, columns, affine);
    const bool added = draw(0, 1);
    Matrix sum(rows, columns, columns, sum_dtype), sum_alone(1, columns, columns, sum_dtype);
    Matrix out(rows, columns, columns, floating()), alone(1, columns, columns, out.dtype);
    clvp_fast_norm call = {};
    call.x = x.first(), call.weight = weight.first(), call.out = out.first();
    if (added) call.residual = residual.first(), call.sum = sum.first();
    call.rms = draw(0, 1), call.bias = call.rms || draw(0, 1) ? nullptr : bias.first();
    call.x_stride = x.stride, call.rows = rows, call.columns = columns, call.eps = 0.25f;
    call.dtype = dtype, call.sum_dtype = added ? sum_dtype : dtype, call.affine_dtype = affine;
    call.out_dtype = out.dtype;

    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    if (draw(1, 6) == 1) {
        clvp_fast_norm spoilt = call;
        spoil(spoilt);
        const auto before = bytes_of(out), sum_before = bytes_of(sum);
        return clvp_fast_norm_cpu(&spoilt, threads, isa) < 0 && before == bytes_of(out) && sum_before == bytes_of(sum);
    }
    const int code = clvp_fast_norm_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;
    for (int64_t m = 0; m < rows; ++m) {
        std::vector<double> values(columns);
        for (int64_t k = 0; k < columns; ++k) {
            values[k] = x.at(m, k) + (added ? residual.at(m, k) : 0);
            if (added && values[k] != sum.at(m, k)) return false; /* sums of two eighths are exact */
        }
        norm(values, call, weight, bias);
        for (int64_t k = 0; k < columns; ++k) {
            const double room = dtype == CLVP_FAST_FLOAT32 && out.dtype == CLVP_FAST_FLOAT32 ? 1e-5 : 8e-3;
            if (!(fabs(out.at(m, k) - values[k]) <= room * (1 + fabs(values[k])))) return false;
        }
    }
    const int64_t row = draw(0, rows - 1);
    call.x = x.first() + row * x.stride * x.size(), call.out = alone.first(), call.rows = 1;
    if (added) call.residual = residual.first() + row * columns * residual.size(), call.sum = sum_alone.first();
    return clvp_fast_norm_cpu(&call, 1, isa) == CLVP_FAST_OK &&
           !memcmp(alone.first(), out.first() + row * columns * out.size(), columns * out.size());
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_norm(int cases, unsigned seed) { return run_cases("norm", clvp_fast_norm_cpu, one_case, cases, seed); }
