/* CUDA's runtime for the launchers of csrc/cuda/ where no GPU is: it hands each launch to a function of the test's.
 *
 * Linked in the runtime's place with the objects that nvcc made, whose registration tells the names of their kernels.
 */
#include <stdint.h>

#include <map>
#include <string>

extern "C" {
#include "stand_in/cuda_runtime.h"

/* A kernel's name in PTX; the grid, and threads of a block; bytes of shared memory; its one argument. Returns 0. */
using Launched = int (*)(const char *kernel, const unsigned *grid, unsigned threads, int64_t bytes,
                         const void *argument, int cooperative);
}

namespace {

/* As an H100 or H200 has. */
constexpr int MOST_SHARED_BYTES = 227 * 1024;

std::map<const void *, std::string> &names() {
    static std::map<const void *, std::string> found;
    return found;
}
Launched launched;
int multiprocessors = 1;

cudaError_t launch(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t bytes, int cooperative) {
    const unsigned sizes[3] = {grid.x, grid.y, grid.z};
    const char *name = names().at(kernel).c_str();
    const int failed = launched(name, sizes, block.x * block.y * block.z, int64_t(bytes), arguments[0], cooperative);
    return failed ? cudaErrorUnknown : cudaSuccess;
}

}  // namespace

extern "C" {

/* Called before the first launch: by whom kernels are run, and how many blocks of a cooperative one there are. */
__attribute__((visibility("default"))) void run_launches_by(Launched function, int blocks) {
    launched = function;
    multiprocessors = blocks;
}

void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *device, int, void *, void *, void *, void *,
                            int *) {
    names()[host] = device;
}
/* Of launches that are written with angle brackets, of which there are none. */
unsigned __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(void **, const void *) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(void *, dim3, dim3, void **, size_t, cudaStream_t) { return cudaErrorUnknown; }

cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    *value = which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? MOST_SHARED_BYTES : multiprocessors;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int value) {
    return value > MOST_SHARED_BYTES ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t bytes, cudaStream_t) {
    return launch(kernel, grid, block, arguments, bytes, 0);
}
cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t bytes,
                                        cudaStream_t) {
    return launch(kernel, grid, block, arguments, bytes, 1);
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char *cudaGetErrorString(cudaError_t) { return "as the test says"; }
}
