#include "executor.h"
#include <string.h>
#include <algorithm>
#include <memory>
#include <random>
#include <stdlib.h>
#include "races.h"
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host {

Thread* self;
int block_x, block_y;
Grid grid;
unsigned char* shared;
unsigned char* cluster_shared;
size_t shared_stride;
std::vector<Late> late;

std::vector<Warp> warps;

namespace {

struct Fiber {
    Thread thread;
    std::unique_ptr<unsigned char[]> stack;
    bool done = false;
#ifdef __x86_64__
    void* sp = nullptr;
#else
    ucontext_t context;
#endif
};

std::vector<Fiber> fibers;
std::vector<int> order;
const std::function<void()>* body;
struct Block {
    int x, y, arrived;
    uint64_t generation;
};
std::vector<Block> cluster;
int cluster_arrived;
uint64_t cluster_generation;
uint64_t progress;
bool stopped, postponed;

#ifdef __x86_64__
void* main_sp;
extern "C" void polar_host_switch(void** save, void* load);
asm(R"(
.text
.globl polar_host_switch
.type polar_host_switch, @function
polar_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size polar_host_switch, .-polar_host_switch
.section .note.GNU-stack,"",@progbits
.text
)");
void leave(Fiber& f) { polar_host_switch(&f.sp, main_sp); }
void enter(Fiber& f) { polar_host_switch(&main_sp, f.sp); }
#else
ucontext_t main_context;
void leave(Fiber& f) { swapcontext(&f.context, &main_context); }
void enter(Fiber& f) { swapcontext(&main_context, &f.context); }
#endif

Fiber* current;

void fiber_main() {
    (*body)();
    current->done = true;
    progress++;
    leave(*current);
    abort();
}

void prepare(Fiber& f) {
    if (!f.stack) f.stack.reset(new unsigned char[STACK]);
    f.done = f.thread.waited = false;
    f.thread.stack = f.stack.get();
    f.thread.groups.clear();
    f.thread.open.clear();
    f.thread.products.clear();
#ifdef __x86_64__
    // The stack as the switch leaves it: six registers, then the address it returns to. At a
    // function's entry the stack pointer is 8 past a multiple of 16.
    uintptr_t top = ((uintptr_t)f.stack.get() + STACK) & ~(uintptr_t)15;
    void** sp = (void**)(top - 8);
    *--sp = (void*)&fiber_main;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &fiber_main, 0);
#endif
}

}  // namespace

int place_in_cluster() { return self->block * grid.threads + self->index; }
Warp& warp() { return warps[place_in_cluster() / 32]; }

void yield() {
    leave(*current);
}

void postpone() {
    postponed = true;
    leave(*current);
    abort();
}

void stop() {
    stopped = true;
    leave(*current);
    abort();
}

// `met` is called when the last one has come, before any goes on.
template <class Counter, class Met>
static void barrier(Counter& arrived, uint64_t& generation, int expected, Met met) {
    uint64_t mine = generation;
    if (++arrived == expected) {
        arrived = 0;
        generation++;
        progress++;
        met();
        return;
    }
    while (generation == mine) yield();
}

void sync_block() {
    Block& b = cluster[self->block];
    barrier(b.arrived, b.generation, grid.threads, races::block_met);
}

void cluster_arrive() {
    self->arrived = cluster_generation;
    if (++cluster_arrived < (int)cluster.size() * grid.threads) return;
    cluster_arrived = 0;
    cluster_generation++;
    progress++;
    races::cluster_met();
}
void cluster_wait() {
    while (cluster_generation == self->arrived) yield();
}

template <class Met> static void meet(Met met) {
    Warp& w = warp();
    barrier(w.arrived, w.generation, std::min(32, grid.threads - self->index / 32 * 32), met);
}
void sync_warp() { meet(races::warp_met); }
void meet_warp() { meet([] {}); }

void wait_for_previous() { self->waited = true; }

static int run_blocks(const Grid& g, const std::function<void()>& kernel) {
    grid = g;
    stopped = false;
    body = &kernel;
    const int threads = g.cluster * g.threads;
    if (g.cluster > 1 && (g.x % g.cluster || g.threads % 32)) return 5;
    fibers.resize(std::max<size_t>(fibers.size(), threads));
    std::vector<int> blocks(g.x * g.y / g.cluster);  // or clusters
    for (size_t i = 0; i < blocks.size(); i++) blocks[i] = (int)i;
    std::mt19937 random(g.seed);
    if (g.seed) std::shuffle(blocks.begin(), blocks.end(), random);
    shared_stride = (g.shared_bytes + 2047) & ~(size_t)1023;
    std::vector<unsigned char> memory(g.cluster * shared_stride + 1024);
    cluster_shared = (unsigned char*)(((uintptr_t)memory.data() + 1023) & ~(uintptr_t)1023);
    // Blocks that waited for others run again from their start; those that still wait then would for ever.
    const size_t all = blocks.size();
    for (size_t next = 0; next < blocks.size(); next++) {
        const int block = blocks[next];
        postponed = false;
        cluster.clear();
        for (int i = block * g.cluster; i < (block + 1) * g.cluster; i++) cluster.push_back({i % g.x, i / g.x, 0, 0});
        memset(memory.data(), 0xff, memory.size());  // NaN in every float type
        warps.assign((threads + 31) / 32, Warp());
        cluster_arrived = 0;
        races::begin_cluster();
        order.resize(threads);
        for (int i = 0; i < threads; i++) {
            order[i] = i;
            fibers[i].thread.index = i % g.threads;
            fibers[i].thread.block = i / g.threads;
            prepare(fibers[i]);
        }
        if (g.seed) std::shuffle(order.begin(), order.end(), random);
        int left = threads;
        std::vector<int> asleep(warps.size(), 0);
        while (left) {
            uint64_t before = progress;
            bool slept = false;
            // A warp may fall behind the others by any amount, as on a GPU.
            for (int& a : asleep) {
                if (a) a--, slept = true;
                else if (g.seed && random() % 64 == 0) a = (int)(random() % 512);
            }
            for (int i : order) {
                Fiber& f = fibers[i];
                if (f.done || asleep[i / 32]) continue;
                current = &f;
                self = &f.thread;
                block_x = cluster[self->block].x;
                block_y = cluster[self->block].y;
                shared = cluster_shared + self->block * shared_stride;
                enter(f);
                self = nullptr;
                if (stopped) return 0;
                if (postponed) break;
                if (f.done) left--;
            }
            if (postponed) break;
            if (progress == before && !slept && std::count(asleep.begin(), asleep.end(), 0) == (long)asleep.size()) return 2;
        }
        if (postponed) {
            if (blocks.size() == 2 * all) return 2;
            blocks.push_back(block);
            continue;
        }
        for (int b = 0; b < g.cluster; b++) {
            const auto first = fibers.begin() + b * g.threads;
            if (std::none_of(first, first + g.threads, [](const Fiber& f) { return f.thread.waited; })) return 3;
        }
    }
    return 0;
}

int run(const Grid& g, const std::function<void()>& kernel) {
    races::begin_launch();
    const int status = run_blocks(g, kernel);
    races::end_launch();
    return *races::found() ? 4 : status;
}

}  // namespace host

// Memory that the kernels before are still writing when the next launches begin; 0 bytes: none any more.
extern "C" void polar_host_late(const void* at, uint64_t bytes) {
    if (bytes == 0) host::late.clear();
    else host::late.push_back({(const unsigned char*)at, (const unsigned char*)at + bytes});
}
