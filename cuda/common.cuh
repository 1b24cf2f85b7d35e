// Small things every kernel uses: 16-byte loads, reductions over a warp and a block.
#pragma once
#include "ptx.cuh"
#include "params.h"

struct alignas(16) Words4 { uint32_t w[4]; };
struct alignas(8) Words2 { uint32_t w[2]; };

#define NEGATIVE_INFINITY float_of_bits(0xff800000u)

template <class T> DEVICE T from_float(float v) { return T{(uint16_t)pack2<T>(v, 0.0f)}; }

DEVICE float warp_sum(float v) {
    for (int m = 16; m; m >>= 1) v += shuffle_xor(v, m);
    return v;
}
DEVICE float warp_max(float v) {
    for (int m = 16; m; m >>= 1) v = fmaxf(v, shuffle_xor(v, m));
    return v;
}

// The sum over this lane and those below it.
DEVICE uint32_t warp_upto(uint32_t v) {
    UNROLL for (int m = 1; m < 32; m *= 2) {
        const uint32_t from = shuffle(v, (lane_index() - m) & 31);
        if (lane_index() >= m) v += from;
    }
    return v;
}

// Element (row, column) of a sum of partial matrices with `rows` rows each.
DEVICE float partial_at(const Partial& p, uint32_t rows, uint32_t row, uint32_t column) {
    const float* at = p.data + (uint64_t)row * p.columns + column;
    uint64_t stride = (uint64_t)rows * p.columns;
    float sum = 0;
    UNROLL_BY(4) for (uint32_t s = 0; s < p.splits; s++) sum += at[s * stride];
    return sum;
}

// W columns from each of N places of a row of a sum; places, columns and the number of columns are
// multiples of W. The loads of several parts are under way together, so that latency is paid once.
template <int W> struct alignas(4 * W) Floats { float v[W]; };
using Floats2 = Floats<2>;
using Floats4 = Floats<4>;
template <int W, int N, int DEPTH = (W * N >= 8 ? 4 : 8)>
DEVICE void partial_sums(Floats<W> (&sum)[N], const Partial& p, uint32_t rows, uint32_t row, const uint32_t (&columns)[N]) {
    const float* at = p.data + (uint64_t)row * p.columns;
    const uint64_t stride = (uint64_t)rows * p.columns;
    UNROLL for (int n = 0; n < N; n++) sum[n] = {};
    for (uint32_t s = 0; s < p.splits; s += DEPTH, at += DEPTH * stride) {
        Floats<W> part[DEPTH][N];
        UNROLL for (int j = 0; j < DEPTH; j++) {
            UNROLL for (int n = 0; n < N; n++) {
                part[j][n] = {};
                if (s + j < p.splits) part[j][n] = *(const Floats<W>*)(at + j * stride + columns[n]);
            }
        }
        UNROLL for (int j = 0; j < DEPTH; j++) {
            UNROLL for (int n = 0; n < N; n++) {
                UNROLL for (int i = 0; i < W; i++) sum[n].v[i] += part[j][n].v[i];
            }
        }
    }
}

// Four elements of a 16-bit vector, zeros when it is null.
template <class T> DEVICE Floats4 load4(const void* from, uint32_t i) {
    Floats4 out = {{0, 0, 0, 0}};
    if (from) {
        struct alignas(8) Four { T v[4]; } x = *(const Four*)((const T*)from + i);
        UNROLL for (int j = 0; j < 4; j++) out.v[j] = to_float(x.v[j]);
    }
    return out;
}
template <class T> DEVICE Floats4 floats4(Words2 x) {
    return {{to_float(T{(uint16_t)x.w[0]}), to_float(T{(uint16_t)(x.w[0] >> 16)}), to_float(T{(uint16_t)x.w[1]}),
             to_float(T{(uint16_t)(x.w[1] >> 16)})}};
}
template <class T> DEVICE Floats2 load2(const void* from, uint32_t i) {
    const uint32_t x = *(const uint32_t*)((const T*)from + i);
    return {{to_float(T{(uint16_t)x}), to_float(T{(uint16_t)(x >> 16)})}};
}
template <class T> DEVICE void store4(void* to, uint64_t i, const Floats4& x) {
    *(Words2*)((T*)to + i) = Words2{{pack2<T>(x.v[0], x.v[1]), pack2<T>(x.v[2], x.v[3])}};
}

// x / (1 + 2^(-x log2 e))
DEVICE float silu(float x) { return x * reciprocal_fast(1.0f + exp2_fast(-1.44269504f * x)); }

// What ActivateParams::kind says.
DEVICE float activation(uint32_t kind, float gate, float up) {
    if (kind == 0) return up > 0 ? up : 0.0f;
    if (kind == 1) return silu(gate) * up;
    if (kind == 2) return (gate > 0 ? gate : 0.0f) * up;
    return up;
}

// Bits that sort as floats do; -0 as 0, NaN below everything.
DEVICE uint32_t sort_key(float v) {
    if (v != v) return 0;
    uint32_t b = bits_of_float(v + 0.0f);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}
