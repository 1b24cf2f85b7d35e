// Runs a kernel on the CPU: blocks one after another, the threads of a block as fibers on one OS
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
    bool valid;
};

struct Warp {
    int arrived = 0;
    uint64_t generation = 0;
    uint32_t words[32][12];
};

struct Thread {
    int index = 0;
    bool waited = false;  // for the kernels before this one
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;                 // not yet committed
};

struct Grid {
    int x = 1, y = 1, threads = 1;
    size_t shared_bytes = 0;
    uint32_t seed = 0;  // 0: threads and blocks in order; else a shuffled order
};

// Where the running fiber is.
extern Thread* self;
extern int block_x, block_y;
extern Grid grid;
extern unsigned char* shared;

// Memory that the kernels before still write: an asynchronous copy from it before the wait is an error.
struct Late { const unsigned char* from; const unsigned char* to; };
extern std::vector<Late> late;
void check_source(const void* source, uint32_t bytes);

Warp& warp();
void yield();
void sync_block();
void sync_warp();

// Runs `kernel` for every thread of the grid. 0: done. 2: a barrier was not reached by all threads (they
// would wait for ever). 3: a block ended without having waited for the kernels before.
int run(const Grid& grid, const std::function<void()>& kernel);

}  // namespace host
