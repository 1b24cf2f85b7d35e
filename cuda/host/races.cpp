#include "races.h"
#include <link.h>
#include <stdio.h>
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>
#include "executor.h"

namespace races {

namespace {

constexpr uint32_t NOBODY = ~0u;
constexpr uint32_t MOST_THREADS = 1024;  // of a block

// Who touched something, and when: how often its block and its warp had met, and itself had fenced.
struct Access {
    uint32_t thread = NOBODY;  // block * MOST_THREADS + index
    uint32_t block_meets, warp_meets, fences;
    uint32_t load;
    uint32_t from;
    uint32_t block() const { return thread / MOST_THREADS; }
    uint32_t warp() const { return thread / 32; }
    explicit operator bool() const { return thread != NOBODY; }
};

// Of all accesses of a kind those that the others are ordered before whenever these are.
struct Accesses {
    Access last, other_warp, other_lane, other_block;

    void add(const Access& a) {
        if (last && last.block() != a.block()) {
            other_block = last;
            other_warp = other_lane = Access{};
        } else if (last && last.block_meets != a.block_meets) {
            other_warp = other_lane = Access{};
        } else if (last && last.warp() != a.warp()) {
            other_warp = last;
        } else if (last && last.thread != a.thread) {
            other_lane = last;
        }
        last = a;
    }
    template <class F> void each(F f) const {
        for (const Access* a : {&last, &other_warp, &other_lane, &other_block})
            if (*a) f(*a);
    }
};

using Counts = std::map<uint32_t, uint32_t>;

// What a thread knows beyond its own block's meets: all before so many meets of a block, of a warp, and all of
// a thread up to so many fences.
struct Knowledge {
    Counts blocks, warps, threads;
    bool has(const Access& a) const {
        auto above = [](const Counts& m, uint32_t key, uint64_t than) {
            auto i = m.find(key);
            return i != m.end() && i->second > than;
        };
        return above(blocks, a.block(), a.block_meets) || above(warps, a.warp(), a.warp_meets) ||
               above(threads, a.thread, a.fences);
    }
};
using Known = std::shared_ptr<const Knowledge>;

void raise(Counts& to, uint32_t key, uint32_t value) {
    uint32_t& at = to[key];
    at = std::max(at, value);
}
bool within(const Counts& a, const Counts& b) {
    return std::all_of(a.begin(), a.end(), [&](auto i) {
        auto at = b.find(i.first);
        return at != b.end() && at->second >= i.second;
    });
}
bool within(const Known& a, const Known& b) {
    return within(a->blocks, b->blocks) && within(a->warps, b->warps) && within(a->threads, b->threads);
}
Known join(const Known& a, const Known& b) {
    if (!a || a == b) return b;
    if (!b || within(b, a)) return a;
    auto both = std::make_shared<Knowledge>(*a);
    for (auto [k, v] : b->blocks) raise(both->blocks, k, v);
    for (auto [k, v] : b->warps) raise(both->warps, k, v);
    for (auto [k, v] : b->threads) raise(both->threads, k, v);
    return both;
}

struct Thread {
    uint32_t fences = 0;
    Known known;      // accesses that are ordered before this thread's next ones
    Known observed;   // by its atomics; known after a fence
    Known published;  // by its fences; what its atomics hand over
};

struct Word {  // that atomics touch
    Accesses atomics;
    Known handed;
};

constexpr uint32_t UNIT = 2;  // bytes
constexpr uintptr_t PAGE = 4096;
struct Unit {
    uint32_t cluster = 0;  // shared memory: whose, in their order; another one's content is void
    bool atomics = false;  // whether there is a Word
    Access write;
    Accesses reads;
};

struct Load { uint32_t warp, seen; };

bool watching;
uint32_t clusters_begun;
// Of the running cluster.
std::vector<uint32_t> block_meets, warp_meets;
std::vector<Thread> threads;
std::unordered_map<uintptr_t, std::vector<Unit>> pages;
uintptr_t page_number;
Unit* page_units;  // of that page, or null
std::unordered_map<uintptr_t, Word> words;  // by unit; those in shared memory end with the cluster
std::vector<Load> loads;
std::string message;  // of the first race: a launch stops there
uintptr_t image, image_end;  // this library in memory

bool in_shared(uintptr_t at) {
    const uintptr_t from = at - (uintptr_t)host::cluster_shared;
    return from < host::grid.cluster * host::shared_stride && from % host::shared_stride < host::grid.shared_bytes;
}

uint32_t thread_id() { return (host::block_y * host::grid.x + host::block_x) * MOST_THREADS + host::self->index; }

Access here(const void* from, uint32_t load) {
    const uint32_t i = host::place_in_cluster();
    return {thread_id(), block_meets[host::self->block], warp_meets[i / 32], threads[i].fences, load,
            (uint32_t)((uintptr_t)from - image)};
}

bool ordered(const Access& before, const Access& a) {
    if (before.thread == a.thread) return true;
    if (before.block() == a.block()) {
        if (before.block_meets < a.block_meets) return true;
        if (before.warp() == a.warp() && before.warp_meets < a.warp_meets) return true;
        if (before.load) {
            const Load& load = loads[before.load - 1];
            if (load.warp == a.warp() && load.seen >> a.thread % 32 & 1) return true;
        }
    }
    const Known& known = threads[host::place_in_cluster()].known;
    return known && known->has(before);
}

enum Kind { READ, WRITE, ATOMIC };
const char* const KINDS[] = {"read", "write", "atomic"};

std::string place(const Access& a) {
    char text[96];
    const uint32_t block = a.block(), x = host::grid.x;
    snprintf(text, sizeof text, "by thread %u of block %u, %u at [+%x]", a.thread % MOST_THREADS, block % x, block / x, a.from);
    return text;
}
std::string place(uintptr_t at) {
    char text[48];
    const size_t in_block = (at - (uintptr_t)host::cluster_shared) % host::shared_stride;
    if (in_shared(at)) snprintf(text, sizeof text, "shared memory + %zu", in_block);
    else snprintf(text, sizeof text, "global memory %#zx", (size_t)at);
    return text;
}

void check(uintptr_t at, Kind kind, const Access& a, Kind earlier, const Access& before) {
    if (!before || ordered(before, a)) return;
    message = place(at) + ": " + KINDS[kind] + " " + place(a) + ", not ordered after the " + KINDS[earlier] + " " + place(before);
    host::stop();  // what a kernel does with a wrong value may be anything
}

Unit& unit_of(uintptr_t at) {
    if (!page_units || at / PAGE != page_number) {
        page_number = at / PAGE;
        std::vector<Unit>& units = pages[page_number];
        if (units.empty()) units.resize(PAGE / UNIT);
        page_units = units.data();
    }
    Unit& unit = page_units[at % PAGE / UNIT];
    const uint32_t cluster = in_shared(at) ? clusters_begun : 0;
    if (unit.cluster != cluster) unit = Unit{cluster, false, {}, {}};
    return unit;
}

// What a thread may not do before it has waited for the kernels before this one.
void check_waited(uintptr_t at, size_t bytes, Kind kind, const Access& a) {
    if (host::self->waited || in_shared(at)) return;
    bool wrong = kind != READ;
    for (const host::Late& l : host::late) wrong |= at < (uintptr_t)l.to && at + bytes > (uintptr_t)l.from;
    if (!wrong) return;
    message = place(at) + ": " + KINDS[kind] + " " + place(a) + ", before it has waited for the kernels before";
    host::stop();
}

}  // namespace

bool on() { return watching; }
const char* found() { return message.c_str(); }

void begin_launch() {
    message.clear();
    if (!instrumented) return;
    if (!image)
        dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
            uintptr_t end = 0;
            for (int i = 0; i < info->dlpi_phnum; i++)
                if (info->dlpi_phdr[i].p_type == PT_LOAD)
                    end = std::max<uintptr_t>(end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
            if ((uintptr_t)&watching - info->dlpi_addr >= end - info->dlpi_addr) return 0;
            image = info->dlpi_addr;
            image_end = end;
            return 1;
        }, nullptr);
    clusters_begun = 0;
    words.clear();
    pages.clear();
    page_units = nullptr;
    loads.clear();
    watching = true;
}
void end_launch() { watching = false; }

