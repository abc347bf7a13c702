// Streams, events, captures, and what a capture forbids.
#include "stub.h"

#include <stdlib.h>
#include <time.h>

typedef struct {
    double at;  // milliseconds
    Capture *capture;
    int device;
    bool recorded;
} Event;

__thread int capture_mode = cudaStreamCaptureModeGlobal;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Stream legacy[DEVICES] = {{.device = 0}, {.device = 1}};
static Capture *first_capture;
static int last_stream;
static unsigned long long last_capture;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

Stream *stream_of(cudaStream_t stream) {
    bool is_default = !stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
    return is_default ? &legacy[current_device] : (Stream *)stream;
}

// The capture that a stream takes part in, NULL where it has ended
Capture *capture_of(Stream *stream) {
    Capture *capture = stream->capture;
    return capture && capture->active ? capture : NULL;
}

Capture *captures(void) { return first_capture; }

static bool is_own(const Capture *capture) { return pthread_equal(capture->thread, pthread_self()); }

// A call that may break a capture that is under way, by the modes of the capture and of this thread
cudaError_t forbidden_in_capture(const char *call) {
    if (capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (Capture *each = first_capture; each; each = each->next) {
        if (!each->active || each->mode == cudaStreamCaptureModeRelaxed) continue;
        bool global = each->mode == cudaStreamCaptureModeGlobal && capture_mode == cudaStreamCaptureModeGlobal;
        if (!is_own(each) && !global) continue;
        each->invalid = true;
        complain("%s during a capture", call, NULL);
        return refuse(cudaErrorStreamCaptureUnsupported);
    }
    return cudaSuccess;
}

cudaError_t wait_for(const char *call, Stream *stream) {
    Capture *capture = capture_of(stream);
    if (capture) {
        capture->invalid = true;
        complain("%s waits for a capturing stream", call, stream);
        return refuse(cudaErrorStreamCaptureUnsupported);
    }
    add_row((Row){.kind = "WAIT", .name = call}, stream);
    return cudaSuccess;
}

// Work for a stream; complains of what a device refuses, or does besides the capture it was meant for
cudaError_t enqueue(Row row, Stream *stream) {
    add_row(row, stream);
    if (stream->device != current_device) {
        complain("%s on a stream of another device", row.name, stream);
        return refuse(cudaErrorInvalidResourceHandle);
    }
    Capture *capture = capture_of(stream);
    if (capture) {
        capture->graph->nodes++;
        return cudaSuccess;
    }
    for (Capture *each = first_capture; each; each = each->next) {
        if (!each->active || !is_own(each)) continue;
        complain("%s outside the capture of its thread", row.name, stream);
        break;
    }
    return cudaSuccess;
}

// ---- streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
    Stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_lock(&lock);
    *stream = (Stream){.device = current_device, .id = ++last_stream};
    pthread_mutex_unlock(&lock);
    *out = (cudaStream_t)stream;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    return cudaStreamCreateWithPriority(out, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }  // rows still name it

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return forbidden_in_capture("cudaStreamQuery"); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for("cudaStreamSynchronize", stream_of(stream)); }

cudaError_t cudaStreamWaitEvent(cudaStream_t raw, cudaEvent_t raw_event, unsigned flags) {
    Event *event = (Event *)raw_event;
    Stream *stream = stream_of(raw);
    bool in_capture = event->capture && event->capture->active;
    if (in_capture && !capture_of(stream)) {
        stream->capture = event->capture;  // joins it
    } else if (!in_capture && event->recorded && capture_of(stream)) {
        complain("%s: a capture waits for an event from outside of it", "cudaStreamWaitEvent", stream);
    }
    return cudaSuccess;
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    Event *event = calloc(1, sizeof *event);
    event->device = current_device;
    *out = (cudaEvent_t)event;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t raw, cudaStream_t raw_stream) {
    Event *event = (Event *)raw;
    Stream *stream = stream_of(raw_stream);
    if (event->device != stream->device) {
        complain("%s: event and stream of different devices", "cudaEventRecord", stream);
        return refuse(cudaErrorInvalidResourceHandle);
    }
    *event = (Event){.at = now(), .capture = capture_of(stream), .device = event->device, .recorded = true};
    add_row((Row){.kind = "EVENT", .name = "record"}, stream);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}

