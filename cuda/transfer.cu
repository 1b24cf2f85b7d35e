// Loading: 16-bit transposition and conversion. Each element is read and written once.
#include "common.cuh"

// Block (column tile, row tile) of 32 x 32 through shared memory, 256 threads.
KERNEL(256, 1) transpose16(const GRID_CONSTANT TransposeParams p) {
    begin_kernel();
    SHARED_BYTES(shared);
    uint16_t* tile = (uint16_t*)shared;  // [32][33]
    const uint32_t column0 = block_x() * 32, row0 = block_y() * 32;
    for (int i = thread_index(); i < 1024; i += 256) {
        const uint32_t r = row0 + i / 32, c = column0 + i % 32;
        if (r < p.in_rows && c < p.columns) tile[i / 32 * 33 + i % 32] = ((const uint16_t*)p.in)[(uint64_t)r * p.columns + c];
    }
    sync_block();
    for (int i = thread_index(); i < 1024; i += 256) {
        const uint32_t c = column0 + i / 32, r = row0 + i % 32;
        if (r < p.in_rows && c < p.columns)
            ((uint16_t*)p.out)[(uint64_t)c * p.out_columns + p.first + r] = tile[i % 32 * 33 + i / 32];
    }
}

KERNEL(256, 1) convert(const GRID_CONSTANT ConvertParams p) {
    begin_kernel();
    for (uint64_t i = (uint64_t)block_x() * 256 + thread_index(); i < p.count; i += (uint64_t)grid_x() * 256) {
        float v;
        if (p.in_kind == 0) v = ((const float*)p.in)[i];
        else if (p.in_kind == 1) v = to_float(((const bf16*)p.in)[i]);
        else v = to_float(((const f16*)p.in)[i]);
        if (p.out_kind == 1) ((bf16*)p.out)[i] = from_float<bf16>(v);
        else ((f16*)p.out)[i] = from_float<f16>(v);
    }
}
