// A few blocks per row: embedding, norms, and what follows the QKV product and the MLP's first product.
// All read the sums that a product left as `splits` fp32 matrices, so no product has an epilogue.
// Traffic: the row, once, from and to the L2; latency-bound at decode.
#include "heads.cuh"
#include "router_bytes.cuh"

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
// residual / sqrt(mean square + eps) * weight. A row is a cluster's, whose threads have CHUNKS times four of its columns in
// registers; what is constant they load while the kernel before still runs. Nothing else overlaps this kernel but the next
// one's weights, of which a multiprocessor brings as many as this leaves room for, and its instructions come from far away:
// it is short, a few rows are many blocks' work, and its warps meet once. Each warp leaves its columns' sum and their
// squares' around its own mean to all blocks, and all of them put these together.
template <class T, int CHUNKS> DEVICE void norm(const NormParams& p) {
    const uint32_t blocks = cluster_blocks(), block = cluster_block();
    if (blocks > 1) cluster_arrive();
    if (!p.late) let_next_start();
    SHARED_BYTES(shared);
    Floats2* of_warps = (Floats2*)shared;  // [32] sum, squares
    const uint32_t out_row = block_x() / blocks, threads = blocks * block_threads();
    const uint32_t thread = block * block_threads() + thread_index(), lane = lane_index(), warp = thread / 32, step = 4 * threads;
    constexpr bool HELD = CHUNKS <= 2;  // whether there are registers for weight and bias, too
    Words2 constants[CHUNKS][3];        // those two and delta_bias: four elements each
    UNROLL for (int c = 0; c < CHUNKS; c++) {
        const uint32_t i = 4 * thread + c * step;
        const void* from[3] = {p.weight, p.bias, p.delta_bias};
        UNROLL for (int j = 0; j < 3; j++) {
            constants[c][j] = {};
            if ((HELD || j == 2) && from[j] && i < p.hidden) constants[c][j] = *(const Words2*)((const T*)from[j] + i);
        }
    }
    const uint32_t row = p.row_map ? p.row_map[out_row] : out_row;
    wait_for_previous();
    if (p.late) let_next_start();
    Floats4 v[CHUNKS];
    float sum = 0, square = 0;
    UNROLL for (int c = 0; c < CHUNKS; c++) {
        v[c] = {};
        const uint32_t i = 4 * thread + c * step;
        if (i >= p.hidden) continue;
        Floats4 delta[1];
        Floats4* stream = (Floats4*)(p.residual + (uint64_t)row * p.hidden + i);
        v[c] = *stream;
        partial_sums<4, 1, 8 / CHUNKS>(delta, p.delta, p.rows, row, {i});
        const Floats4 add = floats4<T>(constants[c][2]);
        UNROLL for (int j = 0; j < 4; j++) {
            v[c].v[j] += delta[0].v[j] + add.v[j];
            sum += v[c].v[j];
        }
        if (!p.row_map) *stream = v[c];
    }
    // Columns of a warp: whole pieces of 128, but for the row's last.
    auto columns = [&](uint32_t warp) {
        uint32_t n = 0;
        UNROLL for (int c = 0; c < CHUNKS; c++) {
            const uint32_t first = 128 * warp + c * step;
            n += first >= p.hidden ? 0 : p.hidden - first < 128 ? p.hidden - first : 128;
        }
        return n ? (float)n : 1;
    };
    float mean = 0;
    if (p.bias) {
        sum = warp_sum(sum);
        mean = sum * reciprocal_fast(columns(warp));
    }
    UNROLL for (int c = 0; c < CHUNKS; c++) {
        if (4 * thread + c * step >= p.hidden) continue;
        UNROLL for (int j = 0; j < 4; j++) square += (v[c].v[j] - mean) * (v[c].v[j] - mean);
    }
    square = warp_sum(square);
    if (blocks > 1) {
        cluster_wait();  // for all to have begun
        if (lane < blocks) store_in_cluster(of_warps + warp, lane, Floats2{{sum, square}});
        cluster_arrive();
        cluster_wait();
    } else {
        if (lane == 0) of_warps[warp] = {{sum, square}};
        sync_block();
    }
    const bool valid = 32 * lane < threads;
    const Floats2 mine = valid ? of_warps[lane] : Floats2{{0, 0}};
    const float one = reciprocal_fast((float)p.hidden);  // column's weight
    square = mine.v[1];
    if (p.bias) {
        mean = warp_sum(mine.v[0]) * one;
        if (valid) {
            const float n = columns(lane), d = mine.v[0] * reciprocal_fast(n) - mean;
            square += n * d * d;
        }
    }
    const float factor = reciprocal_sqrt(warp_sum(square) * one + p.epsilon);
    UNROLL for (int c = 0; c < CHUNKS; c++) {
        const uint32_t i = 4 * thread + c * step;
        if (i >= p.hidden) continue;
        const Floats4 weight = HELD ? floats4<T>(constants[c][0]) : load4<T>(p.weight, i);
        const Floats4 bias = HELD ? floats4<T>(constants[c][1]) : load4<T>(p.bias, i);
        UNROLL for (int j = 0; j < 4; j++) v[c].v[j] = (v[c].v[j] - mean) * factor * weight.v[j] + bias.v[j];
        store4<T>(p.out, (uint64_t)out_row * p.hidden + i, v[c]);
    }
}