void begin_cluster() {
    if (!watching) return;
    clusters_begun++;
    block_meets.assign(host::grid.cluster, 0);
    warp_meets.assign(host::warps.size(), 0);
    threads.assign(host::grid.cluster * host::grid.threads, Thread{});
    std::erase_if(words, [](const auto& w) { return in_shared(w.first * UNIT); });
}

// The threads from `first` on have met.
static void share(size_t first, size_t end) {
    Known known, observed;
    for (size_t i = first; i < end; i++) {
        known = join(known, threads[i].known);
        observed = join(observed, threads[i].observed);
    }
    for (size_t i = first; i < end; i++) {
        threads[i].known = known;
        threads[i].observed = observed;
    }
}
void cluster_met() {
    if (!watching) return;
    auto met = std::make_shared<Knowledge>();
    const uint32_t own = thread_id() / MOST_THREADS - host::self->block;  // the cluster's first block
    for (uint32_t b = 0; b < block_meets.size(); b++) raise(met->blocks, own + b, ++block_meets[b]);
    share(0, threads.size());
    for (Thread& t : threads) t.known = join(t.known, met);
}
void block_met() {
    if (!watching) return;
    block_meets[host::self->block]++;
    const size_t first = host::self->block * host::grid.threads;
    share(first, first + host::grid.threads);
}
void warp_met() {
    if (!watching) return;
    const size_t warp = host::place_in_cluster() / 32;
    warp_meets[warp]++;
    share(32 * warp, std::min(threads.size(), 32 * warp + 32));
}

