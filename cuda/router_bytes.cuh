// The MLP router's second product of bytes with bytes: a quarter of the multiplications' and half of the matrix's bytes
// of a 16-bit one, which are most of what choosing neurons costs. Exact sums of whole numbers, then the scales of the
// row of z and of the neuron; scores as router_scores.cuh has them.
//
// Columns come in pieces of 64: lane 4 g + t multiplies 16 t .. 16 t + 15 of row g, in any order of k as long as
// both sides have the same. So a lane's operands are 16 bytes one after another, and lie so in memory:
//   z  [tile of 8 rows][piece][lane][16 columns]
//   w  [tile of 16 neurons][piece][first or last 8 of these columns][lane]
//      [first or last 4][neuron g, neuron g + 8][4 columns]
// A warp has a tile of neurons. What it multiplies of w, constants, lies in registers: all of it (HELD pieces, a
// rank of 1024) is asked for at once, long before z is there. z is shared by the block. Code is kept short: a kernel of a
// step finds none of its instructions in the caches.
#pragma once
#include "common.cuh"

namespace router_bytes {

constexpr int HELD = 16;         // most pieces
constexpr uint32_t LINE = 512;   // bytes of a piece, of 8 rows

constexpr uint32_t MOST_ROWS = 64;
constexpr uint32_t HEAD = 4 * (2 * MOST_ROWS + 16 * 8);  // bytes: scales and groups of rows, scales of eight warps' neurons

// Shared memory that so many rows of z take, behind those.
DEVICE uint32_t room(uint32_t rows) {
    return (rows <= 8 ? 1 : rows <= 32 ? 4 : 8) * HELD * LINE + HEAD;
}

struct Tile {
    const RouterBytesParams& p;
    unsigned char* z;            // [row tiles][HELD][LINE], behind HEAD
    uint32_t tile;               // of neurons
    uint32_t w[2 * HELD][4];

    uint32_t from = 0;           // pieces that are done

    // In `room` bytes of shared memory.
    DEVICE_MEMBER Tile(const RouterBytesParams& p, unsigned char* shared, uint32_t tile)
        : p(p), z(shared + HEAD), tile(tile) {}
    DEVICE_MEMBER float* z_scales() const { return (float*)(z - HEAD); }
    DEVICE_MEMBER uint32_t* groups() const { return (uint32_t*)z_scales() + MOST_ROWS; }
    DEVICE_MEMBER float* scales() const { return z_scales() + 2 * MOST_ROWS + 16 * warp_index(); }
    DEVICE_MEMBER uint32_t row_tiles() const { return (p.rows + 7) / 8; }

