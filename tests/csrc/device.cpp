/* csrc/cuda/device.cuh against CUDA's answers, which a test writes down before. */
#include "../../csrc/cuda/device.cuh"

/* A stand-in for CUDA's answers: versions, number of devices, shared memory of a block, errors by function; and what it
 * was told.
 */
struct Answers {
    int driver, runtime, count, shared_bytes;
    int count_error, device_error, attribute_error, launch_error;
    int noted;      /* the error that cudaGetLastError gives next */
    int launches;   /* that succeeded */
    int most_bytes; /* of shared memory, as the kernel has it noted */
    int cooperative;
};
extern "C" {
Answers answers;
}

static cudaError_t noted(int error) {
    if (error) answers.noted = error;
    return cudaError_t(error);
}

cudaError_t cudaDriverGetVersion(int *version) { return *version = answers.driver, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = answers.runtime, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { return *count = answers.count, noted(answers.count_error); }
cudaError_t cudaGetDevice(int *device) { return *device = 0, noted(answers.device_error); }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) {
    *value = which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? answers.shared_bytes : 132;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int value) {
    if (answers.attribute_error == 0) answers.most_bytes = value;
    return noted(answers.attribute_error);
}
static cudaError_t launch(size_t bytes, int cooperative) {
    const int error = answers.launch_error ? answers.launch_error : int(bytes) > answers.most_bytes;
    answers.launches += error == 0, answers.cooperative = cooperative;
    return noted(error);
}
cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t bytes, cudaStream_t) { return launch(bytes, 0); }
cudaError_t cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t bytes, cudaStream_t) {
    return launch(bytes, 1);
}
cudaError_t cudaGetLastError() {
    const int last = answers.noted;
    answers.noted = 0;
    return cudaError_t(last);
}
const char *cudaGetErrorName(cudaError_t error) { return error == cudaErrorUnknown ? "cudaErrorUnknown" : "cudaError"; }
const char *cudaGetErrorString(cudaError_t) { return "as the stand-in says"; }

extern "C" int missing(char *sentence, int32_t size) { return clvp_fast::cuda_missing(sentence, size); }
extern "C" int memory_missing(int needs, char *sentence, int32_t size) {
    return clvp_fast::shared_memory_missing(needs, sentence, size);
}
extern "C" const char *error_of(int code) { return clvp_fast::cuda_error(code); }
extern "C" int start(int bytes, int most_bytes, int cooperative) {
    void *arguments[1] = {};
    return clvp_fast::start({&answers, dim3(2), dim3(32), bytes, most_bytes, nullptr, cooperative != 0}, arguments);
}
