// ptx.cuh for a CPU: the same functions, with what hardware leaves undefined made visible.
// Asynchronous copies fill their target with NaN when issued and write it only when waited for.
#pragma once
#include <math.h>
#include <string.h>
#include "executor.h"
#include "races.h"

#ifdef __SANITIZE_THREAD__
const bool races::instrumented = true;
#else
const bool races::instrumented = false;
#endif

#define KERNEL(threads, blocks) extern "C" void
#define GRID_CONSTANT
#define DEVICE static inline
#define DEVICE_CALL static
#define DEVICE_MEMBER inline
#define SHARED_BYTES(name) unsigned char* name = host::shared
#define UNROLL
#define UNROLL_BY(n)
#define __restrict__

using ::floorf;
using ::sqrtf;

DEVICE int thread_index() { return host::self->index; }
DEVICE int block_threads() { return host::grid.threads; }
DEVICE int block_x() { return host::block_x; }
DEVICE int block_y() { return host::block_y; }
DEVICE int grid_x() { return host::grid.x; }
DEVICE int grid_y() { return host::grid.y; }
DEVICE int lane_index() { return host::self->index & 31; }
DEVICE int warp_index() { return host::self->index >> 5; }

DEVICE void let_next_start() {}
DEVICE void wait_for_previous() { host::wait_for_previous(); }
DEVICE void begin_kernel() { wait_for_previous(); }
DEVICE uint32_t load_early(const uint32_t* p) { return *p; }
DEVICE uint16_t load_early(const uint16_t* p) { return *p; }
DEVICE void load_early(const uint32_t* p, uint32_t (&v)[4]) { memcpy(v, p, 16); }
DEVICE void load_constant(const void* p, uint32_t (&v)[4]) { memcpy(v, p, 16); }

DEVICE void sync_block() { host::sync_block(); }
DEVICE uint32_t cluster_blocks() { return (uint32_t)host::grid.cluster; }
DEVICE uint32_t cluster_block() { return (uint32_t)host::self->block; }
DEVICE void cluster_arrive() { host::cluster_arrive(); }
DEVICE void cluster_wait() { host::cluster_wait(); }
template <class T> void store_in_cluster(T* at, uint32_t block, T v) {
    *(T*)(host::cluster_shared + block * host::shared_stride + ((unsigned char*)at - host::shared)) = v;
}
template <class T> T load_in_cluster(const T* at, uint32_t block) {
    return *(const T*)(host::cluster_shared + block * host::shared_stride + ((const unsigned char*)at - host::shared));
}
DEVICE void sync_warp() { host::sync_warp(); }
DEVICE void meet_warp() { host::meet_warp(); }
DEVICE void fence_device() { host::fence(); }
DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v) { return host::fetch_add(p, v); }
DEVICE uint32_t load_relaxed(const uint32_t* p) { return host::fetch_add(const_cast<uint32_t*>(p), 0u); }
DEVICE void wait_for_count(const uint32_t* p, uint32_t count) {
    while (load_relaxed(p) < count) host::postpone();
    fence_device();
}
DEVICE uint32_t atomic_or(uint32_t* p, uint32_t v) { return host::fetch_or(p, v); }
DEVICE uint64_t atomic_add(uint64_t* p, uint64_t v) { return host::fetch_add(p, v); }
DEVICE uint64_t atomic_max(uint64_t* p, uint64_t v) { return host::fetch_max(p, v); }

DEVICE uint32_t bits_of_float(float v) {
    uint32_t y;
    memcpy(&y, &v, 4);
    return y;
}
DEVICE float float_of_bits(uint32_t v) {
    float y;
    memcpy(&y, &v, 4);
    return y;
}

