// out[split][row][column] = sum over the split's k of x[row][k] w: products with many rows (prompts), any shape.
//   linear_tile_nt: w[column][k];  linear_tile_nn: w[k][column].
//
// A block computes 128 x 128, eight warps 64 x 32 each, from a ring of three stages of 64 k. Both
// operands are used as they lie (see linear_skinny, linear_down); 16-byte pieces are stored at
// piece ^ f(row) so that eight lanes read eight banks. Traffic per block and stage: 32 KiB for
// 2 MFLOP, from the L2; blocks that share weights run together.
#include "common.cuh"

namespace tile {

constexpr int ROWS = 128, COLUMNS = 128, DEPTH = 3, STEP = 64;
constexpr int STAGE = (ROWS + COLUMNS) * STEP * 2;

template <class T, bool NN> DEVICE void run(const LinearParams& p) {
    SHARED_BYTES(shared);
    const int lane = lane_index(), g = lane / 4, t = lane % 4, warp = warp_index();
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    const uint32_t column_tiles = (p.n + COLUMNS - 1) / COLUMNS, split = block_y() / column_tiles;
    const uint32_t row0 = block_x() * ROWS, column0 = block_y() % column_tiles * COLUMNS;
    const uint32_t all = (p.k + STEP - 1) / STEP;
    const uint32_t from = (uint32_t)((uint64_t)all * split / p.splits);
    const uint32_t steps = (uint32_t)((uint64_t)all * (split + 1) / p.splits) - from;

    auto issue = [&](uint32_t s) {
        if (s < steps) {
            unsigned char* a = shared + s % DEPTH * STAGE;
            unsigned char* b = a + ROWS * STEP * 2;
            const uint32_t k0 = (from + s) * STEP;
            for (int i = thread_index(); i < ROWS * 8; i += 256) {
                const uint32_t r = i / 8, c = i % 8, k = k0 + 8 * c;
                const bool valid = row0 + r < p.rows && k < p.k;
                copy_async16(a + r * 128 + ((c ^ ((r & 1) << 2)) * 16),
                             valid ? (const void*)((const T*)p.x + (uint64_t)(row0 + r) * p.k + k) : p.x, valid);
            }
            if (!NN) {
                for (int i = thread_index(); i < COLUMNS * 8; i += 256) {
                    const uint32_t r = i / 8, c = i % 8, k = k0 + 8 * c;
                    const bool valid = column0 + r < p.n && k < p.k;
                    copy_async16(b + r * 128 + ((c ^ ((r & 1) << 2)) * 16),
                                 valid ? (const void*)((const T*)p.w + (uint64_t)(column0 + r) * p.k + k) : p.w, valid);
                }
            } else {
                for (int i = thread_index(); i < STEP * 16; i += 256) {
                    const uint32_t r = i / 16, c = i % 16, column = column0 + 8 * c;
                    const bool valid = k0 + r < p.k && column < p.n;
                    copy_async16(b + r * 256 + ((c ^ ((r >> 2 & 3) << 1)) * 16),
                                 valid ? (const void*)((const T*)p.w + (uint64_t)(k0 + r) * p.n + column) : p.w, valid);
                }
            }
        }
        copy_commit();
    };

    float c[4][4][4];
    UNROLL for (int m = 0; m < 4; m++) {
        UNROLL for (int n = 0; n < 4; n++) c[m][n][0] = c[m][n][1] = c[m][n][2] = c[m][n][3] = 0;
    }
    for (int s = 0; s < DEPTH - 1; s++) issue(s);
    for (uint32_t s = 0; s < steps; s++) {
        copy_wait<DEPTH - 2>();
        sync_block();
        issue(s + DEPTH - 1);
        const unsigned char* a_stage = shared + s % DEPTH * STAGE;
        const unsigned char* b_stage = a_stage + ROWS * STEP * 2;
        if (!NN) {
            UNROLL for (int h = 0; h < 2; h++) {  // 32 k each: lane t has k 8 t .. 8 t + 7
                const int piece = ((4 * h + t) ^ ((g & 1) << 2)) * 16;
                Words4 b[4];
                UNROLL for (int n = 0; n < 4; n++)
                    b[n] = *(const Words4*)(b_stage + (warp_column + 8 * n + g) * 128 + piece);
                UNROLL for (int m = 0; m < 4; m++) {
                    const unsigned char* at = a_stage + (warp_row + 16 * m + g) * 128 + piece;
                    const Words4 low = *(const Words4*)at, high = *(const Words4*)(at + 8 * 128);
                    UNROLL for (int q = 0; q < 2; q++) {
                        uint32_t av[4] = {low.w[2 * q], high.w[2 * q], low.w[2 * q + 1], high.w[2 * q + 1]};
                        UNROLL for (int n = 0; n < 4; n++) {
                            uint32_t bv[2] = {b[n].w[2 * q], b[n].w[2 * q + 1]};
                            mma<T>(c[m][n], av, bv);
                        }
                    }
                }
            }
        } else {
            UNROLL for (int h = 0; h < 4; h++) {  // 16 k each: lane t has k 4 t .. 4 t + 3
                Words2 row[4];
                const int at_column = warp_column + 4 * g;  // four columns a lane
                UNROLL for (int r = 0; r < 4; r++) {
                    const int k = 16 * h + 4 * t + r;
                    row[r] = *(const Words2*)(b_stage + k * 256 + ((at_column / 8) ^ ((k >> 2 & 3) << 1)) * 16 +
                                              at_column % 8 * 2);
                }
                UNROLL for (int m = 0; m < 4; m++) {
                    const int piece = ((2 * h + t / 2) ^ ((g & 1) << 2)) * 16 + t % 2 * 8;
                    const unsigned char* at = a_stage + (warp_row + 16 * m + g) * 128 + piece;
                    const Words2 low = *(const Words2*)at, high = *(const Words2*)(at + 8 * 128);
                    uint32_t av[4] = {low.w[0], high.w[0], low.w[1], high.w[1]};
                    UNROLL for (int n = 0; n < 4; n++) {
                        const uint32_t order = n % 2 ? 0x7632 : 0x5410;
                        uint32_t bv[2] = {permute_bytes(row[0].w[n / 2], row[1].w[n / 2], order),
                                          permute_bytes(row[2].w[n / 2], row[3].w[n / 2], order)};
                        mma<T>(c[m][n], av, bv);
                    }
                }
            }
        }
    }
    UNROLL for (int m = 0; m < 4; m++) {
        UNROLL for (int n = 0; n < 4; n++) {
            UNROLL for (int i = 0; i < 4; i++) {
                const uint32_t r = row0 + warp_row + 16 * m + g + 8 * (i / 2);
                const uint32_t column = column0 + warp_column + (NN ? 4 * (2 * t + i % 2) + n : 8 * n + 2 * t + i % 2);
                if (r < p.rows && column < p.n) p.out[((uint64_t)split * p.rows + r) * p.n + column] = c[m][n][i];
            }
        }
    }
}

}  // namespace tile

KERNEL(256, 1) linear_tile_nt_bf16(const GRID_CONSTANT LinearParams p) { begin_kernel(); tile::run<bf16, false>(p); }
KERNEL(256, 1) linear_tile_nn_bf16(const GRID_CONSTANT LinearParams p) { begin_kernel(); tile::run<bf16, true>(p); }
KERNEL(256, 1) linear_tile_nt_f16(const GRID_CONSTANT LinearParams p) { begin_kernel(); tile::run<f16, false>(p); }
KERNEL(256, 1) linear_tile_nn_f16(const GRID_CONSTANT LinearParams p) { begin_kernel(); tile::run<f16, true>(p); }