static cudaError_t ask(const char *call, const Event *event) {
    if (event->capture && event->capture->active) {
        event->capture->invalid = true;
        complain("%s of a captured event", call, NULL);
        return refuse(cudaErrorCapturedEvent);
    }
    return forbidden_in_capture(call);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return ask("cudaEventQuery", (Event *)event); }

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    cudaError_t error = ask("cudaEventSynchronize", (Event *)event);
    if (!error) add_row((Row){.kind = "WAIT", .name = "cudaEventSynchronize"}, NULL);
    return error;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    const Event *one = (Event *)begin, *other = (Event *)end;
    bool valid = one->device == other->device && one->recorded && other->recorded;
    if (!valid) return refuse(cudaErrorInvalidResourceHandle);
    float passed = (float)(other->at - one->at);
    *milliseconds = passed < 1e-4f ? 1e-4f : passed;
    return cudaSuccess;
}

// ---- captures

cudaError_t cudaStreamBeginCapture(cudaStream_t raw, enum cudaStreamCaptureMode mode) {
    Stream *stream = stream_of(raw);
    if (stream == &legacy[current_device]) return refuse(cudaErrorStreamCaptureUnsupported);
    Capture *capture = calloc(1, sizeof *capture);
    pthread_mutex_lock(&lock);
    *capture = (Capture){++last_capture, mode, true, false, pthread_self(), calloc(1, sizeof(Graph)), first_capture};
    first_capture = capture;
    pthread_mutex_unlock(&lock);
    stream->capture = capture;
    add_row((Row){.kind = "CAPTURE", .name = "begin"}, stream);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t *nodes,
                                          const cudaGraphEdgeData *edges, size_t count,
                                          enum cudaStreamCaptureMode mode) {
    cudaError_t error = cudaStreamBeginCapture(stream, mode);
    if (error) return error;
    Capture *capture = stream_of(stream)->capture;
    free(capture->graph);
    capture->graph = (Graph *)graph;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t raw, cudaGraph_t *graph) {
    Stream *stream = stream_of(raw);
    Capture *capture = stream->capture;
    *graph = NULL;
    if (!capture) return refuse(cudaErrorIllegalState);
    add_row((Row){.kind = "CAPTURE", .name = "end", .nodes = capture->graph->nodes}, stream);
    capture->active = false;
    stream->capture = NULL;
    if (capture->mode != cudaStreamCaptureModeRelaxed && !is_own(capture)) {
        return refuse(cudaErrorStreamCaptureWrongThread);
    }
    if (capture->invalid) return refuse(cudaErrorStreamCaptureInvalidated);
    *graph = (cudaGraph_t)capture->graph;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    const Capture *capture = capture_of(stream_of(stream));
    if (!capture) *status = cudaStreamCaptureStatusNone;
    else *status = capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    enum cudaStreamCaptureStatus found;
    cudaStreamIsCapturing(stream, &found);
    *status = (CUstreamCaptureStatus)found;
    return CUDA_SUCCESS;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    cudaStreamIsCapturing(stream, status);
    const Capture *capture = capture_of(stream_of(stream));
    if (capture && id) *id = capture->id;
    if (capture && graph) *graph = (cudaGraph_t)capture->graph;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *nodes,
                                                const cudaGraphEdgeData *edges, size_t count, unsigned flags) {
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    int before = capture_mode;
    capture_mode = (int)*mode;
    *mode = (enum cudaStreamCaptureMode)before;
    return cudaSuccess;
}
