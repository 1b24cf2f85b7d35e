// One block per row: embedding, norms, and what follows the QKV product and the MLP's first product.
// All read the sums that a product left as `splits` fp32 matrices, so no product has an epilogue.
// Traffic: the row, once, from and to the L2; latency-bound at decode.
#include "common.cuh"

namespace rows {

// residual = table[token] + positions[position + offset].
template <class T> DEVICE void embed(const EmbedParams& p) {
    const uint32_t row = block_x();
    const T* from = (const T*)p.table + (uint64_t)p.tokens[row] * p.hidden;
    const T* place = p.position_table
        ? (const T*)p.position_table + (uint64_t)(p.positions[row] + p.position_offset) * p.hidden : nullptr;
    for (uint32_t i = thread_index(); i < p.hidden; i += block_threads()) {
        float v = to_float(from[i]);
        if (place) v += to_float(place[i]);
        p.residual[(uint64_t)row * p.hidden + i] = v;
    }
}

// residual += delta + delta_bias;  out = (residual - mean) / sqrt(variance + eps) * weight + bias, or
// residual / sqrt(mean square + eps) * weight. The row stays in shared memory between the passes.
template <class T> DEVICE void norm(const NormParams& p) {
    SHARED_BYTES(shared);
    float* scratch = (float*)shared;
    float* row_values = scratch + 32;
    const uint32_t row = p.row_map ? p.row_map[block_x()] : block_x();
    float sum = 0;
    const bool changed = p.delta.splits || p.delta_bias;
    for (uint32_t i = 4 * thread_index(); i < p.hidden; i += 4 * block_threads()) {
        Floats4* stream = (Floats4*)(p.residual + (uint64_t)row * p.hidden + i);
        Floats4 v = *stream;
        const Floats4 delta = partial4_at(p.delta, p.rows, row, i), bias = load4<T>(p.delta_bias, i);
        UNROLL for (int j = 0; j < 4; j++) {
            v.v[j] += delta.v[j] + bias.v[j];
            sum += p.bias ? v.v[j] : v.v[j] * v.v[j];
        }
        if (!p.row_map && changed) *stream = v;
        *(Floats4*)(row_values + i) = v;
    }
    sum = block_sum(sum, scratch);
    float mean = 0, square = sum;
    if (p.bias) {
        mean = sum / p.hidden;
        square = 0;
        for (uint32_t i = 4 * thread_index(); i < p.hidden; i += 4 * block_threads()) {
            UNROLL for (int j = 0; j < 4; j++) {
                const float d = row_values[i + j] - mean;
                square += d * d;
            }
        }
        square = block_sum(square, scratch);
    }
    const float factor = reciprocal_sqrt(square / p.hidden + p.epsilon);
    for (uint32_t i = 4 * thread_index(); i < p.hidden; i += 4 * block_threads()) {
        Floats4 v = *(const Floats4*)(row_values + i);
        const Floats4 weight = load4<T>(p.weight, i), bias = load4<T>(p.bias, i);
        UNROLL for (int j = 0; j < 4; j++) v.v[j] = (v.v[j] - mean) * factor * weight.v[j] + bias.v[j];
        store4<T>(p.out, (uint64_t)block_x() * p.hidden + i, v);
    }
}

// Block (row, y): heads y, y + grid_y, … of q, k and v, one warp each: bias, norm, rotation, write.
template <class T> DEVICE void qkv(const QkvParams& p) {
    const uint32_t row = block_x(), hd = p.head_dim, half = hd / 2;
    const int lane = lane_index();
    const uint32_t slot = p.kv_slot[row];
    const uint32_t warps = block_threads() / 32 * grid_y();
    for (uint32_t head = block_y() * (block_threads() / 32) + warp_index(); head < p.heads + 2 * p.kv_heads; head += warps) {
        const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
        if (!is_q && slot == NONE) continue;
        const uint32_t column = head * hd;
        // Lane l holds pairs (i, i + half), i = l, l + 32, …: at most 4 of them.
        float low[4], high[4], square = 0;
        UNROLL for (int j = 0; j < 4; j++) {
            const uint32_t i = lane + 32 * j;
            low[j] = high[j] = 0;
            if (i >= half) continue;
            low[j] = partial_at(p.qkv, p.rows, row, column + i);
            high[j] = partial_at(p.qkv, p.rows, row, column + i + half);
            if (p.bias) {
                low[j] += to_float(((const T*)p.bias)[column + i]);
                high[j] += to_float(((const T*)p.bias)[column + i + half]);
            }
            square += low[j] * low[j] + high[j] * high[j];
        }
        if (p.q_norm && !is_v) {
            const T* weight = (const T*)(is_q ? p.q_norm : p.k_norm);
            const float factor = reciprocal_sqrt(warp_sum(square) / p.norm_dim + p.epsilon);
            UNROLL for (int j = 0; j < 4; j++) {
                const uint32_t i = lane + 32 * j;
                if (i >= half) continue;
                low[j] *= factor * to_float(weight[i]);
                high[j] *= factor * to_float(weight[i + half]);
            }
        }
        T* to;
        if (is_q) {
            to = (T*)p.q + ((uint64_t)row * p.heads + head) * hd;
        } else {
            const uint64_t kv_head = head - p.heads - (is_v ? p.kv_heads : 0);
            to = (T*)p.kv + (((slot / PAGE_TOKENS * (uint64_t)p.kv_heads + kv_head) * 2 + is_v) * PAGE_TOKENS +
                             slot % PAGE_TOKENS) * hd;
        }
        const float* rotation = p.rotation && !is_v ? p.rotation + (uint64_t)p.positions[row] * hd : nullptr;
        UNROLL for (int j = 0; j < 4; j++) {
            const uint32_t i = lane + 32 * j;
            if (i >= half) continue;
            float a = low[j], b = high[j];
            if (rotation) {
                const float c = rotation[2 * i], s = rotation[2 * i + 1];
                a = low[j] * c - high[j] * s;
                b = high[j] * c + low[j] * s;
            }
            to[i] = from_float<T>(a);
            to[i + half] = from_float<T>(b);
        }
    }
}

// Block (row, y): a piece of the row's neurons.
template <class T> DEVICE void activate(const ActivateParams& p) {
    const uint32_t row = block_x();
    const bool gated = p.kind == 1 || p.kind == 2;
    const uint32_t group = p.group ? p.group[row] : NONE;
    const uint32_t* mask = p.masks && group != NONE ? p.masks + (uint64_t)group * ((p.n + 31) / 32) : nullptr;
    for (uint32_t i = 4 * (block_y() * block_threads() + thread_index()); i < p.n; i += 4 * block_threads() * grid_y()) {
        Floats4 up = partial4_at(p.in, p.rows, row, gated ? p.n + i : i), gate = {{0, 0, 0, 0}};
        if (gated) gate = partial4_at(p.in, p.rows, row, i);
        Floats4 y;
        UNROLL for (int j = 0; j < 4; j++) {
            y.v[j] = 0;
            if (i + j >= p.valid || (mask && !(mask[i / 32] >> (i % 32 + j) & 1))) continue;
            const uint32_t neuron = p.index ? p.index[i + j] : i + j;
            float u = up.v[j], g = gate.v[j];
            if (p.up_bias) u += to_float(((const T*)p.up_bias)[neuron]);
            if (p.gate_bias) g += to_float(((const T*)p.gate_bias)[neuron]);
            // silu(x) = x / (1 + 2^(-x log2 e))
            if (p.kind == 0) y.v[j] = u > 0 ? u : 0.0f;
            else if (p.kind == 1) y.v[j] = g / (1.0f + exp2_fast(-1.44269504f * g)) * u;
            else if (p.kind == 2) y.v[j] = (g > 0 ? g : 0.0f) * u;
            else y.v[j] = u;
        }
        store4<T>(p.out, (uint64_t)row * p.n + i, y);
    }
}

}  // namespace rows

#define ROWS(type)                                                                                    \
    KERNEL(256, 1) embed_##type(const GRID_CONSTANT EmbedParams p) { begin_kernel(); rows::embed<type>(p); }          \
    KERNEL(512, 1) norm_##type(const GRID_CONSTANT NormParams p) { begin_kernel(); rows::norm<type>(p); }             \
    KERNEL(256, 1) qkv_##type(const GRID_CONSTANT QkvParams p) { begin_kernel(); rows::qkv<type>(p); }                \
    KERNEL(256, 1) activate_##type(const GRID_CONSTANT ActivateParams p) { begin_kernel(); rows::activate<type>(p); }
ROWS(bf16)
ROWS(f16)
#undef ROWS
