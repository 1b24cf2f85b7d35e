// out[split][row][column] = sum over the split's j of y[row][j] w[index[j]][column], for up to 64
// rows: the down product of a selective MLP, whole rows of the transposed matrix. Without `index`
// row j itself, which is the dense product on the same tensor. `mlp_down` makes y = relu(up + bias) itself
// from the sums of the first product, up to 16 rows: a kernel less between the two.
//
// Traffic: each selected row of w is read once, in pieces of 512 bytes a block (256 with two column warps). Rows of w are the sum's
// side, so fragments need two rows' elements side by side: a lane reads 16 bytes of four rows (4 t ..
// 4 t + 3 of 16) and pairs them by byte permutation, column 8 g + i of 64 being column g of product i.
// Eight lanes copy a whole 128-byte piece of one row (requests of 32 bytes would halve the rate), so
// a stage is a warp's tile of 16 rows by 8 pieces, piece c of row r at c ^ (r / 4 * 2): both sides touch
// all banks. Stages belong to one warp. y is the block's, staged in shared memory CHUNK columns at a time,
// a barrier before and after; weights stay under way meanwhile. Warps share a block's columns, 64 each, and
// its steps, every WARPS / COLUMN_WARPS'th each; at the end the latter's sums are added.
#include "common.cuh"

