// Which heads a decode step computes, from router logits. Exact: ties go to the lower
// index, NaN sorts last and is counted; lists are ascending.
#include "common.cuh"

namespace selection {

// Block b = sequence b, a thread per unit (at most 256). A unit's score is its logit, or the largest of
// its group's when the router has one row per query head. Its rank is the number of better units;
// it stays when the rank is below keep[b]. Rows of unselected heads in `attention` become zero.
template <class T> DEVICE void heads(const SelectParams& p) {
    SHARED_BYTES(shared);
    uint32_t* keys = (uint32_t*)shared;    // [256]
    uint32_t* kept = keys + 256;           // [8] warps' counts
    uint32_t* kept_flags = kept + 8;       // [256]
    const uint32_t b = block_x(), unit = thread_index(), units = p.units, keep = p.keep[b];
    uint32_t key = 0;
    if (unit < units) {
        const uint32_t each = p.logits.columns / units;
        for (uint32_t i = 0; i < each; i++) {
            const uint32_t column = unit * each + i;
            float v = partial_at(p.logits, p.rows, b, column);
            if (p.bias) v += to_float(((const T*)p.bias)[column]);
            const uint32_t k = sort_key(v);
            key = k > key ? k : key;
        }
        keys[unit] = key;
        if (key == 0 && keep < units) atomic_add(p.nan_count, 1);
    }
    sync_block();
    bool stays = false;
    if (unit < units) {
        uint32_t rank = 0;
        for (uint32_t v = 0; v < units; v++) rank += keys[v] > key || (keys[v] == key && v < unit);
        stays = rank < keep;
    }
    kept_flags[unit] = stays;
    const uint32_t bits = vote(stays);
    if (lane_index() == 0) kept[warp_index()] = count_bits(bits);
    sync_block();
    uint32_t place = count_bits(bits & ((1u << lane_index()) - 1));
    for (int w = 0; w < warp_index(); w++) place += kept[w];
    if (stays) p.selected[b * units + place] = (uint16_t)unit;
    T* row = (T*)p.attention + (uint64_t)b * units * p.unit_width;
    for (uint32_t i = thread_index(); i < units * p.unit_width; i += block_threads())
        if (!kept_flags[i / p.unit_width]) row[i] = T{0};
}

}  // namespace selection

KERNEL(256, 1) select_heads_bf16(const GRID_CONSTANT SelectParams p) { begin_kernel(); selection::heads<bf16>(p); }
KERNEL(256, 1) select_heads_f16(const GRID_CONSTANT SelectParams p) { begin_kernel(); selection::heads<f16>(p); }
