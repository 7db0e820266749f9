/* The persistent decode step on a CPU: csrc/cuda/persistent_decode.cuh by as many blocks as one likes, all at the same
 * time.
 *
 * Shared memory, and the workspace past its counter, hold NaN before. */
#include <algorithm>
#include <cstring>

#include "../../csrc/check.h"
#include "../../csrc/cuda/persistent_decode.cuh"
#include "fibers.h"

using namespace clvp_fast;

namespace {

/* A meeting of `members` threads: the last to come lets all go on. */
struct Meeting {
    size_t members;
    Fibers::Waiting waiting = {};

    void meet(Fibers &fibers) {
        if (waiting.size() + 1 == members) {
            fibers.wake(waiting);
        } else {
            fibers.wait(waiting);
        }
    }
};

struct Warp {
    Meeting meeting{32};
    float values[2][32]; /* of this exchange and the one before, which some may still be reading */
};

struct Block {
    Meeting meeting{THREADS};
    std::vector<Warp> warps{WARPS};
    std::vector<char> memory;
};

/* The number of barriers so far; the skip-th one is left out. */
struct Waits {
    int skip;
    int64_t count = 0;
};

class HostRun {
public:
    int thread, block, blocks;

    HostRun(Fibers &fibers, Block &memory, Waits &waits, int thread, int block, int blocks)
        : thread(thread), block(block), blocks(blocks), fibers_(fibers), memory_(memory), waits_(waits) {}

    void sync() { memory_.meeting.meet(fibers_); }
    float exchange(float value, int lanes) { return from_lane(value, (thread % 32) ^ lanes); }
    float from_lane(float value, int lane) {
        Warp &warp = memory_.warps[thread / 32];
        float *values = warp.values[turn_ ^= 1];
        values[thread % 32] = value;
        warp.meeting.meet(fibers_);
        return values[lane];
    }
    template <class T>
    T constant(const T *place) {
        return *place;
    }
    template <class T>
    T fresh(const T *place) {
        return *place;
    }
    void prefetch(const void *) {}
    void settle() {}
    void grid_sync(uint32_t *counter) {
        if (waits_.skip == nth_++) return;
        sync();
        if (thread == 0) {
            if (block == 0) ++waits_.count;
            const uint32_t before = *counter;
            *counter += block == 0 ? 0x80000000u - uint32_t(blocks - 1) : 1u;
            if (((before ^ *counter) & 0x80000000u) == 0) fibers_.watch(counter, before, 0x80000000u);
        }
        sync();
    }

private:
    Fibers &fibers_;
    Block &memory_;
    Waits &waits_;
    int turn_ = 0, nth_ = 0;
};

template <class T, int N>
int launch(const clvp_fast_persistent_decode &call, int blocks, uint32_t seed, Waits &waits) {
    Fibers fibers(seed);
    std::vector<Block> memory(blocks);
    for (int block = 0; block < blocks; ++block) {
        memory[block].memory.assign(shared_bytes<N>(call) + 512, char(0xff));
        const auto address = reinterpret_cast<uintptr_t>(memory[block].memory.data());
        auto *shared = reinterpret_cast<char *>((address + 255) / 256 * 256);
        for (int thread = 0; thread < THREADS; ++thread)
            fibers.add([&, shared, thread, block] {
                HostRun run(fibers, memory[block], waits, thread, block, blocks);
                decode_step<T, N>(run, call, shared);
            });
    }
    if (!fibers.run()) return 1;
    /* Shared memory ends where the launch says. */
    for (const Block &block : memory)
        if (!std::all_of(block.memory.end() - 256, block.memory.end(), [](char byte) { return byte == char(0xff); }))
            return 2;
    return CLVP_FAST_OK;
}

template <class T>
int launch(const clvp_fast_persistent_decode &call, int blocks, uint32_t seed, Waits &waits) {
    return call.num_candidates == 1 ? launch<T, 1>(call, blocks, seed, waits) : launch<T, 4>(call, blocks, seed, waits);
}

}  // namespace

extern "C" int64_t workspace_bytes(const clvp_fast_persistent_decode *call) { return workspace_of(*call).end; }

/* The CUDA function on host memory, by `blocks` blocks. `seed` draws who goes on when. 1: threads are left that wait
 * for what never comes; 2: written behind shared memory. */
extern "C" int emulate_persistent_decode(const clvp_fast_persistent_decode *call, int32_t blocks, int32_t seed,
                                         int32_t skip, int64_t *grid_syncs) {
    const int refused = clvp_fast_check_persistent_decode(call);
    if (refused != CLVP_FAST_OK) return refused;
    Waits waits{skip};
    const int code = call->dtype == CLVP_FAST_FLOAT16 ? launch<Float16>(*call, blocks, seed, waits)
                                                      : launch<BFloat16>(*call, blocks, seed, waits);
    *grid_syncs = waits.count;
    return code;
}
