// Attention of prompt tokens against the pages of their sequence, causal, with an optional window.
// The step's own K and V are already in the pages, so first and later chunks are the same case.
//
// A block takes one tile: one KV head and up to 64 packed query rows (token i, head r of the group is
// row i group + r), 16 rows a warp; it walks the pages the tile can see, four at a time, in a ring of
// two stages. Arithmetic: 4 head_dim FLOP per row and token; each page is read by every tile of its
// sequence, mostly from the L2. Shared memory bounds the rate: every warp reads every page.
#include "page_math.cuh"

namespace prefill {

constexpr int WARPS = 4, STAGES = 2;

template <class T, int HD> DEVICE void run(const PrefillParams& p) {
    using Math = PageMath<T, HD, true>;
    constexpr uint32_t BYTES = 2 * PAGE_TOKENS * HD * 2;
    begin_kernel();
    SHARED_BYTES(shared);
    unsigned char* ring = shared;  // [stage][warp's page]
    TileBarrier* barriers = (TileBarrier*)(shared + STAGES * WARPS * BYTES);

    const PrefillTile tile = p.tiles[block_x()];
    const uint32_t head = block_y(), group = p.heads / p.kv_heads;
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    if (thread_index() < STAGES * WARPS) tile_init(barriers + thread_index());
    sync_block();

    // The two query rows of this lane; rows past the tile are zeros and never written.
    const T* source[2];
    T* target[2];
    uint32_t position[2];
    UNROLL for (int r = 0; r < 2; r++) {
        uint32_t row = warp * 16 + g + 8 * r, token = row / group;
        bool there = token < tile.tokens;
        uint64_t at = ((uint64_t)(tile.first_row + token) * p.heads + head * group + row % group) * HD;
        source[r] = there ? (const T*)p.q + at : nullptr;
        target[r] = there ? (T*)p.out + at : nullptr;
        position[r] = tile.position + (there ? token : 0);
    }
    typename Math::Query query;
    Math::load_query(query, source[0], source[1]);

    const uint32_t newest = tile.position + tile.tokens - 1;
    const uint32_t oldest = p.window == NONE || tile.position + 1 < p.window ? 0 : tile.position + 1 - p.window;
    const uint32_t first = oldest / PAGE_TOKENS, end = newest / PAGE_TOKENS + 1;
    const uint32_t rounds = (end - first + WARPS - 1) / WARPS;
    const uint32_t* table = p.pages + tile.first_page;

    auto load = [&](uint32_t round) {
        uint32_t page = first + round * WARPS + warp, stage = round % STAGES;
        if (round < rounds && page < end) {
            const char* from = (const char*)p.kv + ((uint64_t)table[page] * p.kv_heads + head) * BYTES;
            tile_load(ring + (stage * WARPS + warp) * BYTES, from, BYTES, barriers + stage * WARPS + warp);
        }
    };

    Softmax soft;
    soft.reset();
    float o[Math::TILES][4];
    UNROLL for (int i = 0; i < Math::TILES; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;

    load(0);
    load(1);
    for (uint32_t round = 0; round < rounds; round++) {
        const uint32_t stage = round % STAGES;
        for (int w = 0; w < WARPS; w++) {
            const uint32_t page = first + round * WARPS + w;
            if (page >= end) break;
            tile_wait(barriers + stage * WARPS + w, round / STAGES & 1);
            const T* k = (const T*)(ring + (stage * WARPS + w) * BYTES);
            const T* v = k + PAGE_TOKENS * HD;
            float s[2][4];
            Math::scores(s, query, k);
            const bool masked = page * PAGE_TOKENS + PAGE_TOKENS > tile.position + 1 || p.window != NONE;
            if (masked) {
                UNROLL for (int n = 0; n < 2; n++) {
                    UNROLL for (int c = 0; c < 4; c++) {
                        uint32_t key = page * PAGE_TOKENS + 8 * n + 2 * t + c % 2, at = position[c / 2];
                        bool sees = key <= at && (p.window == NONE || at - key < p.window);
                        if (!sees) s[n][c] = NEGATIVE_INFINITY;
                    }
                }
            }
            float rescale[2];
            if (soft.template update<true>(s, p.scale, rescale)) {
                UNROLL for (int i = 0; i < Math::TILES; i++) {
                    o[i][0] *= rescale[0];
                    o[i][1] *= rescale[0];
                    o[i][2] *= rescale[1];
                    o[i][3] *= rescale[1];
                }
            }
            // Rows not yet written (past the newest token) may hold anything; others are finite.
            const int left = (int)(newest + 1 - page * PAGE_TOKENS);
            const int low = (int)oldest - (int)(page * PAGE_TOKENS);
            if (left < PAGE_TOKENS || low > 0)
                Math::template add_values<true>(o, s, v, low > 0 ? low : 0, left < PAGE_TOKENS ? left : PAGE_TOKENS);
            else Math::template add_values<false>(o, s, v, 0, PAGE_TOKENS);
        }
        sync_block();
        load(round + STAGES);
    }
    soft.finish();

    UNROLL for (int r = 0; r < 2; r++) {
        if (!target[r]) continue;
        const float factor = soft.sum[r] > 0 ? 1.0f / soft.sum[r] : 0.0f;
        UNROLL for (int i = 0; i < Math::TILES; i++) {
            target[r][Math::dimension(i, 0)] = from_float<T>(o[i][2 * r] * factor);
            target[r][Math::dimension(i, 1)] = from_float<T>(o[i][2 * r + 1] * factor);
        }
    }
}

}  // namespace prefill

#define PREFILL(type, hd, blocks)                                                               \
    KERNEL(128, blocks) attention_prefill_##type##_##hd(const GRID_CONSTANT PrefillParams p) {  \
        prefill::run<type, hd>(p);                                                              \
    }
#define PREFILL_TYPE(type) \
    PREFILL(type, 64, 2)   \
    PREFILL(type, 80, 2)   \
    PREFILL(type, 96, 2)   \
    PREFILL(type, 128, 2)
PREFILL_TYPE(bf16)
PREFILL_TYPE(f16)
#undef PREFILL_TYPE
#undef PREFILL
