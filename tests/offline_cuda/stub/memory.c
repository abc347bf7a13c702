// Device memory is memory of the host: reserved, never touched before it is written. Copies and fills are real.
#include "stub.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// Triton clears a buffer of 256 MB between two timings: what is larger than this is left as it is
enum { LARGEST_FILL = 1 << 20, LARGEST_NUMBER = 8, PINNED = -1 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Region *regions;
static size_t used[DEVICES];

static bool find(const void *address, Region *found) {
    pthread_mutex_lock(&lock);
    Region *region = regions;
    while (region && !((char *)address >= region->begin && (char *)address < region->begin + region->bytes)) {
        region = region->next;
    }
    if (region) *found = *region;
    pthread_mutex_unlock(&lock);
    return region != NULL;
}

bool region_of(const void *address, Region *found) { return find(address, found) && found->device != PINNED; }

bool is_pinned(const void *address) {
    Region found;
    return find(address, &found) && found.device == PINNED;
}

static void *reserve(size_t bytes, int device) {
    size_t length = bytes ? bytes : 1;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *address = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, -1, 0);
    Region *region = malloc(sizeof *region);
    pthread_mutex_lock(&lock);
    *region = (Region){address, length, device, regions};
    regions = region;
    if (device >= 0) used[device] += length;
    pthread_mutex_unlock(&lock);
    return address;
}

static void release(void *address) {
    pthread_mutex_lock(&lock);
    for (Region **place = &regions; *place; place = &(*place)->next) {
        if ((*place)->begin != address) continue;
        Region *gone = *place;
        *place = gone->next;
        if (gone->device >= 0) used[gone->device] -= gone->bytes;
        munmap(gone->begin, gone->bytes);
        free(gone);
        break;
    }
    pthread_mutex_unlock(&lock);
}

// PyTorch's allocator takes memory in a capture too, in a relaxed mode, for the pool of the captures
static Row allocation(const char *kind, const char *call, size_t bytes) {
    Row row = {.kind = kind, .name = call, .bytes = (long)bytes};
    for (Capture *each = captures(); each; each = each->next) {
        if (each->active && pthread_equal(each->thread, pthread_self())) row.capture = each->id;
    }
    return row;
}

cudaError_t cudaMalloc(void **address, size_t bytes) {
    cudaError_t error = forbidden_in_capture("cudaMalloc");
    if (error) return error;
    add_row(allocation("MALLOC", "cudaMalloc", bytes), NULL);
    *address = NULL;
    if (fails_now("memory") || used[current_device] + bytes > memory_limit()) return refuse(cudaErrorMemoryAllocation);
    *address = reserve(bytes, current_device);
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) { return cudaMalloc(address, bytes); }

cudaError_t cudaMallocManaged(void **address, size_t bytes, unsigned flags) { return cudaMalloc(address, bytes); }

cudaError_t cudaFree(void *address) {
    cudaError_t error = forbidden_in_capture("cudaFree");
    if (error || !address) return error;
    add_row((Row){.kind = "FREE", .name = "cudaFree"}, NULL);
    release(address);
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return cudaFree(address); }

cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    cudaError_t error = forbidden_in_capture("cudaHostAlloc");
    if (error) return error;
    add_row(allocation("HOSTALLOC", "cudaHostAlloc", bytes), NULL);
    *address = reserve(bytes, PINNED);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }

cudaError_t cudaFreeHost(void *address) {
    release(address);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) { return cudaSuccess; }

cudaError_t cudaHostUnregister(void *address) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = memory_limit();
    *free_bytes = *total > used[current_device] ? *total - used[current_device] : 0;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *address) {
    Region region;
    memset(out, 0, sizeof *out);
    if (!find(address, &region)) {
        out->type = cudaMemoryTypeUnregistered;
        out->hostPointer = (void *)address;
        return cudaSuccess;
    }
    bool pinned = region.device == PINNED;
    out->type = pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    out->device = pinned ? 0 : region.device;
    out->devicePointer = (void *)address;
    out->hostPointer = pinned ? (void *)address : NULL;
    return cudaSuccess;
}

CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr address) {
    Region region;
    if (!find((void *)address, &region)) return CUDA_ERROR_INVALID_VALUE;
    bool pinned = region.device == PINNED;
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
        *(CUdeviceptr *)out = address;
    } else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) {
        *(int *)out = pinned ? 0 : region.device;
    } else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
        *(unsigned *)out = pinned ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    } else {
        memset(out, 0, sizeof(int));
    }
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange(CUdeviceptr *begin, size_t *bytes, CUdeviceptr address) {
    Region region;
    if (!region_of((void *)address, &region)) return CUDA_ERROR_INVALID_VALUE;
    *begin = (CUdeviceptr)region.begin;
    *bytes = region.bytes;
    return CUDA_SUCCESS;
}

static cudaError_t copy(Row row, void *to, const void *from, Stream *stream) {
    Region region;
    bool to_device = region_of(to, &region), from_device = region_of(from, &region);
    bool pageable = (!to_device && !is_pinned(to)) || (!from_device && !is_pinned(from));
    if (to_device && from_device) row.name = "device to device";
    else if (to_device) row.name = pageable ? "pageable to device" : "pinned to device";
    else row.name = pageable ? "device to pageable" : "device to pinned";
    cudaError_t error = enqueue(row, stream);
    if (error) return error;
    Capture *capture = capture_of(stream);
    if (capture && pageable) {
        capture->invalid = true;
        complain("copy from %s memory in a capture", row.name, stream);
        return refuse(cudaErrorStreamCaptureUnsupported);
    }
    if (capture) return cudaSuccess;
    // a number that the host looks at is 0, whatever was in that memory before
    if (!to_device && from_device && row.bytes <= LARGEST_NUMBER) memset(to, 0, row.bytes);
    else memmove(to, from, row.bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = forbidden_in_capture("cudaMemcpy");
    return error ? error : copy((Row){.kind = "COPY", .bytes = (long)bytes}, to, from, stream_of(0));
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy((Row){.kind = "COPY", .bytes = (long)bytes}, to, from, stream_of(stream));
}

cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t bytes, cudaStream_t stream) {
    return copy((Row){.kind = "COPY", .bytes = (long)bytes}, to, from, stream_of(stream));
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t pitch, const void *from, size_t source_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return enqueue((Row){.kind = "COPY", .name = "2D", .bytes = (long)(width * height)}, stream_of(stream));
}

cudaError_t cudaMemcpyToSymbol(const void *to, const void *from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t raw) {
    Stream *stream = stream_of(raw);
    cudaError_t error = enqueue((Row){.kind = "FILL", .name = "cudaMemsetAsync", .bytes = (long)bytes}, stream);
    if (!error && !capture_of(stream) && bytes <= LARGEST_FILL) memset(address, value, bytes);
    return error;
}

cudaError_t cudaMemset(void *address, int value, size_t bytes) {
    return cudaMemsetAsync(address, value, bytes, NULL);
}
