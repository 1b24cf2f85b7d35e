// Attention inside one page of 16 tokens, by one warp with the tensor cores' m16n8k16.
//
// Rows of the 16-row side are query rows (the heads of a group, or tokens of a prompt). Nothing is
// transposed and nothing is shuffled: the order in which a product sums its terms, and which column
// is which token or dimension, is free, so each lane (4 g + t) loads 16 contiguous bytes of K or V
// from plain [16][head_dim] rows and calls them what the fragment layout needs:
//   Q K^T: step pair j sums dimensions 32 j + 8 t .. + 7 in lane t; columns g are tokens g, g + 8.
//   P V:   lane t holds tokens 2t, 2t+1, 2t+8, 2t+9; column g of product i of a set of 64
//          dimensions is dimension 8 g + i.
// Head sizes that are no multiple of 32 (or 64) end in a narrower piece. Shared memory is read once
// per warp: 16 head_dim 2 bytes for K, the same for V.
#pragma once
#include "common.cuh"

template <class T, int HD, bool TALL> struct PageMath {
    static constexpr int STEPS = HD / 16;           // of the sum over dimensions
    static constexpr int PAIRS = HD / 32;
    static constexpr int SETS = HD / 64;            // of output dimensions
    static constexpr int REST = HD % 64;            // dimensions after the sets: 0, 16 or 32
    static constexpr int EACH = REST / 8;           // of them per lane group
    static constexpr int TILES = HD / 8;
    static_assert(HD % 16 == 0 && (REST == 0 || REST == 16 || REST == 32), "head size");

    // Fragments of up to 8 (TALL: 16) query rows.
    struct Query { uint32_t w[STEPS][TALL ? 4 : 2]; };

    // `low` and `high`: rows g and g + 8, null for a row of zeros.
    static DEVICE_MEMBER void load_query(Query& q, const T* low, const T* high) {
        const int t = lane_index() % 4;
        load_half(q, low, t, 0);
        if (TALL) load_half(q, high, t, 1);
    }

    // s[n][c]: scores of tokens 8 n + 2 t + c % 2, rows g (c < 2) and g + 8.
    static DEVICE_MEMBER void scores(float (&s)[2][4], const Query& q, const T* k) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        UNROLL for (int n = 0; n < 2; n++) {
            UNROLL for (int c = 0; c < 4; c++) s[n][c] = 0;
            const T* row = k + (g + 8 * n) * HD;
            UNROLL for (int j = 0; j < PAIRS; j++) {
                Words4 v = *(const Words4*)(row + 32 * j + 8 * t);
                uint32_t b0[2] = {v.w[0], v.w[1]}, b1[2] = {v.w[2], v.w[3]};
                multiply(s[n], q, 2 * j, b0);
                multiply(s[n], q, 2 * j + 1, b1);
            }
            if (HD % 32) {
                Words2 v = *(const Words2*)(row + 32 * PAIRS + 4 * t);
                uint32_t b[2] = {v.w[0], v.w[1]};
                multiply(s[n], q, STEPS - 1, b);
            }
        }
    }

    // o += p v. Tokens outside [first, end) of the page are taken as zero rows whatever they hold.
    template <bool MASKED>
    static DEVICE_MEMBER void add_values(float (&o)[TILES][4], const float (&p)[2][4], const T* v, int first, int end) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        uint32_t a[4] = {pack2<T>(p[0][0], p[0][1]), TALL ? pack2<T>(p[0][2], p[0][3]) : 0u,
                         pack2<T>(p[1][0], p[1][1]), TALL ? pack2<T>(p[1][2], p[1][3]) : 0u};
        const int tokens[4] = {2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9};
        UNROLL for (int set = 0; set < SETS; set++) {
            Words4 row[4];
            UNROLL for (int r = 0; r < 4; r++) {
                row[r] = *(const Words4*)(v + tokens[r] * HD + 64 * set + 8 * g);
                if (MASKED && (tokens[r] < first || tokens[r] >= end)) row[r] = Words4{{0, 0, 0, 0}};
            }
            UNROLL for (int i = 0; i < 8; i++) {
                uint32_t order = i % 2 ? 0x7632 : 0x5410;
                uint32_t b[2] = {permute_bytes(row[0].w[i / 2], row[1].w[i / 2], order),
                                 permute_bytes(row[2].w[i / 2], row[3].w[i / 2], order)};
                mma<T>(o[8 * set + i], a, b);
            }
        }
        if constexpr (REST > 0) {
            uint32_t row[4][EACH / 2];
            UNROLL for (int r = 0; r < 4; r++) {
                const uint32_t* at = (const uint32_t*)(v + tokens[r] * HD + 64 * SETS + EACH * g);
                UNROLL for (int i = 0; i < EACH / 2; i++)
                    row[r][i] = MASKED && (tokens[r] < first || tokens[r] >= end) ? 0 : at[i];
            }
            UNROLL for (int i = 0; i < EACH; i++) {
                uint32_t order = i % 2 ? 0x7632 : 0x5410;
                uint32_t b[2] = {permute_bytes(row[0][i / 2], row[1][i / 2], order),
                                 permute_bytes(row[2][i / 2], row[3][i / 2], order)};
                mma<T>(o[8 * SETS + i], a, b);
            }
        }
    }

    // The dimension that element c (0 or 1 of a row) of output tile `tile` is.
    static DEVICE_MEMBER int dimension(int tile, int c) {
        const int t = lane_index() % 4;
        return tile < 8 * SETS ? tile / 8 * 64 + 8 * (2 * t + c) + tile % 8
                               : 64 * SETS + EACH * (2 * t + c) + tile - 8 * SETS;
    }

  private:
    static DEVICE_MEMBER void multiply(float (&s)[4], const Query& q, int step, const uint32_t (&b)[2]) {
        uint32_t a[4] = {q.w[step][0], TALL ? q.w[step][TALL ? 2 : 0] : 0u, q.w[step][1],
                         TALL ? q.w[step][TALL ? 3 : 1] : 0u};
        mma<T>(s, a, b);
    }

    static DEVICE_MEMBER void load_half(Query& q, const T* row, int t, int half) {
        const int h = 2 * half;
        UNROLL for (int j = 0; j < PAIRS; j++) {
            Words4 v = row ? *(const Words4*)(row + 32 * j + 8 * t) : Words4{{0, 0, 0, 0}};
            q.w[2 * j][h] = v.w[0];
            q.w[2 * j][h + 1] = v.w[1];
            q.w[2 * j + 1][h] = v.w[2];
            q.w[2 * j + 1][h + 1] = v.w[3];
        }
        if (HD % 32) {
            Words2 v = row ? *(const Words2*)(row + 32 * PAIRS + 4 * t) : Words2{{0, 0}};
            q.w[STEPS - 1][h] = v.w[0];
            q.w[STEPS - 1][h + 1] = v.w[1];
        }
    }
};