namespace down {

constexpr int STEP = 16, WARPS = 8, THREADS = 32 * WARPS;
constexpr DEVICE int chunk(int mt) { return mt > 2 ? 256 : 512; }  // columns
constexpr DEVICE int stride(int mt) { return 2 * chunk(mt) + 32; }  // bytes; 32 keep four rows on different banks

// y from memory. Columns from k on become zero, up to `count`.
template <class T, int MT> struct Given {
    const LinearParams& p;
    DEVICE_MEMBER void stage(unsigned char* y, uint32_t j0, uint32_t count) const {
        const uint32_t pieces = count / 8;
        UNROLL_BY(4) for (uint32_t i = thread_index(); i < p.rows * pieces; i += THREADS) {
            const uint32_t r = i / pieces, j = i % pieces * 8;
            Words4 v = {{0, 0, 0, 0}};
            if (j0 + j < p.k) v = *(const Words4*)((const T*)p.x + (uint64_t)r * p.k + j0 + j);
            *(Words4*)(y + r * stride(MT) + 2 * j) = v;
        }
    }
};

// y from the first product's sums: four lanes share four columns, each adds every fourth part.
template <class T, int MT> struct Made {
    const DownParams& p;
    DEVICE_MEMBER void stage(unsigned char* y, uint32_t j0, uint32_t count) const {
        const uint32_t quads = count / 4, q = thread_index() % 4;
        const uint64_t part = (uint64_t)p.rows * p.up.columns;
        for (uint32_t from = thread_index() / 32 * 32; from < 4 * p.rows * quads; from += THREADS) {
            const uint32_t i = (from + lane_index()) / 4, r = i / quads, j = i % quads * 4;
            const bool inside = r < p.rows && j0 + j < p.k;
            Floats4 sum = {{0, 0, 0, 0}};
            float bias = 0;
            if (inside) {
                const float* at = p.up.data + (uint64_t)r * p.up.columns + j0 + j;
                UNROLL_BY(4) for (uint32_t s = q; s < p.up.splits; s += 4) {
                    const Floats4 v = *(const Floats4*)(at + s * part);
                    UNROLL for (int e = 0; e < 4; e++) sum.v[e] += v.v[e];
                }
                if (p.up_bias) bias = to_float(((const T*)p.up_bias)[load_early(p.index + j0 + j + q)]);
            }
            float mine = 0;
            UNROLL for (uint32_t e = 0; e < 4; e++) {
                float whole = sum.v[e] + shuffle_xor(sum.v[e], 1);
                whole += shuffle_xor(whole, 2);
                if (e == q) mine = whole;
            }
            mine += bias;
            if (r < p.rows)
                *(T*)(y + r * stride(MT) + 2 * (j + q)) = from_float<T>(inside && j0 + j + q < p.valid && mine > 0 ? mine : 0.0f);
        }
    }
};

// Rows of w from `listed` on are not read. READY: the list was complete before the kernel ahead of this one began, so weights start at once.
template <class T, int MT, int DEPTH, int COLUMN_WARPS, bool READY, class Y, class P>
DEVICE void run(const P& p, const Y& y, uint32_t listed) {
    constexpr int SHARES = WARPS / COLUMN_WARPS, W_BYTES = 4 * 512, CHUNK_ROUNDS = chunk(MT) / (SHARES * STEP);
    let_next_start();
    if (!READY) wait_for_previous();
    SHARED_BYTES(shared);
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const int share = warp / COLUMN_WARPS;
    unsigned char* w_mine = shared + warp * DEPTH * W_BYTES;
    unsigned char* y_shared = shared + WARPS * DEPTH * W_BYTES;
    const uint32_t column0 = block_x() * 64 * COLUMN_WARPS + warp % COLUMN_WARPS * 64;
    const uint32_t piece = lane % 8, quarter = lane / 8, column = column0 + 8 * piece;

    const uint32_t all = (p.k + STEP - 1) / STEP;
    const uint32_t from = (uint32_t)((uint64_t)all * block_y() / p.splits);
    const uint32_t end = (uint32_t)((uint64_t)all * (block_y() + 1) / p.splits);
    const uint32_t steps = end > from + share ? (end - from - share + SHARES - 1) / SHARES : 0;
    const uint32_t rounds = (end - from + SHARES - 1) / SHARES;  // the same for every warp

    // Row numbers are fetched a step before their rows, the first ones together: else each would be waited for.
    uint32_t rows[DEPTH][4];
    auto look_up = [&](uint32_t s, uint32_t (&to)[4]) {
        const uint32_t j0 = (from + share + s * SHARES) * STEP + 4 * quarter;
        if (p.index && s < steps && j0 < p.k) load_early(p.index + j0, to);
        else
            UNROLL for (int r = 0; r < 4; r++) to[r] = j0 + r;
    };
    auto issue = [&](uint32_t s, const uint32_t (&numbers)[4]) {
        if (s < steps) {
            const uint32_t j0 = (from + share + s * SHARES) * STEP + 4 * quarter;
            UNROLL for (int r = 0; r < 4; r++) {
                const bool valid = j0 + r < listed && column < p.n;
                const uint64_t row = valid ? numbers[r] : 0;
                copy_async16(w_mine + s % DEPTH * W_BYTES + (4 * quarter + r) * 128 + (piece ^ (2 * quarter)) * 16,
                             valid ? (const void*)((const T*)p.w + row * p.n + column) : p.w, valid);
            }
        }
        copy_commit();
    };

    float c[MT][8][4];
    UNROLL for (int m = 0; m < MT; m++) {
        UNROLL for (int n = 0; n < 8; n++) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
    }
    UNROLL for (int s = 0; s < DEPTH; s++) look_up(s, rows[s]);
    UNROLL for (int s = 0; s < DEPTH - 1; s++) issue(s, rows[s]);
    if (READY) wait_for_previous();
    for (uint32_t s = 0; s < rounds; s++) {
        if (s % CHUNK_ROUNDS == 0) {
            const uint32_t left = rounds - s;
            if (s) sync_block();
            y.stage(y_shared, (from + s * SHARES) * STEP, (left < CHUNK_ROUNDS ? left : CHUNK_ROUNDS) * SHARES * STEP);
            sync_block();
        }
        copy_wait<DEPTH - 2>();
        sync_warp();
        issue(s + DEPTH - 1, rows[DEPTH - 1]);
        look_up(s + DEPTH, rows[DEPTH - 1]);
        if (s >= steps) continue;
        const unsigned char* w = w_mine + s % DEPTH * W_BYTES;
        const unsigned char* x = y_shared + 2 * ((s % CHUNK_ROUNDS * SHARES + share) * STEP + 4 * t) + g * stride(MT);
        Words4 row[4];
        UNROLL for (int r = 0; r < 4; r++) row[r] = *(const Words4*)(w + (4 * t + r) * 128 + (g ^ (2 * t)) * 16);
        uint32_t a[MT][4];
        UNROLL for (int m = 0; m < MT; m++) {
            Words2 low = *(const Words2*)(x + 16 * m * stride(MT)), high = *(const Words2*)(x + (16 * m + 8) * stride(MT));
            a[m][0] = low.w[0];
            a[m][1] = high.w[0];
            a[m][2] = low.w[1];
            a[m][3] = high.w[1];
        }
        UNROLL for (int i = 0; i < 8; i++) {
            const uint32_t order = i % 2 ? 0x7632 : 0x5410;
            uint32_t b[2] = {permute_bytes(row[0].w[i / 2], row[1].w[i / 2], order),
                             permute_bytes(row[2].w[i / 2], row[3].w[i / 2], order)};
            UNROLL for (int m = 0; m < MT; m++) mma<T>(c[m][i], a[m], b);
        }
    }
    copy_wait<0>();

    // The other shares hand their sums to share 0 through shared memory.
    constexpr int HANDED = 32 * MT * 32;  // floats of a warp
    auto place = [&](int from_share, int m, int n, int i) {
        const int which = (from_share - 1) * COLUMN_WARPS + warp % COLUMN_WARPS;
        return (float*)shared + which * HANDED + ((m * 8 + n) * 4 + i) * 32 + lane;
    };
    sync_block();
    if (share) {
        UNROLL for (int m = 0; m < MT; m++) {
            UNROLL for (int n = 0; n < 8; n++) {
                UNROLL for (int i = 0; i < 4; i++) *place(share, m, n, i) = c[m][n][i];
            }
        }
    }
    sync_block();
    if (share) return;
    float* out = p.out + (uint64_t)block_y() * p.rows * p.n;
    UNROLL for (int m = 0; m < MT; m++) {
        UNROLL for (int i = 0; i < 4; i++) {
            const uint32_t r = 16 * m + g + 8 * (i / 2), to = column0 + 8 * (2 * t + i % 2);
            if (r >= p.rows || to >= p.n) continue;
            UNROLL for (int n = 0; n < 8; n += 4) {
                Floats4 v;
                UNROLL for (int j = 0; j < 4; j++) {
                    v.v[j] = c[m][n + j][i];
                    UNROLL for (int other = 1; other < SHARES; other++) v.v[j] += *place(other, m, n + j, i);
                }
                *(Floats4*)(out + (uint64_t)r * p.n + to + n) = v;
            }
        }
    }
}

template <class T, int MT, int DEPTH> DEVICE void given(const LinearParams& p) {
    run<T, MT, DEPTH, 4, false>(p, Given<T, MT>{p}, p.k);
}
template <class T, int DEPTH, int COLUMN_WARPS> DEVICE void made(const DownParams& p) {
    run<T, 1, DEPTH, COLUMN_WARPS, true>(p, Made<T, 1>{p}, p.valid);
}

}  // namespace down

// Rows up to 16, 32, 64; the depths keep about 112 KiB under way a multiprocessor.
#define DOWN(type)                                                                                                     \
    KERNEL(256, 2) linear_down_##type##_1(const GRID_CONSTANT LinearParams p) { down::given<type, 1, 5>(p); }          \
    KERNEL(256, 2) linear_down_##type##_2(const GRID_CONSTANT LinearParams p) { down::given<type, 2, 5>(p); }          \
    KERNEL(256, 1) linear_down_##type##_4(const GRID_CONSTANT LinearParams p) { down::given<type, 4, 8>(p); }          \
    KERNEL(256, 2) mlp_down_##type(const GRID_CONSTANT DownParams p) { down::made<type, 5, 4>(p); }                    \
    KERNEL(256, 1) mlp_down_deep_##type(const GRID_CONSTANT DownParams p) { down::made<type, 9, 4>(p); }               \
    KERNEL(256, 1) mlp_down_narrow_##type(const GRID_CONSTANT DownParams p) { down::made<type, 9, 2>(p); }
DOWN(bf16)
DOWN(f16)
#undef DOWN
