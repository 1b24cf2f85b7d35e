// The two products around attention over selected heads, which leave out what no sequence needs. With one sequence that is
// as large a part of their weights as of its heads; two together still leave some.
//   linear_wide_choosing: q, k and v of one sequence and its attention router's logits; of q only the heads that it keeps
//   linear_wide_chosen:   the output projection of up to 8 rows, of k (its columns) only the heads that some row keeps
//
// Traffic: k, v, the router's rows and the kept heads' of q and columns of o are read once from device memory, each head's
// columns of a row as pieces of 128 bytes side by side.
//
// The choice is made in the first of them, while k and v keep the memory busy: its first blocks have the router's rows, few
// steps of k each, and count when their sums are written. Every other block has a part of k's and v's columns and then one of
// q's: when the loads of that are next, which is long after the count is complete, each ranks the logits for itself. The
// first one writes the lists, so that they are complete before the kernel after the next starts: that is attention, which then
// loads pages early, and the output projection its weights.
#include "linear_wide.cuh"
#include "heads.cuh"

namespace wide {

// Steps of a block: of k and v, then of q.
template <class T, int NT> struct Turns {
    static constexpr bool TURNS = true;
    const ChoosingParams& p;
    uint32_t* shared;  // heads::KEYS words and the router's columns
    uint32_t worker, workers, from, turn, count;
    uint32_t then = 0, tile = 0, part = 0;  // of q: first step, tile, part of its k
    uint32_t before = 0;                    // how many blocks had met the choice before this one
    float first[NT][4];

    DEVICE_MEMBER uint32_t operator()(uint32_t s) const { return s < turn ? from + s : then + (s - turn); }
    DEVICE_MEMBER void keep(float (&c)[NT][4]) {
        UNROLL for (int n = 0; n < NT; n++) {
            UNROLL for (int i = 0; i < 4; i++) first[n][i] = c[n][i];
        }
    }
    DEVICE_MEMBER uint32_t next_tile() {
        const SelectParams& select = p.select;
        if (thread_index() == 0) {
            wait_for_count(p.arrived, p.routing);
            before = atomic_add(p.arrived + 2, 1);
        }
        sync_block();
        const bool stays = heads::stays<T>(select, 0, shared, worker == 0);
        uint32_t *counts = shared + heads::COUNTS, *list = shared + heads::KEPT;
        const uint32_t place = heads::place(stays, counts);
        if (stays) list[place] = (uint32_t)thread_index();
        if (stays && worker == 0) select.selected[place] = (uint16_t)thread_index();
        const uint32_t units = heads::all(counts);
        sync_block();
        const uint32_t each = select.unit_width / COLUMNS, tiles = units * each;
        const uint32_t even = workers / (tiles ? tiles : 1), parts = even < MOST_Q_PARTS ? even : MOST_Q_PARTS;
        if (worker == 0 && thread_index() == 0) p.arrived[1] = parts;
        if (worker >= tiles * parts) return 0;
        tile = worker / parts;
        part = worker % parts;
        tile = list[tile / each] * each + tile % each;
        const Part steps(p.product.k, part, parts);
        then = steps.from;
        count = turn + steps.count;
        return tile;
    }
};

template <class T, int NT, int DEPTH> DEVICE void run_choosing(const ChoosingParams& p) {
    constexpr uint32_t STAGE = 2 * TILE + NT * 8 * LINE;
    const LinearParams& product = p.product;
    float c[NT][4];
    if ((uint32_t)block_x() < p.routing) {
        const uint32_t parts = p.select.logits.splits, part = block_x() % parts;
        const uint32_t tile = product.first / COLUMNS + block_x() / parts;
        Part steps(product.k, part, parts);
        multiply<T, 0, NT, DEPTH>(product, tile, steps, c, [] {});
        store(product, tile, part, c);
        sync_block();
        if (thread_index() == 0) {
            fence_device();
            atomic_add(p.arrived, 1);
        }
        return;
    }
    SHARED_BYTES(shared);
    const uint32_t worker = block_x() - p.routing, parts = product.splits;
    const uint32_t tile = p.q / COLUMNS + worker / parts, part = worker % parts;
    const Part own(product.k, part, parts);
    Turns<T, NT> steps = {p, (uint32_t*)(shared + DEPTH * STAGE), worker, grid_x() - p.routing, own.from, own.count, own.count};
    multiply<T, 0, NT, DEPTH>(product, tile, steps, c, [] {});
    const bool turned = steps.count > steps.turn;
    if (!turned) steps.keep(c);
    store(product, tile, part, steps.first);
    if (turned) store(product, steps.tile, steps.part, c);
    // Whatever becomes of the step, the next one finds zeros.
    if (thread_index() == 0 && steps.before == steps.workers - 1) {
        atomic_add(p.arrived, 0u - p.routing);
        atomic_add(p.arrived + 2, 0u - steps.workers);
    }
}

// Steps of k out of a list in shared memory.
struct Listed {
    static constexpr bool TURNS = false;
    const uint32_t* list;
    uint32_t count;
    DEVICE_MEMBER uint32_t operator()(uint32_t s) const { return list[s]; }
};

template <class T, int NT, int DEPTH> DEVICE void run_chosen(const ChosenParams& p) {
    let_next_start();
    SHARED_BYTES(bytes);
    constexpr uint32_t STAGE = 2 * TILE + NT * 8 * LINE;
    uint32_t *counts = (uint32_t*)bytes, *kept = counts + 8;
    uint32_t* list = (uint32_t*)(bytes + DEPTH * STAGE);
    const uint32_t unit = thread_index();
    kept[unit] = 0;
    sync_block();
    for (uint32_t b = 0; b < p.sequences; b++) {
        if (unit < p.keep[b]) kept[load_early(p.selected + b * p.units + unit)] = 1;
    }
    sync_block();
    const bool wanted = kept[unit] != 0;
    const uint32_t place = heads::place(wanted, counts);
    // The block's part of their steps.
    const uint32_t each = p.product.k / p.units / STEP, parts = p.product.splits, all = heads::all(counts) * each;
    const uint32_t from = all * block_y() / parts, count = all * (block_y() + 1) / parts - from;
    for (uint32_t i = 0; wanted && i < each; i++) {
        const uint32_t s = place * each + i - from;
        if (s < count) list[s] = unit * each + i;
    }
    sync_block();
    float c[NT][4];
    Listed steps = {list, count};
    multiply<T, 0, NT, DEPTH>(p.product, block_x(), steps, c, [] {});
    store(p.product, block_x(), block_y(), c);
}

}  // namespace wide

#define HEADS(type)                                                                        \
    KERNEL(256, 2) linear_wide_choosing_##type(const GRID_CONSTANT ChoosingParams p) {     \
        wide::run_choosing<type, 1, 6>(p);                                                 \
    }                                                                                      \
    KERNEL(256, 2) linear_wide_chosen_##type(const GRID_CONSTANT ChosenParams p) {         \
        wide::run_chosen<type, 1, 6>(p);                                                   \
    }
HEADS(bf16)
HEADS(f16)
#undef HEADS
