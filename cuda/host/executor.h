// Runs a kernel on the CPU: blocks, or clusters of them, one after another, their threads as fibers on one OS
// thread, switched only where CUDA threads may wait for each other. The order in which fibers (and
// blocks) run is a parameter: a kernel whose result depends on it lacks a barrier.
// Speed does not matter; indices, masks, pages, merges and order do.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <functional>
#include <vector>

namespace host {

struct Copy {
    void* target;
    const void* source;
    uint32_t bytes;
    bool valid;   // else zeros
    void* from;   // the code that asked for it
};

// Of a warpgroup's product, a thread's share.
struct Product {
    void (*add)(float* c, const void* a, const void* b, int k16);
    float* c;
    const void *a, *b;
    int k16;
    uint32_t held[16] = {};  // where there is no `a`: the thread's own part of it
};

struct Warp {
    int arrived = 0;
    uint64_t generation = 0;
    uint32_t words[32][12];
    // Of products of bytes, in turn: who writes one has met all that read it two products ago.
    uint32_t operands[2][32][6];
    bool turn[32] = {};
};

struct Thread {
    int index = 0, block = 0;  // in its block, and that in its cluster
    uint64_t arrived = 0;      // at which of the cluster's barriers
    bool waited = false;       // for the kernels before this one
    const unsigned char* stack = nullptr;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;                 // not yet committed
    std::vector<Product> products;          // begun
};

struct Grid {
    int x = 1, y = 1, threads = 1;
    int cluster = 1;  // blocks side by side, of whole warps if several
    size_t shared_bytes = 0;
    uint32_t seed = 0;  // 0: threads and blocks in order; else a shuffled order
};

// Where the running fiber is; no thread outside of fibers.
extern Thread* self;
extern int block_x, block_y;
extern Grid grid;
extern unsigned char* shared;
extern unsigned char* cluster_shared;  // the blocks' one after another, so far apart
extern size_t shared_stride;

constexpr size_t STACK = 256 * 1024;

// Memory that the kernels before still write: an asynchronous copy from it before the wait is an error.
struct Late { const unsigned char* from; const unsigned char* to; };
extern std::vector<Late> late;

int place_in_cluster();  // of the running thread
extern std::vector<Warp> warps;
Warp& warp();
void yield();
[[noreturn]] void postpone();  // this block, which has written nothing, to when all others have run
[[noreturn]] void stop();  // this thread and with it the launch
void sync_block();
void cluster_arrive();
void cluster_wait();
void sync_warp();
void meet_warp();  // as a shuffle does: all lanes wait for each other, but memory is not ordered
void wait_for_previous();

// memory.cpp
uint32_t fetch_add(uint32_t* p, uint32_t v);
uint64_t fetch_add(uint64_t* p, uint64_t v);
uint32_t fetch_or(uint32_t* p, uint32_t v);
uint64_t fetch_max(uint64_t* p, uint64_t v);
void fence();
void copy_issue(void* target, const void* source, uint32_t bytes, bool valid);
void copy_commit();
void copy_wait(size_t left);
void product_issue(const Product& product);
void product_wait();
void tile_init(uint64_t* state);
void tile_load(void* target, const void* source, uint32_t bytes, uint64_t* state);
void tile_wait(uint64_t* state, uint32_t parity);

// Runs `kernel` for every thread of the grid. 0: done. 2: a barrier was not reached by all threads (they
// would wait for ever). 3: a block ended without having waited for the kernels before. 4: a race, see races.h. 5: blocks
// that make no whole clusters.
int run(const Grid& grid, const std::function<void()>& kernel);

}  // namespace host
