/* The current CUDA device: whether it can serve, launches on it, and its errors. Host code alone, which the tests
 * compile against a stand-in for CUDA's answers. */
#pragma once

#include <cuda_runtime.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

namespace clvp_fast {

/* Writes a sentence of at most `size` bytes, its end included, and returns 1. */
__attribute__((format(printf, 3, 4))) inline int tell(char *sentence, int32_t size, const char *format, ...) {
    va_list values;
    va_start(values, format);
    if (sentence && size > 0) vsnprintf(sentence, size_t(size), format, values);
    va_end(values);
    return 1;
}

/* Returns the code of an error and clears CUDA's record of it, which would else be reported to the next caller, perhaps
 * another library. */
inline int told(cudaError_t error) {
    if (error != cudaSuccess) (void)cudaGetLastError();
    return error;
}

inline cudaError_t attribute(cudaDeviceAttr which, int *value) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaDeviceGetAttribute(value, which, device) : error;
}

/* The parameters of a launch. CUDA keeps most_shared_bytes for the kernel, in all threads of the process: it may not
 * depend on the call, or another call could change it before the launch. */
struct Launch {
    const void *kernel;
    dim3 grid, block;
    int shared_bytes, most_shared_bytes;
    cudaStream_t stream;
    bool cooperative;
};

/* Launches a kernel with its arguments; returns a cudaError_t. */
inline int start(const Launch &how, void **arguments) {
    /* CUDA keeps this for each device, so that it is set at every call. */
    cudaError_t error =
        cudaFuncSetAttribute(how.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.most_shared_bytes);
    if (error == cudaSuccess) {
        const size_t bytes = size_t(how.shared_bytes);
        error = how.cooperative
                    ? cudaLaunchCooperativeKernel(how.kernel, how.grid, how.block, arguments, bytes, how.stream)
                    : cudaLaunchKernel(how.kernel, how.grid, how.block, arguments, bytes, how.stream);
    }
    return told(error);
}

/* Returns CUDA's own name, number and words for an error; valid until the thread's next call. */
inline const char *cuda_error(int code) {
    thread_local char sentence[256];
    const cudaError_t error = static_cast<cudaError_t>(code);
    tell(sentence, sizeof sentence, "CUDA error %d, %s: %s", code, cudaGetErrorName(error), cudaGetErrorString(error));
    return sentence;
}

inline int cuda_missing(char *sentence, int32_t size) {
    int driver = 0, runtime = 0, count = 0;
    cudaError_t error = cudaDriverGetVersion(&driver);
    if (error == cudaSuccess) error = cudaRuntimeGetVersion(&runtime);
    if (error == cudaSuccess) error = cudaGetDeviceCount(&count);
    told(error);
    const int has = driver % 1000 / 10, needs = runtime % 1000 / 10;
    if (error == cudaErrorInsufficientDriver && driver == 0) return tell(sentence, size, "there is no NVIDIA driver");
    if (error == cudaErrorInsufficientDriver)
        return tell(sentence, size,
                    "the NVIDIA driver serves CUDA %d.%d, and the library was built with CUDA %d.%d: update the driver",
                    driver / 1000, has, runtime / 1000, needs);
    if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0))
        return tell(sentence, size, "the NVIDIA driver sees no CUDA device");
    return error == cudaSuccess ? 0 : tell(sentence, size, "%s", cuda_error(error));
}

inline int shared_memory_missing(int needs, char *sentence, int32_t size) {
    int has = 0;
    if (const int code = told(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &has)))
        return tell(sentence, size, "%s", cuda_error(code));
    if (needs <= has) return 0;
    return tell(sentence, size, "it needs %d KB of shared memory, and a block on this device has %d at most",
                (needs + 1023) / 1024, has / 1024);
}

}  // namespace clvp_fast
