// Which heads a sequence keeps, from its router logits, by one block. Exact: ties go to the lower index,
// NaN sorts last and is counted; the list is ascending.
#pragma once
#include "common.cuh"

namespace heads {

constexpr uint32_t MOST_UNITS = 256;
// Words of shared memory for a router of so many columns.
constexpr uint32_t BEST = 0, KEPT = BEST + MOST_UNITS, COUNTS = KEPT + MOST_UNITS, KEYS = COUNTS + 8;

// How many of the first 256 threads are ahead of this one and say yes. A block barrier is in it; `counts` [8] are free again
// behind the next one.
DEVICE uint32_t place(bool yes, uint32_t* counts) {
    const uint32_t bits = vote(yes);
    if (lane_index() == 0 && warp_index() < 8) counts[warp_index()] = count_bits(bits);
    sync_block();
    uint32_t ahead = count_bits(bits & ((1u << lane_index()) - 1));
    if (yes)
        for (int w = 0; w < warp_index(); w++) ahead += counts[w];
    return ahead;
}

// How many of them do, before that barrier.
DEVICE uint32_t all(const uint32_t* counts) {
    uint32_t n = 0;
    for (int w = 0; w < 8; w++) n += counts[w];
    return n;
}

// Whether sequence b keeps the unit whose number is this thread's. A unit's score is its logit, or the largest of its
// group's when the router has one row per query head. Its rank is the number of better units; it stays when the rank is
// below keep[b]. At least 256 threads, at most 256 units. `counts`: NaN.
template <class T> DEVICE bool stays(const SelectParams& p, uint32_t b, uint32_t* shared, bool counts) {
    const uint32_t unit = thread_index(), units = p.units, columns = units * p.per_unit, keep = p.keep[b];
    uint32_t *best = shared + BEST, *keys = shared + KEYS;
    for (uint32_t c = thread_index(); c < columns; c += block_threads()) {
        const float bias = p.bias ? to_float(((const T*)p.bias)[c]) : 0.0f;
        Floats<1> v[1];
        partial_sums<1, 1>(v, p.logits, p.rows, p.by_unit ? c : b, {p.by_unit ? b : c});
        keys[c] = sort_key(v[0].v[0] + bias);
    }
    sync_block();
    uint32_t key = 0;
    if (unit < units) {
        for (uint32_t i = 0; i < p.per_unit; i++) {
            const uint32_t k = keys[unit * p.per_unit + i];
            key = k > key ? k : key;
        }
        best[unit] = key;
        if (counts && key == 0 && keep && keep < units) atomic_add(p.nan_count, 1);
    }
    sync_block();
    bool yes = false;
    if (unit < units) {
        uint32_t rank = 0;
        for (uint32_t v = 0; v < units; v++) rank += best[v] > key || (best[v] == key && v < unit);
        yes = rank < keep;
    }
    return yes;
}

// The list of sequence b; and rows of unselected heads in `attention` become zero.
template <class T> DEVICE void select(const SelectParams& p, uint32_t b) {
    SHARED_BYTES(bytes);
    uint32_t *shared = (uint32_t*)bytes, *kept = shared + KEPT;
    const uint32_t unit = thread_index(), units = p.units;
    const bool yes = stays<T>(p, b, shared, true);
    if (unit < units) kept[unit] = yes;
    const uint32_t at = place(yes, shared + COUNTS);
    if (yes) p.selected[b * units + at] = (uint16_t)unit;
    Words4* row = (Words4*)((T*)p.attention + (uint64_t)b * units * p.unit_width);
    const uint32_t each = p.unit_width / 8;
    for (uint32_t i = thread_index(); i < units * each; i += block_threads())
        if (!kept[i / each]) row[i] = {{0, 0, 0, 0}};
}

}  // namespace heads
