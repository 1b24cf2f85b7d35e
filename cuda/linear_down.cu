// out[split][row][column] = sum over the split's j of y[row][j] w[index[j]][column], for up to 64
// rows: the down product of a selective MLP, whole rows of the transposed matrix. Without `index`
// row j itself, which is the dense product on the same tensor. `mlp_down` makes y = relu(up + bias) itself
// from the sums of the first product, for a few rows: a kernel less between the two.
//
// Traffic: each selected row of w is read once, in pieces of 512 bytes a block (256 with two column warps). Rows
// of w are the sum's side, so fragments need two rows' elements side by side: a lane reads 16 bytes of four rows
// (4 t .. 4 t + 3 of 16) and pairs them by byte permutation, column 8 g + i of 64 being column g of product i.
// Eight lanes copy a whole 128-byte piece of one row (requests of 32 bytes would halve the rate), so
// a stage is a warp's tile of 16 rows by 8 pieces, piece c of row r at c ^ (r / 4 * 2): both sides touch
// all banks. Stages belong to one warp. y is the block's, in two buffers of eight rounds' columns each, of which one
// is filled while the other is used: one barrier every eight rounds. Warps share a block's columns, 64 each, and
// its steps, every WARPS / COLUMN_WARPS'th each; at the end the latter's sums are added.
//
// The list was complete before the kernel ahead let this one start, so its weights are under way while that one
// still runs.
#include "common.cuh"