void access(const void* p, size_t bytes, bool write, const void* from, uint32_t load) {
    if (!watching || !host::self) return;  // what launches a kernel may be instrumented as well
    const uintptr_t at = (uintptr_t)p;
    if (at - (uintptr_t)host::self->stack < host::STACK) return;
    if (at >= image && at < image_end) return;
    if (at - (uintptr_t)host::warps.data() < host::warps.size() * sizeof(host::Warp)) return;
    const Access a = here(from, load);
    const Kind kind = write ? WRITE : READ;
    check_waited(at, bytes, kind, a);
    for (uintptr_t u = at / UNIT * UNIT; u < at + bytes; u += UNIT) {
        Unit& unit = unit_of(u);
        check(u, kind, a, WRITE, unit.write);
        const Word* word = unit.atomics ? &words.at(u / UNIT) : nullptr;
        // An atomic of this thread came after those of others before it, and so does this.
        if (word && word->atomics.last.thread != a.thread)
            word->atomics.each([&](const Access& before) { check(u, kind, a, ATOMIC, before); });
        if (!write) {
            unit.reads.add(a);
            continue;
        }
        unit.reads.each([&](const Access& before) { check(u, kind, a, READ, before); });
        unit.write = a;
        unit.reads = Accesses{};
        if (word) words.erase(u / UNIT);
        unit.atomics = false;
    }
}

void atomic(const void* p, size_t bytes, const void* from) {
    if (!watching) return;
    const uintptr_t at = (uintptr_t)p;
    const Access a = here(from, 0);
    check_waited(at, bytes, ATOMIC, a);
    Thread& me = threads[host::place_in_cluster()];
    for (uintptr_t u = at; u < at + bytes; u += UNIT) {
        Unit& unit = unit_of(u);
        check(u, ATOMIC, a, WRITE, unit.write);
        unit.reads.each([&](const Access& before) { check(u, ATOMIC, a, READ, before); });
        Word& word = words[u / UNIT];
        unit.atomics = true;
        word.atomics.add(a);
        me.observed = join(me.observed, word.handed);
        word.handed = join(word.handed, me.published);
    }
}

void fence() {
    if (!watching) return;
    Thread& me = threads[host::place_in_cluster()];
    me.known = join(me.known, me.observed);
    auto mine = std::make_shared<Knowledge>(me.known ? *me.known : Knowledge{});
    const uint32_t thread = thread_id();
    raise(mine->blocks, thread / MOST_THREADS, block_meets[host::self->block]);
    raise(mine->warps, thread / 32, warp_meets[host::place_in_cluster() / 32]);
    raise(mine->threads, thread, ++me.fences);
    me.published = mine;
}

uint32_t new_load() {
    if (!watching) return 0;
    loads.push_back({thread_id() / 32, 0});
    return (uint32_t)loads.size();
}
void see_load(uint32_t load) {
    if (watching && load) loads[load - 1].seen |= 1u << host::self->index % 32;
}

}  // namespace races

extern "C" const char* polar_host_races() { return races::found(); }

// What instrumented code calls.
#define CALLS(bytes)                                                                                            \
    extern "C" void __tsan_read##bytes(void* at) { races::access(at, bytes, false, __builtin_return_address(0)); } \
    extern "C" void __tsan_write##bytes(void* at) { races::access(at, bytes, true, __builtin_return_address(0)); }
CALLS(1)
CALLS(2)
CALLS(4)
CALLS(8)
CALLS(16)
extern "C" void __tsan_read_range(void* at, unsigned long bytes) {
    races::access(at, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, unsigned long bytes) {
    races::access(at, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
