// Every PTX instruction and every CUDA built-in the kernels use, behind plain functions.
// A kernel includes this file and nothing else of CUDA; host/ptx_host.h implements the same
// functions for a CPU, so the kernels' logic is tested where there is no GPU.
//
// Conventions: all 32 lanes of a warp call a warp function together; all threads of a block call
// sync_block() together.
#pragma once

#ifndef __CUDACC__
#include "host/ptx_host.h"
#else

#include <stdint.h>

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// Blocks a multiprocessor for kernels of 1024 threads that would fit twice; the compiler needs a few registers more
// than that leaves from sm_100 on.
#if __CUDA_ARCH__ >= 1000
#define ROOMY_BLOCKS 1
#else
#define ROOMY_BLOCKS 2
#endif
#define GRID_CONSTANT __grid_constant__
#define DEVICE static __device__ __forceinline__
#define DEVICE_CALL static __device__ __noinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define SHARED_BYTES(name) extern __shared__ __align__(1024) unsigned char name[]
#define UNROLL _Pragma("unroll")
#define PRAGMA_TEXT(text) _Pragma(#text)
#define UNROLL_BY(n) PRAGMA_TEXT(unroll n)

// ---- where a thread is -------------------------------------------------------------------------

DEVICE int thread_index() { return (int)threadIdx.x; }
DEVICE int block_threads() { return (int)blockDim.x; }
DEVICE int block_x() { return (int)blockIdx.x; }
DEVICE int block_y() { return (int)blockIdx.y; }
DEVICE int grid_x() { return (int)gridDim.x; }
DEVICE int grid_y() { return (int)gridDim.y; }
DEVICE int lane_index() { return (int)(threadIdx.x & 31); }
DEVICE int warp_index() { return (int)(threadIdx.x >> 5); }

// ---- order between kernels ---------------------------------------------------------------------

// Kernels of a step are started before the one before them has ended (programmatic dependent launch),
// so each one waits before it reads or writes anything another kernel touches; only weights, step tables
// and pages of earlier steps may be read earlier. Every kernel calls both, every block of it, before any return.
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// What a kernel before the one ahead of this one wrote, and that kernel waited for: see `linear_up` and
// `linear_down`. Past the multiprocessor's own cache, which may hold an older value. Volatile, so that
// several loads stay ahead of the copies that use them and are under way together.
DEVICE uint32_t load_early(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    return v;
}
DEVICE uint16_t load_early(const uint16_t* p) {
    uint16_t v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    return v;
}
DEVICE void load_early(const uint32_t* p, uint32_t (&v)[4]) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(__cvta_generic_to_global(p)) : "memory");
}
// Constants that are read once: 16 bytes, asked for where the call stands, past the multiprocessor's own cache.
DEVICE void load_constant(const void* p, uint32_t (&v)[4]) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(__cvta_generic_to_global(p)) : "memory");
}
DEVICE void begin_kernel() {
    let_next_start();
    wait_for_previous();
}

// ---- barriers, fences, atomics -----------------------------------------------------------------

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void fence_device() { __threadfence(); }
DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
// A word of the block's that its threads add to meanwhile: some value it had.
DEVICE uint32_t load_relaxed(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.relaxed.cta.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// Blocks of a cluster run at the same time; from compute capability 9.0 on a launch may ask for clusters of several
// (`Launch::cluster`). All threads of all its blocks arrive, and wait for each other: what a thread wrote before it arrived,
// the others see once they have waited. A store or load where `at` is in another block's shared memory is between two such
// barriers, of which the first says that the block has begun, and the second that it has not ended.
#if __CUDA_ARCH__ >= 900
DEVICE uint32_t cluster_blocks() {
    uint32_t v;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(v));
    return v;
}
DEVICE uint32_t cluster_block() {
    uint32_t v;
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(v));
    return v;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
