/* Functions that are always inlined, and unrolled loops, on a CPU and on a GPU. */
#pragma once

#include <type_traits>
#include <utility>

/* Internal linkage throughout: the same text is compiled for several instruction sets into one library. All of it is
 * inlined, lambdas too, because calls would pass the registers through memory. */
#ifdef __CUDACC__
#define CLVP_FAST_HOST_DEVICE __host__ __device__
#define CLVP_FAST_INLINE static __host__ __device__ __forceinline__
#define CLVP_FAST_INLINED
#define CLVP_FAST_PRAGMA(text) _Pragma(#text)
#define CLVP_FAST_UNROLL(times) CLVP_FAST_PRAGMA(unroll times)
#else
#define CLVP_FAST_HOST_DEVICE
#define CLVP_FAST_INLINE static inline __attribute__((always_inline))
#define CLVP_FAST_INLINED __attribute__((always_inline))
#define CLVP_FAST_UNROLL(times)
#endif

namespace clvp_fast {

/* An integer as a type. */
template <int VALUE>
struct Index {
    static constexpr int value = VALUE;
    CLVP_FAST_HOST_DEVICE constexpr operator int() const { return VALUE; }
};

/* Calls body(Index<0>) ... body(Index<COUNT - 1>), unrolled. */
template <class Body, int... INDEX>
CLVP_FAST_INLINE void unroll(Body &&body, std::integer_sequence<int, INDEX...>) {
    (body(Index<INDEX>{}), ...);
}
template <int COUNT, class Body>
CLVP_FAST_INLINE void unroll(Body &&body) {
    unroll(body, std::make_integer_sequence<int, COUNT>{});
}

}  // namespace clvp_fast
