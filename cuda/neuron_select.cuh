// Which neurons a group of rows keeps: the largest of their scores. Exact: ties go to the lower index, NaN sorts last and
// is counted; lists are ascending.
#pragma once
#include "common.cuh"

namespace neurons {

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
template <int BINS_, int WARPS> DEVICE Found search(const uint32_t* histogram, uint32_t* sums, uint32_t wanted) {
    constexpr int EACH = BINS_ / WARPS / 32;
    const int lane = lane_index();
    auto bins = [&](uint32_t warp, uint32_t from) { return histogram + (warp * 32 + from) * EACH; };
    uint32_t own = 0;
    // In an order in which lanes meet on no bank.
    UNROLL for (int i = 0; i < EACH; i++) own += bins(warp_index(), lane)[(i + lane) % EACH];
    own = warp_add(own);
    if (lane == 0) sums[warp_index()] = own;
    sync_block();
    // Lane l has the warps' (then the bins') sums from the top: inclusive sums over the lanes below it.
    auto scan = [&](uint32_t v) {
        for (int m = 1; m < 32; m *= 2) {
            const uint32_t from = shuffle(v, (lane - m) & 31);
            if (lane >= m) v += from;
        }
        return v;
    };
    own = lane < WARPS ? sums[WARPS - 1 - lane] : 0;
    uint32_t upto = scan(own), hits = vote(upto >= wanted);
    if (!hits) return {0, wanted - shuffle(upto, 31), ~0u};
    int hit = lowest_bit(hits);
    const uint32_t before = shuffle(upto - own, hit), warp = WARPS - 1 - hit;
    const uint32_t* mine = bins(warp, 31 - lane);
    own = 0;
    UNROLL for (int i = 0; i < EACH; i++) own += mine[(i + lane) % EACH];
    upto = before + scan(own);
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

// Words of shared memory that `select_by_block` takes for n neurons.
DEVICE uint32_t select_words(uint32_t n) { return 2 * 32 + TOP_BINS + 2 * BINS + (n + 31) / 32 * 32; }

// Bins for `select_by_block`: numbers from 2^-16 to 2^16 by their exponent and seven bits of their fraction, larger ones in
// the last, smaller ones and zeros in bin 0. So fine that few threads meet in one, and few keys are left to divide.
constexpr uint32_t FIRST_KEY = (127 - 16) << 24, BIN_KEYS = 1 << 17;
DEVICE uint32_t fine_bin(uint32_t key) {
    const uint32_t bin = (key - FIRST_KEY) / BIN_KEYS;
    return key < FIRST_KEY ? 0 : bin < TOP_BINS - 2 ? bin + 1 : TOP_BINS - 1;
}

// Group 0's list and mask by one block of few threads, which has nothing else to do: as `select` in neurons.cu, with the
// scores in shared memory, where they become keys. A thread takes BATCH of them at a time, all loaded before the first is
// used. A rehearsal does the same with fewer neurons and scores of its own, and touches only shared memory.
template <int WARPS> DEVICE void select_by_block(const NeuronParams& p, unsigned char* shared, bool rehearsal) {
    constexpr uint32_t BATCH = 8, THREADS = 32 * WARPS;
    uint32_t* sums = (uint32_t*)shared;    // [32]
    uint32_t* kept = sums + 32;            // [32]
    uint32_t* top = kept + 32;             // [4096]
    uint32_t* middle = top + TOP_BINS;     // [2][1024]
    uint32_t* keys = middle + 2 * BINS;    // [n up to a multiple of 32]
    const uint32_t n = rehearsal && p.n > BATCH * THREADS ? BATCH * THREADS : p.n, keep = rehearsal ? (n + 1) / 2 : p.keep0;
    const uint32_t thread = thread_index(), lane = lane_index(), words = (n + 31) / 32;
    for (uint32_t i = 4 * thread; i < n; i += 4 * THREADS) {
        if (i + 4 <= n) copy_async16(keys + i, p.scores + i, !rehearsal);
        else for (uint32_t j = i; j < n; j++) keys[j] = rehearsal ? 0 : bits_of_float(p.scores[j]);
    }
    copy_commit();
    for (uint32_t i = thread; i < TOP_BINS + 2 * BINS; i += THREADS) top[i] = 0;
    copy_wait<0>();
    sync_block();
    auto batch = [&](uint32_t (&k)[BATCH], uint32_t first, uint32_t step, uint32_t end) {
        UNROLL for (uint32_t j = 0; j < BATCH; j++) k[j] = first + j * step < end ? keys[first + j * step] : 0;
    };
    uint32_t nans = 0;
    UNROLL_BY(1) for (uint32_t i = thread; i < 32 * words; i += BATCH * THREADS) {
        uint32_t k[BATCH];
        batch(k, i, THREADS, n);
        UNROLL for (uint32_t j = 0; j < BATCH; j++) {
            const uint32_t at = i + j * THREADS;
            if (rehearsal) k[j] = 0x3f800000u + (at * 0x9e3779b1u >> 6);  // from 1 to 16
            k[j] = at < n ? score_key(float_of_bits(k[j])) : 0;
            nans += k[j] == 1;
            if (at < 32 * words) keys[at] = k[j];
            k[j] = fine_bin(k[j]);
        }
        UNROLL for (uint32_t j = 0; j < BATCH; j++)
            if (k[j]) atomic_add(top + k[j], 1);
    }
    nans = warp_add(nans);
    if (nans && lane == 0) atomic_add(p.nan_count, nans);
    sync_block();
    Found found = search<TOP_BINS, WARPS>(top, sums, keep);
    // The threshold is among `span` keys from `low` on.
    const bool last = found.digit == TOP_BINS - 1;
    uint32_t low = found.digit ? FIRST_KEY + (found.digit - 1) * BIN_KEYS : 0;
    uint32_t span = !found.digit ? FIRST_KEY : last ? 0 - low : BIN_KEYS;
    int bits = found.digit && !last ? 17 : 31;  // that number them
    UNROLL_BY(1) for (int level = 0; bits && found.count != found.left; level++) {
        uint32_t* histogram = middle + level % 2 * BINS;
        if (level > 1) {
            for (uint32_t i = thread; i < BINS; i += THREADS) histogram[i] = 0;
            sync_block();
        }
        bits = bits > DIGIT ? bits - DIGIT : 0;
        UNROLL_BY(1) for (uint32_t i = thread; i < 32 * words; i += BATCH * THREADS) {
            uint32_t k[BATCH];
            batch(k, i, THREADS, 32 * words);
            UNROLL for (uint32_t j = 0; j < BATCH; j++) {
                const uint32_t at = k[j] - low, digit = at >> bits;
                if (at < span && digit) atomic_add(histogram + digit, 1);
            }
        }
        sync_block();
        found = search<BINS, WARPS>(histogram, sums, found.left);
        low += found.digit << bits;
        span = 1u << bits;
    }
    const bool whole_bin = found.count == found.left;
    const uint32_t threshold = whole_bin ? low - 1 : low, ties = whole_bin ? 0 : found.left;
    // A warp has so many words one after another.
    const uint32_t each = (words + WARPS - 1) / WARPS, first = warp_index() * each;
    const uint32_t end = first + each < words ? first + each : words;
    uint32_t mine = 0;
    UNROLL_BY(8) for (uint32_t word = first; word < end; word++) {
        const uint32_t k = keys[32 * word + lane];
        mine += (k > threshold) + ((uint32_t)(k == threshold) << 16);
    }
    mine = warp_add(mine);
    if (lane == 0) kept[warp_index()] = mine;
    sync_block();
    const uint32_t ahead = warp_add((int)lane < warp_index() ? kept[lane] : 0), below = (1u << lane) - 1;
    Keeper keeper = {threshold, ties, ahead & 0xffff, ahead >> 16};
    // Mostly all that stay are above the threshold.
    if (!ties) {
        UNROLL_BY(1) for (uint32_t word = first; word < end; word += BATCH) {
            uint32_t k[BATCH];
            batch(k, 32 * word + lane, 32, 32 * end);
            UNROLL for (uint32_t j = 0; j < BATCH; j++) {
                const uint32_t bits = vote(k[j] > threshold);
                if (k[j] > threshold && !rehearsal) p.index[keeper.above + count_bits(bits & below)] = 32 * (word + j) + lane;
                if (lane == 0 && word + j < end && !rehearsal) p.masks[word + j] = bits;
                keeper.above += count_bits(bits);
            }
        }
    } else UNROLL_BY(1) for (uint32_t word = first; word < end; word++) {
        uint32_t place;
        const uint32_t bits = keeper.word(keys[32 * word + lane], place);
        if (bits >> lane & 1 && !rehearsal) p.index[place] = 32 * word + lane;
        if (lane == 0 && !rehearsal) p.masks[word] = bits;
    }
    if (!rehearsal && thread < 8 && keep % 8 && thread >= keep % 8) p.index[keep / 8 * 8 + thread] = 0;
    sync_block();
}

}  // namespace neurons
