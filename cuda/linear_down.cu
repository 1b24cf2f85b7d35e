// out[split][row][column] = sum over the split's j of x[row][j] w[index[j]][column], for up to 64
// rows: the down product of a selective MLP, whole rows of the transposed matrix. Without `index`
// row j itself, which is the dense product on the same tensor.
//
// Traffic: each selected row of w is read once, in pieces of 512 bytes a block. Rows of w are the sum's
// side, so fragments need two rows' elements side by side: a lane reads 16 bytes of four rows (4 t ..
// 4 t + 3 of 16) and pairs them by byte permutation, column 8 g + i of 64 being column g of product i.
// Eight lanes copy a whole 128-byte piece of one row (requests of 32 bytes would halve the rate), so
// a stage is a warp's tile of 16 rows by 8 pieces, piece c of row r at c ^ (r / 4 * 2): both sides touch
// all banks. Stages belong to one warp: no block barrier until the end, when the two halves of the
// warps (even and odd steps) are added.
#include "common.cuh"

namespace down {

constexpr int COLUMN_WARPS = 4, HALVES = 2, STEP = 16;
constexpr int COLUMNS = 64 * COLUMN_WARPS;

template <class T, int MT> DEVICE void run(const LinearParams& p) {
    constexpr int DEPTH = MT > 2 ? 4 : 5, W_BYTES = 4 * 512, X_BYTES = 2 * MT * 256;
    begin_kernel();
    SHARED_BYTES(shared);
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const int half = warp / COLUMN_WARPS;
    unsigned char* w_mine = shared + warp * DEPTH * W_BYTES;
    unsigned char* x_mine = shared + COLUMN_WARPS * HALVES * DEPTH * W_BYTES + warp * DEPTH * X_BYTES + lane * 8;
    const uint32_t column0 = block_x() * COLUMNS + warp % COLUMN_WARPS * 64;
    const uint32_t piece = lane % 8, quarter = lane / 8, column = column0 + 8 * piece;

    const uint32_t all = (p.k + STEP - 1) / STEP;
    const uint32_t from = (uint32_t)((uint64_t)all * block_y() / p.splits);
    const uint32_t end = (uint32_t)((uint64_t)all * (block_y() + 1) / p.splits);
    const uint32_t steps = end > from + half ? (end - from - half + HALVES - 1) / HALVES : 0;

    // Row numbers are fetched a step before their rows, else each step would wait for them.
    uint32_t rows[4];
    auto look_up = [&](uint32_t s) {
        const uint32_t j0 = (from + half + s * HALVES) * STEP + 4 * quarter;
        if (p.index && s < steps && j0 < p.k) {
            const Words4 four = *(const Words4*)(p.index + j0);
            UNROLL for (int r = 0; r < 4; r++) rows[r] = four.w[r];
        } else {
            UNROLL for (int r = 0; r < 4; r++) rows[r] = j0 + r;
        }
    };
    auto issue = [&](uint32_t s) {
        if (s < steps) {
            const uint32_t step0 = (from + half + s * HALVES) * STEP, j0 = step0 + 4 * t;
            UNROLL for (int r = 0; r < 4; r++) {
                const bool valid = step0 + 4 * quarter < p.k && column < p.n;
                const uint64_t row = valid ? rows[r] : 0;
                copy_async16(w_mine + s % DEPTH * W_BYTES + (4 * quarter + r) * 128 + (piece ^ (2 * quarter)) * 16,
                             valid ? (const void*)((const T*)p.w + row * p.n + column) : p.w, valid);
            }
            UNROLL for (int r = 0; r < 2 * MT; r++) {
                // k is a multiple of 8, so the four elements are all inside or all outside.
                const uint32_t x_row = 8 * r + g;
                const bool valid = x_row < p.rows && j0 < p.k;
                copy_async8(x_mine + s % DEPTH * X_BYTES + r * 256,
                            valid ? (const void*)((const T*)p.x + (uint64_t)x_row * p.k + j0) : p.x, valid);
            }
        }
        look_up(s + 1);
        copy_commit();
    };

    float c[MT][8][4];
    UNROLL for (int m = 0; m < MT; m++) {
        UNROLL for (int n = 0; n < 8; n++) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
    }
    look_up(0);
    for (int s = 0; s < DEPTH - 1; s++) issue(s);
    for (uint32_t s = 0; s < steps; s++) {
        copy_wait<DEPTH - 2>();
        sync_warp();
        issue(s + DEPTH - 1);
        const unsigned char* w = w_mine + s % DEPTH * W_BYTES;
        const unsigned char* x = x_mine + s % DEPTH * X_BYTES;
        Words4 row[4];
        UNROLL for (int r = 0; r < 4; r++) row[r] = *(const Words4*)(w + (4 * t + r) * 128 + (g ^ (2 * t)) * 16);
        uint32_t a[MT][4];
        UNROLL for (int m = 0; m < MT; m++) {
            Words2 low = *(const Words2*)(x + 2 * m * 256), high = *(const Words2*)(x + (2 * m + 1) * 256);
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

    // Half 1 hands its sums to half 0 through shared memory.
    float* exchange = (float*)shared + (warp % COLUMN_WARPS) * 32 * MT * 32;
    sync_block();
    if (half == 1) {
        UNROLL for (int m = 0; m < MT; m++) {
            UNROLL for (int n = 0; n < 8; n++) {
                UNROLL for (int i = 0; i < 4; i++) exchange[((m * 8 + n) * 4 + i) * 32 + lane] = c[m][n][i];
            }
        }
    }
    sync_block();
    if (half == 1) return;
    float* out = p.out + (uint64_t)block_y() * p.rows * p.n;
    UNROLL for (int m = 0; m < MT; m++) {
        UNROLL for (int i = 0; i < 4; i++) {
            const uint32_t r = 16 * m + g + 8 * (i / 2), to = column0 + 8 * (2 * t + i % 2);
            if (r >= p.rows || to >= p.n) continue;
            UNROLL for (int n = 0; n < 8; n += 4) {
                Floats4 v;
                UNROLL for (int j = 0; j < 4; j++)
                    v.v[j] = c[m][n + j][i] + exchange[((m * 8 + n + j) * 4 + i) * 32 + lane];
                *(Floats4*)(out + (uint64_t)r * p.n + to + n) = v;
            }
        }
    }
}

}  // namespace down

#define DOWN(type, mt)                                                                      \
    KERNEL(256, mt > 2 ? 1 : 2) linear_down_##type##_##mt(const GRID_CONSTANT LinearParams p) { \
        down::run<type, mt>(p);                                                             \
    }
DOWN(bf16, 1)
DOWN(bf16, 2)
DOWN(bf16, 4)
DOWN(f16, 1)
DOWN(f16, 2)
DOWN(f16, 4)
#undef DOWN
