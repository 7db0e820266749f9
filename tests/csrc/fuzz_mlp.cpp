/* Random and hostile calls of layers of many rows on every instruction set: every array is an allocation of exactly its
 * size. A call that must be refused is, and leaves the result as it was; any other is what the sums in float64 are, row
 * by row with the same bits as that row alone. */
#include <math.h>
#include <string.h>

#include <vector>

#include "matrix.h"

namespace {

void spoil(clvp_fast_mlp &call) {
    switch (draw(0, 15)) {
        case 0: call.x = nullptr; break;
        case 1: call.w_in = nullptr; break;
        case 2: call.out = nullptr; break;
        case 3: call.x = (const char *)call.x + 1; break;
        case 4: call.out = (char *)call.out + 1; break;
        case 5: call.in_features += draw(1, 31); break;
        case 6: call.in_features = draw(0, 1) ? 0 : INT64_MAX / 32 * 32; break;
        case 7: call.rows = draw(0, 1) ? -1 : INT64_MAX; break;
        case 8: call.activation = draw(0, 1) ? -1 : 3; break;
        case 9: call.residual = (const char *)call.out + 1; break;
        case 10: call.dtype = draw(0, 1) ? CLVP_FAST_INT8 : 77; break;
        case 11: call.out_dtype = CLVP_FAST_FLOAT16; break;
        case 12: call.item_rows = draw(0, 1) ? 0 : 4097; break;
        case 13: call.gated = call.w_out ? draw(0, 1) ? -1 : 2 : 1; break;
        case 14: call.norm_weight = nullptr, call.norm_bias = call.x; break;
        default: call.inner_features += call.w_out ? 5 : 1;
    }
}

double activate(int activation, double x) {
    if (activation == CLVP_FAST_GELU) return 0.5 * x * (1 + erf(x / sqrt(2)));
    if (activation == CLVP_FAST_GELU_TANH) return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    return x;
}

int64_t stride_of(int64_t columns) { return draw(0, 2) ? columns : draw(-columns, 2 * columns); }

bool one_case() {
    const int32_t dtype = draw(0, 1) ? CLVP_FAST_FLOAT32 : CLVP_FAST_BFLOAT16;
    const int32_t out_dtype = draw(0, 1) ? dtype : CLVP_FAST_FLOAT32;
    const bool two = draw(0, 1), gated = two && draw(0, 1), with_residual = draw(0, 1);
    const int64_t rows = draw(1, 30), columns = 32 * draw(1, 4), outs = draw(1, 110);
    const int64_t inner = two ? 32 * draw(1, 3) : outs;
    const int64_t firsts = gated ? 2 * inner : inner;
    const Matrix x(rows, columns, stride_of(columns), dtype), w_in(firsts, columns, stride_of(columns), dtype);
    const Matrix w_out(outs, inner, stride_of(inner), dtype), b_in(1, firsts, firsts, dtype);
    const Matrix b_out(1, outs, outs, dtype);
    const Matrix residual(rows, outs, outs, out_dtype), out(rows, outs, outs, out_dtype);
    const Matrix alone(1, outs, outs, out_dtype);
    const Matrix norm_weight(1, columns, columns, dtype), norm_bias(1, columns, columns, dtype);
    clvp_fast_mlp call = {};
    call.x = x.first(), call.w_in = w_in.first(), call.out = out.first();
    call.b_in = draw(0, 1) ? b_in.first() : nullptr, call.b_out = two && draw(0, 1) ? b_out.first() : nullptr;
    call.w_out = two ? w_out.first() : nullptr;
    call.residual = with_residual ? residual.first() : nullptr;
    call.x_stride = x.stride, call.w_in_stride = w_in.stride, call.w_out_stride = w_out.stride;
    call.rows = rows, call.in_features = columns, call.inner_features = inner, call.out_features = outs;
    call.dtype = dtype, call.out_dtype = out_dtype, call.activation = draw(0, 2), call.item_rows = draw(1, 40);
    call.gated = gated;
    const bool normed = draw(0, 1);
    call.norm_weight = normed ? norm_weight.first() : nullptr, call.eps = 0.125;
    call.norm_bias = normed && draw(0, 1) ? norm_bias.first() : nullptr;
    const char *const isa = draw_isa();
    const int32_t threads = draw(1, 3);
    if (draw(1, 6) == 1) {
        clvp_fast_mlp spoilt = call;
        spoil(spoilt);
        const std::vector<unsigned char> before(out.first(), out.first() + rows * outs * out.size());
        return clvp_fast_mlp_cpu(&spoilt, threads, isa) < 0 && !memcmp(before.data(), out.first(), before.size());
    }
    const int code = clvp_fast_mlp_cpu(&call, threads, isa);
    if (code == CLVP_FAST_NO_ISA) return isa != nullptr;
    if (code != CLVP_FAST_OK) return false;
    std::vector<double> hidden(inner), row_of_x(columns);
    for (int64_t m = 0; m < rows; ++m) {
        double size = 1; /* of what is summed: it is rounded to bfloat16 between the layers, and behind the norm */
        for (int64_t k = 0; k < columns; ++k) row_of_x[k] = x.at(m, k);
        if (normed)
            layer_norm(row_of_x, call.eps, [&](int64_t k, double value) {
                return value * norm_weight.at(0, k) + (call.norm_bias ? norm_bias.at(0, k) : 0);
            });
        double largest = 0;
        for (const double value : row_of_x) largest = fmax(largest, fabs(value));
        const auto sum_of = [&](int64_t n) {
            double sum = call.b_in ? b_in.at(0, n) : 0;
            for (int64_t k = 0; k < columns; ++k) sum += row_of_x[k] * w_in.at(n, k);
            return sum;
        };
        for (int64_t n = 0; n < inner; ++n) {
            const double gate = activate(call.activation, sum_of(gated ? inner + n : n));
            hidden[n] = gated ? sum_of(n) * gate : gate;
            if (fabs(hidden[n]) > size) size = fabs(hidden[n]);
        }
        for (int64_t n = 0; n < outs; ++n) {
            double sum = two ? (call.b_out ? b_out.at(0, n) : 0) : hidden[n];
            for (int64_t k = 0; two && k < inner; ++k) sum += hidden[k] * w_out.at(n, k);
            if (with_residual) sum += residual.at(m, n);
            const double rounding = dtype == CLVP_FAST_BFLOAT16 ? 2e-2 : 2e-6;
            const double first = normed ? 2 * rounding * largest * sqrt((double)columns) : 0;
            const double inside = rounding * size + 2 * first * (gated ? size : 1);
            const double between = two ? inside * sqrt((double)inner) : first + 1e-4;
            const double room = out_dtype == CLVP_FAST_FLOAT32 ? 1e-4 : 4e-3;
            if (!(fabs(out.at(m, n) - sum) <= between + room * (1 + fabs(sum)))) return false;
        }
    }
    const int64_t row = draw(0, rows - 1), bytes = outs * out.size();
    call.x = x.first() + row * x.stride * x.size(), call.rows = 1, call.out = alone.first();
    if (with_residual) call.residual = residual.first() + row * bytes;
    if (clvp_fast_mlp_cpu(&call, 1, isa) != CLVP_FAST_OK) return false;
    return !memcmp(alone.first(), out.first() + row * bytes, bytes);
}

}  // namespace

/* 0, or 1 after a case that failed. */
int fuzz_mlp(int cases, unsigned seed) { return run_cases("mlp", clvp_fast_mlp_cpu, one_case, cases, seed); }
