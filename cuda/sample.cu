// The most likely token of each row of logits and its log probability:
//   token = argmax (ties to the lower id, NaN never), logprob = -log sum exp(logit - max).
// One block per row reads its logits once (vocab * 4 bytes) with a running maximum and sum.
#include "common.cuh"

KERNEL(1024, 1) argmax(const GRID_CONSTANT ArgmaxParams p) {
    SHARED_BYTES(shared);
    float* maxima = (float*)shared;           // [32]
    float* sums = maxima + 32;                // [32]
    uint32_t* tokens = (uint32_t*)(sums + 32);  // [32]
    const float* row = p.logits + (uint64_t)block_x() * p.vocab;
    float best = NEGATIVE_INFINITY, sum = 0;
    uint32_t token = NONE;
    for (uint32_t i = thread_index(); i < p.vocab; i += block_threads()) {
        const float v = row[i];
        if (v > best) {
            sum = sum * exp2_fast((best - v) * 1.44269504f) + 1.0f;
            best = v;
            token = i;
        } else if (v > NEGATIVE_INFINITY) {
            sum += exp2_fast((v - best) * 1.44269504f);
        }
    }
    for (int round = 0; round < 2; round++) {
        for (int m = 16; m; m >>= 1) {
            const float other = shuffle_xor(best, m), other_sum = shuffle_xor(sum, m);
            const uint32_t other_token = shuffle_xor(token, m);
            const float top = fmaxf(best, other);
            if (top > NEGATIVE_INFINITY)
                sum = sum * exp2_fast((best - top) * 1.44269504f) + other_sum * exp2_fast((other - top) * 1.44269504f);
            if (other > best || (other == best && other_token < token)) token = other_token;
            best = top;
        }
        if (round == 1) break;
        if (lane_index() == 0) {
            maxima[warp_index()] = best;
            sums[warp_index()] = sum;
            tokens[warp_index()] = token;
        }
        sync_block();
        const bool there = lane_index() < block_threads() / 32;
        best = there ? maxima[lane_index()] : NEGATIVE_INFINITY;
        sum = there ? sums[lane_index()] : 0.0f;
        token = there ? tokens[lane_index()] : NONE;
    }
    if (thread_index() == 0) {
        const bool broken = token == NONE || !(best < float_of_bits(0x7f800000u));
        p.token[block_x()] = broken ? 0 : token;
        p.logprob[block_x()] = broken ? float_of_bits(0x7fc00000u) : -log2_fast(sum) * 0.693147181f;
    }
}
