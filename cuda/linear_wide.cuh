// Products of up to 64 rows by the matrix instructions of compute capability 9.0, which read both operands out of shared
// memory: what a block does for linear_wide.cu and linear_heads.cu.
//
// A block has 128 columns, a warpgroup 64 of them, which are the 64-row side of the instruction; the batch is its other side.
// What lies in shared memory for columns or rows that there are not is never written, and only reaches sums that nobody wants.
// A step is 64 k. Threads only copy: a stage is three tiles of 128-byte lines (w's two, x); DEPTH of them fill half a
// multiprocessor's memory, which is what it takes to read at the rate of the device's. No thread touches a weight, so the time
// hardly depends on the rows. One barrier a step.
//
// Weights are constants, and a list was complete before the kernel ahead let this one start: their loads start before
// that one has ended.
#pragma once
#include "common.cuh"

namespace wide {

constexpr int THREADS = 256, STEP = 64, COLUMNS = 128, TILE = 64 * STEP * 2, LINE = 128;
constexpr int EACH = 2 * TILE / 16 / THREADS;  // pieces of 16 bytes of w, a thread and stage

// Steps `from` and those that follow, `count` of them: part `part` of `parts` of all of k.
struct Part {
    static constexpr bool TURNS = false;
    uint32_t from, count;
    DEVICE_MEMBER Part(uint32_t k, uint32_t part, uint32_t parts) {
        const uint64_t all = (k + STEP - 1) / STEP;
        from = (uint32_t)(all * part / parts);
        count = (uint32_t)(all * (part + 1) / parts) - from;
    }
    DEVICE_MEMBER uint32_t operator()(uint32_t s) const { return from + s; }
};

// Starts the loads of x of step `step`, which lies in a stage behind so many bytes of w.
template <class T, int NT, uint32_t W_BYTES>
DEVICE void copy_x(const LinearParams& p, uint32_t thread, uint32_t step, unsigned char* stage) {
    const uint32_t piece = thread % 8, k = step * STEP + 8 * piece;
    for (uint32_t r = thread / 8; r < NT * 8; r += THREADS / 8) {
        if (r >= p.rows) continue;
        const void* at = k < p.k ? (const T*)p.x + (uint64_t)r * p.k + k : p.x;
        copy_async16(stage + W_BYTES + r * LINE + (piece ^ r) % 8 * 16, at, k < p.k);
    }
}

// The steps of a block, whose first DEPTH - 1 stages are under way: `begin(s)`, then `multiply(ahead, stage)` when the stage
// is in place, then the loads of step `ahead`, where there is one.
template <uint32_t STAGE, int DEPTH, class Begin, class Multiply, class Issue>
DEVICE void through_stages(unsigned char* shared, const uint32_t& count, const Begin& begin, const Multiply& multiply,
                           const Issue& issue) {
    unsigned char *stage = shared, *oldest = shared + (DEPTH - 1) * STAGE;
    for (uint32_t s = 0; s < count; s++) {
        const uint32_t ahead = s + DEPTH - 1;
        begin(s);
        copy_wait<DEPTH - 2>();
        matrix_publish();
        // This stage is in place, and the oldest one is free.
        sync_block();
        multiply(ahead, stage);
        if (ahead < count) issue(ahead, oldest);
        copy_commit();
        oldest = stage;
        stage = stage == shared + (DEPTH - 1) * STAGE ? shared : stage + STAGE;
        matrix_wait();
    }
    copy_wait<0>();
}

// Sums of the block's columns, the `tile`th 128, over `steps(0)` .. `steps(steps.count - 1)` of k. K_LINES: w[k][j]; its steps
// follow each other. `meanwhile` is what a thread does when its first loads are under way and the kernel ahead still runs.
// Steps that TURN go on with another tile from step `turn` on, at least DEPTH - 1: `next_tile()` says which when its loads are
// next, and may change `count`; the sums so far go to `keep`.
template <class T, int K_LINES, int NT, int DEPTH, class Steps, class Meanwhile>
DEVICE void multiply(const LinearParams& p, uint32_t tile, Steps& steps, float (&c)[NT][4], const Meanwhile& meanwhile) {
    constexpr uint32_t W_BYTES = 2 * TILE, STAGE = W_BYTES + NT * 8 * LINE;
    if (!(p.late & LATE_SUCCESSOR)) let_next_start();
    SHARED_BYTES(shared);
    const uint32_t thread = thread_index(), group = thread / 128;
    uint32_t first = tile * COLUMNS, end = first + COLUMNS < p.n ? first + COLUMNS : p.n;
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
                number[i] = listed ? list[k] : steps(0) * STEP + k;
            }
        }
        UNROLL for (int i = 0; i < EACH; i++) {
            const uint32_t r = line + APART * i, k = steps(s) * STEP + (K_LINES ? r : 8 * piece);
            if (K_LINES ? column >= end : row[i] == nullptr) continue;
            const T* at = K_LINES ? (const T*)p.w + (uint64_t)number[i] * p.n + column : row[i] + k;
            copy_async16(stage + r * LINE + (piece ^ r) % 8 * 16, k < p.k ? (const void*)at : p.w, k < p.k);
        }
    };
    auto issue_x = [&](uint32_t s, unsigned char* stage) { copy_x<T, NT, W_BYTES>(p, thread, steps(s), stage); };

    UNROLL for (int n = 0; n < NT; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
    if (p.late & LATE_WEIGHTS) wait_for_previous();
    if (!K_LINES) find_rows();
    if (listed) {
        const uint32_t from = steps(0) * STEP;
        constexpr uint32_t AT_ONCE = 4;  // loads before the first store
        for (uint32_t i = thread; i < steps.count * STEP; i += AT_ONCE * THREADS) {
            uint32_t number[AT_ONCE];
            UNROLL for (uint32_t e = 0; e < AT_ONCE; e++) {
                const uint32_t k = from + i + e * THREADS;
                number[e] = load_early(p.index + (k < p.k ? k : p.k - 1));
            }
            UNROLL for (uint32_t e = 0; e < AT_ONCE; e++)
                if (i + e * THREADS < steps.count * STEP) list[i + e * THREADS] = number[e];
        }
        sync_block();
    }
    for (uint32_t s = 0; s < DEPTH - 1; s++)
        if (s < steps.count) issue_w(s, shared + s * STAGE);
    meanwhile();
    wait_for_previous();
    if (p.late & LATE_SUCCESSOR) let_next_start();
    for (uint32_t s = 0; s < DEPTH - 1; s++) {
        if (s < steps.count) issue_x(s, shared + s * STAGE);
        copy_commit();
    }
    through_stages<STAGE, DEPTH>(
        shared, steps.count,
        [&](uint32_t s) {
            if constexpr (Steps::TURNS) {
                if (s == steps.turn) {
                    steps.keep(c);
                    UNROLL for (int n = 0; n < NT; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
                }
            }
        },
        [&](uint32_t ahead, unsigned char* stage) {
            if constexpr (Steps::TURNS) {
                if (ahead == steps.turn) {
                    first = steps.next_tile() * COLUMNS;
                    end = first + COLUMNS < p.n ? first + COLUMNS : p.n;
                    find_rows();
                }
            }
            matrix_begin();
            UNROLL for (int k16 = 0; k16 < STEP / 16; k16++)
                matrix_multiply<T, K_LINES>(c, stage + group * TILE, stage + W_BYTES, k16);
            matrix_end();
        },
        [&](uint32_t s, unsigned char* stage) {
            issue_w(s, stage);
            issue_x(s, stage);
        });
}

// Those sums to `out`, as part `part`.
template <int NT> DEVICE void store(const LinearParams& p, uint32_t tile, uint32_t part, const float (&c)[NT][4]) {
    const uint32_t thread = thread_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const uint32_t first = tile * COLUMNS, end = first + COLUMNS < p.n ? first + COLUMNS : p.n;
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
    float* out = p.out + (uint64_t)part * p.rows * p.n;
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

}  // namespace wide
