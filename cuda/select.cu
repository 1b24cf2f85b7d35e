// Which neurons (and, as a kernel of its own, which heads) a decode step computes, from router logits.
// Exact: ties go to the lower index, NaN sorts last and is counted; lists are ascending.
#include "heads.cuh"

namespace selection {

// scores[group][j] = sum over the group's rows of max(logit[row][j], 0); NaN stays NaN.
// Block (neurons, group) of 64 neurons by 4 quarters of the rows; logits are read once, from the L2.
DEVICE void scores(const NeuronParams& p) {
    SHARED_BYTES(shared);
    float* quarters = (float*)shared;  // [4][64]
    const uint32_t place = thread_index() % 64, quarter = thread_index() / 64;
    const uint32_t j = block_x() * 64 + place, group = p.first_group + block_y();
    if (p.last_group && group > *p.last_group) return;
    float score = 0;
    if (j < p.n) {
        UNROLL_BY(4) for (uint32_t r = quarter; r < p.rows; r += 4) {
            const float v = p.group[r] == group ? partial_at(p.logits, p.rows, r, j) : 0.0f;
            score += v < 0 ? 0.0f : v;
        }
    }
    quarters[thread_index()] = score;
    sync_block();
    if (quarter == 0 && j < p.n)
        p.scores[(uint64_t)block_y() * p.n + j] =
            quarters[place] + quarters[64 + place] + quarters[128 + place] + quarters[192 + place];
}

// Block = group: its `keep` best scores become a bit mask and, for group 0, a list. Radix select: the
// threshold key is found 8 bits at a time from histograms in shared memory (a warp's two commonest digits
// are counted at once: most scores are zero and exponents are few), then an ordered pass writes what is
// above it and the first of those equal to it. Shared memory: n + 256 + n / 16 + 2 words.
DEVICE void neurons(const NeuronParams& p) {
    SHARED_BYTES(shared);
    uint32_t* keys = (uint32_t*)shared;          // [n]
    uint32_t* histogram = keys + p.n;            // [256]
    const uint32_t words = (p.n + 31) / 32;
    uint32_t* counts = histogram + 256;          // [words] above the threshold, then before the word
    uint32_t* equals = counts + words;
    uint32_t* found = equals + words;            // [2] threshold prefix, still wanted
    const uint32_t group = p.first_group + block_x(), thread = thread_index(), threads = block_threads();
    const uint32_t keep = group == 0 ? p.keep0 : p.keep_other;
    if (keep == NONE || (p.last_group && group > *p.last_group)) return;

    uint32_t nans = 0;
    const float* scores = p.scores + (uint64_t)block_x() * p.n;
    for (uint32_t j0 = thread; j0 < p.n; j0 += 8 * threads) {
        float v[8];  // loads first: stores to shared memory in between would serialise them
        UNROLL for (int i = 0; i < 8; i++) v[i] = j0 + i * threads < p.n ? scores[j0 + i * threads] : 0.0f;
        UNROLL for (int i = 0; i < 8; i++) {
            if (j0 + i * threads >= p.n) continue;
            const uint32_t key = sort_key(v[i]);
            keys[j0 + i * threads] = key;
            nans += key == 0;
        }
    }
    if (nans) atomic_add(p.nan_count, nans);
    if (thread == 0) {
        found[0] = 0;
        found[1] = keep;
    }
    const uint32_t rounds = (p.n + threads - 1) / threads;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (thread < 256) histogram[thread] = 0;
        sync_block();
        const uint32_t prefix = found[0], above_mask = shift == 24 ? 0 : ~0u << (shift + 8);
        for (uint32_t round = 0; round < rounds; round++) {
            const uint32_t j = round * threads + thread;
            const bool counted = j < p.n && (keys[j] & above_mask) == prefix;
            if (!vote(counted)) continue;
            const uint32_t digit = keys[j < p.n ? j : 0] >> shift & 255;
            bool left = counted;
            for (int i = 0; i < 2; i++) {
                const uint32_t waiting = vote(left);
                const int leader = waiting ? lowest_bit(waiting) : 0;
                const uint32_t common = shuffle(digit, leader), same = vote(left && digit == common);
                if (same && lane_index() == leader) atomic_add(histogram + common, count_bits(same));
                left = left && digit != common;
            }
            if (left) atomic_add(histogram + digit, 1);
        }
        sync_block();
        // Lane l of warp 0 owns digits 8 l .. 8 l + 7; sums from the top tell where `wanted` falls.
        if (thread < 32) {
            uint32_t own = 0;
            for (int i = 0; i < 8; i++) own += histogram[8 * thread + i];
            uint32_t higher = own;  // inclusive sum over this lane and those above
            for (int m = 1; m < 32; m *= 2) {
                const uint32_t from = shuffle(higher, (lane_index() + m) & 31);
                if (lane_index() + m < 32) higher += from;
            }
            const uint32_t wanted = found[1];
            uint32_t left = wanted - (higher - own);
            sync_warp();
            if (higher >= wanted && higher - own < wanted) {
                int digit = 7;
                while (histogram[8 * thread + digit] < left) left -= histogram[8 * thread + digit--];
                found[0] = prefix | (8 * thread + digit) << shift;
                found[1] = left;
            }
        }
        sync_block();
    }
    // A warp per word of the mask, a lane per bit. First how many of each word stay for sure and may stay.
    const uint32_t threshold = found[0], equal_wanted = found[1], below = (1u << lane_index()) - 1;
    for (uint32_t w = warp_index(); w < words; w += threads / 32) {
        const uint32_t j = 32 * w + lane_index();
        const uint32_t above = vote(j < p.n && keys[j] > threshold), equal = vote(j < p.n && keys[j] == threshold);
        if (lane_index() == 0) {
            counts[w] = count_bits(above);
            equals[w] = count_bits(equal);
        }
    }
    sync_block();
    // Both become sums over the words before: a thread owns `each` words, then a warp, then the block.
    {
        const uint32_t each = (words + threads - 1) / threads, begin = thread * each < words ? thread * each : words;
        const uint32_t end = begin + each < words ? begin + each : words;
        uint32_t above = 0, equal = 0;
        for (uint32_t w = begin; w < end; w++) {
            above += counts[w];
            equal += equals[w];
        }
        uint32_t above_sum = above, equal_sum = equal;
        for (int m = 1; m < 32; m *= 2) {
            const uint32_t a = shuffle(above_sum, (lane_index() - m) & 31), e = shuffle(equal_sum, (lane_index() - m) & 31);
            if (lane_index() >= m) {
                above_sum += a;
                equal_sum += e;
            }
        }
        if (lane_index() == 31) {
            histogram[warp_index()] = above_sum;
            histogram[32 + warp_index()] = equal_sum;
        }
        sync_block();
        above = above_sum - above;
        equal = equal_sum - equal;
        for (int w = 0; w < warp_index(); w++) {
            above += histogram[w];
            equal += histogram[32 + w];
        }
        for (uint32_t w = begin; w < end; w++) {
            const uint32_t a = counts[w], e = equals[w];
            counts[w] = above;
            equals[w] = equal;
            above += a;
            equal += e;
        }
    }
    sync_block();
    for (uint32_t w = warp_index(); w < words; w += threads / 32) {
        const uint32_t j = 32 * w + lane_index(), key = j < p.n ? keys[j] : 0;
        const uint32_t equal = vote(j < p.n && key == threshold);
        const bool stays = j < p.n && (key > threshold ||
                                       (key == threshold && equals[w] + count_bits(equal & below) < equal_wanted));
        const uint32_t mask = vote(stays);
        const uint32_t place = counts[w] + (equals[w] < equal_wanted ? equals[w] : equal_wanted) + count_bits(mask & below);
        if (stays && p.index && group == 0) p.index[place] = j;
        if (lane_index() == 0 && p.masks) p.masks[(uint64_t)group * words + w] = mask;
    }
    if (p.index && group == 0 && thread < 8 && keep % 8 && thread >= keep % 8) p.index[keep / 8 * 8 + thread] = 0;
}

}  // namespace selection

KERNEL(256, 1) select_heads_bf16(const GRID_CONSTANT SelectParams p) { begin_kernel(); heads::select<bf16>(p, block_x()); }
KERNEL(256, 1) select_heads_f16(const GRID_CONSTANT SelectParams p) { begin_kernel(); heads::select<f16>(p, block_x()); }
KERNEL(256, 1) neuron_scores(const GRID_CONSTANT NeuronParams p) { begin_kernel(); selection::scores(p); }
KERNEL(1024, 1) select_neurons(const GRID_CONSTANT NeuronParams p) { begin_kernel(); selection::neurons(p); }