namespace down {

constexpr int STEP = 16, WARPS = 8, THREADS = 32 * WARPS, CHUNK_ROUNDS = 8;
constexpr DEVICE int chunk(int column_warps) { return CHUNK_ROUNDS * (WARPS / column_warps) * STEP; }  // columns of y
// Where column j of row r of a chunk is, bytes. A step's 16 columns move with the row: four rows on different banks.
template <int CHUNK> DEVICE uint32_t y_place(uint32_t r, uint32_t j) {
    return (r * (CHUNK / STEP) + (j / STEP ^ r % 4)) * (2 * STEP) + j % STEP * 2;
}

// y from memory. Both take a chunk's first column and the split's end; columns from k on become zero.
template <class T, int MT, int CHUNK> struct Given {
    const LinearParams& p;
    static constexpr int EACH = 16 * MT * CHUNK / 8 / THREADS;
    // Starts what may start before the chunk is staged: the chunks after the first, as a part of the caller's next group.
    DEVICE_MEMBER void expect(unsigned char* y, uint32_t j0, uint32_t end, bool first) {
        if (first) return;
        UNROLL for (int i = 0; i < EACH; i++) {
            const Piece at(*this, i, j0, end);
            copy_async16(y + at.place, at.valid ? (const void*)at.from : p.x, at.valid);
        }
    }
    // The first chunk goes through registers: a wait for its copy would wait for the weights' as well. All loads
    // come before the first store, else each would be waited for.
    DEVICE_MEMBER void stage(unsigned char* y, uint32_t j0, uint32_t end, bool first) {
        if (!first) return;
        Words4 v[EACH];
        UNROLL for (int i = 0; i < EACH; i++) {
            const Piece at(*this, i, j0, end);
            v[i] = {{0, 0, 0, 0}};
            if (at.valid) v[i] = *(const Words4*)at.from;
        }
        UNROLL for (int i = 0; i < EACH; i++) *(Words4*)(y + Piece(*this, i, j0, end).place) = v[i];
    }
    // A thread's i-th 16 bytes of a chunk.
    struct Piece {
        uint32_t place;
        const T* from;
        bool valid;
        DEVICE_MEMBER Piece(const Given& y, int i, uint32_t j0, uint32_t end) {
            const uint32_t at = i * THREADS + thread_index(), r = at / (CHUNK / 8), j = at % (CHUNK / 8) * 8;
            place = y_place<CHUNK>(r, j);
            from = (const T*)y.p.x + (uint64_t)r * y.p.k + j0 + j;
            valid = r < y.p.rows && j0 + j < end && j0 + j < y.p.k;
        }
    };
};

// y from the first product's sums: four lanes share four columns, each adds every fourth part.
template <class T, int CHUNK> struct Made {
    static constexpr int EACH = CHUNK / THREADS;
    static constexpr uint32_t ROWS = 2, PARTS = 4;  // loads under way together
    const DownParams& p;
    float bias[EACH];
    DEVICE_MEMBER uint32_t quad(int e) const { return (e * THREADS + thread_index()) / 4 * 4; }
    DEVICE_MEMBER void expect(unsigned char*, uint32_t j0, uint32_t, bool) {
        const uint32_t q = thread_index() % 4;
        UNROLL for (int e = 0; e < EACH; e++) {
            const uint32_t j = j0 + quad(e) + q;
            bias[e] = p.up_bias && j < p.valid ? to_float(((const T*)p.up_bias)[load_early(p.index + j)]) : 0.0f;
        }
    }
    DEVICE_MEMBER void stage(unsigned char* y, uint32_t j0, uint32_t end, bool) {
        const uint32_t q = thread_index() % 4;
        const uint64_t part = (uint64_t)p.rows * p.up.columns;
        UNROLL for (int e = 0; e < EACH; e++) {
            const uint32_t j = j0 + quad(e), parts = j < end && j < p.k ? p.up.splits : 0;
            for (uint32_t r0 = 0; r0 < p.rows; r0 += ROWS) {
                Floats4 sum[ROWS] = {};
                for (uint32_t s0 = q; s0 < parts; s0 += 4 * PARTS) {
                    Floats4 v[ROWS][PARTS] = {};
                    UNROLL for (uint32_t r = 0; r < ROWS; r++) {
                        UNROLL for (uint32_t s = 0; s < PARTS; s++) {
                            const float* at = p.up.data + (s0 + 4 * s) * part + (uint64_t)(r0 + r) * p.up.columns + j;
                            if (r0 + r < p.rows && s0 + 4 * s < parts) v[r][s] = *(const Floats4*)at;
                        }
                    }
                    UNROLL for (uint32_t r = 0; r < ROWS; r++) {
                        UNROLL for (uint32_t s = 0; s < PARTS; s++) {
                            UNROLL for (int i = 0; i < 4; i++) sum[r].v[i] += v[r][s].v[i];
                        }
                    }
                }
                UNROLL for (uint32_t r = 0; r < ROWS; r++) {
                    float mine = 0;
                    UNROLL for (uint32_t i = 0; i < 4; i++) {
                        float whole = sum[r].v[i] + shuffle_xor(sum[r].v[i], 1);
                        whole += shuffle_xor(whole, 2);
                        if (i == q) mine = whole;
                    }
                    mine += bias[e];
                    *(T*)(y + y_place<CHUNK>(r0 + r, quad(e) + q)) = from_float<T>(j + q < p.valid && mine > 0 ? mine : 0.0f);
                }
            }
        }
    }
};

// Rows of w from `listed` on are not read.
template <class T, int MT, int DEPTH, int COLUMN_WARPS, class Y, class P>
DEVICE void run(const P& p, Y y, uint32_t listed) {
    constexpr int SHARES = WARPS / COLUMN_WARPS, W_BYTES = 4 * 512, CHUNK = chunk(COLUMN_WARPS), Y_BYTES = 16 * MT * 2 * CHUNK;
    static_assert(DEPTH <= CHUNK_ROUNDS, "a chunk is in place when its first round comes");
    let_next_start();
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
    // Past the end the last ones again (k is a multiple of 8); those are not used.
    uint32_t rows[DEPTH][4];
    auto look_up = [&](uint32_t s, uint32_t (&to)[4]) {
        const uint32_t j0 = (from + share + s * SHARES) * STEP + 4 * quarter;
        load_early(p.index + (j0 < p.k ? j0 : p.k - 4), to);
    };
    auto number = [&](uint32_t s, uint32_t (&to)[4]) {
        UNROLL for (int r = 0; r < 4; r++) to[r] = (from + share + s * SHARES) * STEP + 4 * quarter + r;
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
    if (p.index)
        UNROLL for (int s = 0; s < DEPTH; s++) look_up(s, rows[s]);
    else
        UNROLL for (int s = 0; s < DEPTH; s++) number(s, rows[s]);
    UNROLL for (int s = 0; s < DEPTH - 1; s++) issue(s, rows[s]);
    auto buffer = [&](uint32_t s) { return y_shared + s / CHUNK_ROUNDS % 2 * Y_BYTES; };
    auto column_of = [&](uint32_t s) { return (from + s * SHARES) * STEP; };
    y.expect(y_shared, column_of(0), end * STEP, true);
    wait_for_previous();
    for (uint32_t s = 0; s < rounds; s++) {
        if (s % CHUNK_ROUNDS == 0) {
            const uint32_t next = s + CHUNK_ROUNDS;
            y.stage(buffer(s), column_of(s), end * STEP, s == 0);
            sync_block();
            if (next < rounds) y.expect(buffer(next), column_of(next), end * STEP, false);
        }
        copy_wait<DEPTH - 2>();
        sync_warp();
        issue(s + DEPTH - 1, rows[DEPTH - 1]);
        if (p.index) look_up(s + DEPTH, rows[DEPTH - 1]);
        else number(s + DEPTH, rows[DEPTH - 1]);
        if (s >= steps) continue;
        const unsigned char* w = w_mine + s % DEPTH * W_BYTES;
        const unsigned char* x = buffer(s) + y_place<CHUNK>(g, (s % CHUNK_ROUNDS * SHARES + share) * STEP + 4 * t);
        Words4 row[4];
        UNROLL for (int r = 0; r < 4; r++) row[r] = *(const Words4*)(w + (4 * t + r) * 128 + (g ^ (2 * t)) * 16);
        uint32_t a[MT][4];
        UNROLL for (int m = 0; m < MT; m++) {
            Words2 low = *(const Words2*)(x + 16 * m * 2 * CHUNK), high = *(const Words2*)(x + (16 * m + 8) * 2 * CHUNK);
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

    // The shares' sums meet in shared memory, [share][row][column]; all threads add and write them, whole lines. Four
    // columns together, number q of a row at q ^ (q / 4 % 4) ^ (row % 2), so that both sides touch all banks.
    constexpr int QUADS = 16 * COLUMN_WARPS, ROWS = 16 * MT;
    auto place = [&](int of_share, int row, int quad) {
        return (Floats4*)shared + (of_share * ROWS + row) * QUADS + (quad ^ (quad / 4 % 4) ^ (row % 2));
    };
    sync_block();
    UNROLL for (int m = 0; m < MT; m++) {
        UNROLL for (int n = 0; n < 8; n += 4) {
            UNROLL for (int i = 0; i < 4; i++) {
                Floats4 v;
                UNROLL for (int j = 0; j < 4; j++) v.v[j] = c[m][n + j][i];
                *place(share, 16 * m + g + 8 * (i / 2), warp % COLUMN_WARPS * 16 + 4 * t + i % 2 * 2 + n / 4) = v;
            }
        }
    }
    sync_block();
    float* out = p.out + (uint64_t)block_y() * p.rows * p.n;
    UNROLL for (int e = 0; e < ROWS * QUADS / THREADS; e++) {
        const int at = e * THREADS + thread_index(), r = at / QUADS, quad = at % QUADS;
        const uint32_t to = block_x() * 64 * COLUMN_WARPS + 4 * quad;
        if (r >= (int)p.rows || to >= p.n) continue;
        Floats4 v = *place(0, r, quad);
        UNROLL for (int other = 1; other < SHARES; other++) {
            const Floats4 more = *place(other, r, quad);
            UNROLL for (int j = 0; j < 4; j++) v.v[j] += more.v[j];
        }
        *(Floats4*)(out + (uint64_t)r * p.n + to) = v;
    }
}

template <class T, int MT, int DEPTH, int COLUMN_WARPS> DEVICE void given(const LinearParams& p) {
    run<T, MT, DEPTH, COLUMN_WARPS>(p, Given<T, MT, chunk(COLUMN_WARPS)>{p}, p.k);
}
template <class T, int DEPTH, int COLUMN_WARPS> DEVICE void made(const DownParams& p) {
    run<T, 1, DEPTH, COLUMN_WARPS>(p, Made<T, chunk(COLUMN_WARPS)>{p, {}}, p.valid);
}

}  // namespace down

// Rows up to 16, 32, 64; the depths keep 64 to 128 KiB under way a multiprocessor. Up to 16 rows a block has
// half the columns: half as many parts for the norm to add, and y, which is small, read twice as often; and less
// under way, so that the next kernel's blocks find room early.
#define DOWN(type)                                                                                                     \
    KERNEL(256, 3) linear_down_##type##_1(const GRID_CONSTANT LinearParams p) { down::given<type, 1, 3, 2>(p); }       \
    KERNEL(256, 2) linear_down_##type##_2(const GRID_CONSTANT LinearParams p) { down::given<type, 2, 5, 4>(p); }       \
    KERNEL(256, 1) linear_down_##type##_4(const GRID_CONSTANT LinearParams p) { down::given<type, 4, 8, 4>(p); }       \
    KERNEL(256, 2) mlp_down_##type(const GRID_CONSTANT DownParams p) { down::made<type, 5, 2>(p); }
DOWN(bf16)
DOWN(f16)
#undef DOWN
