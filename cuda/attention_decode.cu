// Selective decode attention over pages: for each sequence b and each of its kept KV heads,
//   out = softmax(scale q K^T) V   for the `group` query heads that share the KV head,
// exactly; heads not kept are never addressed. Dense attention is the same kernel with all kept.
//
// Traffic: each kept (page, head) is read once from device memory, 2 * 16 * head_dim * 2 bytes in
// one bulk copy (8 KiB at head_dim 128); q, out and the merge buffers stay in the L2.
//
// Schedule (stream-K): the work is a line of virtual pages. Sequence b owns keep[b] pieces of
// pages(b) + segment_cost virtual pages each, starting at prefix[b]; each block (worker) owns an equal
// interval of the line, so ragged lengths and few sequences still load every multiprocessor. The line
// depends on lengths and counts only, never on which heads won: one plan serves all layers. Where there are about as
// many pieces as multiprocessors, all of about one length, they are as long as the longest and each has a worker (`line.rs`).
// The warps of a block take the pages of a piece in turn, each with its own ring of loads, which
// runs ahead across pieces. The ring is short: loads beyond what the latency needs would only queue in the memory
// system, and whoever is first in that queue at the start ends microseconds before whoever is last. A piece that one worker covers is written directly; else the parts go to
// `parts` and the worker that arrives last adds them in worker order, so results do not depend on timing.
//
// With few pieces a worker is a cluster of blocks, which share its one piece as the warps of a block do and add up in
// the first one's shared memory: that takes a microsecond where parts in global memory take five.
#include "page_math.cuh"
#include "router_bytes.cuh"
#include "neuron_select.cuh"

namespace decode {

constexpr float LN_2 = 0.69314718f;
// A run of pages [first, end) of slot `slot` (0 .. keep[b] - 1) of sequence `b`, `length` pages long.
struct Segment { uint32_t b, slot, first, end, length; };

// Walks a worker's interval piece by piece, with the tables of the sequence it is in.
struct Walk {
    uint32_t at, end, b;
    uint32_t start, stop, tokens, skip, first_page;
    uint32_t least;  // pages of the shortest piece

    DEVICE_MEMBER void enter(const DecodeParams& p, uint32_t sequence) {
        b = sequence;
        start = p.prefix[b];
        stop = p.prefix[b + 1];
        tokens = p.tokens[b];
        skip = p.skip[b];
        first_page = p.first_page[b];
    }

    // Virtual pages of a piece of so many pages.
    DEVICE_MEMBER uint32_t piece_of(const DecodeParams& p, uint32_t pages) {
        return p.segment_cost + (pages > least ? pages : least);
    }