    // Before the kernel ahead has ended.
    DEVICE_MEMBER void load_w() {
        if (16 * tile >= p.n) return;
        const char* at = (const char*)p.w + ((uint64_t)tile * p.pieces + from) * 2 * LINE + 16 * lane_index();
        UNROLL for (int c = 0; c < HELD; c++) {
            UNROLL for (int half = 0; half < 2; half++) {
                // Zeros, so that z may be anything there.
                UNROLL for (int i = 0; i < 4; i++) w[2 * c + half][i] = 0;
                if (from + c < p.pieces) load_constant(at + (2 * c + half) * LINE, w[2 * c + half]);
            }
        }
    }
    // By all threads of the block, when z is complete.
    DEVICE_MEMBER void copy_z() {
        const uint32_t pieces = p.pieces - from < HELD ? p.pieces - from : HELD, each = pieces * LINE;
        const char* source = (const char*)p.z + from * LINE;
        unsigned char* to = z;
        for (uint32_t t = 0; t < row_tiles(); t++, source += p.pieces * LINE, to += HELD * LINE)
            UNROLL_BY(4) for (uint32_t i = 16 * thread_index(); i < each; i += 16 * block_threads())
                copy_async16(to + i, source + i, true);
        copy_commit();
    }
    DEVICE_MEMBER void wait_z() {
        const bool brings = thread_index() < (int)p.rows;
        const float z_scale = brings ? p.z_scales[thread_index()] : 0.0f;
        const uint32_t group = brings ? p.group[thread_index()] : NONE;
        const uint32_t neuron = 16 * tile + lane_index();
        const bool scaled = lane_index() < 16 && neuron < p.n;
        const float scale = scaled ? p.scales[neuron] : 0.0f;
        copy_wait<0>();
        if (scaled) scales()[lane_index()] = scale;
        if (brings) {
            z_scales()[thread_index()] = z_scale;
            groups()[thread_index()] = group;
        }
        sync_block();
    }
    // Shared memory of a warp's sums.
    DEVICE_MEMBER uint32_t sums_size() const { return 512 * (row_tiles() <= 1 ? 1 : row_tiles() <= 4 ? 4 : 8); }
    // Sums as [row][neuron of the tile], which may lie where z does; `more`: added to those.
    template <int NT> DEVICE_MEMBER void multiply_by(int* sums, bool more) {
        constexpr int CHAINS = NT > 2 ? 1 : 2;  // of multiplications, each waiting for the one before, for a row tile
        int c[NT][CHAINS][4] = {};
        const unsigned char* from = z + 16 * lane_index();
        UNROLL for (int k = 0; k < HELD; k++) {
            UNROLL for (int n = 0; n < NT; n++) {
                const Words4 v = *(const Words4*)(from + (n * HELD + k) * LINE);
                UNROLL for (int half = 0; half < 2; half++) {
                    const uint32_t b[2] = {v.w[2 * half], v.w[2 * half + 1]};
                    mma_bytes(c[n][half % CHAINS], w[2 * k + half], b);
                }
            }
        }
        sync_block();
        const int g = lane_index() / 4, t = lane_index() % 4;
        UNROLL for (int n = 0; n < NT; n++) {
            UNROLL for (int i = 0; i < 4; i++) {
                int* to = sums + (8 * n + 2 * t + i % 2) * 16 + g + 8 * (i / 2);
                *to = c[n][0][i] + (CHAINS > 1 ? c[n][CHAINS - 1][i] : 0) + (more ? *to : 0);
            }
        }
    }
    DEVICE_MEMBER void multiply(int* sums, bool more) {
        const uint32_t tiles = row_tiles();
        if (tiles <= 1) multiply_by<1>(sums, more);
        else if (tiles <= 4) multiply_by<4>(sums, more);
        else multiply_by<8>(sums, more);
    }
    // Scores from a warp's own sums.
    DEVICE_MEMBER void deliver(const int* sums) {
        const uint32_t neuron = 16 * tile + lane_index() % 16;
        sync_warp();
        // Half of the rows for each half of the warp.
        const bool valid = neuron < p.n;
        const float scale = scales()[lane_index() % 16];
        float shared_score = 0;
        UNROLL_BY(4) for (uint32_t r = lane_index() / 16; r < p.rows; r += 2) {
            const uint32_t group = groups()[r];
            const float logit = (float)sums[r * 16 + lane_index() % 16] * z_scales()[r] * scale, score = logit < 0 ? 0.0f : logit;
            if (group == 0) shared_score += score;
            else if (group != NONE && valid) p.scores[(uint64_t)(group - p.first_group) * p.n + neuron] = score;
        }
        shared_score += shuffle_xor(shared_score, 16);
        if (lane_index() >= 16 || !valid || p.first_group != 0) return;
        p.scores[neuron] = shared_score + (p.more ? p.scores[neuron] : 0.0f);
    }
};

// Row `row` of sums to bytes and their scale, by a block. `shared`: 32 floats and those of the row.
DEVICE void narrow(const NarrowParams& p, uint32_t row, float* shared) {
    const uint32_t columns = 64 * p.pieces;
    float* values = shared + 32;
    float most = 0;
    for (uint32_t i = 4 * thread_index(); i < columns; i += 4 * block_threads()) {
        Floats4 sum[1] = {};
        if (i < p.columns) {
            const Floats4 factor = *(const Floats4*)(p.factors + i);
            partial_sums<4, 1>(sum, p.sums, p.rows, row, {i});
            UNROLL for (int j = 0; j < 4; j++) sum[0].v[j] *= factor.v[j];
        }
        *(Floats4*)(values + i) = sum[0];
        UNROLL for (int j = 0; j < 4; j++) {
            const float size = sum[0].v[j] < 0 ? -sum[0].v[j] : sum[0].v[j];
            most = size <= most ? most : size < float_of_bits(0x7f800000u) ? size : float_of_bits(0x7f800000u);
        }
    }
    most = warp_max(most);
    if (lane_index() == 0) shared[warp_index()] = most;
    sync_block();
    for (int w = 0; w < block_threads() / 32; w++) most = fmaxf(most, shared[w]);
    const bool finite = most < float_of_bits(0x7f800000u);
    const float inverse = finite && most > 0 ? 127.0f / most : 0.0f;
    if (thread_index() == 0) p.scales[row] = finite ? most / 127.0f : float_of_bits(0x7fc00000u);
    for (uint32_t i = 4 * thread_index(); i < columns; i += 4 * block_threads()) {
        uint32_t bytes = 0;
        // 1.5 * 2^23 more, a float's lowest byte is the whole number.
        UNROLL for (int j = 0; j < 4; j++)
            bytes |= (bits_of_float(finite ? values[i + j] * inverse + 12582912.0f : 0.0f) & 0xff) << (8 * j);
        const uint64_t lane = ((uint64_t)(row / 8) * p.pieces + i / 64) * 32 + row % 8 * 4 + i % 64 / 16;
        *(uint32_t*)((char*)p.out + 16 * lane + i % 16) = bytes;
    }
}

}  // namespace router_bytes