DEVICE uint32_t shuffle(uint32_t v, int lane) {
    host::Warp& w = host::warp();
    w.words[lane_index()][0] = v;
    meet_warp();
    uint32_t y = w.words[lane][0];
    meet_warp();
    return y;
}
DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return shuffle(v, lane_index() ^ mask); }
DEVICE float shuffle_xor(float v, int mask) { return float_of_bits(shuffle_xor(bits_of_float(v), mask)); }
DEVICE uint32_t vote(bool v) {
    host::Warp& w = host::warp();
    w.words[lane_index()][0] = v;
    meet_warp();
    uint32_t y = 0;
    for (int i = 0; i < 32; i++) y |= (w.words[i][0] & 1u) << i;
    meet_warp();
    return y;
}
DEVICE uint32_t warp_add(uint32_t v) {
    for (int m = 16; m; m >>= 1) v += shuffle_xor(v, m);
    return v;
}
DEVICE int count_bits(uint32_t v) { return __builtin_popcount(v); }
DEVICE int lowest_bit(uint32_t v) { return __builtin_ffs((int)v) - 1; }
DEVICE int highest_bit(uint64_t v) { return 63 - __builtin_clzll(v); }

DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float log2_fast(float x) { return log2f(x); }
DEVICE float exp_exact(float x) { return expf(x); }
DEVICE float product(float a, float b) { return a * b; }
DEVICE float reciprocal_fast(float x) { return 1.0f / x; }
DEVICE float reciprocal_sqrt(float x) { return 1.0f / sqrtf(x); }

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

DEVICE float to_float(bf16 v) { return float_of_bits((uint32_t)v.bits << 16); }
DEVICE float to_float(f16 v) {
    _Float16 h;
    memcpy(&h, &v.bits, 2);
    return (float)h;
}
DEVICE uint32_t round_bf16(float v) {
    uint32_t b = bits_of_float(v);
    if (v != v) return 0x7fff;
    return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
DEVICE uint32_t round_f16(float v) {
    _Float16 h = (_Float16)v;
    uint16_t y;
    memcpy(&y, &h, 2);
    return y;
}
template <class T> uint32_t pack2(float low, float high);
template <> inline uint32_t pack2<bf16>(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
template <> inline uint32_t pack2<f16>(float low, float high) { return round_f16(low) | round_f16(high) << 16; }
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t order) {
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t y = 0;
    for (int i = 0; i < 4; i++) y |= (uint32_t)(both >> (8 * ((order >> (4 * i)) & 7)) & 0xff) << (8 * i);
    return y;
}

template <class T> float half_of(uint32_t pair, int which) { return to_float(T{(uint16_t)(pair >> (16 * which))}); }

template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    host::Warp& w = host::warp();
    int lane = lane_index(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) w.words[lane][i] = a[i];
    for (int i = 0; i < 2; i++) w.words[lane][4 + i] = b[i];
    meet_warp();
    for (int i = 0; i < 4; i++) {
        int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            uint32_t x = w.words[(row % 8) * 4 + (k % 8) / 2][row / 8 + 2 * (k / 8)];
            uint32_t y = w.words[column * 4 + (k % 8) / 2][4 + k / 8];
            sum += half_of<T>(x, k % 2) * half_of<T>(y, k % 2);
        }
        c[i] += sum;
    }
    meet_warp();
}

DEVICE void mma_bytes(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    host::Warp& w = host::warp();
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    auto& words = w.operands[w.turn[lane] ^= true];
    for (int i = 0; i < 4; i++) words[lane][i] = a[i];
    for (int i = 0; i < 2; i++) words[lane][4 + i] = b[i];
    meet_warp();
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (int k = 0; k < 32; k += 4) {
            const uint32_t x = words[(row % 8) * 4 + (k % 16) / 4][row / 8 + 2 * (k / 16)];
            const uint32_t y = words[column * 4 + (k % 16) / 4][4 + k / 16];
            for (int j = 0; j < 32; j += 8) c[i] += (int)(int8_t)(x >> j) * (int)(int8_t)(y >> j);
        }
    }
}

template <class T> void widen_bytes(uint32_t bytes, uint32_t& low, uint32_t& high) {
    const auto number = [&](int i) { return (float)(int8_t)(bytes >> (8 * i)); };
    low = pack2<T>(number(0), number(1));
    high = pack2<T>(number(2), number(3));
}

