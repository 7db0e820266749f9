/* Random and hostile calls of linear on every instruction set: every array is an allocation of exactly its size. A call
 * that must be refused is, and leaves the result as it was; any other is what the sums in float64 are, row by row with
 * the same bits as that row alone. */
#include <math.h>
#include <string.h>

#include <vector>

#include "matrix.h"

namespace {

void spoil(clvp_fast_linear &call) {
    switch (draw(0, 13)) {
        case 0: call.x = nullptr; break;
        case 1: call.weight = call.panels = nullptr; break;
        case 2: call.out = nullptr; break;
        case 3: call.x = (const char *)call.x + 1; break;
        case 4: call.out = (char *)call.out + 1; break;
        case 5: call.in_features += draw(1, 31); break;
        case 6: call.in_features = call.int8_x ? (1 << 16) + 32 : draw(0, 1) ? 0 : INT64_MAX / 32 * 32; break;
        case 7: call.rows = draw(0, 1) ? -1 : INT64_MAX; break;
        case 8: call.activation = draw(0, 1) ? -1 : 2; break;
        case 9: call.residual = (const float *)((const char *)call.out + 2); break;
        case 10:
            if (call.weight_dtype == CLVP_FAST_INT8) call.x = nullptr;
            call.panels = (const char *)call.x + 1;
            break;
        case 11: call.dtype = draw(0, 1) ? CLVP_FAST_FLOAT64 : 77; break;
        case 12:
            if (call.int8_x || call.weight_dtype == CLVP_FAST_INT8)
                call.panels = nullptr, call.int8_x = draw(0, 1) ? 1 : -1;
            else
                call.int8_x = 1;
            break;
        default: call.weight_dtype = CLVP_FAST_FLOAT16;
    }
}

/* The weights as `panels` of clvp_fast.h says, in exactly the memory that they need. */
std::unique_ptr<unsigned char[]> panels_of(const Matrix &weight, bool int8_x) {
    const int64_t size = weight.size(), together = int8_x ? 4 : size == 4 ? 1 : 2, groups = (weight.rows + 47) / 48;
    std::unique_ptr<unsigned char[]> panels(new unsigned char[groups * 48 * weight.columns * size]());
    for (int64_t n = 0; n < weight.rows; ++n)
        for (int64_t k = 0; k < weight.columns; ++k) {
            const int64_t unit = (n / 48 * (weight.columns / together) + k / together) * 48 + n % 48;
            unsigned char *const to = panels.get() + (unit * together + k % together) * size;
            memcpy(to, weight.first() + (n * weight.stride + k) * size, size);
            if (int8_x) *to += 128;
        }
    return panels;
}

/* A row of x, or with int8_x what it is rounded to. */
std::vector<double> row_of(const Matrix &x, int64_t row, bool int8_x) {
    std::vector<double> values(x.columns);
    float largest = 0;
    for (int64_t k = 0; k < x.columns; ++k) largest = fmaxf(largest, fabsf(float(values[k] = x.at(row, k))));
    const float step = fmaxf(largest / 127, 1.17549435e-38f), inverse = 1 / step;
    if (int8_x)
        for (double &value : values) value = double(nearbyintf(float(value) * inverse)) * step;
    return values;
}

double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

bool one_case() {
    const int32_t dtype = draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16;
    const int64_t rows = draw(0, 8) ? draw(1, 9) : draw(120, 140), columns = 32 * draw(1, 5), outs = draw(1, 110);
    const Matrix x(rows, columns, draw(0, 2) ? columns : draw(-columns, 2 * columns), dtype);
    const Matrix weight(outs, columns, draw(0, 2) ? columns : draw(-columns, 2 * columns),
                        draw(0, 1) ? dtype : CLVP_FAST_INT8);
    const Matrix bias(1, outs, outs, dtype), scale(1, outs, outs, CLVP_FAST_FLOAT32);
    const Matrix residual(rows, outs, outs, CLVP_FAST_FLOAT32);
    const bool with_residual = draw(0, 1);
    const int32_t out_dtype = with_residual ? CLVP_FAST_FLOAT32 : dtype;
    Matrix out(rows, outs, outs, out_dtype), alone(1, outs, outs, out_dtype);
    clvp_fast_linear call = {};
    call.x = x.first(), call.weight = weight.first(), call.out = out.first();
    call.scale = draw(0, 1) ? (const float *)scale.first() : nullptr;
    call.bias = draw(0, 1) ? bias.first() : nullptr;
    call.residual = with_residual ? (const float *)residual.first() : nullptr;
    call.x_stride = x.stride, call.weight_stride = weight.stride;
    call.rows = rows, call.in_features = columns, call.out_features = outs;
    call.dtype = dtype, call.weight_dtype = weight.dtype, call.activation = draw(0, 1);
    call.int8_x = weight.dtype == CLVP_FAST_INT8 && draw(0, 1);
    const auto panels = panels_of(weight, call.int8_x);
    if (call.int8_x || draw(0, 1)) call.panels = panels.get(), call.weight = draw(0, 1) ? call.weight : nullptr;
    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    if (draw(1, 6) == 1) {
        clvp_fast_linear spoilt = call;
        spoil(spoilt);
        const std::vector<unsigned char> before(out.first(), out.first() + rows * outs * out.size());
        return clvp_fast_linear_cpu(&spoilt, threads, isa) < 0 && !memcmp(before.data(), out.first(), before.size());
    }
    const int code = clvp_fast_linear_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;
    for (int64_t m = 0; m < rows; ++m) {
        const std::vector<double> values = row_of(x, m, call.int8_x);
        for (int64_t n = 0; n < outs; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < columns; ++k) sum += values[k] * weight.at(n, k);
            if (call.scale) sum *= scale.at(0, n);
            if (call.bias) sum += bias.at(0, n);
            if (call.activation) sum = gelu(sum);
            if (with_residual) sum += residual.at(m, n);
            const double room = out_dtype == CLVP_FAST_FLOAT32 ? 1e-4 : 4e-3;
            if (!(fabs(out.at(m, n) - sum) <= room * (1 + fabs(sum)))) return false;
        }
    }
    const int64_t row = draw(0, rows - 1);
    call.x = x.first() + row * x.stride * x.size(), call.rows = 1, call.out = alone.first();
    if (with_residual) call.residual += row * outs;
    if (clvp_fast_linear_cpu(&call, 1, isa) != CLVP_FAST_OK) return false;
    return !memcmp(alone.first(), out.first() + row * outs * out.size(), outs * out.size());
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_linear(int cases, unsigned seed) { return run_cases("linear", clvp_fast_linear_cpu, one_case, cases, seed); }
