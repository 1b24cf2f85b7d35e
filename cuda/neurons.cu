// Which neurons a decode step computes: the largest sums of positive router logits over a group of
// rows. Exact: ties go to the lower index, NaN sorts last and is counted; lists are ascending.
#include "common.cuh"

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

// A key's three digits, high to low: exponent and four bits of the fraction in 12 bits, then twice DIGIT.
constexpr int DIGIT = 10;
constexpr int TOP_BINS = 4096, BINS = 1024;

// Sorts as the scores do, which are never negative; NaN 1, zero 2, infinity 0xff000002. 0 is what is no neuron.
DEVICE uint32_t score_key(float v) { return v > 0 ? 2 * bits_of_float(v) + 2 : 1 + (v == v); }

struct Found {
    uint32_t digit;
    uint32_t left;   // still wanted in that bin
    uint32_t count;  // in that bin
};

// From the top, the bin in which `wanted` falls. Bin 0 is not counted and stands for all the rest. Every
// warp sums its share of the bins, then all of them search: one barrier, no broadcast.
template <int BINS_> DEVICE Found search(const uint32_t* histogram, uint32_t* sums, uint32_t wanted) {
    constexpr int EACH = BINS_ / WARPS / 32;
    const int lane = lane_index();
    auto bins = [&](uint32_t warp, uint32_t from) { return histogram + (warp * 32 + from) * EACH; };
    uint32_t own = 0;
    // In an order in which lanes meet on no bank.
    UNROLL for (int i = 0; i < EACH; i++) own += bins(warp_index(), lane)[(i + lane) % EACH];
    own = warp_add(own);
    if (lane == 0) sums[warp_index()] = own;
    sync_block();
    // Lane l has the warps' (then the bins') sums from the top.
    own = sums[WARPS - 1 - lane];
    uint32_t upto = warp_upto(own), hits = vote(upto >= wanted);
    if (!hits) return {0, wanted - shuffle(upto, 31), ~0u};
    int hit = lowest_bit(hits);
    const uint32_t before = shuffle(upto - own, hit), warp = WARPS - 1 - hit;
    const uint32_t* mine = bins(warp, 31 - lane);
    own = 0;
    UNROLL for (int i = 0; i < EACH; i++) own += mine[(i + lane) % EACH];
    upto = before + warp_upto(own);
    hit = lowest_bit(vote(upto >= wanted));
    uint32_t left = wanted - (upto - own), place = EACH - 1;
    if (lane == hit)
        while (mine[place] < left) left -= mine[place--];
    const uint32_t count = shuffle(lane == hit ? mine[place] : 0, hit);
    return {(warp * 32 + 31 - hit) * EACH + shuffle(place, hit), shuffle(left, hit), count};
}

// Goes through words of keys in ascending order: all above the threshold stay, and the first `ties` of those equal to it.
struct Keeper {
    uint32_t threshold, ties;
    uint32_t above, equal;  // so many of those so far

    // Which of a word's keys stay, a lane's each; and this lane's place in the list if it does.
    DEVICE_MEMBER uint32_t word(uint32_t key, uint32_t& place) {
        const uint32_t lane = lane_index(), below = (1u << lane) - 1;
        const uint32_t more = vote(key > threshold), same = vote(key == threshold);
        const bool stays = more >> lane & 1 || (same >> lane & 1 && equal + count_bits(same & below) < ties);
        const uint32_t bits = vote(stays);
        place = above + (equal < ties ? equal : ties) + count_bits(bits & below);
        above += count_bits(more);
        equal += count_bits(same);
        return bits;
    }
};

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
    Found found = search<TOP_BINS>(top, sums, keep);
    uint32_t prefix = found.digit;
    int shift = 2 * DIGIT;
    // Keys whose first digits are `prefix`, by the next one.
    for (uint32_t* histogram = middle; shift && found.count != found.left; histogram += BINS) {
        UNROLL for (uint32_t i = 0; i < rounds; i++) {
            const uint32_t k = key(i), digit = k >> (shift - DIGIT) & (BINS - 1);
            if (k >> shift == prefix && digit) atomic_add(histogram + digit, 1);
        }
        sync_block();
        found = search<BINS>(histogram, sums, found.left);
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
