/* The CUDA kernel of log_mel: csrc/cuda/log_mel_block.cuh on a GPU. */
#include <limits.h>

#include "../check.h"
#include "../clvp_fast.h"
#include "device.cuh"
#include "log_mel_block.cuh"

namespace clvp_fast {
namespace {

/* Each thread of a block runs the phases itself. */
template <int N>
struct GpuRun {
    Registers<N> registers;

    template <Barrier AFTER, class Body>
    __device__ __forceinline__ void phase(Body body) {
        /* Hidden from the compiler, which would keep values derived from it in registers from phase to phase. */
        int thread = int(threadIdx.x);
        asm volatile("" : "+r"(thread));
        body(*this, thread, registers);
        if constexpr (AFTER == Barrier::WARP) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }
    /* Element INDEX of thread `partner` of the job; all lanes of the warp call it. */
    template <int T, int INDEX>
    __device__ __forceinline__ Complex<float> from(Registers<N> &own, int partner) {
        return {__shfl_sync(~0u, own.x[INDEX].re, partner, T), __shfl_sync(~0u, own.x[INDEX].im, partner, T)};
    }
    /* *place = max(*place, the values of all threads). */
    __device__ __forceinline__ void max(uint32_t *place, uint32_t value, int thread) {
        value = __reduce_max_sync(~0u, value);
        if (thread % 32 == 0) atomicMax(place, value);
    }
    /* Adds a range's maximum to its row's, and returns how many of the row's ranges had been finished before. One
     * thread calls it after a barrier of the block: its fences order what the whole block wrote before, and reads
     * after. */
    __device__ __forceinline__ uint32_t finish(uint32_t *maxima, uint32_t loudest) {
        atomicMax(maxima, loudest);
        __threadfence();
        const uint32_t before = atomicAdd(maxima + 1, 1u);
        __threadfence();
        return before;
    }
    template <class T>
    __device__ __forceinline__ T fresh(const T *place) {
        return __ldcg(place);
    }
};

template <int N, class Sample>
__global__ void __launch_bounds__(Layout<N>::THREADS, Layout<N>::BLOCKS_PER_SM)
    log_mel(const __grid_constant__ clvp_fast_log_mel call) {
    extern __shared__ __align__(16) unsigned char memory[];
    GpuRun<N> run;
    const Share share = {int(blockIdx.x), int(gridDim.x), int(blockIdx.y), int(gridDim.y)};
    block<N, Sample>(run, reinterpret_cast<Shared<N> *>(memory), &call, share);
}

template <int N, class Sample>
int launch(const clvp_fast_log_mel &call, cudaStream_t stream) {
    using L = Layout<N>;
    const auto kernel = log_mel<N, Sample>;
    int multiprocessors;
    if (const int code = told(attribute(cudaDevAttrMultiProcessorCount, &multiprocessors))) return code;
    const int64_t of_row = (call.frames + L::FRAMES - 1) / L::FRAMES, resident = multiprocessors * L::BLOCKS_PER_SM;
    if (of_row > (INT_MAX - resident) / call.batch) return CLVP_FAST_BAD_SIZE;
    const int64_t tiles = of_row * call.batch, blocks = tiles < resident ? tiles : resident;
    /* Few tiles leave multiprocessors free: then a block does one round, in half of the time. */
    const int parts = tiles * L::ROUNDS <= multiprocessors ? L::ROUNDS : 1;
    constexpr int bytes = sizeof(Shared<N>);
    void *arguments[] = {const_cast<clvp_fast_log_mel *>(&call)};
    const Launch how = {reinterpret_cast<const void *>(kernel),
                        dim3(unsigned(blocks), unsigned(parts)),
                        dim3(L::THREADS),
                        bytes,
                        bytes,
                        stream,
                        false};
    return start(how, arguments);
}

template <int N>
int launch(const clvp_fast_log_mel &call, cudaStream_t stream) {
    return call.samples_dtype == CLVP_FAST_INT16 ? launch<N, int16_t>(call, stream) : launch<N, float>(call, stream);
}

int shared_bytes(int32_t n_fft) {
    switch (n_fft) {
        case 256: return sizeof(Shared<256>);
        case 512: return sizeof(Shared<512>);
        case 1024: return sizeof(Shared<1024>);
        case 2048: return sizeof(Shared<2048>);
        default: return sizeof(Shared<4096>);
    }
}

}  // namespace
}  // namespace clvp_fast

extern "C" __attribute__((visibility("default"))) int clvp_fast_log_mel_cuda(const clvp_fast_log_mel *call,
                                                                             void *stream) {
    const int refused = clvp_fast_check_log_mel(call, 1);
    if (refused != CLVP_FAST_OK || call->batch == 0) return refused;
    const auto on = static_cast<cudaStream_t>(stream);
    switch (call->n_fft) {
        case 256: return clvp_fast::launch<256>(*call, on);
        case 512: return clvp_fast::launch<512>(*call, on);
        case 1024: return clvp_fast::launch<1024>(*call, on);
        case 2048: return clvp_fast::launch<2048>(*call, on);
        default: return clvp_fast::launch<4096>(*call, on);
    }
}

extern "C" __attribute__((visibility("default"))) int clvp_fast_log_mel_cuda_missing(int32_t n_fft, char *sentence,
                                                                                     int32_t size) {
    return clvp_fast::shared_memory_missing(clvp_fast::shared_bytes(n_fft), sentence, size);
}

extern "C" __attribute__((visibility("default"))) int clvp_fast_cuda_missing(char *sentence, int32_t size) {
    return clvp_fast::cuda_missing(sentence, size);
}

extern "C" __attribute__((visibility("default"))) const char *clvp_fast_cuda_error(int code) {
    return clvp_fast::cuda_error(code);
}
