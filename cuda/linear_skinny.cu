// out[split][row][neuron] = sum over the split's k of x[row][k] w[neuron][k], for up to 64 rows:
// the products of a decode step. In `linear_up`, neuron j is row index[j] of w (selective MLP).
//
// Traffic: each weight is read once from device memory; x is read once per block of neurons from the
// L2, `rows / (64 MT)` bytes per byte of weights. The weights are the 16-row side of m16n8k16, the
// batch its columns. A step is 64 k: eight lanes copy a whole 128-byte piece of one row (smaller requests
// halve the rate), DEPTH steps ahead, into the warp's own tiles of 16 rows by 8 pieces, piece c of row r
// at c ^ (r % 2 * 4), so that both sides touch all banks: no block barrier stands between a weight and its
// use. x is shared by the block, in chunks of 128, one barrier each. The order in which a product sums k
// is free, so both operands are used as they lie: element 8 t + 2 i of 32 is step i / 2.
#include "router_scores.cuh"

namespace skinny {

constexpr int WARPS = 4, STEP = 64, CHUNK = 128, TILE = 16 * STEP * 2;
constexpr int STEPS_PER_CHUNK = CHUNK / STEP;
constexpr int X_STRIDE = CHUNK * 2 + 64;  // bytes; the 64 keep eight lanes on different banks

// The sums of the block's part in `c`: lane 4 g + t has neurons neuron0 + 16 m + g (+ 8 for i > 1) of
// rows 8 n + 2 t + i % 2. LISTED: neuron j is row index[j] of w,
// a list that was complete before the kernel ahead let this one start.
template <class T, int MT, int NT, bool LISTED> DEVICE uint32_t sums(const LinearParams& p, float (&c)[MT][NT][4]) {
    constexpr int DEPTH = MT > 1 ? 3 : LISTED ? 5 : 4, BUFFERS = MT > 1 ? 2 : 3;  // at least two blocks a multiprocessor
    if (!(p.late & LATE_SUCCESSOR)) let_next_start();
    SHARED_BYTES(shared);
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    unsigned char* mine = shared + warp * DEPTH * MT * TILE;
    unsigned char* x_shared = shared + WARPS * DEPTH * MT * TILE;

    // This split's steps.
    const uint32_t all = (p.k + STEP - 1) / STEP;
    const uint32_t from = (uint32_t)((uint64_t)all * block_y() / p.splits);
    const uint32_t steps = (uint32_t)((uint64_t)all * (block_y() + 1) / p.splits) - from;

    const uint32_t neuron0 = (block_x() * WARPS + warp) * 16 * MT;
    const uint32_t piece = lane % 8;
    const T* row[4 * MT];  // rows 4 i + lane / 8 of the warp's
    auto find_rows = [&] {
        UNROLL for (int i = 0; i < 4 * MT; i++) {
            const uint32_t n = neuron0 + 4 * i + lane / 8;
            const uint32_t at = LISTED ? load_early(p.index + (n < p.n ? n : p.n - 1)) : n;
            row[i] = n >= p.n ? nullptr
                : p.more && n >= p.first ? (const T*)p.more + (uint64_t)(n - p.first) * p.k
                : (const T*)p.w + (uint64_t)at * p.k;
        }
    };
    auto issue_w = [&](uint32_t s) {
        const uint32_t k = (from + s) * STEP + 8 * piece;
        unsigned char* to = mine + s % DEPTH * MT * TILE;
        UNROLL for (int i = 0; i < 4 * MT; i++) {
            const uint32_t r = 4 * i + lane / 8;
            const bool valid = row[i] && k < p.k;
            copy_async16(to + r * 128 + (piece ^ (r % 2 * 4)) * 16, valid ? (const void*)(row[i] + k) : p.w, valid);
        }
    };
    auto issue_x = [&](uint32_t s) {
        unsigned char* buffer = x_shared + s / STEPS_PER_CHUNK % BUFFERS * NT * 8 * X_STRIDE;
        constexpr int PER_ROW = CHUNK / 8;
        for (int i = thread_index(); i < NT * 8 * PER_ROW; i += 128) {
            const uint32_t r = i / PER_ROW, c = i % PER_ROW, k = (from + s) * STEP + 8 * c;
            const bool valid = r < p.rows && k < p.k;
            copy_async16(buffer + r * X_STRIDE + c * 16,
                         valid ? (const void*)((const T*)p.x + (uint64_t)r * p.k + k) : p.x, valid);
        }
    };

    UNROLL for (int m = 0; m < MT; m++) {
        UNROLL for (int n = 0; n < NT; n++) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
    }
    // Weights are constants: their loads start before the kernel that makes x has ended.
    if (p.late & LATE_WEIGHTS) wait_for_previous();
    find_rows();
    for (uint32_t s = 0; s < DEPTH - 1; s++)
        if (s < steps) issue_w(s);
    wait_for_previous();
    if (p.late & LATE_SUCCESSOR) let_next_start();
    for (uint32_t s = 0; s < DEPTH - 1; s++) {
        if (s < steps && s % STEPS_PER_CHUNK == 0) issue_x(s);
        copy_commit();
    }
    for (uint32_t s = 0; s < steps; s++) {
        copy_wait<DEPTH - 2>();
        // The chunk that starts here is in place, and the oldest buffer is free.
        if (s % STEPS_PER_CHUNK == 0) sync_block();
        else sync_warp();
        const uint32_t ahead = s + DEPTH - 1;
        if (ahead < steps) {
            issue_w(ahead);
            if (ahead % STEPS_PER_CHUNK == 0) issue_x(ahead);
        }
        copy_commit();
        const unsigned char* w = mine + s % DEPTH * MT * TILE + g * 128;
        const unsigned char* x = x_shared + s / STEPS_PER_CHUNK % BUFFERS * NT * 8 * X_STRIDE +
                                 g * X_STRIDE + s % STEPS_PER_CHUNK * 128 + t * 16;
        UNROLL for (int half = 0; half < 2; half++) {  // 32 k each
            const int at = ((4 * half + t) ^ (g % 2 * 4)) * 16;
            uint32_t a[MT][2][4];
            UNROLL for (int m = 0; m < MT; m++) {
                const Words4 low = *(const Words4*)(w + m * TILE + at), high = *(const Words4*)(w + m * TILE + 1024 + at);
                UNROLL for (int h = 0; h < 2; h++) {
                    a[m][h][0] = low.w[2 * h];
                    a[m][h][1] = high.w[2 * h];
                    a[m][h][2] = low.w[2 * h + 1];
                    a[m][h][3] = high.w[2 * h + 1];
                }
            }
            UNROLL for (int n = 0; n < NT; n++) {
                const Words4 v = *(const Words4*)(x + n * 8 * X_STRIDE + half * 64);
                UNROLL for (int h = 0; h < 2; h++) {
                    uint32_t b[2] = {v.w[2 * h], v.w[2 * h + 1]};
                    UNROLL for (int m = 0; m < MT; m++) mma<T>(c[m][n], a[m][h], b);
                }
            }
        }
    }
    return neuron0;
}

template <class T, int MT, int NT, bool LISTED> DEVICE void run(const LinearParams& p) {
    float c[MT][NT][4];
    const uint32_t neuron0 = sums<T, MT, NT, LISTED>(p, c);
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    float* out = p.out + (uint64_t)block_y() * p.rows * p.n;
    UNROLL for (int m = 0; m < MT; m++) {
        UNROLL for (int n = 0; n < NT; n++) {
            UNROLL for (int i = 0; i < 4; i++) {
                const uint32_t neuron = neuron0 + 16 * m + g + 8 * (i / 2), r = 8 * n + 2 * t + i % 2;
                if (neuron < p.n && r < p.rows) out[(uint64_t)r * p.n + neuron] = c[m][n][i];
            }
        }
    }
}

// The MLP router's second product, straight to the neurons' scores, see router_scores.cuh.
template <class T, int MT, int NT> DEVICE void scores(const RouterParams& p) {
    float c[MT][NT][4];
    const LinearParams product = {p.z, p.w, nullptr, nullptr, p.rows, p.n, p.rank, 1, nullptr, 0, 0};
    const uint32_t neuron0 = sums<T, MT, NT, false>(product, c);
    store_scores(p, neuron0, c);
}

}  // namespace skinny

