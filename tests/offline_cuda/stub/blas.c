// cuBLAS and cuBLASLt: each product is one row with its shape.
//
// Declared here with the arguments that are looked at, which come first: the caller passes more.
#include "stub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, EXECUTION_FAILED = 13, HEURISTIC_BYTES = 96 };
// attributes of cuBLASLt
enum { LAYOUT_BATCH = 5, DESC_TRANSPOSE_A = 3, DESC_EPILOGUE = 7 };

typedef struct {
    cudaStream_t stream;
} Handle;

typedef struct {
    unsigned type;
    unsigned long rows, columns;
    long stride;
    int batch;
} Layout;

typedef struct {
    int transposed;  // of the first factor
    int epilogue;
    int rest[6];
} Description;

static int product(const char *name, cudaStream_t stream, int m, int n, int k, int batch) {
    Row row = {.kind = "PRODUCT", .name = name, .m = m, .n = n, .k = k, .batch = batch};
    return enqueue(row, stream_of(stream)) ? EXECUTION_FAILED : OK;
}

int cublasCreate_v2(Handle **handle) {
    *handle = calloc(1, sizeof(Handle));
    add_row((Row){.kind = "CUBLAS", .name = "create"}, NULL);
    return OK;
}

int cublasDestroy_v2(Handle *handle) { return OK; }

int cublasSetStream_v2(Handle *handle, cudaStream_t stream) {
    handle->stream = stream;
    return OK;
}

int cublasSetWorkspace_v2(Handle *handle, void *memory, size_t bytes) { return OK; }

int cublasSetMathMode(Handle *handle, int mode) { return OK; }

int cublasGetMathMode(Handle *handle, int *mode) {
    *mode = 0;
    return OK;
}

int cublasSetPointerMode_v2(Handle *handle, int mode) { return OK; }

int cublasGetPointerMode_v2(Handle *handle, int *mode) {
    *mode = 0;
    return OK;
}

int cublasSetSmCountTarget(Handle *handle, int count) { return OK; }

#define PRODUCT(call, name) \
    int call(Handle *handle, int ta, int tb, int m, int n, int k) { return product(name, handle->stream, m, n, k, 1); }

PRODUCT(cublasGemmEx, "GemmEx")
PRODUCT(cublasSgemm_v2, "Sgemm")
PRODUCT(cublasDgemm_v2, "Dgemm")
PRODUCT(cublasSgemmEx, "SgemmEx")

#define BATCHED_PRODUCT(call, name) \
    int call(Handle *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda, \
             long long stride_a, const void *b, int ldb, long long stride_b, const void *beta, void *c, int ldc, \
             long long stride_c, int batch) { \
        return product(name, handle->stream, m, n, k, batch); \
    }

BATCHED_PRODUCT(cublasSgemmStridedBatched, "SgemmStridedBatched")
BATCHED_PRODUCT(cublasDgemmStridedBatched, "DgemmStridedBatched")

int cublasGemmStridedBatchedEx(Handle *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                               int type_a, int lda, long long stride_a, const void *b, int type_b, int ldb,
                               long long stride_b, const void *beta, void *c, int type_c, int ldc, long long stride_c,
                               int batch) {
    return product("GemmStridedBatchedEx", handle->stream, m, n, k, batch);
}

int cublasSgemv_v2(Handle *handle, int transposed, int m, int n) { return product("Sgemv", handle->stream, m, n, 1, 1); }

int cublasDgemv_v2(Handle *handle, int transposed, int m, int n) { return product("Dgemv", handle->stream, m, n, 1, 1); }

// ---- cuBLASLt

size_t cublasLtGetVersion(void) { return 130401; }

int cublasLtMatrixLayoutCreate(Layout **out, unsigned type, unsigned long rows, unsigned long columns, long stride) {
    *out = malloc(sizeof(Layout));
    **out = (Layout){type, rows, columns, stride, 1};
    return OK;
}

int cublasLtMatrixLayoutDestroy(Layout *layout) {
    free(layout);
    return OK;
}

int cublasLtMatrixLayoutSetAttribute(Layout *layout, int attribute, const void *value, size_t bytes) {
    if (attribute == LAYOUT_BATCH) layout->batch = *(const int *)value;
    return OK;
}

int cublasLtMatmulDescCreate(Description **out, int compute, int scale) {
    *out = calloc(1, sizeof(Description));
    return OK;
}

int cublasLtMatmulDescDestroy(Description *description) {
    free(description);
    return OK;
}

int cublasLtMatmulDescSetAttribute(Description *description, int attribute, const void *value, size_t bytes) {
    if (attribute == DESC_TRANSPOSE_A) description->transposed = *(const int *)value;
    if (attribute == DESC_EPILOGUE) description->epilogue = *(const int *)value;
    return OK;
}

int cublasLtMatmulPreferenceCreate(void **out) {
    *out = calloc(1, 64);
    return OK;
}

int cublasLtMatmulPreferenceDestroy(void *preference) {
    free(preference);
    return OK;
}

int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t bytes) {
    return OK;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, char *results, int *found) {
    memset(results, 0, HEURISTIC_BYTES);
    *found = 1;
    return OK;
}

int cublasLtMatmulAlgoInit(void) { return OK; }

int cublasLtMatmulAlgoCheck(void) { return OK; }

int cublasLtMatmulAlgoConfigGetAttribute(void) { return OK; }

int cublasLtMatmulAlgoConfigSetAttribute(void) { return OK; }

int cublasLtMatmul(void *handle, const Description *description, const void *alpha, const void *a,
                   const Layout *a_layout, const void *b, const Layout *b_layout, const void *beta, const void *c,
                   const Layout *c_layout, void *d, const Layout *d_layout, const void *algorithm, void *workspace,
                   size_t bytes, cudaStream_t stream) {
    char *name = malloc(64);
    snprintf(name, 64, "Lt type %u epilogue %d", a_layout->type, description->epilogue);
    unsigned long inner = description->transposed ? a_layout->rows : a_layout->columns;
    return product(name, stream, (int)d_layout->rows, (int)d_layout->columns, (int)inner, d_layout->batch);
}
