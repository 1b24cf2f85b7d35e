// out[split][row][j] = sum over the split's k of x[row][k] w, for up to 64 rows, by the matrix instructions of
// compute capability 9.0, which read both operands out of shared memory:
//   linear_wide:      w[j][k], or row index[j] of it (see linear_skinny.cu: so are `more` and `late`)
//   linear_wide_down: w[k][j], or row index[k] of it (see linear_down.cu)
// and out[row][j] = activation of the whole sum:
//   linear_wide_activated: w[j][k], or row index[j] of it, no gate
//
// Traffic: each weight is read once from device memory, x once per block from the L2. A block has 128 columns, a
// warpgroup 64 of them, which are the 64-row side of the instruction; the batch is its other side. What lies in shared
// memory for columns or rows that there are not is never written, and only reaches sums that nobody wants. A step is 64 k.
// Threads only copy: a stage is three tiles of 128-byte lines (w's two, x); DEPTH of them fill half a multiprocessor's
// memory, which is what it takes to read at the rate of the device's. No thread touches a weight, so the time hardly
// depends on the rows. One barrier a step.
//
// Weights are constants, and a list was complete before the kernel ahead let this one start: their loads start before
// that one has ended.
#include "common.cuh"

namespace wide {

constexpr int THREADS = 256, STEP = 64, COLUMNS = 128, TILE = 64 * STEP * 2, LINE = 128;
constexpr int EACH = 2 * TILE / 16 / THREADS;  // pieces of 16 bytes of w, a thread and stage

// Sums of the block's columns, the `tile`th 128, over part `part` of k. K_LINES: w[k][j]. `meanwhile` is what a thread does
// when its first loads are under way and the kernel ahead still runs.
template <class T, int K_LINES, int NT, int DEPTH, class Meanwhile>
DEVICE void multiply(const LinearParams& p, uint32_t tile, uint32_t part, float (&c)[NT][4], const Meanwhile& meanwhile) {
    constexpr uint32_t W_BYTES = 2 * TILE, STAGE = W_BYTES + NT * 8 * LINE;
    if (!(p.late & LATE_SUCCESSOR)) let_next_start();
    SHARED_BYTES(shared);
    const uint32_t thread = thread_index(), group = thread / 128;
    const uint32_t all = (p.k + STEP - 1) / STEP;
    const uint32_t from = (uint32_t)((uint64_t)all * part / p.splits);
    const uint32_t steps = (uint32_t)((uint64_t)all * (part + 1) / p.splits) - from;
    const uint32_t first = tile * COLUMNS, end = first + COLUMNS < p.n ? first + COLUMNS : p.n;
    const bool listed = K_LINES && p.index;
    uint32_t* list = (uint32_t*)(shared + DEPTH * STAGE);  // of the block's lines of w[k][j]

    // A thread's pieces of a stage: the same one of every 32nd line of w[j][k], of every 16th line of w[k][j].
    const uint32_t piece = thread % (K_LINES ? 16 : 8), line = thread / (K_LINES ? 16 : 8);
    constexpr uint32_t APART = K_LINES ? 16 : 32;
    const uint32_t column = first + 8 * piece;  // of w[k][j]
    const T* row[EACH];                         // its lines, of w[j][k]
    auto find_rows = [&] {
        UNROLL for (int i = 0; i < EACH; i++) {
            const uint32_t j = first + line + APART * i;
            const uint32_t at = p.index ? load_early(p.index + (j < end ? j : p.n - 1)) : j;
            row[i] = j >= end ? nullptr
                : p.more && j >= p.first ? (const T*)p.more + (uint64_t)(j - p.first) * p.k
                : (const T*)p.w + (uint64_t)at * p.k;
        }
    };
    auto issue_w = [&](uint32_t s, unsigned char* stage) {
        uint32_t number[EACH];  // of the lines, of w[k][j]
        if (K_LINES) {
            stage += piece / 8 * TILE;
            UNROLL for (int i = 0; i < EACH; i++) {
                const uint32_t k = s * STEP + line + APART * i;
                number[i] = listed ? list[k] : from * STEP + k;
            }
        }
        UNROLL for (int i = 0; i < EACH; i++) {
            const uint32_t r = line + APART * i, k = (from + s) * STEP + (K_LINES ? r : 8 * piece);
            if (K_LINES ? column >= end : row[i] == nullptr) continue;
            const T* at = K_LINES ? (const T*)p.w + (uint64_t)number[i] * p.n + column : row[i] + k;
            copy_async16(stage + r * LINE + (piece ^ r) % 8 * 16, k < p.k ? (const void*)at : p.w, k < p.k);
        }
    };
    auto issue_x = [&](uint32_t s, unsigned char* stage) {
        const uint32_t c = thread % 8, k = (from + s) * STEP + 8 * c;
        for (uint32_t r = thread / 8; r < NT * 8; r += THREADS / 8) {
            if (r >= p.rows) continue;
            const void* at = k < p.k ? (const T*)p.x + (uint64_t)r * p.k + k : p.x;
            copy_async16(stage + W_BYTES + r * LINE + (c ^ r) % 8 * 16, at, k < p.k);
        }
    };

    UNROLL for (int n = 0; n < NT; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
    if (p.late & LATE_WEIGHTS) wait_for_previous();
    if (!K_LINES) find_rows();
    if (listed) {
        for (uint32_t i = thread; i < steps * STEP; i += THREADS)
            list[i] = load_early(p.index + (from * STEP + i < p.k ? from * STEP + i : p.k - 1));
        sync_block();
    }
    for (uint32_t s = 0; s < DEPTH - 1; s++)
        if (s < steps) issue_w(s, shared + s * STAGE);
    meanwhile();
    wait_for_previous();
    if (p.late & LATE_SUCCESSOR) let_next_start();
    for (uint32_t s = 0; s < DEPTH - 1; s++) {
        if (s < steps) issue_x(s, shared + s * STAGE);
        copy_commit();
    }
    unsigned char *stage = shared, *oldest = shared + (DEPTH - 1) * STAGE;
    for (uint32_t s = 0; s < steps; s++) {
        copy_wait<DEPTH - 2>();
        matrix_publish();
        // This stage is in place, and the oldest one is free.
        sync_block();
        matrix_begin();
        UNROLL for (int k16 = 0; k16 < STEP / 16; k16++)
            matrix_multiply<T, K_LINES>(c, stage + group * TILE, stage + W_BYTES, k16);
        matrix_end();
        const uint32_t ahead = s + DEPTH - 1;
        if (ahead < steps) {
            issue_w(ahead, oldest);
            issue_x(ahead, oldest);
        }
        copy_commit();
        oldest = stage;
        stage = stage == shared + (DEPTH - 1) * STAGE ? shared : stage + STAGE;
        matrix_wait();
    }
    copy_wait<0>();
}

template <class T, int K_LINES, int NT, int DEPTH> DEVICE void run(const LinearParams& p) {
    float c[NT][4];
    multiply<T, K_LINES, NT, DEPTH>(p, block_x(), block_y(), c, [] {});
    const uint32_t thread = thread_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const uint32_t first = block_x() * COLUMNS, end = first + COLUMNS < p.n ? first + COLUMNS : p.n;
    SHARED_BYTES(shared);

    // Turned in shared memory, so that whole lines are written.
    constexpr int STRIDE = COLUMNS + 4;
    float* sums = (float*)shared;  // [row][STRIDE]
    sync_block();
    UNROLL for (int n = 0; n < NT; n++) {
        UNROLL for (int i = 0; i < 4; i++)
            sums[(8 * n + 2 * t + i % 2) * STRIDE + thread / 32 * 16 + g + 8 * (i / 2)] = c[n][i];
    }
    sync_block();
    float* out = p.out + (uint64_t)block_y() * p.rows * p.n;
    const bool whole = p.n % 4 == 0;
    for (uint32_t i = thread; i < p.rows * (COLUMNS / 4); i += THREADS) {
        const uint32_t r = i / (COLUMNS / 4), j = first + i % (COLUMNS / 4) * 4;
        const Floats4 v = *(const Floats4*)(sums + r * STRIDE + (j - first));
        float* to = out + (uint64_t)r * p.n + j;
        if (whole && j < end) *(Floats4*)to = v;
        UNROLL for (uint32_t e = 0; e < 4; e++)
            if (!whole && j + e < end) to[e] = v.v[e];
    }
}

// out = activation of the sums and their bias. The blocks that have parts of the same columns are a cluster: each leaves
// the sums of a tile of 8 rows to the block whose tile it is, and that one adds them, part after part.
template <class T, int NT, int DEPTH> DEVICE void run_activated(const ActivatedParams& p) {
    const uint32_t parts = cluster_blocks(), part = cluster_block(), tile = block_x() / parts;
    const LinearParams product = {p.x, p.w, p.index, nullptr, p.rows, p.n, p.k, parts, nullptr, 0, 0};
    const uint32_t thread = thread_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    // A thread of the addition has two rows of two columns.
    const uint32_t own = thread / 4, column = tile * COLUMNS + own;
    constexpr uint32_t HALF = COLUMNS / 2;
    float bias[2] = {0, 0};
    float c[NT][4];
    multiply<T, 0, NT, DEPTH>(product, tile, part, c, [&] {
        UNROLL for (uint32_t h = 0; h < 2; h++) {
            const uint32_t j = column + h * HALF;
            if (p.up_bias && j < p.valid) bias[h] = to_float(((const T*)p.up_bias)[p.index ? load_early(p.index + j) : j]);
        }
    });
    SHARED_BYTES(shared);
    constexpr uint32_t SUMS = COLUMNS * 8;  // of a tile of rows: [column][row]
    float* sums = (float*)shared;           // [tile of this block's][part][SUMS]
    const uint32_t mine = warp_index() * 16 + g;
    // Nobody reads its stages any more, nor is anything still copied there.
    sync_block();
    cluster_arrive();
    cluster_wait();
    UNROLL for (uint32_t i = 0; i < NT; i++) {
        float* to = sums + (i / parts * parts + part) * SUMS + 2 * t;
        store_in_cluster((Floats2*)(to + mine * 8), i % parts, Floats2{{c[i][0], c[i][1]}});
        store_in_cluster((Floats2*)(to + (mine + 8) * 8), i % parts, Floats2{{c[i][2], c[i][3]}});
    }
    cluster_arrive();
    cluster_wait();
    const uint32_t two = 2 * (thread % 4), odd = own % 2;
    for (uint32_t i = 0; i * parts + part < NT; i++) {
        UNROLL for (uint32_t h = 0; h < 2; h++) {
            const uint32_t j = column + h * HALF, row = 8 * (i * parts + part) + two + odd;
            Floats2 y = {{bias[h], bias[h]}};
            for (uint32_t s = 0; s < parts; s++) {
                const Floats2 v = *(const Floats2*)(sums + (i * parts + s) * SUMS + (own + h * HALF) * 8 + two);
                UNROLL for (int r = 0; r < 2; r++) y.v[r] += v.v[r];
            }
            UNROLL for (int r = 0; r < 2; r++) y.v[r] = j < p.valid ? activation(p.kind, 0.0f, y.v[r]) : 0.0f;
            // Trades a row with the next column's thread, so as to write two columns of one.
            const float other = shuffle_xor(odd ? y.v[0] : y.v[1], 4);
            const uint32_t both = odd ? pack2<T>(other, y.v[1]) : pack2<T>(y.v[0], other);
            if (row < p.rows && j < p.n) *(uint32_t*)((T*)p.out + (uint64_t)row * p.n + (j - odd)) = both;
        }
    }
}

}  // namespace wide

// Rows up to 8 NT. The depths are those of WideCut: two blocks a multiprocessor, with room for a list.
#define WIDE(type, nt, depth, down_depth)                                               \
    KERNEL(256, 2) linear_wide_##type##_##nt(const GRID_CONSTANT LinearParams p) {      \
        wide::run<type, 0, nt, depth>(p);                                               \
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