template <class T> DEVICE void store_in_cluster(T* at, uint32_t block, T v) {
    static_assert(sizeof(T) % 8 == 0, "");
    uint32_t to, w[sizeof(T) / 4];
    memcpy(w, &v, sizeof(T));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(at)), "r"(block));
    UNROLL for (uint32_t i = 0; i < sizeof(T) / 4; i += 2)
        asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" :: "r"(to + 4 * i), "r"(w[i]), "r"(w[i + 1]) : "memory");
}
template <class T> DEVICE T load_in_cluster(const T* at, uint32_t block) {
    static_assert(sizeof(T) == 8, "");
    uint32_t from, w[2];
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(from) : "r"(shared_address(at)), "r"(block));
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(from) : "memory");
    T v;
    memcpy(&v, w, 8);
    return v;
}
#else
DEVICE uint32_t cluster_blocks() { return 1; }
DEVICE uint32_t cluster_block() { return 0; }
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
template <class T> DEVICE void store_in_cluster(T* at, uint32_t, T v) { *at = v; }
template <class T> DEVICE T load_in_cluster(const T* at, uint32_t) { return *at; }
#endif
// Until other blocks have counted so far, behind a fence; what they wrote ahead of theirs is seen from here on. The blocks
// must be running or done, and this one must not have written anything that others see.
DEVICE void wait_for_count(const uint32_t* p, uint32_t count) {
    uint32_t v;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    while (v < count);
}
DEVICE uint32_t atomic_or(uint32_t* p, uint32_t v) { return atomicOr(p, v); }
DEVICE uint64_t atomic_add(uint64_t* p, uint64_t v) { return atomicAdd((unsigned long long*)p, (unsigned long long)v); }
DEVICE uint64_t atomic_max(uint64_t* p, uint64_t v) { return atomicMax((unsigned long long*)p, (unsigned long long)v); }

// ---- warp exchange -----------------------------------------------------------------------------

DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
DEVICE uint32_t shuffle(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }
DEVICE uint32_t vote(bool v) { return __ballot_sync(~0u, v); }
DEVICE uint32_t warp_add(uint32_t v) { return __reduce_add_sync(~0u, v); }
DEVICE int count_bits(uint32_t v) { return __popc(v); }
DEVICE int lowest_bit(uint32_t v) { return __ffs((int)v) - 1; }
DEVICE int highest_bit(uint64_t v) { return 63 - __clzll((long long)v); }  // of a number that is not 0

// ---- arithmetic --------------------------------------------------------------------------------

DEVICE float float_of_bits(uint32_t v) { return __uint_as_float(v); }
DEVICE uint32_t bits_of_float(float v) { return __float_as_uint(v); }
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
DEVICE float log2_fast(float x) { return __log2f(x); }
DEVICE float exp_exact(float x) { return expf(x); }  // to the last place or two, subnormal results kept
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }  // never fused with a sum

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

DEVICE float to_float(bf16 v) { return __uint_as_float((uint32_t)v.bits << 16); }
DEVICE float to_float(f16 v) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(v.bits));
    return y;
}
// Two floats rounded to nearest even, `low` in the low half.
template <class T> DEVICE uint32_t pack2(float low, float high);
template <> __device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <> __device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
// Bytes of (a, b), numbered 0-3 in a and 4-7 in b, picked by the four nibbles of `order`.
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t order) { return __byte_perm(a, b, order); }

// c += a b with a 16x16, b 16x8, c 16x8. Lane = 4 g + t holds
//   a: [0] (row g, k 2t..), [1] (row g+8, k 2t..), [2] (row g, k 2t+8..), [3] (row g+8, k 2t+8..)
//   b: [0] (k 2t.., column g), [1] (k 2t+8.., column g)
//   c: [0] (g, 2t), [1] (g, 2t+1), [2] (g+8, 2t), [3] (g+8, 2t+1)
template <class T> DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <> __device__ __forceinline__ void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> __device__ __forceinline__ void mma<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of signed bytes, b too, over 32 k: each register four of them, k 4t.., and 4t+16.. where 2t+8.. stands above.
DEVICE void mma_bytes(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements out of shared memory. Lane l points at the 16 bytes of row
// l % 8 of matrix l / 8; lane 4 g + t gets of matrix i, in out[i], elements 2t and 2t+1 of row g:
// a of mma with matrices (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15).
DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)));
}
// The same with every matrix transposed: elements g of rows 2t and 2t+1.
DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)));
}