// Element (row, column) of matrix i as two bytes, from the 16 bytes each lane points at.
template <bool TRANSPOSED> void host_load_matrices(uint32_t (&out)[4], const void* row) {
    host::Warp& w = host::warp();
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    if ((uintptr_t)row % 16) __builtin_trap();  // misaligned
    memcpy(w.words[lane], &row, sizeof row);
    meet_warp();
    for (int i = 0; i < 4; i++) {
        uint16_t two[2];
        for (int e = 0; e < 2; e++) {
            const int from = TRANSPOSED ? 2 * t + e : g, column = TRANSPOSED ? g : 2 * t + e;
            const unsigned char* at;
            memcpy(&at, w.words[8 * i + from], sizeof at);
            memcpy(&two[e], at + 2 * column, 2);
        }
        out[i] = two[0] | (uint32_t)two[1] << 16;
    }
    meet_warp();
}
DEVICE void load_matrices(uint32_t (&out)[4], const void* row) { host_load_matrices<false>(out, row); }
DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) { host_load_matrices<true>(out, row); }

// The product happens when it is waited for, the last moment at which hardware may read.
DEVICE void matrix_publish() {}
DEVICE void matrix_begin() {}
DEVICE void matrix_end() {}
DEVICE void matrix_wait() { host::product_wait(); }
template <class T> float tile_element(const void* tile, int line, int place) {
    T v;
    memcpy(&v, (const char*)tile + line * 128 + (place / 8 ^ line % 8) * 16 + place % 8 * 2, 2);
    return to_float(v);
}
template <class T, int K_LINES, int NT> void add_product(float* c, const void* a, const void* b, int k16) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    for (int n = 0; n < NT; n++) {
        for (int i = 0; i < 4; i++) {
            const int row = warp_index() % 4 * 16 + g + 8 * (i / 2), column = 8 * n + 2 * t + i % 2;
            float sum = 0;
            for (int k = 16 * k16; k < 16 * k16 + 16; k++)
                sum += tile_element<T>(a, K_LINES ? k : row, K_LINES ? row : k) * tile_element<T>(b, column, k);
            c[4 * n + i] += sum;
        }
    }
}
template <class T, int K_LINES, int NT> void matrix_multiply(float (&c)[NT][4], const void* a, const void* b, int k16) {
    if ((uintptr_t)a % 1024 || (uintptr_t)b % 1024) __builtin_trap();  // misaligned
    host::product_issue({add_product<T, K_LINES, NT>, c[0], a, b, k16});
}

// What a lane holds of a product's a: rows g and g + 8, eight pairs each, exchanged when it is begun.
template <class T, int NT> void add_product_held(float* c, const void* a, const void* b, int k16) {
    const uint32_t* pairs = (const uint32_t*)a;
    for (int n = 0; n < NT; n++) {
        for (int i = 0; i < 4; i++) {
            const int column = 8 * n + 2 * (lane_index() % 4) + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; k++)
                sum += half_of<T>(pairs[i / 2 * 8 + k / 2], k % 2) * tile_element<T>(b, column, 16 * k16 + k);
            c[4 * n + i] += sum;
        }
    }
}
template <class T, int NT> void matrix_multiply_held(float (&c)[NT][4], const uint32_t (&a)[4], const void* b, int k16) {
    if ((uintptr_t)b % 1024) __builtin_trap();  // misaligned
    host::Warp& w = host::warp();
    const int lane = lane_index();
    auto& words = w.operands[w.turn[lane] ^= true];
    for (int i = 0; i < 4; i++) words[lane][i] = a[i];
    meet_warp();
    host::Product product = {add_product_held<T, NT>, c[0], nullptr, b, k16};
    for (int i = 0; i < 16; i++) product.held[i] = words[lane / 4 * 4 + i % 4][i / 8 + 2 * (i / 4 % 2)];
    host::product_issue(product);
}

DEVICE void copy_async16(void* target, const void* source, bool valid) { host::copy_issue(target, source, 16, valid); }
DEVICE void copy_commit() { host::copy_commit(); }
template <int N> void copy_wait() { host::copy_wait(N); }

struct TileBarrier { uint64_t state; };
DEVICE void tile_init(TileBarrier* b) { host::tile_init(&b->state); }
DEVICE void tile_load(void* target, const void* source, uint32_t bytes, TileBarrier* b) {
    host::tile_load(target, source, bytes, &b->state);
}
DEVICE void tile_wait(TileBarrier* b, uint32_t parity) { host::tile_wait(&b->state, parity); }
