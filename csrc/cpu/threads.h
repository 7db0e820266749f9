/* Work shared out over the process's OpenMP threads, or over threads that live as long as the call. */
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

namespace clvp_fast {

/* Runs loop() on at most `count` threads at a time, this one among them, of the `pool` that the process may have.
 *
 * Torch's threads wait for work by spinning: other threads beside them would have to wait for a core. So the work is
 * given to torch's own, by the entry point of its OpenMP library that compiled code calls, where that is loaded. All of
 * them enter, and those beyond `count` leave at once: the library ends threads that a smaller team has no use for, and
 * the next larger one would have to make them anew. */
template <class Loop>
inline void on_threads(int64_t count, int32_t pool, const Loop &loop) {
    typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
    if (count <= 1) return loop();
    if (const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))) {
        std::atomic<int64_t> entered{0};
        const auto limited = [&] {
            if (entered.fetch_add(1, std::memory_order_relaxed) < count) loop();
        };
        const auto call = [](void *given) { (*static_cast<decltype(limited) *>(given))(); };
        return parallel(call, const_cast<void *>(static_cast<const void *>(&limited)), static_cast<unsigned>(pool), 0);
    }
    std::vector<std::thread> threads;
    try {
        for (int64_t i = 1; i < count; ++i) threads.emplace_back(loop);
    } catch (const std::exception &) {
        /* The threads that there are do all of the work. */
    }
    loop();
    for (std::thread &thread : threads) thread.join();
}

/* Calls work(thread's scratch, item) for items 0 .. count - 1 on at most `most` of the process's num_threads threads;
 * false if memory is short. Scratch memory lies at a multiple of 64 bytes, and begins with a zero of 64 bits. */
template <class Work>
inline bool share_out(int64_t count, int32_t num_threads, int32_t most, size_t scratch_bytes, const Work &work) {
    std::atomic<int64_t> next{0};
    /* Long runs of items first, whose weights and rows a thread reads in one go, and ever shorter ones, so that all
     * threads end together. */
    const auto take = [&](int64_t &first) {
        int64_t some;
        first = next.load(std::memory_order_relaxed);
        do some = 1 + (count - first) / (4 * (int64_t)most);
        while (first < count && !next.compare_exchange_weak(first, first + some, std::memory_order_relaxed));
        return some;
    };
    const auto loop = [&] {
        void *scratch = scratch_bytes ? std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64) : nullptr;
        if (scratch_bytes && !scratch) return; /* The other threads do all of the work, if there are any. */
        if (scratch) *static_cast<int64_t *>(scratch) = 0;
        for (int64_t first, some; some = take(first), first < count;)
            for (int64_t item = first; item < first + some; ++item) work(scratch, item);
        std::free(scratch);
    };
    on_threads(most < count ? most : count, num_threads, loop);
    return next >= count;
}
template <class Work>
inline bool share_out(int64_t count, int32_t num_threads, size_t scratch_bytes, const Work &work) {
    return share_out(count, num_threads, num_threads, scratch_bytes, work);
}

}  // namespace clvp_fast
