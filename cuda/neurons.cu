// Which neurons a decode step computes: the largest sums of positive router logits over a group of
// rows. Exact: ties go to the lower index, NaN sorts last and is counted; lists are ascending.
#include "neuron_select.cuh"

namespace neurons {

// scores[group][j] = sum over the group's rows of max(logit[row][j], 0); NaN stays NaN. For more rows
// than `router_scores` takes. Block (neurons, group) of 64 neurons by 4 quarters of the rows; logits are
// read once, from the L2.
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

constexpr int WARPS = 32;

// Block (piece, group): finds the group's `keep` best scores and writes its piece of the bit mask and, for
// group 0, of the list. Every piece finds the threshold by itself, which costs no time and no order between
// blocks. Radix select over keys that stay where they were read to (registers; shared memory for
// more than 32 EACH words of neurons): a histogram of the first digit, of the second among the
// keys that share the first, of the third only if the second leaves a choice. The zeros, often most of
// the keys, fall in bin 0 and cost nothing. Warp w owns neurons from 32 each w on, lane l every 32nd: loads,
// masks and list entries are whole lines.
// Shared memory: 2 x 32 sums, the three histograms, then n keys when EACH is 0.
template <int EACH> DEVICE void select(const NeuronParams& p) {
    SHARED_BYTES(shared);
    uint32_t* sums = (uint32_t*)shared;     // [32]
    uint32_t* kept = sums + WARPS;          // [32]
    uint32_t* top = kept + WARPS;           // [4096]
    uint32_t* middle = top + TOP_BINS;      // [2][1024]: of the second digit, of the third
    uint32_t* stored = middle + 2 * BINS;   // [n up to a multiple of 32]
    let_next_start();
    const uint32_t thread = thread_index(), lane = lane_index();
    for (uint32_t i = thread; i < TOP_BINS + 2 * BINS; i += 32 * WARPS) top[i] = 0;
    sync_block();
    wait_for_previous();
    const uint32_t group = p.first_group + block_y(), keep = group == 0 ? p.keep0 : p.keep_other;
    if (keep == NONE || (p.last_group && group > *p.last_group)) return;
    const uint32_t words = (p.n + 31) / 32, each = (words + WARPS - 1) / WARPS, first = warp_index() * each;
    const uint32_t rounds = EACH ? EACH : each;
    uint32_t held[EACH ? EACH : 1];
    auto inside = [&](uint32_t i) { return i < each && 32 * (first + i) + lane < p.n; };
    auto key = [&](uint32_t i) { return EACH ? held[EACH ? i : 0] : inside(i) ? stored[32 * (first + i) + lane] : 0; };

    const float* scores = p.scores + (uint64_t)block_y() * p.n;
    constexpr uint32_t AT_ONCE = EACH ? EACH : 8;  // loads before the first store to shared memory
    uint32_t nans = 0;
    for (uint32_t from = 0; from < rounds; from += AT_ONCE) {
        float v[AT_ONCE];
        UNROLL for (uint32_t i = 0; i < AT_ONCE; i++)
            v[i] = inside(from + i) ? scores[32 * (first + from + i) + lane] : 0.0f;
        UNROLL for (uint32_t i = 0; i < AT_ONCE; i++) {
            const uint32_t k = inside(from + i) ? score_key(v[i]) : 0;
            if (EACH) held[EACH ? i : 0] = k;
            else if (inside(from + i)) stored[32 * (first + from + i) + lane] = k;
            nans += k == 1;
            if (k >> 2 * DIGIT) atomic_add(top + (k >> 2 * DIGIT), 1);
        }
    }
    if (block_x() == 0) {
        nans = warp_add(nans);
        if (nans && lane == 0) atomic_add(p.nan_count, nans);
    }
    sync_block();
    Found found = search<TOP_BINS, WARPS>(top, sums, keep);
    uint32_t prefix = found.digit;
    int shift = 2 * DIGIT;
    // Keys whose first digits are `prefix`, by the next one.
    for (uint32_t* histogram = middle; shift && found.count != found.left; histogram += BINS) {
        UNROLL for (uint32_t i = 0; i < rounds; i++) {
            const uint32_t k = key(i), digit = k >> (shift - DIGIT) & (BINS - 1);
            if (k >> shift == prefix && digit) atomic_add(histogram + digit, 1);
        }
        sync_block();
        found = search<BINS, WARPS>(histogram, sums, found.left);
        prefix = prefix << DIGIT | found.digit;
        shift -= DIGIT;
    }
    // All above the threshold stay, and the first `ties` of those equal to it.
    const bool whole_bin = found.count == found.left;
    const uint32_t threshold = whole_bin ? (prefix << shift) - 1 : prefix, ties = whole_bin ? 0 : found.left;

    // Above and equal, packed: there are fewer than 65536 neurons.
    uint32_t mine = 0;
    UNROLL for (uint32_t i = 0; i < rounds; i++)
        mine += (key(i) > threshold) + ((uint32_t)(key(i) == threshold) << 16);
    mine = warp_add(mine);
    if (lane == 0) kept[warp_index()] = mine;
    sync_block();
    if ((uint32_t)warp_index() * grid_x() / WARPS != (uint32_t)block_x()) return;
    const uint32_t ahead = warp_add((int)lane < warp_index() ? kept[lane] : 0);
    Keeper keeper = {threshold, ties, ahead & 0xffff, ahead >> 16};
    uint32_t* mask = p.masks ? p.masks + (uint64_t)group * words : nullptr;
    uint32_t* list = group == 0 ? p.index : nullptr;
    UNROLL for (uint32_t i = 0; i < rounds; i++) {
        const uint32_t word = first + i;
        uint32_t place;
        const uint32_t bits = keeper.word(key(i), place);
        if (bits >> lane & 1 && list) list[place] = 32 * word + lane;
        if (lane == 0 && mask && i < each && word < words) mask[word] = bits;
    }
    if (list && thread < 8 && keep % 8 && thread >= keep % 8) list[keep / 8 * 8 + thread] = 0;
}

}  // namespace neurons

KERNEL(256, 1) neuron_scores(const GRID_CONSTANT NeuronParams p) { begin_kernel(); neurons::scores(p); }
// Up to 16384 neurons; any number that shared memory holds. Two blocks, 32 registers a thread, so that a block finds
// room beside three of a product's blocks instead of waiting until a multiprocessor is nearly empty.
KERNEL(1024, ROOMY_BLOCKS) select_neurons(const GRID_CONSTANT NeuronParams p) { neurons::select<16>(p); }
KERNEL(1024, ROOMY_BLOCKS) select_neurons_large(const GRID_CONSTANT NeuronParams p) { neurons::select<0>(p); }