// Four signed bytes as pairs of T, the first two in the low one.
template <class T> DEVICE void widen_bytes(uint32_t bytes, uint32_t& low, uint32_t& high);
// A byte's lower bits behind the exponent of 128 are 128 more than their number, its sign there doubles the 128.
template <> __device__ __forceinline__ void widen_bytes<bf16>(uint32_t bytes, uint32_t& low, uint32_t& high) {
    const uint32_t two[2] = {permute_bytes(bytes, 0x43434343u, 0x4140), permute_bytes(bytes, 0x43434343u, 0x4342)};
    uint32_t y[2];
    UNROLL for (int i = 0; i < 2; i++)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(y[i]) : "r"(two[i] & 0xff7fff7fu), "r"(0x3f803f80u), "r"((two[i] & 0xff80ff80u) | 0x80008000u));
    low = y[0], high = y[1];
}
// 128 more than a byte behind the exponent of 1024.
template <> __device__ __forceinline__ void widen_bytes<f16>(uint32_t bytes, uint32_t& low, uint32_t& high) {
    bytes ^= 0x80808080u;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(low) : "r"(permute_bytes(bytes, 0x64646464u, 0x4140)), "r"(0x64806480u));
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(high) : "r"(permute_bytes(bytes, 0x64646464u, 0x4342)), "r"(0x64806480u));
}

// ---- products by a warpgroup ------------------------------------------------------------------

// c += a b over 16 of 64 k, a 64 long and b 8 NT long: by four warps together, the operands out of shared memory, where
// all reading happens between the call and matrix_wait(). An operand is a tile of lines of 128 bytes, 1024-byte aligned,
// piece p of 16 bytes of line r at p ^ (r % 8): of b a line is 64 k of one place; of a the same, or, with K_LINES, 64
// places of one k. Lane 4 g + t of warp w holds in c[n] what mma's c has of rows 16 w + .. and columns 8 n + ..
// Compute capability 9.0 only: other builds have a trap here, and launches ask first (`Device::warpgroups`).
//
// matrix_multiply_held: a in registers, warp w's 16 rows of it as mma's a, not written to before matrix_wait().
//
// Each thread: matrix_publish() behind its writes to a tile and before the barrier ahead of its use; then
// matrix_begin(), products, matrix_end(); matrix_wait() before c is read or a tile written again.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
DEVICE void matrix_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void matrix_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void matrix_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void matrix_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// A tile for the instruction: 128-byte swizzle, eight lines every 1024 bytes.
DEVICE uint64_t matrix_tile(const void* p) {
    return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
#define FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define MATRIX(type, name, nt, columns, list, a, b, k_lines, ...)                                                     \
    template <> __device__ __forceinline__ void matrix_multiply<type, k_lines, nt>(float (&c)[nt][4], const void* left, \
                                                                                const void* right, int k16) {          \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #name "." #name " {" list                 \
                     "}, %" #a ", %" #b ", 1, 1, 1, " #k_lines ", 0;"                                                  \
                     : __VA_ARGS__                                                                                     \
                     : "l"(matrix_tile(left) + (k_lines ? 128 : 2) * k16), "l"(matrix_tile(right) + 2 * k16));         \
    }
#define MATRIX_HELD(type, name, nt, columns, list, a, b, ...)                                                          \
    template <> __device__ __forceinline__ void matrix_multiply_held<type, nt>(                                        \
        float (&c)[nt][4], const uint32_t (&left)[4], const void* right, int k16) {                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #name "." #name " {" list                 \
                     "}, {" a "}, %" #b ", 1, 1, 1, 0;"                                                                \
                     : __VA_ARGS__                                                                                     \
                     : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(matrix_tile(right) + 2 * k16));     \
    }
#define LIST_1 "%0,%1,%2,%3"
#define LIST_2 LIST_1 ",%4,%5,%6,%7"
#define LIST_4 LIST_2 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST_8 LIST_4 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FOUR_2 FOUR(0), FOUR(1)
#define FOUR_4 FOUR_2, FOUR(2), FOUR(3)
#define FOUR_8 FOUR_4, FOUR(4), FOUR(5), FOUR(6), FOUR(7)
#define MATRIX_SIZES(type, name, k_lines)                     \
    MATRIX(type, name, 1, 8, LIST_1, 4, 5, k_lines, FOUR(0))  \
    MATRIX(type, name, 2, 16, LIST_2, 8, 9, k_lines, FOUR_2)  \
    MATRIX(type, name, 4, 32, LIST_4, 16, 17, k_lines, FOUR_4) \
    MATRIX(type, name, 8, 64, LIST_8, 32, 33, k_lines, FOUR_8)
