// Which neurons a group of rows keeps, chosen by one block of few threads, with which a list of thousands has to be ready soon:
// decode attention's last block. The largest of their scores; exact: ties go to the lower index, NaN sorts last and is counted;
// lists are ascending.
//
// What costs it least is to look at all scores again, compared and counted as numbers, which a multiprocessor does at twice
// the rate of whole ones: a sample says where the threshold may lie, two or three looks how many scores are above places
// around it, and the last LEFT between two places are compared with each other.
//
// Its instructions come from afar, and while pages are read each line of eight may take microseconds. So they are fetched in a
// rehearsal, before there are scores: every warp does a stage of its own, with a few numbers of its own, at the same time.
#pragma once
#include "common.cuh"

namespace neurons {

// Of 32 values at `from` the bits of those above `low` and not above `high`.
DEVICE_CALL uint32_t bits_between(const float* from, float low, float high) {
    uint32_t y = 0;
    UNROLL for (uint32_t i = 0; i < 32; i += 4) {
        const Floats4 v = *(const Floats4*)(from + i);
        UNROLL for (int j = 0; j < 4; j++)
            if (v.v[j] > low && v.v[j] <= high) y |= 1u << (i + j);
    }
    return y;
}

constexpr uint32_t LEFT = 128;
// Of LEFT numbers, WAYS threads have the same one: how many of them are larger, and how many are as large or larger.
template <uint32_t WAYS> DEVICE_CALL Words2 rank(const float* list) {
    const float own = list[thread_index() / WAYS];
    float larger[2] = {0, 0}, as_large[2] = {0, 0};
    UNROLL_BY(1) for (uint32_t i = 4 * (thread_index() % WAYS); i < LEFT; i += 16 * WAYS) {
        UNROLL for (uint32_t k = 0; k < 4; k++) {
            const Floats4 v = *(const Floats4*)(list + i + 4 * k * WAYS);
            UNROLL for (int j = 0; j < 4; j++) {
                if (v.v[j] > own) larger[j % 2] += 1;
                if (v.v[j] >= own) as_large[j % 2] += 1;
            }
        }
    }
    float sum[2] = {larger[0] + larger[1], as_large[0] + as_large[1]};
    if (WAYS == 2) UNROLL for (int i = 0; i < 2; i++) sum[i] += shuffle_xor(sum[i], 1);
    return {{(uint32_t)sum[0], (uint32_t)sum[1]}};
}

// What it takes of NeuronParams, by value: a called function that has a pointer to them would load them.
struct ChoiceParams {
    const float* scores;
    uint32_t *index, *masks, *nan_count;
    uint32_t n, keep;
};

template <int WARPS> struct Choice {
    static constexpr uint32_t THREADS = 32 * WARPS, CUTS = 3, WAYS = THREADS / LEFT;
    static_assert(WAYS == 1 || WAYS == 2, "");
    // Words of shared memory ahead of the values; and of what a warp's rehearsal uses, with 32 values a thread.
    static constexpr uint32_t HEAD = LEFT + 2 * 2 * 32 + 2 * 32 + 32, REHEARSED = HEAD + 32 * (32 + 4) + 32;
    // Places in `found`; the first are for CUTS.
    static constexpr uint32_t LISTED = CUTS, THRESHOLD = CUTS + 1, TIES = CUTS + 2;
    // A barrier stands behind each.
    enum Stage : uint32_t { LOAD, SAMPLE, GUESS, NARROW, COLLECT, COMPARE, MASK, LIST, STAGES };

    const ChoiceParams p;
    const bool rehearsal;
    const uint32_t n, keep;
    // A thread has so many neurons one after another, a multiple of 32, four words ahead of the next thread's: so lanes that
    // load four of theirs meet on no bank.
    const uint32_t each;
    const uint32_t lane = lane_index(), thread;

    float* const list;      // [LEFT] a sample, then what is left
    Words2* const counts;   // [2][32], in turn
    uint32_t* const sums;   // [2][32]
    uint32_t* const found;  // [32] zeros, until threads that have found something or it in: all of them the same
    float* const values;    // [THREADS][each + 4], in whose place then the list of neurons
    float* const mine;
    uint32_t* const words;  // [2][each / 32][THREADS] of the mask; of those equal to the threshold

    // At least `keep` scores are above `low`, fewer above `high`. Scores are not negative; NaN stands as -1, and what is no
    // neuron as -2.
    float low = -2, high = -NEGATIVE_INFINITY;
    uint32_t above_low, above_high = 0;
    float cut[CUTS] = {0, 0, 0};
    // Of the thread's own: those above `low`, above `high`, and above each cut at the last of so many looks.
    uint32_t own_low, own_high = 0, own[CUTS] = {0, 0, 0}, looks = 0;
    bool equal_parts = false;
    uint32_t ahead = 0;  // kept by the lanes below

    // Bytes of shared memory: `choice_bytes` in launch.rs.
    DEVICE_MEMBER Choice(const ChoiceParams& p, float* shared, bool rehearsal)
        : p(p), rehearsal(rehearsal), n(rehearsal ? 32 * 32 : p.n), keep(rehearsal ? n : p.keep),
          each((n + 32 * THREADS - 1) / (32 * THREADS) * 32), thread(rehearsal ? lane : thread_index()),
          list(shared), counts((Words2*)(list + LEFT)), sums((uint32_t*)(counts + 2 * 32)), found(sums + 2 * 32),
          values((float*)(found + 32)), mine(values + thread * (each + 4)),
          words((uint32_t*)(values + (rehearsal ? 32 : THREADS) * (each + 4))), above_low(n) {
        own_low = thread * each >= n ? 0 : n - thread * each < each ? n - thread * each : each;
    }

    // The stages one after another, NARROW until the threshold is known; in a rehearsal each by another warp.
    DEVICE_MEMBER void run() {
        uint32_t stage = rehearsal ? warp_index() : LOAD;
        do {
            if (stage == LOAD) load();
            if (stage == SAMPLE) sample();
            if (stage == GUESS) guess();
            if (stage == NARROW) {
                decide();
                if (rehearsal || open()) look();
                else stage = above_low != keep && left() <= LEFT ? COLLECT : MASK;
            }
            if (stage == COLLECT) collect();
            if (stage == COMPARE) compare();
            if (stage == MASK) mask();
            if (stage == LIST) write_list();
            sync_block();
            if (rehearsal) stage += WARPS;
            else if (stage != NARROW) stage++;
        } while (stage < STAGES);
        uint32_t* to = rehearsal ? (uint32_t*)values : p.index;
        UNROLL_BY(1) for (uint32_t i = 4 * thread; i < end(); i += 4 * THREADS)
            *(Words4*)(to + i) = *(const Words4*)(values + i);
        sync_block();
    }

    // Ahead of a rehearsal: zeros, and a one for each thread.
    DEVICE_MEMBER void prepare() {
        UNROLL_BY(1) for (uint32_t i = lane; i < REHEARSED; i += 32) list[i] = 0;
        sync_warp();
        mine[lane] = 1;
        low = .5f, high = 1, equal_parts = true, own_low = 1;
        sync_warp();
    }

    DEVICE_MEMBER uint32_t end() { return (keep + 7) / 8 * 8; }
    DEVICE_MEMBER uint32_t left() { return above_low - above_high; }
    // The next smaller number, of those that scores may be or stand for.
    DEVICE_MEMBER static float below(float v) { return v > 0 ? float_of_bits(bits_of_float(v) - 1) : v - 1; }
    // Whether the threshold is still to be narrowed down.
    DEVICE_MEMBER bool open() { return above_low != keep && left() > LEFT && below(high) > low; }

    DEVICE_MEMBER void load() {
        const uint32_t part = ~0u / each + 1;  // 2^32 / each, rounded up
        auto place = [&](uint32_t i) { return values + i + 4 * (uint32_t)((uint64_t)i * part >> 32); };
        UNROLL_BY(1) for (uint32_t i = 4 * thread; i + 4 <= n; i += 4 * THREADS)
            copy_async16(place(i), p.scores + i, !rehearsal);
        copy_commit();
        UNROLL_BY(1) for (uint32_t i = n / 4 * 4 + thread; i < THREADS * each && !rehearsal; i += THREADS)
            *(place(i / 4 * 4) + i % 4) = i >= n ? -2.0f : p.scores[i];
        if (thread < 32) found[thread] = 0;
        copy_wait<0>();
    }

    // One of the thread's own, of which none is NaN from here on.
    DEVICE_MEMBER void sample() {
        float sum = 0;
        UNROLL_BY(1) for (uint32_t i = 0; i < each; i += 16) {
            UNROLL for (uint32_t k = 0; k < 16; k += 4) {
                const Floats4 v = *(const Floats4*)(mine + i + k);
                sum += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]);
            }
        }
        if (sum != sum) {
            uint32_t nans = 0;
            UNROLL_BY(1) for (uint32_t i = 0; i < each; i++) {
                if (mine[i] == mine[i]) continue;
                mine[i] = -1;
                nans++;
            }
            atomic_add(p.nan_count, nans);
        }
        if (thread % WAYS == 0) list[thread / WAYS] = mine[5 * thread % 32];
    }

    // The sample's numbers at the rank that the threshold has among all scores, and nine ranks to either side: at least 1.6
    // standard deviations.
    DEVICE_MEMBER void guess() {
        const Words2 r = rank<WAYS>(list);
        const int likely = (int)((float)(LEFT * keep) * reciprocal_fast((float)(THREADS * each)));
        UNROLL for (int c = 0; c < (int)CUTS; c++) {
            int wanted = likely + 9 * (c - 1);
            wanted = wanted < 0 ? 0 : wanted;
            if ((int)r.w[0] <= wanted && wanted < (int)r.w[1]) atomic_or(found + c, bits_of_float(list[thread / WAYS]));
        }
    }

    // By what the last look has found, where to look next.
    DEVICE_MEMBER void decide() {
        if (!looks && !rehearsal) {
            UNROLL for (uint32_t c = 0; c < CUTS; c++) cut[c] = float_of_bits(found[c]);
            return;
        }
        Words2 all = {{0, 0}};
        if (lane < WARPS) all = counts[32 * (looks % 2) + lane];
        all = {{warp_add(all.w[0]), warp_add(all.w[1])}};
        const uint32_t sum[CUTS] = {all.w[0] & 0xffff, all.w[0] >> 16, all.w[1]}, before = left();
        UNROLL for (uint32_t c = 0; c < CUTS; c++) {
            if (sum[c] >= keep && cut[c] > low) low = cut[c], above_low = sum[c], own_low = own[c];
            if (sum[c] < keep && cut[c] < high) high = cut[c], above_high = sum[c], own_high = own[c];
        }
        // Where the threshold would be, were those between spread evenly, with what is left around it; in equal parts of all
        // numbers if that has just brought little.
        equal_parts = !equal_parts && left() > before / 4;
        const float floor = low > 0 ? low : 0.0f;
        if (equal_parts) {
            const uint32_t from = bits_of_float(floor), to = bits_of_float(high), part = (to - from) / 4;
            cut[0] = float_of_bits(from + part);
            cut[1] = float_of_bits(from + 2 * part);
            cut[2] = float_of_bits(to - 1 - part);
        } else {
            const float step = (high - floor) * reciprocal_fast((float)left()), margin = (float)(left() / 64 + 80);
            const float likely = (float)(above_low - keep);
            UNROLL for (int c = 0; c < (int)CUTS; c++) cut[c] = floor + step * (likely + margin * (float)(c - 1));
        }
        if (low < 0) cut[0] = low + 1;
    }

    // How many scores are above each cut.
    DEVICE_MEMBER void look() {
        float count[CUTS][2];
        UNROLL for (uint32_t c = 0; c < CUTS; c++) count[c][0] = count[c][1] = 0;
        UNROLL_BY(1) for (uint32_t i = 0; i < each; i += 16) {
            UNROLL for (uint32_t k = 0; k < 16; k += 4) {
                const Floats4 v = *(const Floats4*)(mine + i + k);
                UNROLL for (uint32_t c = 0; c < CUTS; c++) {
                    UNROLL for (int j = 0; j < 4; j++)
                        if (v.v[j] > cut[c]) count[c][j % 2] += 1;
                }
            }
        }
        // Two in a word: there are fewer than 65536 neurons.
        UNROLL for (uint32_t c = 0; c < CUTS; c++) own[c] = (uint32_t)(count[c][0] + count[c][1]);
        const Words2 all = {{warp_add(own[0] + (own[1] << 16)), warp_add(own[2])}};
        looks++;
        if (lane == 0) counts[32 * (looks % 2) + warp_index()] = all;
    }

    // The few that are left between `low` and `high`.
    DEVICE_MEMBER void collect() {
        const uint32_t count = own_low - own_high, all = warp_upto(count);
        uint32_t first = 0;
        if (lane == 31) first = atomic_add(found + LISTED, all);
        float* to = list + shuffle(first, 31) + all - count;
        UNROLL_BY(1) for (uint32_t from = 0; from < each; from += 32) {
            uint32_t rest = bits_between(mine + from, low, high);
            UNROLL_BY(1) for (; rest; rest &= rest - 1) *to++ = mine[from + lowest_bit(rest)];
        }
        if (thread >= left() && thread < LEFT) list[thread] = -3;
    }

    // The threshold is one of them. All above it stay, and so many of those equal to it.
    DEVICE_MEMBER void compare() {
        const Words2 r = rank<WAYS>(list);
        const uint32_t wanted = keep - above_high;
        if (wanted <= r.w[0] || r.w[1] < wanted) return;
        const float own = list[thread / WAYS];
        const bool all = wanted == r.w[1];
        atomic_or(found + THRESHOLD, bits_of_float(all ? below(own) : own));
        atomic_or(found + TIES, all ? 0 : wanted - r.w[0]);
    }

    DEVICE_MEMBER uint32_t of_warps_below(const uint32_t* sums) {
        return warp_add((int)lane < warp_index() ? sums[lane] : 0);
    }

    // The mask of those that stay.
    DEVICE_MEMBER void mask() {
        float threshold = low;
        uint32_t ties = 0;
        if (above_low != keep) {
            const bool compared = left() <= LEFT;
            threshold = compared ? float_of_bits(found[THRESHOLD]) : high;
            ties = compared ? found[TIES] : keep - above_high;
        }
        uint32_t* equal = words + THREADS * each / 32;
        if (ties) {
            uint32_t count = 0;
            UNROLL_BY(1) for (uint32_t from = 0; from < each; from += 32) {
                const uint32_t word = bits_between(mine + from, below(threshold), threshold);
                equal[from / 32 * THREADS + thread] = word;
                count += count_bits(word);
            }
            const uint32_t all = warp_upto(count);
            if (lane == 31) sums[32 + warp_index()] = all;
            sync_block();
            const uint32_t earlier = of_warps_below(sums + 32) + all - count;
            ties = earlier < ties ? ties - earlier : 0;
        }
        uint32_t kept = 0, *to = rehearsal ? words : p.masks;
        UNROLL_BY(1) for (uint32_t from = 0; from < each; from += 32) {
            const uint32_t at = from / 32 * THREADS + thread, i = thread * each + from;
            uint32_t word = bits_between(mine + from, threshold, -NEGATIVE_INFINITY);
            uint32_t rest = ties ? equal[at] : 0;
            UNROLL_BY(1) for (; rest && ties; rest &= rest - 1, ties--) word |= rest & (0 - rest);
            kept += count_bits(word);
            words[at] = word;
            if (i < n) to[i / 32] = word;
        }
        const uint32_t all = warp_upto(kept);
        if (lane == 31) sums[warp_index()] = all;
        ahead = all - kept;
    }

    // Their list, in place of the scores.
    DEVICE_MEMBER void write_list() {
        uint32_t* to = (uint32_t*)values + of_warps_below(sums) + ahead;
        UNROLL_BY(1) for (uint32_t from = 0; from < each; from += 32) {
            uint32_t word = words[from / 32 * THREADS + thread], i = thread * each + from;
            UNROLL_BY(1) for (uint32_t k = 0; k < 32; k += 16, i += 16, word >>= 16) {
                UNROLL for (uint32_t j = 0; j < 16; j++)
                    if (word >> j & 1) *to++ = i + j;
            }
        }
        if (thread < end() - keep) ((uint32_t*)values)[keep + thread] = 0;
    }
};

// Called, not part of its caller, where the compiler would be short of registers.
template <int WARPS> DEVICE_CALL void choose(const ChoiceParams p, float* shared, bool rehearsal) {
    using Block = Choice<WARPS>;
    Block block(p, shared + (rehearsal ? warp_index() * Block::REHEARSED : 0), rehearsal);
    if (rehearsal) block.prepare();
    block.run();
}

// Group 0's list and mask, as `select` in neurons.cu makes them, with the scores in shared memory.
template <int WARPS> DEVICE void select_by_block(const NeuronParams& p, unsigned char* shared, bool rehearsal) {
    choose<WARPS>({p.scores, p.index, p.masks, p.nan_count, p.n, p.keep0}, (float*)shared, rehearsal);
}

}  // namespace neurons
