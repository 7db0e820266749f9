/* The mathematics of log-mel that CPU and GPU share: reflection, discrete Fourier transforms in registers, the order in
 * which a transform leaves its result, and the power spectra of two real frames from one complex transform.
 *
 * Two frames a and b are transformed as one, z = a + ib. With Z its transform of length N,
 *
 *     A[k] = (Z[k] + conj Z[N - k]) / 2,    B[k] = (Z[k] - conj Z[N - k]) / 2i,
 *
 * and the halves are folded into the window. A transform of length N = R1 R2 R3 is three stages in place (decimation in
 * frequency): a stage of radix R takes each block of length L apart into L / R transforms of length R over elements
 * that lie L / R apart, rotates the results, and leaves R blocks of length L / R. `position` gives a bin's final place.
 *
 * T is a number, or on a CPU a vector of numbers, one of each of several pairs of frames. */
#pragma once

#include <stdint.h>

#include <type_traits>
#include <utility>

#include "inline.h"

namespace clvp_fast {

template <class T>
struct Complex {
    T re, im;
};

/* The type of a number, or of the numbers in a vector. */
template <class T, class = void>
struct Element {
    using type = T;
};
template <class T>
struct Element<T, std::void_t<decltype(std::declval<T &>()[0])>> {
    using type = std::decay_t<decltype(std::declval<T &>()[0])>;
};

/* `place` mirrored at both ends of a signal, again and again where it is short, into 0 .. length - 1. */
template <class Integer>
CLVP_FAST_INLINE Integer reflect(Integer place, Integer length) {
    if (place >= 0 && place < length) return place;
    if (length == 1) return 0;
    const Integer period = 2 * (length - 1);
    place %= period;
    if (place < 0) place += period;
    return place < length ? place : period - place;
}

template <class T>
CLVP_FAST_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
    return {a.re + b.re, a.im + b.im};
}
template <class T>
CLVP_FAST_INLINE Complex<T> operator-(Complex<T> a, Complex<T> b) {
    return {a.re - b.re, a.im - b.im};
}

/* x * (cosine + i sine). */
template <class T, class Real>
CLVP_FAST_INLINE Complex<T> multiply(Complex<T> x, Real cosine, Real sine) {
    return {x.re * cosine - x.im * sine, x.re * sine + x.im * cosine};
}

/* cos(2 pi j / 32), j = 0 .. 8; the other angles by symmetry. */
template <int J>
CLVP_FAST_HOST_DEVICE constexpr double cosine_32nd() {
    constexpr double first[9] = {1.0,
                                 0.98078528040323044913,
                                 0.92387953251128675613,
                                 0.83146961230254523708,
                                 0.70710678118654752440,
                                 0.55557023301960222474,
                                 0.38268343236508977173,
                                 0.19509032201612826785,
                                 0.0};
    constexpr int j = ((J % 32) + 32) % 32;
    constexpr int half = j > 16 ? 32 - j : j;
    return half > 8 ? -first[16 - half] : first[half];
}

/* x * exp(-2 pi i J / R), for angles that are known when this is compiled; R divides 32. */
template <int J, int R, class T>
CLVP_FAST_INLINE Complex<T> turn(Complex<T> x) {
    using Real = typename Element<T>::type;
    constexpr int j = (J * (32 / R)) % 32;
    if constexpr (j == 0) {
        return x;
    } else if constexpr (j == 8) {
        return {x.im, -x.re};
    } else if constexpr (j == 16) {
        return {-x.re, -x.im};
    } else if constexpr (j == 24) {
        return {-x.im, x.re};
    } else if constexpr (j == 4) {
        constexpr Real root_half = Real(cosine_32nd<4>());
        return {(x.re + x.im) * root_half, (x.im - x.re) * root_half};
    } else if constexpr (j == 12) {
        constexpr Real root_half = Real(cosine_32nd<4>());
        return {(x.im - x.re) * root_half, -(x.re + x.im) * root_half};
    } else {
        constexpr Real cosine = Real(cosine_32nd<j>()), sine = Real(-cosine_32nd<j - 8>());
        return multiply(x, cosine, sine);
    }
}

/* x[k] becomes sum_r x[r] exp(-2 pi i r k / R), in registers; R = 1, 2, 4, 8, 16 or 32. */
template <int R, class T>
CLVP_FAST_INLINE void dft(Complex<T> (&x)[R]) {
    if constexpr (R == 2) {
        const Complex<T> a = x[0], b = x[1];
        x[0] = a + b;
        x[1] = a - b;
    } else if constexpr (R == 4) {
        const Complex<T> a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = turn<1, 4>(x[1] - x[3]);
        x[0] = a + c;
        x[1] = b + d;
        x[2] = a - c;
        x[3] = b - d;
    } else if constexpr (R > 4) {
        constexpr int ROWS = R == 8 ? 2 : 4, COLUMNS = R / ROWS;
        Complex<T> turned[ROWS][COLUMNS];
        unroll<COLUMNS>([&](auto column) CLVP_FAST_INLINED {
            Complex<T> down[ROWS];
            unroll<ROWS>([&](auto row) CLVP_FAST_INLINED { down[row] = x[COLUMNS * row + column]; });
            dft<ROWS>(down);
            unroll<ROWS>([&](auto row)
                             CLVP_FAST_INLINED { turned[row][column] = turn<row.value * column.value, R>(down[row]); });
        });
        unroll<ROWS>([&](auto row) CLVP_FAST_INLINED {
            dft<COLUMNS>(turned[row]);
            unroll<COLUMNS>([&](auto column) CLVP_FAST_INLINED { x[row + ROWS * column] = turned[row][column]; });
        });
    }
}

/* Returns the place where the stages of radix R1, R2 and R3 leave bin k of a transform of length R1 R2 R3. */
template <int R1, int R2, int R3>
CLVP_FAST_INLINE int position(int k) {
    return (k % R1) * (R2 * R3) + (k / R1 % R2) * R3 + k / (R1 * R2);
}

/* Returns twice bin k, squared, from Z[k] and Z[N - k], of the frames in the real and in the imaginary part. */
template <class T>
CLVP_FAST_INLINE T power_of_real(const Complex<T> &z, const Complex<T> &mirrored) {
    const T re = z.re + mirrored.re, im = z.im - mirrored.im;
    return re * re + im * im;
}
template <class T>
CLVP_FAST_INLINE T power_of_imaginary(const Complex<T> &z, const Complex<T> &mirrored) {
    const T re = z.re - mirrored.re, im = z.im + mirrored.im;
    return re * re + im * im;
}

}  // namespace clvp_fast
