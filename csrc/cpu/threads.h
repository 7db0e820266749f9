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

/* Lets a core wait for a moment. */
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

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

/* Items of work 0 .. count - 1, which threads take in any order. */
struct Task {
    int64_t count = 0;
    size_t scratch_bytes = 0;
    void (*work)(const void *context, void *scratch, int64_t item) = nullptr;
    const void *context = nullptr;
    std::atomic<int64_t> next{0}, done{0};

    Task() = default;
    /* Calls work(thread's scratch, item). Scratch memory lies at a multiple of 64 bytes, and begins with a zero of 64
     * bits. `work` must outlive the task. */
    template <class Work>
    void set(int64_t items, size_t bytes, const Work &given) {
        count = items, scratch_bytes = bytes, context = &given;
        work = [](const void *of, void *scratch, int64_t item) { (*static_cast<const Work *>(of))(scratch, item); };
    }
    /* Takes a run of items. Long ones come first, whose weights and rows a thread reads in one go, and ever shorter
     * ones, so that all threads end together. */
    bool take(int32_t threads, int64_t &first, int64_t &end) {
        first = next.load(std::memory_order_relaxed);
        do end = first + 1 + (count - first) / (4 * (int64_t)threads);
        while (first < count && !next.compare_exchange_weak(first, end, std::memory_order_relaxed));
        return first < count;
    }
    /* Waits for the other threads: mostly for less than a microsecond, but one may have lost its core. */
    void wait() const {
        for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins)
            if (spins < 4096)
                pause();
            else
                std::this_thread::yield();
    }
};

/* Does tasks one after another, on at most `most` of the process's num_threads threads; false if memory is short. A
 * thread goes on as soon as all items of a task are done, and waits for no thread that has taken none. */
inline bool share_out(Task *tasks, int64_t num_tasks, int32_t num_threads, int32_t most) {
    size_t scratch_bytes = 0;
    int64_t largest = 1;
    for (int64_t i = 0; i < num_tasks; ++i) {
        if (scratch_bytes < tasks[i].scratch_bytes) scratch_bytes = tasks[i].scratch_bytes;
        if (largest < tasks[i].count) largest = tasks[i].count;
    }
    const auto loop = [&] {
        void *scratch = scratch_bytes ? std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64) : nullptr;
        if (scratch_bytes && !scratch) return; /* The other threads do all of the work, if there are any. */
        for (int64_t i = 0; i < num_tasks; ++i) {
            Task &task = tasks[i];
            if (scratch) *static_cast<int64_t *>(scratch) = 0;
            for (int64_t first, end; task.take(most, first, end);) {
                for (int64_t item = first; item < end; ++item) task.work(task.context, scratch, item);
                task.done.fetch_add(end - first, std::memory_order_release);
            }
            if (i + 1 < num_tasks) task.wait();
        }
        std::free(scratch);
    };
    on_threads(most < largest ? most : largest, num_threads, loop);
    return !num_tasks || tasks[num_tasks - 1].next >= tasks[num_tasks - 1].count;
}
/* Does one task: calls work(thread's scratch, item), as `Task::set` says. */
template <class Work>
inline bool share_out(int64_t count, int32_t num_threads, int32_t most, size_t scratch_bytes, const Work &work) {
    Task task;
    task.set(count, scratch_bytes, work);
    return share_out(&task, 1, num_threads, most);
}
template <class Work>
inline bool share_out(int64_t count, int32_t num_threads, size_t scratch_bytes, const Work &work) {
    return share_out(count, num_threads, num_threads, scratch_bytes, work);
}

}  // namespace clvp_fast