    // The next segment that has pages; false at the end of the interval.
    DEVICE_MEMBER bool next(const DecodeParams& p, Segment& s) {
        while (at < end) {
            while (stop <= at) enter(p, b + 1);
            s.b = b;
            s.length = (tokens + PAGE_TOKENS - 1) / PAGE_TOKENS;
            const uint32_t cost = p.segment_cost, piece = piece_of(p, s.length), offset = at - start;
            s.slot = offset / piece;
            uint32_t from = offset - s.slot * piece;
            uint32_t to = from + (end - at) < piece ? from + (end - at) : piece;
            at += to - from;
            s.first = from > cost ? from - cost : 0;
            s.end = to > cost ? to - cost : 0;
            if (s.end > s.length) s.end = s.length;
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

// Four dimensions of a part of the tokens: sum of exponentials and of weighted values, relative to `max`.
struct Share {
    float max = NEGATIVE_INFINITY, sum = 0;
    Floats4 x = {{0, 0, 0, 0}};

    // To the present maximum, from an `old` one.
    DEVICE_MEMBER void rescale(float old) {
        const float factor = old == NEGATIVE_INFINITY ? 0.0f : exp2_fast(old - max);
        sum *= factor;
        UNROLL for (int c = 0; c < 4; c++) x.v[c] *= factor;
    }
    // What is relative to `own`, which is no more than the maximum.
    DEVICE_MEMBER void add(float own, float own_sum, const Floats4& own_x) {
        const float factor = own == NEGATIVE_INFINITY ? 0.0f : exp2_fast(own - max);
        sum += own_sum * factor;
        UNROLL for (int c = 0; c < 4; c++) x.v[c] += own_x.v[c] * factor;
    }
};

DEVICE Floats4 divided(const Floats4& x, float by) {
    const float factor = reciprocal_fast(by);
    return {{x.v[0] * factor, x.v[1] * factor, x.v[2] * factor, x.v[3] * factor}};
}

// One warp's loads: pages first + turn, first + turn + apart, … of each segment, in order. The warps of a block, or of
// a cluster, take them in turn.
template <int WARPS, bool CLUSTER> struct Loads {
    Walk walk;
    Segment segment;
    const uint32_t turn = (CLUSTER ? WARPS * cluster_block() : 0) + warp_index();
    const uint32_t apart = CLUSTER ? WARPS * cluster_blocks() : WARPS;
    uint32_t page, issued, stage, head, ids, ids_from;
    bool more;

    DEVICE_MEMBER void open(const DecodeParams& p) {
        do more = walk.next(p, segment);
        while (more && segment.first + turn >= segment.end);
        page = segment.first + turn;
        head = NONE;
        if (more) find_ids(p);
    }

    // Page numbers come 32 at a time, one per lane.
    DEVICE_MEMBER void find_ids(const DecodeParams& p) {
        ids_from = page;
        const uint32_t mine = page + apart * lane_index();
        ids = mine < segment.length ? p.pages[walk.first_page + mine] : 0;
    }

    // Behind the wait through the multiprocessor's own cache, where the query's rows are looked up next.
    DEVICE_MEMBER uint32_t selected(const DecodeParams& p, uint32_t i) {
        return p.early & EARLY_SELECTED ? load_early(p.selected + i) : p.selected[i];
    }

    // Whether the next page holds tokens of earlier steps only.
    DEVICE_MEMBER bool settled() { return more && page + 1 < segment.length; }

    template <int HD> DEVICE_MEMBER void issue(const DecodeParams& p, unsigned char* ring, TileBarrier* barriers) {
        if (!more) return;
        if (page >= ids_from + 32 * apart) find_ids(p);
        if (head == NONE) head = p.selected ? selected(p, segment.b * p.kv_heads + segment.slot) : segment.slot;
        const uint32_t id = shuffle(ids, (page - ids_from) / apart);
        constexpr uint32_t BYTES = 2 * PAGE_TOKENS * HD * 2;
        const char* from = (const char*)p.kv + id * p.page_stride + head * p.head_stride;
        tile_load(ring + stage * WARPS * BYTES, from, BYTES, barriers + stage);
        issued++;
        stage = stage + 1 == p.stages ? 0 : stage + 1;
        page += apart;
        if (page >= segment.end) open(p);
    }
};

// The MLP router's second product, tiles of neurons shared out over all blocks: their matrix is on its way before the
// kernels ahead have ended, when memory is idle, and a few more microseconds of work do not show beside the pages. Where
// neurons are chosen too, the last block does that and nothing else: it waits for the others' scores, which they have
// before their pages. They are all running or done: blocks start in order.
template <int WARPS, bool SCORED> struct Scoring {
    const DecodeParams& p;
    router_bytes::Tile tile;

    DEVICE_MEMBER Scoring(const DecodeParams& p, unsigned char* z)
        : p(p), tile(p.router, z, WARPS * block_x() + warp_index()) {
        if (!chooses()) tile.load_w();
    }
    // Blocks that attend.
    DEVICE_MEMBER uint32_t blocks() const { return grid_x() - (p.router.arrived != nullptr); }
    DEVICE_MEMBER bool chooses() const { return (uint32_t)block_x() >= blocks(); }
    DEVICE_MEMBER void choose(unsigned char* shared) {
        const uint32_t tiles = (p.router.n + 16 * WARPS - 1) / (16 * WARPS);
        // First without scores, while there are none: by then its instructions are in the caches.
        UNROLL_BY(1) for (int rehearsal = p.router.arrived != nullptr; rehearsal >= 0; rehearsal--) {
            if (!rehearsal) {
                wait_for_previous();
                if (thread_index() == 0) {
                    wait_for_count(p.router.arrived, tiles < blocks() ? tiles : blocks());
                    *p.router.arrived = 0;
                }
                sync_block();
            }
            neurons::select_by_block<WARPS>(p.choice, shared, rehearsal);
        }
    }
    DEVICE_MEMBER bool any() { return 16 * (tile.tile - warp_index()) < tile.p.n; }
    DEVICE_MEMBER void begin() {
        if (any()) tile.copy_z();
    }
    // Then z is free.
    DEVICE_MEMBER void finish() {
        if (!any()) return;
        do {
            tile.wait_z();
            int* sums = (int*)(tile.z + warp_index() * tile.sums_size());
            tile.multiply(sums, false);
            tile.deliver(sums);
            sync_block();
            tile.tile += WARPS * blocks();
            tile.load_w();
            begin();
        } while (any());
        if (p.router.arrived && thread_index() == 0) {
            fence_device();
            atomic_add(p.router.arrived, 1);
        }
    }
};
template <int WARPS> struct Scoring<WARPS, false> {
    DEVICE_MEMBER Scoring(const DecodeParams&, unsigned char*) {}
    DEVICE_MEMBER uint32_t blocks() const { return grid_x(); }
    DEVICE_MEMBER bool chooses() const { return false; }
    DEVICE_MEMBER void choose(unsigned char*) {}
    DEVICE_MEMBER void begin() {}
    DEVICE_MEMBER void finish() {}
};

template <class T, int HD, bool TALL, int WARPS, bool SCORED, bool CLUSTER> DEVICE void run(const DecodeParams& p) {
    using Math = PageMath<T, HD, TALL>;
    constexpr uint32_t BYTES = 2 * PAGE_TOKENS * HD * 2;
    constexpr int MERGE = HD > 128 ? 2 : TALL || SCORED ? 8 : 12;  // parts that are loaded at once, by registers
    SHARED_BYTES(shared);
    const uint32_t group = p.heads / p.kv_heads;
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    if (!p.late) let_next_start();
    // What the router multiplies takes the place of all pages of a warp but the first.
    Scoring<WARPS, SCORED> scoring(p, shared + WARPS * BYTES);
    if (scoring.chooses()) return scoring.choose(shared);

    // Up to the wait only step tables are read, and pages that no kernel of this step writes.
    uint32_t each = (p.sequences + 31) / 32, low = each * lane;
    const uint32_t mark = p.prefix[low < p.sequences ? low : p.sequences];
    const uint32_t line = p.prefix[p.sequences];
    uint32_t workers = p.prefix[p.sequences + 1];
    const uint32_t least = p.prefix[p.sequences + 2];
    const uint32_t blocks = CLUSTER ? cluster_blocks() : 1, most = scoring.blocks() / blocks;
    workers = workers > most ? most : workers;
    const uint32_t worker = block_x() / blocks;
    const bool idle = line == 0 || worker >= workers;
    if (idle && !SCORED) {
        wait_for_previous();
        return;  // which lets the next start, too
    }
    if (CLUSTER) cluster_arrive();

    // Shared memory: pages [stage][warp], merge buffers, barriers.
    unsigned char* ring = shared + warp * BYTES;
    uint32_t pages = WARPS * p.stages * BYTES;
    if (SCORED) {
        const uint32_t least = WARPS * BYTES + router_bytes::room(p.router.rows);
        pages = pages < least ? least : pages;
    }
    float* merged = (float*)(shared + pages);  // [warp][group][HD]
    float* maxima = merged + WARPS * group * HD;                  // [warp][16]
    float* sums = maxima + WARPS * 16;                            // [warp][16]
    uint32_t* flag = (uint32_t*)(sums + WARPS * 16);
    TileBarrier* barriers = (TileBarrier*)(flag + 4) + warp * p.stages;  // only this warp uses its own
    const uint32_t values = group * HD;
    float* shares = (float*)((TileBarrier*)(flag + 4) + WARPS * p.stages);  // a cluster's: [block][group][HD]
    Floats2* states = (Floats2*)(shares + blocks * values);                 // [block][group] maximum, sum
    if (lane == 0)
        UNROLL_BY(1) for (uint32_t s = 0; s < p.stages; s++) tile_init(barriers + s);
    sync_warp();

    Walk walk;
    walk.at = idle ? 0 : worker_start(line, workers, worker);
    walk.end = idle ? 0 : worker_start(line, workers, worker + 1);
    // The sequence whose prefix is the last one not above `at`: 32 marks at a time.
    low = each * (count_bits(vote(low < p.sequences && mark <= walk.at)) - 1);
    while (each > 1) {
        const uint32_t high = low + each < p.sequences ? low + each : p.sequences;
        each = (each + 31) / 32;
        const uint32_t i = low + each * lane;
        low += each * (count_bits(vote(i < high && p.prefix[i < high ? i : low] <= walk.at)) - 1);
    }
    walk.least = least;
    walk.enter(p, low);
    Loads<WARPS, CLUSTER> loads;
    loads.walk = walk;
    loads.issued = loads.stage = 0;
    loads.open(p);
    const uint32_t ahead = SCORED ? 1 : p.stages - 1;
    if (p.early & EARLY_PAGES && (!p.selected || p.early & EARLY_SELECTED))
        while (loads.issued < ahead && loads.settled()) loads.template issue<HD>(p, ring, barriers);
    wait_for_previous();
    if (p.late) let_next_start();
    scoring.begin();
    while (loads.issued < ahead && loads.more) loads.template issue<HD>(p, ring, barriers);
    scoring.finish();
    while (loads.issued + 1 < p.stages && loads.more) loads.template issue<HD>(p, ring, barriers);

    uint32_t stage = 0, parity = 0, first_row;
    Segment segment;
    typename Math::Query query;
    // The next segment, and the rows of q and out that are its.
    auto open = [&] {
        if (!walk.next(p, segment)) return false;
        const uint32_t slot = segment.b * p.kv_heads + segment.slot;
        const uint32_t row = (p.selected ? p.selected[slot] : segment.slot) * group;
        first_row = segment.b * p.heads + row;
        const T* q = (const T*)p.q + segment.b * p.q_stride + row * HD;
        Math::load_query(query, (uint32_t)g < group ? q + g * HD : nullptr,
                         (uint32_t)g + 8 < group ? q + (g + 8) * HD : nullptr);
        return true;
    };
    bool more = open();
    while (more) {
        const uint32_t tokens = walk.tokens, skip = walk.skip;
        const uint32_t opening = walk.start + segment.slot * walk.piece_of(p, segment.length) + p.segment_cost;
        const uint32_t first_worker = worker_of(line, workers, opening);
        const uint32_t others = worker_of(line, workers, opening + segment.length - 1) - first_worker;

        Softmax soft;
        soft.reset();
        float o[Math::TILES][4];
        UNROLL for (int i = 0; i < Math::TILES; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;

        for (uint32_t page = segment.first + loads.turn; page < segment.end; page += loads.apart) {
            tile_wait(barriers + stage, parity);
            loads.template issue<HD>(p, ring, barriers);
            const T* k = (const T*)(ring + stage * WARPS * BYTES);
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
            if (++stage == p.stages) {
                stage = 0;
                parity ^= 1;
            }
        }
        soft.finish();

        // The warps leave what they have; then each thread adds up four dimensions of a row.
        UNROLL for (int r = 0; r < (TALL ? 2 : 1); r++) {
            const uint32_t row = g + 8 * r;
            if (row >= group) continue;
            if (t == 0) {
                maxima[warp * 16 + row] = soft.max[r];
                sums[warp * 16 + row] = soft.sum[r];
            }
            float* to = merged + (warp * group + row) * HD;
            UNROLL for (int c = 0; c < 2; c++) {
                UNROLL for (int i = 0; i < 8 * Math::SETS; i += 4)
                    *(Floats4*)(to + Math::dimension(i, c)) =
                        {{o[i][2 * r + c], o[i + 1][2 * r + c], o[i + 2][2 * r + c], o[i + 3][2 * r + c]}};
                UNROLL for (int i = 8 * Math::SETS; i < Math::TILES; i++) to[Math::dimension(i, c)] = o[i][2 * r + c];
            }
        }
        T* out = (T*)p.out + (uint64_t)first_row * HD;
        float* lse = p.lse ? p.lse + first_row : nullptr;
        uint32_t* counter = p.counters + segment.b * p.kv_heads + segment.slot;
        more = open();  // the next query is on its way while this segment is merged
        sync_block();
        const uint32_t stride = group * (HD + 4);
        // A part is slot 1 of the worker that opens the piece, slot 0 of the others.
        auto part_of = [&](uint32_t j) { return p.parts + (uint64_t)(2 * (first_worker + j) + (j == 0)) * stride; };
        auto finish = [&](uint32_t i, const Share& s) {
            store4<T>(out, i, divided(s.x, s.sum));
            if (lse && i % HD == 0) lse[i / HD] = LN_2 * (s.max + log2_fast(s.sum));
        };
        // Adds the first `count` shares in shared memory.
        auto add_up = [&](uint32_t count, auto deliver) {
            for (uint32_t i = 4 * thread_index(); i < values; i += 4 * block_threads()) {
                const uint32_t row = i / HD;
                Share s;
                UNROLL for (uint32_t w = 0; w < WARPS; w++)
                    if (w < count) s.max = fmaxf(s.max, maxima[w * 16 + row]);
                UNROLL for (uint32_t w = 0; w < WARPS; w++)
                    if (w < count) s.add(maxima[w * 16 + row], sums[w * 16 + row], *(const Floats4*)(merged + w * values + i));
                deliver(i, s);
            }
        };
        if (CLUSTER) {
            cluster_wait();  // for all to have begun
            add_up(WARPS, [&](uint32_t i, const Share& s) {
                store_in_cluster((Floats4*)(shares + cluster_block() * values + i), 0, s.x);
                if (i % HD == 0) store_in_cluster(states + cluster_block() * group + i / HD, 0, Floats2{{s.max, s.sum}});
            });
            cluster_arrive();
            cluster_wait();
            if (cluster_block() > 0) return;
            for (uint32_t i = 4 * thread_index(); i < values; i += 4 * block_threads()) {
                const Floats2* state = states + i / HD;
                Share s;
                for (uint32_t b = 0; b < blocks; b++) s.max = fmaxf(s.max, state[b * group].v[0]);
                for (uint32_t b = 0; b < blocks; b++)
                    s.add(state[b * group].v[0], state[b * group].v[1], *(const Floats4*)(shares + b * values + i));
                finish(i, s);
            }
            return;
        }
        if (others == 0) {
            add_up(WARPS, finish);
        } else {
            float* part = part_of(worker - first_worker);
            add_up(WARPS, [&](uint32_t i, const Share& s) {
                *(Floats4*)(part + i) = s.x;
                if (i % HD == 0) *(Floats2*)(part + values + 2 * (i / HD)) = {{s.max, s.sum}};
            });
        }
        sync_block();
        if (others == 0) continue;
        if (thread_index() == 0) {
            fence_device();
            *flag = atomic_add(counter, 1);
            if (*flag == others) *counter = 0;
            fence_device();
        }
        sync_block();
        if (*flag != others) continue;
        // Threads that would idle, the group being small, take a share of the parts each.
        uint32_t ways = 4 * block_threads() / values;
        ways = ways < 1 ? 1 : ways > WARPS ? WARPS : ways;
        const uint32_t way = ways == 1 ? 0 : 4 * thread_index() / values;
        if (way < ways) {
            for (uint32_t i = 4 * thread_index() - way * values; i < values; i += 4 * block_threads()) {
                const uint32_t row = i / HD;
                Share s;
                for (uint32_t from = way; from <= others; from += MERGE * ways) {
                    Floats4 o[MERGE];
                    Floats2 state[MERGE];  // maximum, sum
                    UNROLL for (int j = 0; j < MERGE; j++) {
                        if (from + j * ways > others) continue;
                        o[j] = *(const Floats4*)(part_of(from + j * ways) + i);
                        state[j] = *(const Floats2*)(part_of(from + j * ways) + values + 2 * row);
                    }
                    const float old = s.max;
                    UNROLL for (int j = 0; j < MERGE; j++)
                        if (from + j * ways <= others) s.max = fmaxf(s.max, state[j].v[0]);
                    s.rescale(old);
                    UNROLL for (int j = 0; j < MERGE; j++)
                        if (from + j * ways <= others) s.add(state[j].v[0], state[j].v[1], o[j]);
                }
                if (ways == 1) {
                    finish(i, s);
                } else {
                    *(Floats4*)(merged + way * values + i) = s.x;
                    if (i % HD == 0) {
                        maxima[way * 16 + row] = s.max;
                        sums[way * 16 + row] = s.sum;
                    }
                }
            }
        }
        if (ways == 1) continue;
        sync_block();
        add_up(ways, finish);
        sync_block();
    }
}

}  // namespace decode

// Groups up to 8 fill half of the 16-row side; larger ones fill it (`tall`). Blocks of eight warps (`large`) have a
// multiprocessor to themselves.
#define DECODE(name, type, hd, tall, warps, blocks, scored, cluster)                                    \
    KERNEL(32 * warps, blocks) attention_decode_##name##type##_##hd(const GRID_CONSTANT DecodeParams p) { \
        decode::run<type, hd, tall, warps, scored, cluster>(p);                                         \
    }
#define DECODE_SIZE(type, hd)                           \
    DECODE(, type, hd, false, 4, 2, false, false)       \
    DECODE(large_, type, hd, false, 8, 1, false, false) \
    DECODE(tall_, type, hd, true, 4, 2, false, false)   \
    DECODE(cluster_, type, hd, false, 4, 2, false, true)
#define DECODE_SCORED(type, hd)                         \
    DECODE(scored_, type, hd, false, 4, 2, true, false) \
    DECODE(scored_large_, type, hd, false, 8, 1, true, false)
#define DECODE_TYPE(type)     \
    DECODE_SIZE(type, 64)     \
    DECODE_SIZE(type, 80)     \
    DECODE_SIZE(type, 96)     \
    DECODE_SIZE(type, 128)    \
    DECODE(, type, 256, false, 4, 1, false, false) \
    DECODE_SCORED(type, 64)   \
    DECODE_SCORED(type, 128)
DECODE_TYPE(bf16)
DECODE_TYPE(f16)
#undef DECODE_TYPE
#undef DECODE_SIZE
#undef DECODE_SCORED
#undef DECODE
