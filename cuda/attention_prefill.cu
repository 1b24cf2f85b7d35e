// Attention of prompt tokens against the pages of their sequence, causal, with an optional window.
// The step's own K and V are already in the pages, so first and later chunks are the same case.
//
// A block takes one tile of one KV head: up to ROWS packed query rows (token i, head r of the group is
// row i group + r), 16 TALL of them a warp. It walks the cache KEYS tokens a step; K and V of a step
// are two loads into a ring of three slots, so that two loads are under way while one is used.
// Arithmetic: 4 head_dim FLOP per row and token. A warp reads K and V from shared memory once for its
// 16 TALL rows: 256 / TALL bytes per mma, where the tensor cores and the shared memory of a Hopper are
// even at about 190. Each load is read from the L2 once per tile.
//
// Rows in shared memory are an odd number of 16-byte pieces apart: the eight rows of an 8x8 matrix
// lie in different banks. Steps begin at multiples of KEYS, whatever the tile and the chunk, and no
// row's arithmetic depends on the other rows, so no bit of a token's output depends on how its prompt is
// cut, nor on which of the two tiles a step uses.
#include "common.cuh"

namespace prefill {

// A running maximum is moved only when scores pass it by more than this (log2): probabilities stay
// below 2^8, and the output is rescaled a few times instead of at nearly every step.
constexpr float SLACK = 8;

template <class T, int HD, int WARPS, int TALL, int KEYS> struct Attention {
    static constexpr int ROWS = WARPS * 16 * TALL, WARP_ROWS = 16 * TALL;
    static constexpr int PITCH = HD * 2 + 16, PIECES = HD / 8;
    static constexpr int SLOTS = 3, SLOT = KEYS * PITCH;
    static constexpr int EACH = KEYS / WARPS;  // tokens of a load that one warp copies, of one page
    static constexpr int STEPS = HD / 16, BLOCKS = KEYS / 16;
    static_assert(PAGE_TOKENS % EACH == 0 && HD % 16 == 0 && ROWS <= 256 && TALL <= 2, "sizes");
    // Whether the queries stay in registers, beside output and scores.
    static constexpr bool HELD = TALL * (4 * STEPS + HD / 2 + KEYS / 2) <= 160;

    static DEVICE_MEMBER void run(const PrefillParams& p) {
        begin_kernel();
        SHARED_BYTES(shared);
        const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
        const unsigned char* const rows = shared + warp * WARP_ROWS * PITCH;
        unsigned char* const ring = shared + ROWS * PITCH;

        // All heads of a tile before the next tile: the longest blocks start first.
        const PrefillTile tile = p.tiles[block_x() / p.kv_heads];
        const uint32_t window = p.window < 0x7fffffffu ? p.window : 0x7fffffffu;
        const uint32_t newest = tile.position + tile.tokens - 1;
        const uint32_t oldest = tile.position + 1 < window ? 0 : tile.position + 1 - window;
        const uint32_t begin = oldest / KEYS * KEYS;

        // Joins the group of the first load.
        rows_of(p, tile, shared).for_pieces([&](unsigned char* at, uint64_t i, bool there) {
            copy_async16(at, (const T*)p.q + (there ? i : 0), there);
        });

        // Pages before the window may be another sequence's, rows after the newest may hold anything:
        // neither is read, and zeros stand in the ring.
        auto page_of = [&](uint32_t key0) {
            const uint32_t token = key0 + warp * EACH;
            return token / PAGE_TOKENS >= oldest / PAGE_TOKENS && token <= newest
                       ? p.pages[tile.first_page + token / PAGE_TOKENS] : 0u;
        };
        uint32_t page = page_of(begin);
        // Starts the load of K (0), then V (1), of the step at key0.
        auto issue = [&](uint32_t key0, uint32_t kv, unsigned char* slot) {
            if (key0 <= newest) {
                const uint32_t token = key0 + warp * EACH, head = block_x() % p.kv_heads;
                const char* from = (const char*)p.kv + (uint64_t)lane * 16 +
                                   ((((uint64_t)page * p.kv_heads + head) * 2 + kv) * PAGE_TOKENS +
                                    token % PAGE_TOKENS) * (HD * 2);
                unsigned char* to = slot + warp * EACH * PITCH;
                UNROLL for (int i = 0; i < (EACH * PIECES + 31) / 32; i++) {
                    const int row = row_of(i);
                    if (EACH * PIECES % 32 == 0 || row < EACH)
                        copy_async16(to + row * PITCH + piece_of(i) * 16, from + 512 * i,
                                     token - oldest + row <= newest - oldest);
                }
                if (kv) page = page_of(key0 + KEYS);
            }
            copy_commit();
        };
        issue(begin, 0, ring);
        issue(begin, 1, ring + SLOT);

        // Which token of the tile a row of this warp belongs to; rows past the tile go with the last one.
        auto token_of = [&](uint32_t row) {
            const uint32_t token = (warp * WARP_ROWS + row) / (p.heads / p.kv_heads);
            return token < tile.tokens ? token : tile.tokens - 1;
        };
        uint32_t tokens = 0;  // of rows g, g + 8, g + 16, ..., a byte each
        UNROLL for (int i = 0; i < 2 * TALL; i++) tokens |= token_of(g + 8 * i) << (8 * i);
        const bool works = warp * WARP_ROWS / (p.heads / p.kv_heads) < tile.tokens;
        const uint32_t ends = token_of(0) | token_of(WARP_ROWS - 1) << 8;  // of this warp

        uint32_t query[HELD ? TALL : 1][HELD ? STEPS : 1][4];
        float o[TALL][HD / 8][4], top[TALL][2], sum[TALL][2];
        UNROLL for (int m = 0; m < TALL; m++) {
            top[m][0] = top[m][1] = NEGATIVE_INFINITY;
            sum[m][0] = sum[m][1] = 0;
            UNROLL for (int i = 0; i < HD / 8; i++) o[m][i][0] = o[m][i][1] = o[m][i][2] = o[m][i][3] = 0;
        }
        // Where this lane points load_matrices: rows l % 16 of 16, piece l / 16 (queries, values);
        // K's second piece comes before its second eight tokens.
        const int tall_at = lane % 16 * PITCH + lane / 16 * 16;
        const int wide_at = (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16;

        // Waits for a load and starts the one two later, in the slot that all warps have left.
        int slot = 0;
        auto next = [&](uint32_t key0, uint32_t kv) {
            copy_wait<1>();
            sync_block();
            issue(key0 + KEYS, kv, ring + (slot == 0 ? SLOTS - 1 : slot - 1) * SLOT);
            const unsigned char* at = ring + slot * SLOT;
            slot = slot == SLOTS - 1 ? 0 : slot + 1;
            return at;
        };

        for (uint32_t key0 = begin; key0 <= newest; key0 += KEYS) {
            const uint32_t from = tile.position + (ends & 255), to = tile.position + (ends >> 8);
            const bool sees = works && key0 <= to && key0 + KEYS + window > from + 1;
            const unsigned char* k = next(key0, 0) + wide_at;
            float s[TALL][KEYS / 8][4];
            if (HELD && key0 == begin) {
                UNROLL for (int m = 0; m < (HELD ? TALL : 0); m++) {
                    UNROLL for (int i = 0; i < STEPS; i++)
                        load_matrices(query[m][i], rows + tall_at + m * 16 * PITCH + i * 32);
                }
            }
            if (sees) {
                UNROLL for (int m = 0; m < TALL; m++) {
                    UNROLL for (int n = 0; n < KEYS / 8; n++)
                        s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
                }
                UNROLL for (int i = 0; i < STEPS; i++) {
                    uint32_t a[TALL][4];
                    UNROLL for (int m = 0; m < TALL; m++) {
                        if (!HELD) load_matrices(a[m], rows + tall_at + m * 16 * PITCH + i * 32);
                    }
                    UNROLL for (int n = 0; n < BLOCKS; n++) {
                        uint32_t b[4];
                        load_matrices(b, k + n * 16 * PITCH + i * 32);
                        UNROLL for (int m = 0; m < TALL; m++)
                            multiply(s[m][2 * n], s[m][2 * n + 1], HELD ? query[HELD ? m : 0][HELD ? i : 0] : a[m], b);
                    }
                }
                if (key0 + KEYS > from + 1 || key0 + window <= to) {
                    UNROLL for (int m = 0; m < TALL; m++) {
                        const uint32_t at[2] = {tile.position - key0 + (tokens >> (16 * m) & 255),
                                                tile.position - key0 + (tokens >> (16 * m + 8) & 255)};
                        UNROLL for (int n = 0; n < KEYS / 8; n++) {
                            UNROLL for (int c = 0; c < 4; c++) {
                                // A key after the position wraps to a large number.
                                if (at[c / 2] - (8 * n + 2 * t + c % 2) >= window) s[m][n][c] = NEGATIVE_INFINITY;
                            }
                        }
                    }
                }
                UNROLL for (int m = 0; m < TALL; m++) soften(s[m], o[m], top[m], sum[m], p.scale);
            }
            const unsigned char* v = next(key0, 1) + tall_at;
            if (sees) {
                UNROLL for (int n = 0; n < BLOCKS; n++) {
                    uint32_t a[TALL][4];
                    UNROLL for (int m = 0; m < TALL; m++) {
                        UNROLL for (int c = 0; c < 4; c++)
                            a[m][c] = pack2<T>(s[m][2 * n + c / 2][c % 2 * 2], s[m][2 * n + c / 2][c % 2 * 2 + 1]);
                    }
                    UNROLL for (int i = 0; i < STEPS; i++) {
                        uint32_t b[4];
                        load_matrices_transposed(b, v + n * 16 * PITCH + i * 32);
                        UNROLL for (int m = 0; m < TALL; m++) multiply(o[m][2 * i], o[m][2 * i + 1], a[m], b);
                    }
                }
            }
        }
        // The tile is read again: registers are short in the loop.
        if (works) write(rows_of(p, p.tiles[block_x() / p.kv_heads], shared), (T*)p.out, o, sum);
    }

  private:
    // low += a b, high += a b for the two halves of a 16 x 16 block b.
    static DEVICE_MEMBER void multiply(float (&low)[4], float (&high)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4]) {
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        mma<T>(low, a, b0);
        mma<T>(high, a, b1);
    }

    // The i-th 16-byte piece that this lane copies, out of consecutive rows: its row, its place there.
    static DEVICE_MEMBER int row_of(int i) {
        return 32 % PIECES == 0 ? lane_index() / PIECES + 32 / PIECES * i : (lane_index() + 32 * i) / PIECES;
    }
    static DEVICE_MEMBER int piece_of(int i) {
        return (32 % PIECES == 0 ? lane_index() : lane_index() + 32 * i) % PIECES;
    }

    // The packed rows of a warp.
    struct Rows {
        unsigned char* at;        // in shared memory: queries, in the end output
        uint32_t first;           // row of the tile
        uint32_t group, tokens;   // of the tile
        uint64_t head;            // of row 0 in q and out, in heads
        uint32_t heads;           // of a token

        // Calls `each` for this lane's pieces: place in shared memory, element of q and out, whether
        // there is such a row.
        template <class Each> DEVICE_MEMBER void for_pieces(Each each) const {
            UNROLL_BY(4) for (int i = 0; i < WARP_ROWS * PIECES / 32; i++) {
                const int row = row_of(i), piece = piece_of(i);
                const uint32_t token = (first + row) / group, r = (first + row) % group;
                const uint64_t element = (head + (uint64_t)token * heads + r) * HD + piece * 8;
                each(at + row * PITCH + piece * 16, element, token < tokens);
            }
        }
    };

    static DEVICE_MEMBER Rows rows_of(const PrefillParams& p, const PrefillTile& tile, unsigned char* shared) {
        const uint32_t first = warp_index() * WARP_ROWS, group = p.heads / p.kv_heads;
        const uint64_t head = (uint64_t)tile.first_row * p.heads + block_x() % p.kv_heads * group;
        return {shared + first * PITCH, first, group, tile.tokens, head, p.heads};
    }

    // Turns 16 rows' scores into probabilities relative to their maximum; sums stay per lane.
    static DEVICE_MEMBER void soften(float (&s)[KEYS / 8][4], float (&o)[HD / 8][4], float (&top)[2],
                                     float (&sum)[2], float scale) {
        float rescale[2];
        bool moved = false;
        UNROLL for (int r = 0; r < 2; r++) {
            float m = NEGATIVE_INFINITY;
            UNROLL for (int n = 0; n < KEYS / 8; n++) m = fmaxf(m, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            m = fmaxf(m, shuffle_xor(m, 1));
            m = fmaxf(m, shuffle_xor(m, 2)) * scale;
            const bool up = m > top[r] + SLACK;
            rescale[r] = up ? exp2_fast(top[r] - m) : 1.0f;
            top[r] = up ? m : top[r];
            moved |= up;
        }
        if (vote(moved)) {
            UNROLL for (int r = 0; r < 2; r++) {
                sum[r] *= rescale[r];
                UNROLL for (int i = 0; i < HD / 8; i++) {
                    o[i][2 * r] *= rescale[r];
                    o[i][2 * r + 1] *= rescale[r];
                }
            }
        }
        UNROLL for (int r = 0; r < 2; r++) {
            // A row that has seen no key yet keeps probabilities of zero.
            const float base = top[r] == NEGATIVE_INFINITY ? 0.0f : top[r];
            UNROLL for (int n = 0; n < KEYS / 8; n++) {
                UNROLL for (int c = 0; c < 2; c++) {
                    s[n][2 * r + c] = exp2_fast(s[n][2 * r + c] * scale - base);
                    sum[r] += s[n][2 * r + c];
                }
            }
        }
    }

    // Output through this warp's rows of shared memory, for whole 16-byte pieces.
    static DEVICE_MEMBER void write(const Rows& mine, T* out, const float (&o)[TALL][HD / 8][4],
                                    const float (&sum)[TALL][2]) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        UNROLL for (int m = 0; m < TALL; m++) {
            UNROLL for (int r = 0; r < 2; r++) {
                float total = sum[m][r];
                total += shuffle_xor(total, 1);
                total += shuffle_xor(total, 2);
                const float factor = total > 0 ? 1.0f / total : 0.0f;
                unsigned char* to = mine.at + (16 * m + 8 * r + g) * PITCH + 4 * t;
                UNROLL for (int i = 0; i < HD / 8; i++)
                    *(uint32_t*)(to + 16 * i) = pack2<T>(o[m][i][2 * r] * factor, o[m][i][2 * r + 1] * factor);
            }
        }
        sync_warp();
        mine.for_pieces([&](unsigned char* at, uint64_t i, bool there) {
            if (there) *(Words4*)(out + i) = *(const Words4*)at;
        });
    }
};

}  // namespace prefill

// Two tiles: the large one reads the least a FLOP, the small one makes twice as many blocks of a step that
// has few. src/backend/cuda/launch.rs knows rows and keys of each, and chooses. They share KEYS, so both
// give a row the same bits.
#define PREFILL(name, type, hd, tall, keys)                                                     \
    KERNEL(128, 2) attention_prefill##name##_##type##_##hd(const GRID_CONSTANT PrefillParams p) { \
        prefill::Attention<type, hd, 4, tall, keys>::run(p);                                    \
    }
#define PREFILL_SIZE(type, hd)       \
    PREFILL(, type, hd, 2, 64)       \
    PREFILL(_small, type, hd, 1, 64)
#define PREFILL_TYPE(type)   \
    PREFILL_SIZE(type, 64)   \
    PREFILL_SIZE(type, 80)   \
    PREFILL_SIZE(type, 96)   \
    PREFILL_SIZE(type, 128)  \
    PREFILL(, type, 256, 1, 32)
PREFILL_TYPE(bf16)
PREFILL_TYPE(f16)
#undef PREFILL_TYPE
#undef PREFILL_SIZE
#undef PREFILL
