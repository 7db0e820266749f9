/* Vectors as wide as the instruction set that this is compiled for has: loading, storing and turning squares of them.
 */
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "../inline.h"

namespace clvp_fast {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class Real>
struct Lanes {
    static constexpr int COUNT = VECTOR_BYTES / sizeof(Real);
    using Integer = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
    typedef Real Vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef Integer Integers __attribute__((vector_size(VECTOR_BYTES)));
};
template <class Real>
using Vector = typename Lanes<Real>::Vector;

template <class To, class From>
CLVP_FAST_INLINE Vector<To> load(const From *from) {
    typedef From Stored __attribute__((vector_size(Lanes<To>::COUNT * sizeof(From))));
    Stored stored;
    memcpy(&stored, from, sizeof stored);
    return __builtin_convertvector(stored, Vector<To>);
}

/* The first `count` lanes, to memory of any alignment. */
template <class Real, class To>
CLVP_FAST_INLINE void store(To *to, Vector<Real> x, int64_t count) {
    typedef To Stored __attribute__((vector_size(Lanes<Real>::COUNT * sizeof(To))));
    const Stored stored = __builtin_convertvector(x, Stored);
    if (count >= Lanes<Real>::COUNT)
        memcpy(to, &stored, sizeof stored);
    else
        memcpy(to, &stored, count * sizeof(To));
}

/* a[0], b[0], a[1], b[1], ... from the lower (HALF = 0) or upper (HALF = 1) halves of a and b. */
template <class Real, int HALF, int... LANE>
CLVP_FAST_INLINE Vector<Real> interleave(Vector<Real> a, Vector<Real> b, std::integer_sequence<int, LANE...>) {
    constexpr int COUNT = Lanes<Real>::COUNT;
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (LANE % 2 * COUNT + HALF * COUNT / 2 + LANE / 2)...);
#else
    return __builtin_shuffle(a, b, typename Lanes<Real>::Integers{(LANE % 2 * COUNT + HALF * COUNT / 2 + LANE / 2)...});
#endif
}

/* x[i][j] becomes x[j][i]. */
template <class Real>
CLVP_FAST_INLINE void transpose(Vector<Real> (&x)[Lanes<Real>::COUNT]) {
    constexpr int COUNT = Lanes<Real>::COUNT;
    using Lane = std::make_integer_sequence<int, COUNT>;
#pragma GCC unroll 4
    for (int round = 1; round < COUNT; round *= 2) {
        Vector<Real> mixed[COUNT];
        unroll<COUNT / 2>([&](auto i) CLVP_FAST_INLINED {
            mixed[2 * i] = interleave<Real, 0>(x[i], x[i + COUNT / 2], Lane{});
            mixed[2 * i + 1] = interleave<Real, 1>(x[i], x[i + COUNT / 2], Lane{});
        });
        unroll<COUNT>([&](auto i) CLVP_FAST_INLINED { x[i] = mixed[i]; });
    }
}

}  // namespace
}  // namespace clvp_fast
