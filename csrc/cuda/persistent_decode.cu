/* The persistent decode step on a GPU: csrc/cuda/persistent_decode.cuh as one cooperative launch. */
#include <limits.h>

#include "../check.h"
#include "../clvp_fast.h"
#include "device.cuh"
#include "persistent_decode.cuh"

namespace clvp_fast {
namespace {

/* The operations of a thread; all threads of the grid run at the same time. */
struct GpuRun {
    int thread, block, blocks;

    __device__ __forceinline__ void sync() { __syncthreads(); }
    __device__ __forceinline__ float exchange(float value, int lanes) { return __shfl_xor_sync(~0u, value, lanes); }
    __device__ __forceinline__ float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }

    /* Loads values that stay the same during the launch. */
    template <class T>
    __device__ __forceinline__ T constant(const T *place) {
        return __ldg(place);
    }
    /* Volatile, so that the load stays before its barrier. The L1 cache would not help, as weights are read once. */
    __device__ __forceinline__ Halves constant(const Halves *place) {
        Halves halves;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(halves.words[0]), "=r"(halves.words[1]), "=r"(halves.words[2]), "=r"(halves.words[3])
                     : "l"(place));
        return halves;
    }
    /* Loads values that other blocks wrote before the last barrier, from the L2 cache. */
    __device__ __forceinline__ float fresh(const float *place) { return __ldcg(place); }
    __device__ __forceinline__ Found fresh(const Found *place) {
        const float2 pair = __ldcg(reinterpret_cast<const float2 *>(place));
        return {pair.x, pair.y};
    }
    __device__ __forceinline__ Halves fresh(const Halves *place) {
        const uint4 four = __ldcg(reinterpret_cast<const uint4 *>(place));
        return {{four.x, four.y, four.z, four.w}};
    }
    __device__ __forceinline__ void prefetch(const void *place) {
        asm volatile("prefetch.global.L2 [%0];" : : "l"(place));
    }

    /* The compiler moves nothing across that reads memory or depends on the thread's number: it would keep more in
     * registers at once than there are. */
    __device__ __forceinline__ void settle() { asm volatile("" : "+r"(thread), "+r"(block) : : "memory"); }
    /* Waits for all threads of all blocks, whose earlier writes are then visible. The counter's highest bit flips when
     * the last block arrives, so that the counter is never reset, even between launches. */
    __device__ __forceinline__ void grid_sync(uint32_t *counter) {
        __syncthreads(); /* for any caller, though all of today's end with one: theirs keep shared memory */
        if (thread == 0) {
            const uint32_t add = block == 0 ? 0x80000000u - uint32_t(blocks - 1) : 1u;
            uint32_t before, now;
            asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                         : "=r"(before)
                         : "l"(counter), "r"(add)
                         : "memory");
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
            } while (((before ^ now) & 0x80000000u) == 0);
        }
        __syncthreads();
        settle();
    }
};

template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1)
    persistent_decode(const __grid_constant__ clvp_fast_persistent_decode call) {
    extern __shared__ __align__(16) char memory[];
    GpuRun run = {int(threadIdx.x), int(blockIdx.x), int(gridDim.x)};
    decode_step<T, N>(run, call, memory);
}

template <class T, int N>
int launch(const clvp_fast_persistent_decode &call, cudaStream_t stream) {
    int multiprocessors, most_bytes;
    cudaError_t error = attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
    if (error == cudaSuccess) error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most_bytes);
    if (error != cudaSuccess) return told(error);
    void *arguments[] = {const_cast<clvp_fast_persistent_decode *>(&call)};
    /* CUDA refuses this where the grid does not fit on the device at once. */
    const Launch how = {reinterpret_cast<const void *>(persistent_decode<T, N>),
                        dim3(unsigned(multiprocessors)),
                        dim3(THREADS),
                        int(shared_bytes<N>(call)),
                        most_bytes,
                        stream,
                        true};
    return start(how, arguments);
}

template <class T>
int launch(const clvp_fast_persistent_decode &call, cudaStream_t stream) {
    switch (call.num_candidates) {
        case 1: return launch<T, 1>(call, stream);
        default: return launch<T, 4>(call, stream);
    }
}

}  // namespace
}  // namespace clvp_fast

extern "C" __attribute__((visibility("default"))) int clvp_fast_persistent_decode_cuda(
    const clvp_fast_persistent_decode *call, void *stream) {
    const int refused = clvp_fast_check_persistent_decode(call);
    if (refused != CLVP_FAST_OK) return refused;
    const auto on = static_cast<cudaStream_t>(stream);
    return call->dtype == CLVP_FAST_FLOAT16 ? clvp_fast::launch<clvp_fast::Float16>(*call, on)
                                            : clvp_fast::launch<clvp_fast::BFloat16>(*call, on);
}

extern "C" __attribute__((visibility("default"))) int64_t
clvp_fast_persistent_decode_workspace(const clvp_fast_persistent_decode *call) {
    return clvp_fast::workspace_of(*call).end;
}
