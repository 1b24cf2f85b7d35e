// Which heads a sequence keeps, from its router logits, by one block. Exact: ties go to the lower index,
// NaN sorts last and is counted; the list is ascending.
#pragma once
#include "common.cuh"

namespace heads {

// Of sequence b. A unit's score is its logit, or the largest of its group's when the router has one row
// per query head. Its rank is the number of better units; it stays when the rank is below keep[b]. Rows
// of unselected heads in `attention` become zero. At least 256 threads, at most 256 units.
template <class T> DEVICE void select(const SelectParams& p, uint32_t b) {
    SHARED_BYTES(shared);
    const uint32_t unit = thread_index(), units = p.units, columns = units * p.per_unit, keep = p.keep[b];
    uint32_t* best = (uint32_t*)shared;  // [256] keys of the units
    uint32_t* kept = best + 256;         // [256]
    uint32_t* counts = kept + 256;       // [8] of the warps
    uint32_t* keys = counts + 8;         // [columns]
    for (uint32_t c = thread_index(); c < columns; c += block_threads()) {
        Floats<1> v[1];
        partial_sums<1, 1>(v, p.logits, p.rows, p.by_unit ? c : b, {p.by_unit ? b : c});
        if (p.bias) v[0].v[0] += to_float(((const T*)p.bias)[c]);
        keys[c] = sort_key(v[0].v[0]);
    }
    sync_block();
    uint32_t key = 0;
    if (unit < units) {
        for (uint32_t i = 0; i < p.per_unit; i++) {
            const uint32_t k = keys[unit * p.per_unit + i];
            key = k > key ? k : key;
        }
        best[unit] = key;
        if (key == 0 && keep && keep < units) atomic_add(p.nan_count, 1);
    }
    sync_block();
    bool stays = false;
    if (unit < units) {
        uint32_t rank = 0;
        for (uint32_t v = 0; v < units; v++) rank += best[v] > key || (best[v] == key && v < unit);
        stays = rank < keep;
        kept[unit] = stays;
    }
    const uint32_t bits = vote(stays);
    if (lane_index() == 0 && warp_index() < 8) counts[warp_index()] = count_bits(bits);
    sync_block();
    uint32_t place = count_bits(bits & ((1u << lane_index()) - 1));
    if (stays) {
        for (int w = 0; w < warp_index(); w++) place += counts[w];
        p.selected[b * units + place] = (uint16_t)unit;
    }
    Words4* row = (Words4*)((T*)p.attention + (uint64_t)b * units * p.unit_width);
    const uint32_t each = p.unit_width / 8;
    for (uint32_t i = thread_index(); i < units * each; i += block_threads())
        if (!kept[i / each]) row[i] = {{0, 0, 0, 0}};
}

}  // namespace heads
