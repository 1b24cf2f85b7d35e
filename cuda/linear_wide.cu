// out[split][row][j] = sum over the split's k of x[row][k] w, for up to 64 rows, by the matrix instructions of
// compute capability 9.0, which read both operands out of shared memory:
//   linear_wide:      w[j][k], or row index[j] of it (see linear_skinny.cu: so are `more` and `late`)
//   linear_wide_bytes: the same, the last columns from bytes (wide_bytes.cuh)
//   linear_wide_down: w[k][j], or row index[k] of it (see linear_down.cu)
// and out[row][j] = activation of the whole sum:
//   linear_wide_activated: w[j][k], or row index[j] of it, no gate
//
// Traffic: each weight is read once from device memory, x once per block from the L2. How: see linear_wide.cuh.
#include "wide_bytes.cuh"

namespace wide {

template <class T, int K_LINES, int NT, int DEPTH> DEVICE void run(const LinearParams& p) {
    float c[NT][4];
    Part steps(p.k, block_y(), p.splits);
    multiply<T, K_LINES, NT, DEPTH>(p, block_x(), steps, c, [] {});
    store(p, block_x(), block_y(), c);
}

template <class T, int NT, int DEPTH> DEVICE void run_with_bytes(const LinearParams& p) {
    float c[NT][4];
    Part steps(p.k, block_y(), p.splits);
    const uint32_t tile = block_x(), bytes = p.first_byte / COLUMNS;
    if (tile >= bytes) {
        multiply_bytes<T, NT, DEPTH>(p, tile - bytes, steps, c);
    } else {
        LinearParams others = p;
        others.n = p.ends;
        multiply<T, 0, NT, DEPTH>(others, tile, steps, c, [] {});
    }
    store(p, tile, block_y(), c);
}

// out = activation of the sums and their bias. The blocks that have parts of the same columns are a cluster: each adds the
// sums of some of its tiles of 8 rows, part after part, out of the others' shared memory.
template <class T, int NT, int DEPTH> DEVICE void run_activated(const ActivatedParams& p) {
    const uint32_t parts = cluster_blocks(), part = cluster_block(), tile = block_x() / parts;
    const LinearParams product = {p.x, p.w, p.index, nullptr, p.rows, p.n, p.k, parts, nullptr, 0, 0, nullptr, 0, 0};
    const uint32_t thread = thread_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    // A thread of the addition has two rows of two columns.
    const uint32_t own = thread / 4, column = tile * COLUMNS + own;
    constexpr uint32_t HALF = COLUMNS / 2;
    float bias[2] = {0, 0};
    float c[NT][4];
    Part steps(p.k, part, parts);
    multiply<T, 0, NT, DEPTH>(product, tile, steps, c, [&] {
        UNROLL for (uint32_t h = 0; h < 2; h++) {
            const uint32_t j = column + h * HALF;
            if (p.up_bias && j < p.valid) bias[h] = to_float(((const T*)p.up_bias)[p.index ? load_early(p.index + j) : j]);
        }
    });
    SHARED_BYTES(shared);
    constexpr uint32_t SUMS = COLUMNS * 8;  // of a tile of rows: [column][row]
    float* sums = (float*)shared;           // [tile][SUMS]
    const uint32_t mine = warp_index() * 16 + g;
    // Nobody reads its stages any more, nor is anything still copied there.
    sync_block();
    UNROLL for (uint32_t i = 0; i < NT; i++) {
        float* to = sums + i * SUMS + 2 * t;
        *(Floats2*)(to + mine * 8) = {{c[i][0], c[i][1]}};
        *(Floats2*)(to + (mine + 8) * 8) = {{c[i][2], c[i][3]}};
    }
    cluster_arrive();
    cluster_wait();
    const uint32_t two = 2 * (thread % 4), odd = own % 2;
    for (uint32_t i = 0; i * parts + part < NT; i++) {
        const float* from = sums + (i * parts + part) * SUMS + two;
        UNROLL for (uint32_t h = 0; h < 2; h++) {
            const uint32_t j = column + h * HALF, row = 8 * (i * parts + part) + two + odd;
            Floats2 y = {{bias[h], bias[h]}};
            UNROLL_BY(4) for (uint32_t s = 0; s < parts; s++) {
                const Floats2 v = load_in_cluster((const Floats2*)(from + (own + h * HALF) * 8), s);
                UNROLL for (int r = 0; r < 2; r++) y.v[r] += v.v[r];
            }
            UNROLL for (int r = 0; r < 2; r++) y.v[r] = j < p.valid ? activation(p.kind, 0.0f, y.v[r]) : 0.0f;
            // Trades a row with the next column's thread, so as to write two columns of one.
            const float other = shuffle_xor(odd ? y.v[0] : y.v[1], 4);
            const uint32_t both = odd ? pack2<T>(other, y.v[1]) : pack2<T>(y.v[0], other);
            if (row < p.rows && j < p.n) *(uint32_t*)((T*)p.out + (uint64_t)row * p.n + (j - odd)) = both;
        }
    }
    cluster_arrive();
    cluster_wait();  // for all to have read
}

}  // namespace wide

// Rows up to 8 NT. The depths are those of WideCut: two blocks a multiprocessor, with room for a list.
#define WIDE(type, nt, depth, down_depth)                                               \
    KERNEL(256, 2) linear_wide_##type##_##nt(const GRID_CONSTANT LinearParams p) {      \
        wide::run<type, 0, nt, depth>(p);                                               \
    }                                                                                   \
    KERNEL(256, 2) linear_wide_bytes_##type##_##nt(const GRID_CONSTANT LinearParams p) { \
        wide::run_with_bytes<type, nt, depth>(p);                                        \
    }                                                                                   \
    KERNEL(256, 2) linear_wide_down_##type##_##nt(const GRID_CONSTANT LinearParams p) { \
        wide::run<type, 1, nt, down_depth>(p);                                          \
    }                                                                                   \
    KERNEL(256, 2) linear_wide_activated_##type##_##nt(const GRID_CONSTANT ActivatedParams p) { \
        wide::run_activated<type, nt, depth>(p);                                        \
    }
#define WIDE_TYPE(type) \
    WIDE(type, 1, 6, 6) \
    WIDE(type, 2, 6, 5) \
    WIDE(type, 4, 5, 5) \
    WIDE(type, 8, 4, 4)
WIDE_TYPE(bf16)
WIDE_TYPE(f16)
#undef WIDE_TYPE
#undef WIDE
