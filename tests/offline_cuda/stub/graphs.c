// Captured graphs: made executable, launched, destroyed.
#include "stub.h"

#include <stdlib.h>

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags) {
    if (fails_now("instantiate")) return refuse(cudaErrorMemoryAllocation);
    Graph *executable = malloc(sizeof *executable);
    *executable = *(Graph *)graph;
    *out = (cudaGraphExec_t)executable;
    add_row((Row){.kind = "GRAPH", .name = "instantiate", .nodes = executable->nodes}, NULL);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(out, graph, flags);
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    int nodes = ((Graph *)executable)->nodes;
    return enqueue((Row){.kind = "GRAPH", .name = "launch", .nodes = nodes}, stream_of(stream));
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    add_row((Row){.kind = "GRAPH", .name = "destroy", .nodes = ((Graph *)executable)->nodes}, NULL);
    free(executable);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = ((Graph *)graph)->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
    return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t *out, void *data, cudaHostFn_t destroy, unsigned count,
                                 unsigned flags) {
    static char object;
    *out = (cudaUserObject_t)&object;
    return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) { return cudaSuccess; }
