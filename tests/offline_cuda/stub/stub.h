// What the files of the stand-in share. A topic a file; ../build.py makes one library of them.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

enum { DEVICES = 2 };

typedef struct {
    int nodes;
} Graph;

// A capture, from its begin on; it stays in the list when it has ended.
typedef struct Capture {
    unsigned long long id;
    int mode;
    bool active, invalid;
    pthread_t thread;
    Graph *graph;
    struct Capture *next;
} Capture;

typedef struct {
    int device, id;
    Capture *capture;  // may have ended: ask `capture_of`
} Stream;

// Memory that was handed out; `device` is -1 for pinned memory of the host.
typedef struct Region {
    char *begin;
    size_t bytes;
    int device;
    struct Region *next;
} Region;

// One thing that a device would have been told, or a complaint. ../recorder.py reads it as a ctypes structure.
typedef struct {
    const char *kind, *name;
    unsigned grid[3], block[3];
    int device, stream, thread;
    unsigned long long capture;  // 0: none
    long bytes;
    int registers, spilled, shared;  // of a kernel; -1: not known. The last two in bytes
    int m, n, k, batch;              // of a product
    int nodes;                       // of a graph
} Row;

#pragma GCC visibility push(hidden)

extern __thread int current_device;
extern __thread int capture_mode;

// record.c
void add_row(Row row, const Stream *stream);
void complain(const char *format, const char *name, const Stream *stream);
bool fails_now(const char *what);
size_t memory_limit(void);

// device.c
cudaError_t refuse(cudaError_t error);
int attribute_of(int attribute);

// memory.c
bool region_of(const void *address, Region *found);
bool is_pinned(const void *address);

// streams.c
Stream *stream_of(cudaStream_t stream);
Capture *capture_of(Stream *stream);
Capture *captures(void);
cudaError_t forbidden_in_capture(const char *call);
cudaError_t wait_for(const char *call, Stream *stream);
cudaError_t enqueue(Row row, Stream *stream);

// launches.c
cudaError_t launch(Row kernel, Stream *stream);

#pragma GCC visibility pop