// Rows up to 8 NT; NT = 8 takes two row tiles a warp, else shared memory reads would bound it. `linear_up`
// is the selective MLP's first product: its list comes from the side stream, joined before the norm ahead of
// it, so the first weights are under way while that norm runs.
#define SKINNY(type, mt, nt)                                                              \
    KERNEL(128, nt > 4 ? 2 : 3) linear_skinny_##type##_##nt(const GRID_CONSTANT LinearParams p) { \
        skinny::run<type, mt, nt, false>(p);                                              \
    }                                                                                     \
    KERNEL(128, nt > 4 ? 2 : 3) linear_up_##type##_##nt(const GRID_CONSTANT LinearParams p) { \
        skinny::run<type, mt, nt, true>(p);                                               \
    }                                                                                     \
    KERNEL(128, nt > 4 ? 2 : 3) router_scores_##type##_##nt(const GRID_CONSTANT RouterParams p) { \
        skinny::scores<type, mt, nt>(p);                                                  \
    }
#define SKINNY_TYPE(type) \
    SKINNY(type, 1, 1)    \
    SKINNY(type, 1, 2)    \
    SKINNY(type, 1, 4)    \
    SKINNY(type, 2, 8)
SKINNY_TYPE(bf16)
SKINNY_TYPE(f16)
#undef SKINNY_TYPE
#undef SKINNY
