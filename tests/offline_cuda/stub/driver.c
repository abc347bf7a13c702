// The driver: contexts, and launches of the kernels that Triton compiles.
#include "stub.h"

#include <dlfcn.h>
#include <stdio.h>

#include "modules.h"

static CUresult does_nothing(void) { return CUDA_SUCCESS; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    void *found = dlsym(RTLD_DEFAULT, name);
    *function = found ? found : (void *)does_nothing;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaDriverGetVersion(version); }

CUresult cuDeviceGetCount(int *devices) { return (CUresult)cudaGetDeviceCount(devices); }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int bytes, CUdevice device) {
    snprintf(name, bytes, "offline H100");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute_of((int)attribute);
    return CUDA_SUCCESS;
}

// ---- contexts: the ordinal of a device, plus one

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)(size_t)(current_device + 1);
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    if (context) current_device = (int)(size_t)context - 1;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    *device = current_device;
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxPopCurrent(CUcontext *context) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t *value, CUlimit which) {
    *value = 1024;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit which, size_t value) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(size_t)(device + 1);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "error of the CUDA stand-in";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OFFLINE";
    return CUDA_SUCCESS;
}

// ---- functions of modules

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction raw) {
    const Function *function = (Function *)raw;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->spilled; break;
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuLaunchKernel(CUfunction raw, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments,
                        void **extra) {
    const Function *function = (Function *)raw;
    Row kernel = {
        .name = function->name,
        .grid = {grid_x, grid_y, grid_z},
        .block = {block_x, block_y, block_z},
        .registers = function->registers,
        .spilled = function->spilled,
        .shared = (int)shared,
    };
    return (CUresult)launch(kernel, stream_of(stream));
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void **arguments) {
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, arguments, NULL);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
    return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                          c->sharedMemBytes, c->hStream, arguments, extra);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared) {
    *blocks = 2;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    *clusters = 1;
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sides, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    return CUDA_SUCCESS;
}

// PyTorch and Triton look these up by name, and never call them here
__asm__(".globl cuTensorMapEncodeIm2col\ncuTensorMapEncodeIm2col = cuTensorMapEncodeTiled\n");

CUresult cuLinkCreate(unsigned count, CUjit_option *options, void **values, CUlinkState *state) { return CUDA_SUCCESS; }

CUresult cuLinkAddData(CUlinkState state, CUjitInputType type, void *data, size_t bytes, const char *name,
                       unsigned count, CUjit_option *options, void **values) {
    return CUDA_SUCCESS;
}

CUresult cuLinkComplete(CUlinkState state, void **image, size_t *bytes) { return CUDA_SUCCESS; }
