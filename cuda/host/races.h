// A race detector for the executor. The compiler's ThreadSanitizer instrumentation (-fsanitize=thread on
// the kernels alone) calls it for every load and store; its runtime is not linked, since it cannot be
// loaded into a test's process and knows threads and locks, not blocks, warps and fences. Without that flag
// everything here does nothing.
//
// Two accesses to the same bytes, one of them a plain write, or one atomic and the other not, race unless
// ordered by
//   sync_block() between two threads of a block, cluster_arrive() and cluster_wait() between two of a cluster,
//   sync_warp() between two of a warp (shuffles, votes and mma order nothing, as on a GPU);
//   fence_device() and an atomic by the one thread; a later atomic on the same word and fence_device() by the
//   other. What a thread learnt so it passes on at barriers and fences;
//   tile_wait(), for the bytes of that load;
//   one thread's atomic on that very word, for all atomics before it.
// Blocks run one after another, yet are concurrent. Between kernels: a thread that has not waited for the
// kernels before may write nothing but shared memory, and touch nothing that they still write (`late`).
// Not seen: races between bytes of one 16-bit unit; a read or an atomic of a block before the last one that
// touched the same unit; one between a thread's cluster_arrive() and cluster_wait().
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace races {

// Whether the kernels are instrumented: as the one file that includes ptx_host.h was compiled.
extern const bool instrumented;
// Whether a launch is being watched.
bool on();

void begin_launch();
void end_launch();
void begin_cluster();  // of host::grid, in host::cluster_shared
// All threads of the cluster, of the running thread's block, or of its warp, have met.
void cluster_met();
void block_met();
void warp_met();

// By host::self. `from`: the code that asks, `load`: the tile's load that ends with this write.
void access(const void* at, size_t bytes, bool write, const void* from, uint32_t load = 0);
void atomic(const void* at, size_t bytes, const void* from);
void fence();
// A number for a tile's load; the thread has waited for it.
uint32_t new_load();
void see_load(uint32_t load);

// The race that ended the last launch, empty: none. [+hex] are places in this library's code.
const char* found();

}  // namespace races
