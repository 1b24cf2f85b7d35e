// The most likely token of each row of logits and its log probability:
//   token = argmax (ties to the lower id, NaN and infinity never), logprob = -log sum exp(logit - max).
// Blocks (piece, row) read the row's logits once (vocab * 4 bytes) with a running maximum and sum; the
// block of a row that arrives last adds the pieces in order.
#include "common.cuh"

namespace top {

constexpr float LOG2_E = 1.44269504f;

struct Best {
    float max, sum;
    uint32_t token;

    DEVICE_MEMBER void add(const Best& other) {
        const float top = fmaxf(max, other.max);
        if (top > NEGATIVE_INFINITY)
            sum = sum * exp2_fast((max - top) * LOG2_E) + other.sum * exp2_fast((other.max - top) * LOG2_E);
        if (other.max > max || (other.max == max && other.token < token)) token = other.token;
        max = top;
    }
    DEVICE_MEMBER void add_warp() {
        for (int m = 16; m; m >>= 1) add(Best{shuffle_xor(max, m), shuffle_xor(sum, m), shuffle_xor(token, m)});
    }
};

}  // namespace top

KERNEL(512, 1) argmax(const GRID_CONSTANT ArgmaxParams p) {
    begin_kernel();
    using top::Best;
    SHARED_BYTES(shared);
    Best* warps = (Best*)shared;                 // [32]
    uint32_t* flag = (uint32_t*)(warps + 32);
    const uint32_t pieces = grid_x(), row_index = block_y();
    const float* row = p.logits + (uint64_t)row_index * p.vocab;
    const uint32_t begin = (uint32_t)((uint64_t)p.vocab * block_x() / pieces);
    const uint32_t end = (uint32_t)((uint64_t)p.vocab * (block_x() + 1) / pieces);
    Best best = {NEGATIVE_INFINITY, 0, NONE};
    UNROLL_BY(4) for (uint32_t i = begin + thread_index(); i < end; i += block_threads()) {
        const float v = row[i];
        if (!(v < -NEGATIVE_INFINITY)) continue;
        if (v > best.max) {
            best.sum = best.sum * exp2_fast((best.max - v) * top::LOG2_E) + 1.0f;
            best.max = v;
            best.token = i;
        } else if (v > NEGATIVE_INFINITY) {
            best.sum += exp2_fast((v - best.max) * top::LOG2_E);
        }
    }
    best.add_warp();
    if (lane_index() == 0) warps[warp_index()] = best;
    sync_block();
    float* parts = p.parts + 3 * (uint64_t)(row_index * pieces);
    if (thread_index() == 0) {
        for (int w = 1; w < block_threads() / 32; w++) best.add(warps[w]);
        parts[3 * block_x()] = best.max;
        parts[3 * block_x() + 1] = best.sum;
        ((uint32_t*)parts)[3 * block_x() + 2] = best.token;
        fence_device();
        *flag = atomic_add(p.counters + row_index, 1);
    }
    sync_block();
    if (*flag != pieces - 1 || warp_index() > 0) return;
    fence_device();
    best = Best{NEGATIVE_INFINITY, 0, NONE};
    for (uint32_t i = lane_index(); i < pieces; i += 32)
        best.add(Best{parts[3 * i], parts[3 * i + 1], ((const uint32_t*)parts)[3 * i + 2]});
    best.add_warp();
    if (thread_index() == 0) {
        const bool broken = best.token == NONE;
        p.token[row_index] = broken ? 0 : best.token;
        p.logprob[row_index] = broken ? float_of_bits(0x7fc00000u) : -log2_fast(best.sum) * 0.693147181f;
        p.counters[row_index] = 0;
    }
}
