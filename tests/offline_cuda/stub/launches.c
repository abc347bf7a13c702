// Launches of kernels, which do nothing; and the names of those that libraries bring, by their host function.
#include "stub.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_BLOCKS_X = 2147483647, MOST_BLOCKS = 65535, MOST_THREADS = 1024, FIRST_SLOTS = 1 << 16 };

static bool fits(const unsigned grid[3], const unsigned block[3]) {
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > MOST_BLOCKS_X) return false;
    if (grid[1] > MOST_BLOCKS || grid[2] > MOST_BLOCKS) return false;
    unsigned long threads = (unsigned long)block[0] * block[1] * block[2];
    return threads > 0 && threads <= MOST_THREADS;
}

cudaError_t launch(Row kernel, Stream *stream) {
    kernel.kind = "KERNEL";
    cudaError_t error = enqueue(kernel, stream);
    if (error || fits(kernel.grid, kernel.block)) return error;
    complain("%s: grid or block out of range", kernel.name, stream);
    return refuse(cudaErrorInvalidConfiguration);
}

// ---- kernels of libraries: a hash table, host function to name, filled while the libraries are loaded

typedef struct {
    const void *host;
    const char *name;
} Named;

static Named *table;
static long entries, slots;

static long slot_of(const void *host) {
    long slot = (long)((size_t)host >> 4) & (slots - 1);
    while (table[slot].host && table[slot].host != host) slot = (slot + 1) & (slots - 1);
    return slot;
}

static void grow(void) {
    Named *old = table;
    long before = slots;
    slots = slots ? 2 * slots : FIRST_SLOTS;
    table = calloc(slots, sizeof *table);
    for (long i = 0; i < before; i++) {
        if (old[i].host) table[slot_of(old[i].host)] = old[i];
    }
    free(old);
}

static const char *name_of(const void *host) {
    const char *name = slots ? table[slot_of(host)].name : NULL;
    return name ? name : "unknown kernel";
}

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *thread_id,
                            void *block_id, void *block, void *grid, int *warp) {
    if (2 * (entries + 1) > slots) grow();
    long slot = slot_of(host);
    if (!table[slot].host) entries++;
    table[slot] = (Named){host, name};
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) {}

void __cudaUnregisterFatBinary(void **handle) {}

void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t bytes,
                       int constant, int global) {}

// ---- launches of the runtime

static __thread struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(cudaStream_t *)stream = pushed.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    Row kernel = {
        .name = name_of(host),
        .grid = {grid.x, grid.y, grid.z},
        .block = {block.x, block.y, block.z},
        .registers = -1,
        .spilled = -1,
        .shared = (int)shared,
    };
    return launch(kernel, stream_of(stream));
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *host, void **arguments) {
    return cudaLaunchKernel(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                            config->stream);
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t raw, cudaHostFn_t function, void *data) {
    Stream *stream = stream_of(raw);
    cudaError_t error = enqueue((Row){.kind = "HOSTFUNC", .name = "cudaLaunchHostFunc"}, stream);
    if (!error && !capture_of(stream)) function(data);
    return error;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned flags) {
    cudaError_t error = wait_for("cudaStreamAddCallback", stream_of(stream));
    if (!error) function(stream, cudaSuccess, data);
    return error;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *host) {
    *out = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = MOST_THREADS,
        .numRegs = 32,
        .ptxVersion = 90,
        .binaryVersion = 90,
        .maxDynamicSharedSizeBytes = 49152,
    };
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                            int device) {
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *host, int threads, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *host, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char memory[1 << 16];
    *address = memory;
    return cudaSuccess;
}