// Block (row, y): a head of q, k or v for each warp: bias, norm, rotation, write. With rows to narrow the first y does
// that, and with a selection the next: they take longest, and there may be more blocks than have room at once. Attention
// over selected heads can load nothing early and its blocks fill the registers: with few rows it starts only when the
// product has ended, unless it has a router's matrix to load; so it does where the product chose the heads (CHOSEN): then their
// lists are complete, and it loads pages early. PAIRS: for heads of up to 128 times that; PARTS: of the sums
// that are under way at once, so that `qkv_whole`, for sums of one part, has room for more blocks.
constexpr uint32_t FEW_ROWS = 4;
template <class T, int PAIRS, int PARTS, bool CHOSEN = false> DEVICE void qkv(const QkvParams& p) {
    const uint32_t row = block_x(), hd = p.head_dim, half = hd / 2;
    const bool selects = p.select.sequences != 0, narrows = p.narrow.sequences != 0;
    const bool late = CHOSEN || (selects && !narrows && p.rows <= FEW_ROWS);
    auto wait = [&] {
        wait_for_previous();
        if (late) let_next_start();
    };
    if (!late) let_next_start();
    if (narrows && block_y() == 0) {
        wait();
        SHARED_BYTES(shared);
        if (row < p.narrow.sequences) router_bytes::narrow(p.narrow, row, (float*)shared);
        return;
    }
    if (selects && block_y() == narrows) {
        wait();
        if (row < p.select.sequences) heads::select<T>(p.select, row);
        return;
    }
    const uint32_t slot = p.kv_slot[row], y = block_y() - narrows - selects;
    const uint32_t head = y * (block_threads() / 32) + warp_index();
    const bool is_q = head < p.heads, is_v = head >= p.heads + p.kv_heads;
    if (head >= p.heads + 2 * p.kv_heads || (!is_q && slot == NONE)) return wait();
    const uint32_t column = head * hd;
    // Lane l holds pairs (i, i + half) and (i + 1, i + 1 + half), i = 2 l (and 2 l + 64, in heads of more than 128): x[j][0]
    // and x[j][1] are the two halves. Constants are loaded while the product still runs.
    const T* weight = (const T*)(is_v ? nullptr : is_q ? p.q_norm : p.k_norm);
    const float* rotation = p.rotation && !is_v ? p.rotation + (uint64_t)p.positions[row] * hd : nullptr;
    Floats2 x[PAIRS][2], bias[PAIRS][2], scale[PAIRS][2];
    Floats4 turn[PAIRS];
    UNROLL for (int j = 0; j < PAIRS; j++) {
        const uint32_t i = 2 * lane_index() + 64 * j;
        UNROLL for (int h = 0; h < 2; h++) {
            x[j][h] = bias[j][h] = {{0, 0}};
            scale[j][h] = {{1, 1}};
            if (i < half && p.bias) bias[j][h] = load2<T>(p.bias, column + i + h * half);
            if (i < half && weight) scale[j][h] = load2<T>(weight, i + h * half);
        }
        turn[j] = {{1, 0, 1, 0}};
        if (i < half && rotation) turn[j] = *(const Floats4*)(rotation + 2 * i);
    }
    wait();
    Partial of_q = p.qkv;
    if (CHOSEN && is_q) of_q.splits = p.arrived[1];
    float square = 0;
    UNROLL for (int j = 0; j < PAIRS; j++) {
        const uint32_t i = 2 * lane_index() + 64 * j;
        if (i >= half) continue;
        partial_sums<2, 2, PARTS>(x[j], CHOSEN ? of_q : p.qkv, p.rows, row, {column + i, column + i + half});
        UNROLL for (int h = 0; h < 2; h++) {
            UNROLL for (int c = 0; c < 2; c++) {
                x[j][h].v[c] += bias[j][h].v[c];
                square += x[j][h].v[c] * x[j][h].v[c];
            }
        }
    }
    const float factor = weight ? reciprocal_sqrt(warp_sum(square) / p.norm_dim + p.epsilon) : 1.0f;
    T* to;
    if (is_q) {
        to = (T*)p.q + ((uint64_t)row * p.heads + head) * hd;
    } else {
        const uint64_t kv_head = head - p.heads - (is_v ? p.kv_heads : 0);
        to = (T*)p.kv + (((slot / PAGE_TOKENS * (uint64_t)p.kv_heads + kv_head) * 2 + is_v) * PAGE_TOKENS +
                         slot % PAGE_TOKENS) * hd;
    }
    UNROLL for (int j = 0; j < PAIRS; j++) {
        const uint32_t i = 2 * lane_index() + 64 * j;
        if (i >= half) continue;
        Floats2 a, b;
        UNROLL for (int c = 0; c < 2; c++) {
            const float low = x[j][0].v[c] * (factor * scale[j][0].v[c]), high = x[j][1].v[c] * (factor * scale[j][1].v[c]);
            const float cosine = turn[j].v[2 * c], sine = turn[j].v[2 * c + 1];
            a.v[c] = low * cosine - high * sine;
            b.v[c] = high * cosine + low * sine;
        }
        *(uint32_t*)(to + i) = pack2<T>(a.v[0], a.v[1]);
        *(uint32_t*)(to + i + half) = pack2<T>(b.v[0], b.v[1]);
    }
}

