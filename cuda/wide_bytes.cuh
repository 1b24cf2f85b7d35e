// Columns whose weights are whole numbers in a byte each, in a product of linear_wide.cuh: the MLP router's first matrix
// beside q, k and v. Half the bytes; the kernel that narrows the sums multiplies them with a column's factor.
//
// Of 128 columns a step of 64 k is 8 KiB one after another, zeros where there are none:
//   [tile of 128 columns][step of 64 k][warp, 16 columns][column g, column g + 8][lane 4 g + t][16 k][2t, 2t + 1, 2t + 8, 2t + 9]
// which are the numbers of a lane's operands in order: it widens 16 bytes of each of two columns to what it holds of a
// for four products, out of its own copies. Only x is shared by the block. Stages are smaller than those of 16-bit weights and as
// many more.
#pragma once
#include "linear_wide.cuh"

namespace wide {

// Sums of the `tile`th 128 of those columns, as multiply() leaves them.
template <class T, int NT, int LESS_DEPTH>
DEVICE void multiply_bytes(const LinearParams& p, uint32_t tile, const Part& steps, float (&c)[NT][4]) {
    constexpr uint32_t X_BYTES = NT * 8 * LINE, W_BYTES = COLUMNS * STEP, STAGE = W_BYTES + X_BYTES;
    constexpr int DEPTH = LESS_DEPTH * (2 * TILE + X_BYTES) / STAGE;
    let_next_start();
    SHARED_BYTES(shared);
    const uint32_t thread = thread_index(), own = warp_index() * 1024 + lane_index() * 16;
    const uint32_t all = (p.k + STEP - 1) / STEP;
    const char* from = (const char*)p.bytes + ((uint64_t)tile * all + steps.from) * W_BYTES + own;
    auto issue_w = [&](uint32_t s, unsigned char* stage) {
        UNROLL for (uint32_t half = 0; half < 2; half++)
            copy_async16(stage + own + half * 512, from + s * W_BYTES + half * 512, true);
    };
    auto issue_x = [&](uint32_t s, unsigned char* stage) { copy_x<T, NT, W_BYTES>(p, thread, steps(s), stage); };
    UNROLL for (int n = 0; n < NT; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
    for (uint32_t s = 0; s < DEPTH - 1; s++)
        if (s < steps.count) issue_w(s, shared + s * STAGE);
    wait_for_previous();
    for (uint32_t s = 0; s < DEPTH - 1; s++) {
        if (s < steps.count) issue_x(s, shared + s * STAGE);
        copy_commit();
    }
    through_stages<STAGE, DEPTH>(
        shared, steps.count, [](uint32_t) {},
        [&](uint32_t, unsigned char* stage) {
            const Words4 low = *(const Words4*)(stage + own), high = *(const Words4*)(stage + own + 512);
            uint32_t a[STEP / 16][4];
            UNROLL for (int k16 = 0; k16 < STEP / 16; k16++) {
                widen_bytes<T>(low.w[k16], a[k16][0], a[k16][2]);
                widen_bytes<T>(high.w[k16], a[k16][1], a[k16][3]);
            }
            matrix_begin();
            UNROLL for (int k16 = 0; k16 < STEP / 16; k16++) matrix_multiply_held<T>(c, a[k16], stage + W_BYTES, k16);
            matrix_end();
        },
        [&](uint32_t s, unsigned char* stage) {
            issue_w(s, stage);
            issue_x(s, stage);
        });
}

}  // namespace wide
