// out[row][j] = activation of the sum over k of x[row][k] w[j][k], for up to 8 rows: an MLP's first product and what
// otherwise takes a kernel of its own between it and the second one, which costs a short chain more than its bytes do.
// Neuron j is row index[j] of w where there is a list; with a gate, rows j and n + j.
//
// Traffic: each weight is read once from device memory, x once per block from the L2. A sum is not cut into parts that
// another kernel adds: a block has some neurons and all of k, a warp an eighth of k. What a warp has of x
// stays in its registers, the 16-row side of m16n8k16; eight lines of w are the columns. A step is 8 lines of 256 k, copied a
// line an instruction, DEPTH of them under way in each warp: no barrier stands between a weight and its use. Piece c of
// line r lies at c ^ (r % 2 * 4), so that eight lanes touch all banks. The order in which a product sums k is free, so
// both operands are used as they lie (see linear_skinny.cu). Of the 16 rows the first eight have four of eight k of a
// batch row and the others the other four, so that no register is spent on zeros: each half is right in the product
// with its own k of w and means nothing in the other.
//
// Blocks have equally many neurons, to within one. A list was complete before the kernel ahead let this one start.
#include "common.cuh"

namespace activated {

constexpr int WARPS = 8, DEPTH = 3, STEP = 256, LINES = 8, SUBS = 2;
constexpr uint32_t STAGE = LINES * STEP * 2, ROUND = 7 * LINES;  // lines between two additions

// Sum of the warps' parts for line `line` and row `row` of a round.
DEVICE float added(const float* parts, uint32_t line, uint32_t row) {
    float sum = 0;
    UNROLL for (uint32_t w = 0; w < WARPS; w++) sum += parts[(w * ROUND + line) * 8 + row];
    return sum;
}

template <class T> DEVICE void run(const ActivatedParams& p) {
    let_next_start();
    SHARED_BYTES(shared);
    const uint32_t thread = thread_index(), warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const bool gated = p.kind == 1 || p.kind == 2;
    const uint32_t per = gated ? 2 : 1;  // lines of a neuron
    const uint32_t first = (uint32_t)((uint64_t)p.n * block_x() / grid_x());
    const uint32_t neurons = (uint32_t)((uint64_t)p.n * (block_x() + 1) / grid_x()) - first;
    const uint32_t lines = neurons * per, groups = (lines + LINES - 1) / LINES;
    unsigned char* ring = shared + warp * DEPTH * STAGE;
    float* parts = (float*)(shared + WARPS * DEPTH * STAGE);  // [warp][ROUND][8 rows]
    uint32_t* row_of = (uint32_t*)(parts + WARPS * ROUND * 8);  // by line, of w; NONE: fills up the last group
    float* bias = (float*)(row_of + groups * LINES);            // by line

    // Which row of w a line is.
    for (uint32_t i = thread; i < groups * LINES; i += 32 * WARPS) {
        const bool gate = gated && i % 2 == 0;
        const uint32_t j = first + i / per, neuron = i < lines && p.index ? load_early(p.index + j) : j;
        row_of[i] = i >= lines ? NONE : gated && !gate ? p.n + neuron : neuron;
    }
    sync_block();

    // The warp's steps of k, and its stages: of each group of lines all of those.
    const uint32_t all = (p.k + STEP - 1) / STEP, from = all * warp / WARPS;
    const uint32_t subs = all * (warp + 1) / WARPS - from, stages = groups * subs;
    uint32_t issued = 0, group_ahead = 0, sub_ahead = 0, place_ahead = 0;
    auto issue = [&] {
        if (issued < stages) {
            const uint32_t k = (from + sub_ahead) * STEP + 8 * lane;
            unsigned char* to = ring + place_ahead * STAGE;
            const Words4* rows = (const Words4*)(row_of + group_ahead * LINES);
            UNROLL_BY(1) for (uint32_t half = 0; half < 2; half++, to += 4 * STEP * 2) {
                const Words4 four = rows[half];
                UNROLL for (uint32_t i = 0; i < 4; i++) {
                    const bool valid = four.w[i] != NONE && k < p.k;
                    copy_async16(to + i * STEP * 2 + (lane ^ (i % 2 * 4)) * 16,
                                 valid ? (const void*)((const T*)p.w + (uint64_t)four.w[i] * p.k + k) : p.w, valid);
                }
            }
            issued++;
            place_ahead = place_ahead + 1 == DEPTH ? 0 : place_ahead + 1;
            if (++sub_ahead == subs) {
                sub_ahead = 0;
                group_ahead++;
            }
        }
        copy_commit();
    };
    for (int s = 0; s < DEPTH; s++) issue();
    // Behind the first weights, and for after the next barrier.
    for (uint32_t i = thread; i < lines; i += 32 * WARPS) {
        const bool gate = gated && i % 2 == 0;
        const T* from = (const T*)(gate ? p.gate_bias : p.up_bias);
        const uint32_t neuron = gated && !gate ? row_of[i] - p.n : row_of[i];
        bias[i] = from && first + i / per < p.valid ? to_float(from[neuron]) : 0.0f;
    }
    wait_for_previous();
    Words4 x[SUBS][STEP / 32];
    UNROLL for (uint32_t sub = 0; sub < SUBS; sub++) {
        UNROLL for (uint32_t j = 0; j < STEP / 32; j++) {
            const uint32_t k = (from + sub) * STEP + 32 * j + 8 * t;
            Words4 v = {};
            if (sub < subs && g < p.rows && k < p.k) v = *(const Words4*)((const T*)p.x + (uint64_t)g * p.k + k);
            x[sub][j] = {{v.w[0], v.w[2], v.w[1], v.w[3]}};
        }
    }

    uint32_t place = 0;
    const uint32_t odd = g % 2 * 64;  // where the first of a line's pairs of pieces lies
    for (uint32_t begin = 0; begin < lines; begin += ROUND) {
        const uint32_t end = begin + ROUND < lines ? begin + ROUND : lines;
        for (uint32_t line = begin; line < end; line += LINES) {
            float c[4] = {}, d[4] = {};
            UNROLL for (uint32_t sub = 0; sub < SUBS; sub++) {
                if (sub >= subs) continue;
                copy_wait<DEPTH - 1>();
                sync_warp();
                const unsigned char* w = ring + place * STAGE + g * STEP * 2 + t * 16;
                UNROLL for (uint32_t j = 0; j < STEP / 32; j++) {
                    const Words4 v = *(const Words4*)(w + j / 2 * 128 + (j % 2 ? odd ^ 64 : odd));
                    const uint32_t low[2] = {v.w[0], v.w[1]}, high[2] = {v.w[2], v.w[3]};
                    mma<T>(c, x[sub][j].w, low);
                    mma<T>(d, x[sub][j].w, high);
                }
                sync_warp();
                issue();
                place = place + 1 == DEPTH ? 0 : place + 1;
            }
            UNROLL for (uint32_t i = 0; i < 2; i++) parts[(warp * ROUND + line - begin + 2 * t + i) * 8 + g] = c[i] + d[2 + i];
        }
        sync_block();
        for (uint32_t i = thread; i < (end - begin) / per * 8; i += 32 * WARPS) {
            const uint32_t row = i % 8, line = i / 8 * per, j = first + begin / per + i / 8;
            if (row >= p.rows) continue;
            const float up = added(parts, line + per - 1, row) + bias[begin + line + per - 1];
            const float gate = gated ? added(parts, line, row) + bias[begin + line] : 0.0f;
            const float y = activation(p.kind, gate, up);
            ((T*)p.out)[(uint64_t)row * p.n + j] = from_float<T>(j < p.valid ? y : 0.0f);
        }
        sync_block();
    }
    copy_wait<0>();
}

}  // namespace activated

KERNEL(256, 2) linear_activated_bf16(const GRID_CONSTANT ActivatedParams p) { activated::run<bf16>(p); }
KERNEL(256, 2) linear_activated_f16(const GRID_CONSTANT ActivatedParams p) { activated::run<f16>(p); }