#define MATRIX_HELD_SIZES(type, name)                                          \
    MATRIX_HELD(type, name, 1, 8, LIST_1, "%4,%5,%6,%7", 8, FOUR(0))           \
    MATRIX_HELD(type, name, 2, 16, LIST_2, "%8,%9,%10,%11", 12, FOUR_2)        \
    MATRIX_HELD(type, name, 4, 32, LIST_4, "%16,%17,%18,%19", 20, FOUR_4)      \
    MATRIX_HELD(type, name, 8, 64, LIST_8, "%32,%33,%34,%35", 36, FOUR_8)
template <class T, int K_LINES, int NT>
DEVICE void matrix_multiply(float (&c)[NT][4], const void* a, const void* b, int k16);
template <class T, int NT> DEVICE void matrix_multiply_held(float (&c)[NT][4], const uint32_t (&a)[4], const void* b, int k16);
MATRIX_SIZES(bf16, bf16, 0)
MATRIX_SIZES(bf16, bf16, 1)
MATRIX_SIZES(f16, f16, 0)
MATRIX_SIZES(f16, f16, 1)
MATRIX_HELD_SIZES(bf16, bf16)
MATRIX_HELD_SIZES(f16, f16)
#undef MATRIX_HELD_SIZES
#undef MATRIX_HELD
#undef MATRIX_SIZES
#undef MATRIX
#undef LIST_1
#undef LIST_2
#undef LIST_4
#undef LIST_8
#undef FOUR_2
#undef FOUR_4
#undef FOUR_8
#undef FOUR
#else
DEVICE void matrix_publish() {}
DEVICE void matrix_begin() {}
DEVICE void matrix_end() {}
DEVICE void matrix_wait() {}
template <class T, int K_LINES, int NT> DEVICE void matrix_multiply(float (&)[NT][4], const void*, const void*, int) {
    asm volatile("trap;");
}
template <class T, int NT> DEVICE void matrix_multiply_held(float (&)[NT][4], const uint32_t (&)[4], const void*, int) {
    asm volatile("trap;");
}
#endif

// ---- copies from global to shared memory -------------------------------------------------------

// One thread's 16 bytes, zeros when not valid; both addresses aligned. Done after copy_wait.
DEVICE void copy_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// Closes a group of this thread's copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are still under way.
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }

// A warp's tile loader: one barrier per pipeline stage, in shared memory.
// sm_90 and later: one bulk copy per tile; before: 16-byte copies by all lanes.
struct TileBarrier { uint64_t state; };

#if __CUDA_ARCH__ >= 900
constexpr int TILE_ARRIVALS = 1;
#else
constexpr int TILE_ARRIVALS = 32;
#endif

// By one thread, before a sync_warp() (or sync_block()) that comes before the first load.
DEVICE void tile_init(TileBarrier* b) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(TILE_ARRIVALS) : "memory");
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// By a whole warp that has finished reading the stage (sync_warp() before). `bytes` is a multiple
// of 16; addresses are 16-byte aligned.
DEVICE void tile_load(void* shared, const void* global, uint32_t bytes, TileBarrier* b) {
#if __CUDA_ARCH__ >= 900
    if (lane_index() == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(shared_address(b)), "r"(bytes) : "memory");
        asm volatile("{\n .reg .b64 policy;\n"
                     " createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                     " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}"
                     :: "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(b)) : "memory");
    }
#else
    const char* source = (const char*)global;
    char* target = (char*)shared;
    for (uint32_t i = lane_index() * 16; i < bytes; i += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(target + i)), "l"(source + i) : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(shared_address(b)) : "memory");
#endif
}
// By every lane: returns when the load number `parity` (0, 1, 0, …) of this stage is in place.
DEVICE void tile_wait(TileBarrier* b, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
#if __CUDA_ARCH__ >= 900
        asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.b32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
#else
        asm volatile("{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.b32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
#endif
    }
}

#endif
