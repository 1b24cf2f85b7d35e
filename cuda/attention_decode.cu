// Selective decode attention over pages: for each sequence b and each of its kept KV heads,
//   out = softmax(scale q K^T) V   for the `group` query heads that share the KV head,
// exactly; heads not kept are never addressed. Dense attention is the same kernel with all kept.
//
// Traffic: each kept (page, head) is read once from device memory, 2 * 16 * head_dim * 2 bytes in
// one bulk copy (8 KiB at head_dim 128); q, out and the merge buffers stay in the L2.
//
// Schedule (stream-K): the work is a line of virtual pages. Sequence b owns keep[b] pieces of
// pages(b) + SEGMENT_COST virtual pages each, starting at prefix[b]; each block (worker) owns an equal
// interval of the line, so ragged lengths and few sequences still load every multiprocessor. The line
// depends on lengths and counts only, never on which heads won: one plan serves all layers.
// The four warps of a block take the pages of a piece in turn, each with its own ring of loads, which
// runs ahead across pieces. A piece that one worker covers is written directly; else the parts go to
// `parts` and the worker that arrives last adds them in worker order, so results do not depend on timing.
#include "page_math.cuh"

namespace decode {

constexpr int WARPS = 4;
constexpr uint32_t COST = SEGMENT_COST;
constexpr float LN_2 = 0.69314718f;

// A run of pages [first, end) of sequence `b`, slot `slot` (0 .. keep[b] - 1).
struct Segment { uint32_t b, slot, first, end, length; };

DEVICE uint32_t page_count(const DecodeParams& p, uint32_t b) {
    return (p.tokens[b] + PAGE_TOKENS - 1) / PAGE_TOKENS;
}

// Walks a worker's interval piece by piece.
struct Walk {
    uint32_t at, end, b;

    // The next segment that has pages; false at the end of the interval.
    DEVICE_MEMBER bool next(const DecodeParams& p, Segment& s) {
        while (at < end) {
            while (p.prefix[b + 1] <= at) b++;
            s.b = b;
            s.length = page_count(p, b);
            uint32_t piece = s.length + COST, offset = at - p.prefix[b];
            s.slot = offset / piece;
            uint32_t from = offset - s.slot * piece;
            uint32_t to = from + (end - at) < piece ? from + (end - at) : piece;
            at += to - from;
            s.first = from > COST ? from - COST : 0;
            s.end = to > COST ? to - COST : 0;
            if (s.end > s.first) return true;
        }
        return false;
    }
};

DEVICE uint32_t worker_start(uint64_t line, uint32_t workers, uint32_t w) { return (uint32_t)(line * w / workers); }
// The worker whose interval holds virtual page `at`.
DEVICE uint32_t worker_of(uint64_t line, uint32_t workers, uint32_t at) {
    return (uint32_t)((((uint64_t)at + 1) * workers - 1) / line);
}

// One warp's loads: pages first + warp, first + warp + 4, … of each segment, in order.
struct Loads {
    Walk walk;
    Segment segment;
    uint32_t page, issued, ids, ids_from;
    bool more;

    DEVICE_MEMBER void open(const DecodeParams& p) {
        do more = walk.next(p, segment);
        while (more && segment.first + warp_index() >= segment.end);
        page = segment.first + warp_index();
        ids_from = NONE;
    }

