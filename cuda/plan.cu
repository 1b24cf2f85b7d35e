// Operator level: hosts with their own pages bring a block table and lengths. One small kernel per step
// turns them into the tables that decode attention reads, for all layers; another fills in the zeros
// that it leaves out. Latency-bound: a few words per sequence.
#include "common.cuh"

namespace plan {

constexpr int THREADS = 256;

// Block 0 plans, 256 sequences at a time; the others only help to zero the merge counters.
DEVICE void attention(const PlanParams& p) {
    SHARED_BYTES(shared);
    uint32_t* sums = (uint32_t*)shared;  // [8] warps' costs
    const uint32_t thread = thread_index(), counters = p.sequences * p.kv_heads;
    for (uint32_t i = block_x() * THREADS + thread; i < counters; i += grid_x() * THREADS) p.counters[i] = 0;
    if (block_x() > 0) return;

    const uint32_t most = p.max_pages * PAGE_TOKENS;
    uint32_t before = 0;
    if (thread == 0) p.prefix[0] = 0;
    for (uint32_t b0 = 0; b0 < p.sequences; b0 += THREADS) {
        const uint32_t b = b0 + thread;
        uint32_t cost = 0;
        if (b < p.sequences) {
            const int32_t given = p.lengths[b];
            const uint32_t length = given < 0 ? 0 : (uint32_t)given < most ? given : most;
            const uint32_t start = length > p.window ? length - p.window : 0, first = start / PAGE_TOKENS;
            const uint32_t tokens = length - first * PAGE_TOKENS;
            uint32_t keep = p.wanted ? p.wanted[b] : p.kv_heads;
            if (keep > p.kv_heads) keep = p.kv_heads;  // also what is negative
            if (length == 0) keep = 0;
            p.first_page[b] = b * p.table_stride + first;
            p.tokens[b] = tokens;
            p.skip[b] = start % PAGE_TOKENS;
            p.keep[b] = keep;
            cost = keep * ((tokens + PAGE_TOKENS - 1) / PAGE_TOKENS + p.segment_cost);
        }
        uint32_t sum = warp_upto(cost);
        if (lane_index() == 31) sums[warp_index()] = sum;
        sync_block();
        uint32_t all = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp_index()) sum += sums[w];
            all += sums[w];
        }
        if (b < p.sequences) p.prefix[b + 1] = before + sum;
        before += all;
        sync_block();
    }
    const uint32_t workers = before / p.min_pages;
    if (thread > 0) return;
    p.prefix[p.sequences + 1] = workers < 1 ? 1 : workers;
    p.prefix[p.sequences + 2] = 0;
}

// Block = sequence: heads that attention does not compute.
DEVICE void zero(const ZeroParams& p) {
    SHARED_BYTES(shared);
    uint32_t* kept = (uint32_t*)shared;  // [kv_heads]
    const uint32_t b = block_x(), thread = thread_index(), keep = p.keep[b];
    for (uint32_t u = thread; u < p.kv_heads; u += THREADS) kept[u] = !p.selected && u < keep;
    sync_block();
    if (p.selected) {
        for (uint32_t j = thread; j < keep; j += THREADS) {
            const uint32_t u = p.selected[b * p.kv_heads + j];
            if (u < p.kv_heads) kept[u] = 1;
        }
    }
    sync_block();
    const uint32_t pieces = p.kv_heads * p.unit_width / 8;
    Words4* out = (Words4*)p.out + (uint64_t)b * pieces;
    for (uint32_t i = thread; i < pieces; i += THREADS)
        if (!kept[8 * i / p.unit_width]) out[i] = Words4{{0, 0, 0, 0}};
    if (!p.lse) return;
    const uint32_t heads = p.kv_heads * p.group;
    for (uint32_t i = thread; i < heads; i += THREADS)
        if (!kept[i / p.group]) p.lse[(uint64_t)b * heads + i] = NEGATIVE_INFINITY;
}

DEVICE void mark(const MarkParams& p) {
    const uint32_t active = p.active ? (uint32_t)p.active[0] : p.rows;
    for (uint32_t r = thread_index(); r < p.rows; r += THREADS) p.group[r] = r < active ? 0 : NONE;
}

}  // namespace plan

KERNEL(256, 1) attention_plan(const GRID_CONSTANT PlanParams p) { begin_kernel(); plan::attention(p); }
KERNEL(256, 1) zero_heads(const GRID_CONSTANT ZeroParams p) { begin_kernel(); plan::zero(p); }
KERNEL(256, 1) mark_rows(const GRID_CONSTANT MarkParams p) { begin_kernel(); plan::mark(p); }
