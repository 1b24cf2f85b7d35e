// For benchmarks: the read ceiling of the device, and random contents without a file.
#include "common.cuh"

// Reads count * 16 bytes once, four loads in flight a thread; the sum keeps the loads alive.
KERNEL(512, 2) read_stream(const GRID_CONSTANT StreamParams p) {
    begin_kernel();
    const Words4* from = (const Words4*)p.at;
    const uint64_t stride = (uint64_t)grid_x() * block_threads();
    uint64_t i = (uint64_t)block_x() * block_threads() + thread_index();
    uint32_t sum = 0;
    for (; i + 3 * stride < p.count; i += 4 * stride) {
        Words4 v[4];
        UNROLL for (int j = 0; j < 4; j++) v[j] = from[i + j * stride];
        UNROLL for (int j = 0; j < 4; j++) sum += v[j].w[0] ^ v[j].w[1] ^ v[j].w[2] ^ v[j].w[3];
    }
    for (; i < p.count; i += stride) sum += from[i].w[0];
    if (sum == 0x12345678u) *(uint32_t*)p.sink = sum;
}

// Uniform numbers in (-scale, scale) + offset, by a hash of place and seed.
template <class T> DEVICE void fill(const FillParams& p) {
    for (uint64_t i = (uint64_t)block_x() * block_threads() + thread_index(); i < p.count;
         i += (uint64_t)grid_x() * block_threads()) {
        uint64_t z = (i + p.seed * 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 29)) * 0x94d049bb133111ebull;
        const float u = (float)(uint32_t)(z >> 40) * (2.0f / 16777216.0f) - 1.0f;
        ((T*)p.at)[i] = from_float<T>(u * p.scale + p.offset);
    }
}
KERNEL(256, 1) fill_bf16(const GRID_CONSTANT FillParams p) { begin_kernel(); fill<bf16>(p); }
KERNEL(256, 1) fill_f16(const GRID_CONSTANT FillParams p) { begin_kernel(); fill<f16>(p); }
