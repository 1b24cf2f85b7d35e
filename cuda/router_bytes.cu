// The MLP router's second product from a matrix of 8-bit numbers: half the bytes, which are most of what choosing
// neurons costs. Scores as router_scores.cuh says, for up to 64 rows a launch.
//
// w holds rows of `stride` bytes, v + 128 for v from -127 to 127, times the row's scale. Columns of each 64 lie
// so that the 16 bytes of lane t are what it multiplies with two 16-byte pieces of z: column 32 j + 8 t + i at
// 16 t + 8 j + i. Else as linear_skinny.cu: eight lanes copy a whole 128-byte piece of a row, here 128 columns,
// DEPTH steps ahead, into the warp's own tiles; z is shared by the block, a buffer for every step under way.
#include "router_scores.cuh"

namespace router_bytes {

// Rows of z are 64 bytes more apart than they are long, which keeps eight lanes on different banks.
constexpr int WARPS = 4, STEP = 128, TILE = 16 * STEP;

// Four stored bytes as two pairs. 2^23 + byte is a float whose low byte that is.
template <class T> DEVICE void widen(uint32_t four, uint32_t (&pairs)[2]) {
    float v[4];
    UNROLL for (uint32_t i = 0; i < 4; i++)
        v[i] = float_of_bits(permute_bytes(four, 0x4b000000u, 0x7650u + i)) - (8388608.0f + 128.0f);
    pairs[0] = pack2<T>(v[0], v[1]);
    pairs[1] = pack2<T>(v[2], v[3]);
}

// z from memory, a step at a time, DEPTH buffers.
template <class T, int NT, int DEPTH> struct Given {
    const RouterParams& p;
    unsigned char* buffers;
    static constexpr bool BY_STEP = true;
    DEVICE_MEMBER uint32_t stride() const { return STEP * 2 + 64; }
    DEVICE_MEMBER const unsigned char* at(uint32_t s) const { return buffers + s % DEPTH * NT * 8 * stride(); }
    DEVICE_MEMBER void make() {}
    DEVICE_MEMBER void issue(uint32_t s) {
        unsigned char* buffer = buffers + s % DEPTH * NT * 8 * stride();
        constexpr int PER_ROW = STEP / 8;
        for (int i = thread_index(); i < NT * 8 * PER_ROW; i += 32 * WARPS) {
            const uint32_t r = i / PER_ROW, c = i % PER_ROW, k = s * STEP + 8 * c;
            const bool valid = r < p.rows && k < p.rank;
            copy_async16(buffer + r * stride() + c * 16,
                         valid ? (const void*)((const T*)p.z + (uint64_t)r * p.rank + k) : p.z, valid);
        }
    }
};

// All of z from the first product's sums, for a few rows: every block adds them for itself, which takes less time than
// a kernel that does it for all.
template <class T> struct Made {
    const RouterParams& p;
    unsigned char* buffer;  // [8][rank up to a multiple of STEP]
    static constexpr bool BY_STEP = false;
    DEVICE_MEMBER uint32_t stride() const { return (p.rank + STEP - 1) / STEP * STEP * 2 + 64; }
    DEVICE_MEMBER const unsigned char* at(uint32_t s) const { return buffer + s * STEP * 2; }
    DEVICE_MEMBER void issue(uint32_t) {}
    DEVICE_MEMBER void make() {
        const uint32_t quads = (p.rank + STEP - 1) / STEP * STEP / 4;
        for (uint32_t i = thread_index(); i < 8 * quads; i += 32 * WARPS) {
            const uint32_t r = i / quads, k = i % quads * 4;
            Floats4 sum[1] = {};
            if (r < p.rows && k < p.rank) partial_sums<4, 1>(sum, p.first, p.rows, r, {k});
            store4<T>(buffer + r * stride(), k, sum[0]);
        }
        sync_block();
    }
};

template <class T, int MT, int NT, int DEPTH, class Z> DEVICE void run(const RouterParams& p) {
    let_next_start();
    SHARED_BYTES(shared);
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    unsigned char* mine = shared + warp * DEPTH * MT * TILE;
    Z z_of{p, shared + WARPS * DEPTH * MT * TILE};
    const uint32_t z_stride = z_of.stride();
    const uint32_t steps = (p.rank + STEP - 1) / STEP, neuron0 = (block_x() * WARPS + warp) * 16 * MT;
    const uint32_t piece = lane % 8;

    auto issue_w = [&](uint32_t s) {
        const uint32_t column = s * STEP + 16 * piece;
        unsigned char* to = mine + s % DEPTH * MT * TILE;
        UNROLL for (int i = 0; i < 4 * MT; i++) {
            const uint32_t r = 4 * i + lane / 8, neuron = neuron0 + r;
            const bool valid = neuron < p.n && column < p.stride;
            copy_async16(to + r * 128 + (piece ^ (r % 2 * 4)) * 16,
                         valid ? (const unsigned char*)p.w + (uint64_t)neuron * p.stride + column : (const unsigned char*)p.w, valid);
        }
    };

    float c[MT][NT][4] = {};
    // The matrix is constant: its loads start before the kernel that makes z has ended.
    for (uint32_t s = 0; s < DEPTH - 1; s++)
        if (s < steps) issue_w(s);
    wait_for_previous();
    z_of.make();
    for (uint32_t s = 0; s < DEPTH - 1; s++) {
        if (s < steps) z_of.issue(s);
        copy_commit();
    }
    for (uint32_t s = 0; s < steps; s++) {
        copy_wait<DEPTH - 2>();
        // This step's z is in place, and the buffer of the step before is free.
        if (Z::BY_STEP) sync_block();
        else sync_warp();
        const uint32_t ahead = s + DEPTH - 1;
        if (ahead < steps) {
            issue_w(ahead);
            z_of.issue(ahead);
        }
        copy_commit();
        const unsigned char* w = mine + s % DEPTH * MT * TILE + g * 128;
        const unsigned char* z = z_of.at(s) + g * z_stride + t * 16;
        UNROLL for (int half = 0; half < 2; half++) {  // 64 columns each
            const int at = ((4 * half + t) ^ (g % 2 * 4)) * 16;
            Words4 low[MT], high[MT];
            UNROLL for (int m = 0; m < MT; m++) {
                low[m] = *(const Words4*)(w + m * TILE + at);
                high[m] = *(const Words4*)(w + m * TILE + 1024 + at);
            }
            UNROLL for (int j = 0; j < 2; j++) {
                Words4 v[NT];
                UNROLL for (int n = 0; n < NT; n++) v[n] = *(const Words4*)(z + n * 8 * z_stride + half * 128 + j * 64);
                UNROLL for (int h = 0; h < 2; h++) {
                    UNROLL for (int m = 0; m < MT; m++) {
                        uint32_t pairs[2][2];
                        widen<T>(low[m].w[2 * j + h], pairs[0]);
                        widen<T>(high[m].w[2 * j + h], pairs[1]);
                        const uint32_t a[4] = {pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]};
                        UNROLL for (int n = 0; n < NT; n++) {
                            const uint32_t b[2] = {v[n].w[2 * h], v[n].w[2 * h + 1]};
                            mma<T>(c[m][n], a, b);
                        }
                    }
                }
            }
        }
    }
    store_scores(p, neuron0, c);
}

}  // namespace router_bytes

// Rows up to 8 NT; `router_scores_made` for a few, from the first product's sums.
#define ROUTER_BYTES(type, mt, nt, depth)                                                             \
    KERNEL(128, nt > 4 ? 2 : 3) router_scores_bytes_##type##_##nt(const GRID_CONSTANT RouterParams p) { \
        router_bytes::run<type, mt, nt, depth, router_bytes::Given<type, nt, depth>>(p);              \
    }
#define ROUTER_BYTES_TYPE(type)                                                         \
    ROUTER_BYTES(type, 1, 1, 6)                                                         \
    ROUTER_BYTES(type, 1, 2, 6)                                                         \
    ROUTER_BYTES(type, 1, 4, 4)                                                         \
    ROUTER_BYTES(type, 2, 8, 3)                                                         \
    KERNEL(128, 2) router_scores_made_##type(const GRID_CONSTANT RouterParams p) {      \
        router_bytes::run<type, 1, 1, 8, router_bytes::Made<type>>(p);                  \
    }
ROUTER_BYTES_TYPE(bf16)
ROUTER_BYTES_TYPE(f16)
#undef ROUTER_BYTES_TYPE
#undef ROUTER_BYTES
