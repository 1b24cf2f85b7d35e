// cuBLASLt without a GPU, in the same file as the mock driver (cuda.cpp): products in plain loops. It
// proposes two algorithms that do the same; the first takes twice as long by the mock's clock. When the
// process ends, standard output gets how often each ran.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include "cuda.h"

namespace {

struct Layout { int type; uint64_t rows, columns; int64_t stride; };
struct Operation { int transposed; };
struct Algorithm { uint64_t number, rest[7]; };
struct Proposal { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };

constexpr int SUCCESS = 0, EXECUTION_FAILED = 13;
constexpr int F32 = 0, F16 = 2, BF16 = 14, TRANSA = 3;

struct Counts {
    unsigned runs[2];
    ~Counts() { printf("first proposal %u, second %u\n", runs[0], runs[1]); fflush(stdout); }
} counts;

float at(const Layout& m, const void* data, uint64_t row, uint64_t column) {
    const size_t i = row + column * (uint64_t)m.stride;
    if (m.type == F16) return (float)((const _Float16*)data)[i];
    const uint32_t bits = (uint32_t)((const uint16_t*)data)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

}  // namespace

extern "C" {

int cublasLtCreate(void** out) { *out = &counts; return SUCCESS; }
int cublasLtDestroy(void*) { return SUCCESS; }
int cublasLtMatmulDescCreate(Operation** out, int, int) { *out = new Operation{0}; return SUCCESS; }
int cublasLtMatmulDescSetAttribute(Operation* o, int which, const void* value, size_t) {
    if (which == TRANSA) memcpy(&o->transposed, value, sizeof(int));
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(Operation* o) { delete o; return SUCCESS; }
int cublasLtMatrixLayoutCreate(Layout** out, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *out = new Layout{type, rows, columns, stride};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout* l) { delete l; return SUCCESS; }
int cublasLtMatmulPreferenceCreate(void** out) { *out = &counts; return SUCCESS; }
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return SUCCESS; }
int cublasLtMatmulPreferenceDestroy(void*) { return SUCCESS; }

int cublasLtMatmulAlgoGetHeuristic(void*, Operation*, Layout*, Layout*, Layout*, Layout*, void*, int most,
                                   Proposal* out, int* found) {
    *found = most < 2 ? most : 2;
    for (int i = 0; i < *found; i++) out[i] = Proposal{{(uint64_t)i, {}}, 0, SUCCESS, 1, {}};
    return SUCCESS;
}

int cublasLtMatmul(void*, Operation* o, const void*, const void* a, Layout* la, const void* b, Layout* lb,
                   const void*, const void*, Layout*, void* out, Layout* ld, const Algorithm* algorithm, void*,
                   size_t, void* stream) {
    const Layout wa = *la, wb = *lb, wd = *ld;
    const bool transposed = o->transposed;
    const uint64_t number = algorithm->number;
    if (wd.type != F32 || (wa.type != F16 && wa.type != BF16) || wb.type != wa.type) return EXECUTION_FAILED;
    const int code = mock::enqueue(stream, [=] {
        for (uint64_t column = 0; column < wd.columns; column++)
            for (uint64_t row = 0; row < wd.rows; row++) {
                float sum = 0;
                for (uint64_t k = 0; k < wb.rows; k++)
                    sum += (transposed ? at(wa, a, k, row) : at(wa, a, row, k)) * at(wb, b, k, column);
                ((float*)out)[row + column * (uint64_t)wd.stride] = sum;
            }
        counts.runs[number]++;
        mock::pass(number == 0 ? 20 : 10);
        return 0;
    });
    return code == 0 ? SUCCESS : EXECUTION_FAILED;
}

}  // extern "C"