// Running maximum, sum and scale of a row pair (g, g + 8) in an online softmax, base 2.
struct Softmax {
    float max[2], sum[2];

    DEVICE_MEMBER void reset() {
        max[0] = max[1] = NEGATIVE_INFINITY;
        sum[0] = sum[1] = 0;
    }

    // Turns scores into probabilities relative to the new maximum; `rescale` is what earlier output
    // must be multiplied with. Sums stay per lane until finish().
    template <bool TALL> DEVICE_MEMBER bool update(float (&s)[2][4], float scale, float (&rescale)[2]) {
        bool moved = false;
        UNROLL for (int r = 0; r < (TALL ? 2 : 1); r++) {
            float m = fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
            m = fmaxf(m, shuffle_xor(m, 1));
            m = fmaxf(m, shuffle_xor(m, 2)) * scale;
            m = fmaxf(m, max[r]);
            rescale[r] = m == max[r] ? 1.0f : exp2_fast(max[r] - m);
            moved |= m != max[r];
            max[r] = m;
            float base = m == NEGATIVE_INFINITY ? 0.0f : m;
            float total = 0;
            UNROLL for (int n = 0; n < 2; n++) {
                UNROLL for (int c = 0; c < 2; c++) {
                    float p = exp2_fast(s[n][2 * r + c] * scale - base);
                    s[n][2 * r + c] = p;
                    total += p;
                }
            }
            sum[r] = sum[r] * rescale[r] + total;
        }
        if (!TALL) rescale[1] = 1.0f;
        return vote(moved) != 0;
    }

    // Sums over the four lanes of a row.
    DEVICE_MEMBER void finish() {
        UNROLL for (int r = 0; r < 2; r++) {
            sum[r] += shuffle_xor(sum[r], 1);
            sum[r] += shuffle_xor(sum[r], 2);
        }
    }
};