// Block (row, y): a piece of the row's neurons. Biases are constants, and the list was complete before the kernel
// ahead of this one began: a thread's first biases are loaded while that one still runs.
template <class T> DEVICE void activate(const ActivateParams& p) {
    let_next_start();
    const uint32_t row = block_x(), first = 4 * (block_y() * block_threads() + thread_index());
    auto load_biases = [&](Floats4 (&bias)[2], uint32_t i) {
        const void* from[2] = {p.up_bias, p.gate_bias};
        uint32_t neuron[4] = {i, i + 1, i + 2, i + 3};
        if (p.index && (from[0] || from[1])) load_early(p.index + i, neuron);
        UNROLL for (int b = 0; b < 2; b++) {
            bias[b] = {};
            if (!from[b]) continue;
            if (!p.index) bias[b] = load4<T>(from[b], i);
            else UNROLL for (int j = 0; j < 4; j++) bias[b].v[j] = to_float(((const T*)from[b])[neuron[j]]);
        }
    };
    Floats4 bias[2];
    if (first < p.n) load_biases(bias, first);
    wait_for_previous();
    const bool gated = p.kind == 1 || p.kind == 2;
    const uint32_t group = p.group ? p.group[row] : NONE;
    const uint32_t* mask = p.masks && group != NONE ? p.masks + (uint64_t)group * ((p.n + 31) / 32) : nullptr;
    for (uint32_t i = first; i < p.n; i += 4 * block_threads() * grid_y()) {
        if (i != first) load_biases(bias, i);
        Floats4 sum[2];  // up, gate
        if (gated) {
            partial_sums<4, 2>(sum, p.in, p.rows, row, {p.n + i, i});
        } else {
            Floats4 up[1];
            partial_sums<4, 1>(up, p.in, p.rows, row, {i});
            sum[0] = up[0];
            sum[1] = {{0, 0, 0, 0}};
        }
        UNROLL for (int b = 0; b < 2; b++) {
            UNROLL for (int j = 0; j < 4; j++) sum[b].v[j] += bias[b].v[j];
        }
        const uint32_t on = mask ? mask[i / 32] >> i % 32 : ~0u;
        Floats4 y;
        UNROLL for (int j = 0; j < 4; j++) {
            y.v[j] = activation(p.kind, sum[1].v[j], sum[0].v[j]);
            if (i + j >= p.valid || !(on >> j & 1)) y.v[j] = 0;
        }
        store4<T>(p.out, (uint64_t)row * p.n + i, y);
    }
}

}  // namespace rows

#define ROWS(type)                                                                                    \
    KERNEL(256, 1) embed_##type(const GRID_CONSTANT EmbedParams p) { begin_kernel(); rows::embed<type>(p); }          \
    KERNEL(1024, 1) norm_##type##_1(const GRID_CONSTANT NormParams p) { rows::norm<type, 1>(p); }                     \
    KERNEL(1024, 1) norm_##type##_2(const GRID_CONSTANT NormParams p) { rows::norm<type, 2>(p); }                     \
    KERNEL(1024, 1) norm_##type##_4(const GRID_CONSTANT NormParams p) { rows::norm<type, 4>(p); }                     \
    KERNEL(256, 4) qkv_##type(const GRID_CONSTANT QkvParams p) { rows::qkv<type, 1, 8>(p); }                         \
    KERNEL(256, 6) qkv_whole_##type(const GRID_CONSTANT QkvParams p) { rows::qkv<type, 1, 1>(p); }                    \
    KERNEL(256, 4) qkv_chosen_##type(const GRID_CONSTANT QkvParams p) { rows::qkv<type, 1, 8, true>(p); }             \
    KERNEL(256, 3) qkv_long_##type(const GRID_CONSTANT QkvParams p) { rows::qkv<type, 2, 8>(p); }                     \
    KERNEL(256, 5) activate_##type(const GRID_CONSTANT ActivateParams p) { rows::activate<type>(p); }
ROWS(bf16)
ROWS(f16)
#undef ROWS