    template <int HD> DEVICE_MEMBER void issue(const DecodeParams& p, unsigned char* ring, TileBarrier* barriers) {
        if (!more) return;
        // Page numbers come 32 at a time, one per lane.
        if (ids_from == NONE || page >= ids_from + 32 * WARPS) {
            ids_from = page;
            uint32_t mine = page + WARPS * lane_index();
            ids = mine < segment.length ? p.pages[p.first_page[segment.b] + mine] : 0;
        }
        uint32_t id = shuffle(ids, (page - ids_from) / WARPS);
        uint32_t head = p.selected ? p.selected[segment.b * p.kv_heads + segment.slot] : segment.slot;
        constexpr uint32_t BYTES = 2 * PAGE_TOKENS * HD * 2;
        uint32_t stage = issued % p.stages;
        const char* from = (const char*)p.kv + id * p.page_stride + head * p.head_stride;
        tile_load(ring + stage * BYTES, from, BYTES, barriers + stage);
        issued++;
        page += WARPS;
        if (page >= segment.end) open(p);
    }
};

template <class T, int HD, bool TALL> DEVICE void run(const DecodeParams& p) {
    using Math = PageMath<T, HD, TALL>;
    constexpr uint32_t BYTES = 2 * PAGE_TOKENS * HD * 2;
    SHARED_BYTES(shared);
    const uint32_t group = p.heads / p.kv_heads;
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;

    const uint32_t line = p.prefix[p.sequences];
    uint32_t workers = line / p.min_pages;
    const uint32_t most = grid_x() < 4 * HD ? grid_x() : 4 * HD;
    workers = workers < 1 ? 1 : workers > most ? most : workers;
    const uint32_t worker = block_x();
    let_next_start();
    if (line == 0 || worker >= workers) {
        wait_for_previous();
        return;
    }

    // Shared memory: rings of the four warps, merge buffers, barriers.
    unsigned char* ring = shared + warp * p.stages * BYTES;
    float* merged = (float*)(shared + WARPS * p.stages * BYTES);  // [warp][group][HD]
    float* maxima = merged + WARPS * group * HD;                  // [warp][group]
    float* sums = maxima + WARPS * 16;                            // [warp][group]
    uint32_t* flag = (uint32_t*)(sums + WARPS * 16);
    TileBarrier* barriers = (TileBarrier*)(flag + 4) + warp * p.stages;

    if (lane == 0)
        for (uint32_t s = 0; s < p.stages; s++) tile_init(barriers + s);
    sync_block();

    Walk walk;
    walk.at = worker_start(line, workers, worker);
    walk.end = worker_start(line, workers, worker + 1);
    {
        uint32_t low = 0, high = p.sequences;  // prefix[low] <= at < prefix[high]
        while (high - low > 1) {
            uint32_t middle = (low + high) / 2;
            if (p.prefix[middle] <= walk.at) low = middle;
            else high = middle;
        }
        walk.b = low;
    }
    // Up to here only step tables were read.
    wait_for_previous();
    Loads loads;
    loads.walk = walk;
    loads.issued = 0;
    loads.open(p);
    for (uint32_t s = 0; s < p.stages; s++) loads.template issue<HD>(p, ring, barriers);

    uint32_t used = 0;
    Segment segment;
    while (walk.next(p, segment)) {
        const uint32_t head = p.selected ? p.selected[segment.b * p.kv_heads + segment.slot] : segment.slot;
        const T* q = (const T*)p.q + segment.b * p.q_stride + head * group * HD;
        typename Math::Query query;
        Math::load_query(query, (uint32_t)g < group ? q + g * HD : nullptr,
                         (uint32_t)g + 8 < group ? q + (g + 8) * HD : nullptr);
        const uint32_t tokens = p.tokens[segment.b], skip = p.skip[segment.b];

        Softmax soft;
        soft.reset();
        float o[Math::TILES][4];
        UNROLL for (int i = 0; i < Math::TILES; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;

        for (uint32_t page = segment.first + warp; page < segment.end; page += WARPS, used++) {
            const uint32_t stage = used % p.stages;
            tile_wait(barriers + stage, used / p.stages & 1);
            const T* k = (const T*)(ring + stage * BYTES);
            const T* v = k + PAGE_TOKENS * HD;
            float s[2][4];
            Math::scores(s, query, k);
            const int first = page == 0 ? (int)skip : 0;
            const int left = (int)(tokens - page * PAGE_TOKENS);
            const int end = left < PAGE_TOKENS ? left : PAGE_TOKENS;
            const bool masked = first > 0 || end < PAGE_TOKENS;
            if (masked) {
                UNROLL for (int n = 0; n < 2; n++) {
                    UNROLL for (int c = 0; c < 4; c++) {
                        int token = 8 * n + 2 * t + c % 2;
                        if (token < first || token >= end) s[n][c] = NEGATIVE_INFINITY;
                    }
                }
            }
            float rescale[2];
            if (soft.template update<TALL>(s, p.scale, rescale)) {
                UNROLL for (int i = 0; i < Math::TILES; i++) {
                    o[i][0] *= rescale[0];
                    o[i][1] *= rescale[0];
                    if (TALL) {
                        o[i][2] *= rescale[1];
                        o[i][3] *= rescale[1];
                    }
                }
            }
            if (masked) Math::template add_values<true>(o, s, v, first, end);
            else Math::template add_values<false>(o, s, v, 0, PAGE_TOKENS);
            sync_warp();
            loads.template issue<HD>(p, ring, barriers);
        }
        soft.finish();

        // The four warps' parts of the segment become one.
        UNROLL for (int r = 0; r < (TALL ? 2 : 1); r++) {
            uint32_t row = g + 8 * r;
            if (t == 0 && row < group) maxima[warp * 16 + row] = soft.max[r];
        }
        sync_block();
        UNROLL for (int r = 0; r < (TALL ? 2 : 1); r++) {
            uint32_t row = g + 8 * r;
            if (row < group) {
                float m = maxima[row];
                for (int w = 1; w < WARPS; w++) m = fmaxf(m, maxima[w * 16 + row]);
                float factor = soft.max[r] == NEGATIVE_INFINITY ? 0.0f : exp2_fast(soft.max[r] - m);
                if (t == 0) sums[warp * 16 + row] = soft.sum[r] * factor;
                float* to = merged + (warp * group + row) * HD;
                UNROLL for (int i = 0; i < Math::TILES; i++) {
                    to[Math::dimension(i, 0)] = o[i][2 * r] * factor;
                    to[Math::dimension(i, 1)] = o[i][2 * r + 1] * factor;
                }
            }
        }
        // `maxima` is written again only after the next sync_block(), so keep the row's maximum now.
        float row_max = NEGATIVE_INFINITY;
        if ((uint32_t)thread_index() < group)
            for (int w = 0; w < WARPS; w++) row_max = fmaxf(row_max, maxima[w * 16 + thread_index()]);
        sync_block();

        const uint32_t piece_start = p.prefix[segment.b] + segment.slot * (segment.length + COST);
        const uint32_t first_worker = worker_of(line, workers, piece_start + COST);
        const uint32_t last_worker = worker_of(line, workers, piece_start + COST + segment.length - 1);
        T* out = (T*)p.out + ((uint64_t)segment.b * p.heads + head * group) * HD;
        const uint32_t values = group * HD, stride = group * (HD + 2);
        const bool whole = first_worker == last_worker;
        // A part is slot 1 of the worker that opens the piece, slot 0 of the others.
        float* part = p.parts + (uint64_t)(2 * worker + (worker == first_worker ? 1 : 0)) * stride;
        for (uint32_t i = thread_index(); i < values / 2; i += block_threads()) {
            float x[2], sum = 0;
            uint32_t row = 2 * i / HD;
            UNROLL for (int c = 0; c < 2; c++) {
                x[c] = 0;
                for (int w = 0; w < WARPS; w++) x[c] += merged[w * values + 2 * i + c];
            }
            for (int w = 0; w < WARPS; w++) sum += sums[w * 16 + row];
            if (whole) {
                ((uint32_t*)out)[i] = pack2<T>(x[0] / sum, x[1] / sum);
            } else {
                part[2 * i] = x[0];
                part[2 * i + 1] = x[1];
            }
        }
        float* lse = p.lse ? p.lse + (uint64_t)segment.b * p.heads + head * group : nullptr;
        if ((uint32_t)thread_index() < group) {
            float sum = 0;
            for (int w = 0; w < WARPS; w++) sum += sums[w * 16 + thread_index()];
            if (!whole) {
                part[values + 2 * thread_index()] = row_max;
                part[values + 2 * thread_index() + 1] = sum;
            } else if (lse) {
                lse[thread_index()] = LN_2 * (row_max + log2_fast(sum));
            }
        }
        if (whole) continue;
        fence_device();
        sync_block();
        uint32_t* counter = p.counters + segment.b * p.kv_heads + segment.slot;
        if (thread_index() == 0) {
            *flag = atomic_add(counter, 1);
            if (*flag == last_worker - first_worker) *counter = 0;
        }
        sync_block();
        if (*flag != last_worker - first_worker) continue;
        fence_device();
        // The maxima of all parts, at most 4 HD of them, take the place of the merged output.
        const uint32_t count = last_worker - first_worker + 1;
        auto part_of = [&](uint32_t j) { return p.parts + (uint64_t)(2 * (first_worker + j) + (j == 0 ? 1 : 0)) * stride; };
        for (uint32_t i = thread_index(); i < count * group; i += block_threads())
            merged[i] = part_of(i / group)[values + 2 * (i % group)];
        sync_block();
        for (uint32_t i = thread_index(); i < values / 2; i += block_threads()) {
            const uint32_t row = 2 * i / HD;
            float m = NEGATIVE_INFINITY, sum = 0, x0 = 0, x1 = 0;
            for (uint32_t j = 0; j < count; j++) m = fmaxf(m, merged[j * group + row]);
            UNROLL_BY(8) for (uint32_t j = 0; j < count; j++) {
                const float* from = part_of(j);
                const float factor = exp2_fast(merged[j * group + row] - m);
                sum += from[values + 2 * row + 1] * factor;
                x0 += from[2 * i] * factor;
                x1 += from[2 * i + 1] * factor;
            }
            ((uint32_t*)out)[i] = pack2<T>(x0 / sum, x1 / sum);
            if (lse && 2 * i % HD == 0) lse[row] = LN_2 * (m + log2_fast(sum));
        }
        sync_block();
    }
}

}  // namespace decode

// Groups up to 8 fill half of the 16-row side; larger ones fill it (`tall`).
#define DECODE(type, hd, blocks)                                                              \
    KERNEL(128, blocks) attention_decode_##type##_##hd(const GRID_CONSTANT DecodeParams p) {  \
        decode::run<type, hd, false>(p);                                                      \
    }
#define DECODE_TALL(type, hd)                                                                 \
    KERNEL(128, 2) attention_decode_tall_##type##_##hd(const GRID_CONSTANT DecodeParams p) {  \
        decode::run<type, hd, true>(p);                                                       \
    }
#define DECODE_TYPE(type)   \
    DECODE(type, 64, 2)     \
    DECODE(type, 80, 2)     \
    DECODE(type, 96, 2)     \
    DECODE(type, 128, 2)    \
    DECODE(type, 256, 1)    \
    DECODE_TALL(type, 64)   \
    DECODE_TALL(type, 80)   \
    DECODE_TALL(type, 96)   \
    DECODE_TALL(type, 128)
DECODE_TYPE(bf16)
DECODE_TYPE(f16)
#undef DECODE_TYPE
#undef DECODE_TALL
#undef DECODE
