// A kernel with faults that a GPU shows seldom or never, for the race detector to find: blocks of 64
// threads, all in one cluster, pass numbers on in every way there is, and the block that arrives last adds up what
// each one left.
#include "../../cuda/common.cuh"

enum Fault : uint32_t {
    NO_FAULT,
    NO_SYNC_BLOCK,        // between a store to shared memory and a load by another warp
    NO_SYNC_BLOCK_AFTER,  // between that load and the next store
    NO_SYNC_WARP,         // between a store to shared memory and a load by another lane, but a shuffle
    NO_BARRIER_AFTER_COPY,
    NO_WARP_BEFORE_LOAD,  // between a load by another lane and the tile that overwrites it
    NO_TILE_WAIT,
    NO_FENCE_BEFORE,      // between a store and the atomic that tells of it
    NO_FENCE_AFTER,       // between an atomic and the load of what it tells of
    ONE_WORD,             // blocks that store to one word
    COUNTER_READ,         // while others add to it
    EARLY_STORE,          // before the kernels before are waited for
    EARLY_LOAD,           // of what they write
    ONE_TOO_MANY,         // blocks that are waited for
    NO_CLUSTER_WAIT,      // between a store to another block's shared memory and a load there
};

struct FaultParams {
    const uint32_t* in;  // [blocks][64]
    uint32_t* out;       // [blocks], then the sum of all, a counter and a word
    uint32_t fault;
};

static void faulty(const FaultParams& p) {
    SHARED_BYTES(shared);
    uint32_t* values = (uint32_t*)shared;               // [64]
    uint32_t* copied = values + 64;                     // [64]
    uint32_t* tiles = copied + 64;                      // [2][32]
    uint32_t* count = tiles + 64;                       // [4]
    TileBarrier* barriers = (TileBarrier*)(count + 4);  // [2]
    uint64_t* passed = (uint64_t*)(barriers + 2);
    const uint32_t i = thread_index(), lane = lane_index(), blocks = grid_x();
    uint32_t *sum = p.out + blocks, *counter = sum + 1, *word = sum + 2;
    const uint32_t* in = p.in + 64 * block_x();
    uint32_t total = p.fault == EARLY_LOAD ? in[i] : 0;
    if (p.fault == EARLY_STORE && i == 0) p.out[block_x()] = 0;
    begin_kernel();
    // The last block, which has written nothing, waits for the others.
    if (p.fault == ONE_TOO_MANY && block_x() == grid_x() - 1 && i == 0) wait_for_count(counter, blocks);

    cluster_arrive();
    cluster_wait();
    if (i == 0) store_in_cluster(passed, (block_x() + 1) % blocks, (uint64_t)block_x());
    cluster_arrive();
    if (p.fault != NO_CLUSTER_WAIT) cluster_wait();
    total += (uint32_t)*passed;

    values[i] = in[i];
    if (i == 0) count[0] = 0;
    if (p.fault != NO_SYNC_BLOCK) sync_block();
    total += values[63 - i];
    if (p.fault != NO_SYNC_BLOCK_AFTER) sync_block();
    values[i] = in[i] + shuffle(i, 0);
    if (p.fault != NO_SYNC_WARP) sync_warp();
    total += values[i ^ 1];

    if (i < 16) copy_async16(copied + 4 * i, in + 4 * i, true);
    copy_commit();
    copy_wait<0>();
    if (p.fault != NO_BARRIER_AFTER_COPY) sync_block();
    total += copied[63 - i];

    uint32_t* tile = tiles + 32 * warp_index();
    TileBarrier* barrier = barriers + warp_index();
    if (lane == 0) tile_init(barrier);
    sync_warp();
    for (uint32_t n = 0; n < 2; n++) {
        tile_load(tile, in + 32 * n, 128, barrier);
        if (p.fault != NO_TILE_WAIT || lane < 16) tile_wait(barrier, n);
        total += tile[lane ^ 1];
        if (p.fault != NO_WARP_BEFORE_LOAD) sync_warp();
    }

    atomic_add(count, total);
    if (p.fault == COUNTER_READ && *count == 0) atomic_add(count, 1);
    sync_block();
    if (i == 0) {
        p.out[block_x()] = *count;
        if (p.fault == ONE_WORD) *word = 1;
        if (p.fault != NO_FENCE_BEFORE) fence_device();
        count[1] = atomic_add(counter, 1) == blocks - 1;
        if (p.fault != NO_FENCE_AFTER) fence_device();
    }
    sync_block();
    if (!count[1] || i > 0) return;
    *sum = 0;
    for (uint32_t b = 0; b < blocks; b++) *sum += p.out[b];
    *counter = 0;
}

extern "C" int polar_host_launch(const char*, uint32_t x, uint32_t y, uint32_t threads, uint32_t shared_bytes,
                                 uint32_t cluster, uint32_t seed, const void* params) {
    return host::run({(int)x, (int)y, (int)threads, (int)cluster, shared_bytes, seed},
                     [&] { faulty(*(const FaultParams*)params); });
}
extern "C" int polar_host_sizes(uint32_t*) { return 0; }
