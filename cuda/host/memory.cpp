// What reaches memory otherwise than by loads and stores: atomics, fences, asynchronous copies.
#include "executor.h"
#include <string.h>
#include "races.h"

namespace host {

namespace {

template <class T, class F> [[gnu::always_inline]] inline T change(T* p, F f) {
    races::atomic(p, sizeof(T), __builtin_return_address(0));
    const T old = *p;
    *p = f(old);
    return old;
}

void check_source(const void* source, uint32_t bytes) {
    if (self->waited || races::on()) return;  // the detector looks at every access
    const unsigned char* at = (const unsigned char*)source;
    for (const Late& l : late)
        if (at < l.to && at + bytes > l.from) __builtin_trap();
}

// A copy takes its source and its target when it starts and when it ends.
// `load`: its number if it is a tile's.
void begin(const Copy& c, uint32_t load) {
    if (c.valid) check_source(c.source, c.bytes);
    if (c.valid) races::access(c.source, c.bytes, false, c.from);
    races::access(c.target, c.bytes, true, c.from, load);
    memset(c.target, 0xff, c.bytes);
}
void end(const Copy& c, uint32_t load) {
    if (c.valid) races::access(c.source, c.bytes, false, c.from);
    races::access(c.target, c.bytes, true, c.from, load);
    if (c.valid) memcpy(c.target, c.source, c.bytes);
    else memset(c.target, 0, c.bytes);
}

}  // namespace

uint32_t fetch_add(uint32_t* p, uint32_t v) { return change(p, [v](uint32_t old) { return old + v; }); }
uint64_t fetch_add(uint64_t* p, uint64_t v) { return change(p, [v](uint64_t old) { return old + v; }); }
uint32_t fetch_or(uint32_t* p, uint32_t v) { return change(p, [v](uint32_t old) { return old | v; }); }
uint64_t fetch_max(uint64_t* p, uint64_t v) { return change(p, [v](uint64_t old) { return old > v ? old : v; }); }
void fence() { races::fence(); }

void copy_issue(void* target, const void* source, uint32_t bytes, bool valid) {
    self->open.push_back({target, source, bytes, valid, __builtin_return_address(0)});
    begin(self->open.back(), 0);
}
void copy_commit() {
    self->groups.push_back(self->open);
    self->open.clear();
}
void copy_wait(size_t left) {
    auto& groups = self->groups;
    while (groups.size() > left) {
        for (const Copy& c : groups.front()) end(c, 0);
        groups.erase(groups.begin());
    }
}

// A tile's barrier points into a table: the load under way (at most one a stage), how many there were.
struct Tile {
    Copy copy;
    uint32_t loads, number;
    bool pending;
};
static Tile*& tile_of(uint64_t* state) { return *(Tile**)state; }

void product_issue(const Product& product) { self->products.push_back(product); }
void product_wait() {
    for (const Product& p : self->products) p.add(p.c, p.a ? p.a : p.held, p.b, p.k16);
    self->products.clear();
}
void tile_init(uint64_t* state) {
    static std::vector<Tile> pool(4096);
    static size_t next = 0;
    Tile* tile = &pool[next++ % pool.size()];
    *tile = Tile{};
    races::access(state, sizeof *state, true, __builtin_return_address(0));
    tile_of(state) = tile;
}
void tile_load(void* target, const void* source, uint32_t bytes, uint64_t* state) {
    if (self->index % 32 == 0) {
        races::access(state, sizeof *state, false, __builtin_return_address(0));
        Tile* tile = tile_of(state);
        if (tile->pending) __builtin_trap();  // a stage loaded twice without a wait
        tile->copy = {target, source, bytes, true, __builtin_return_address(0)};
        tile->pending = true;
        tile->loads++;
        tile->number = races::new_load();
        begin(tile->copy, tile->number);
    }
    meet_warp();
}
void tile_wait(uint64_t* state, uint32_t parity) {
    races::access(state, sizeof *state, false, __builtin_return_address(0));
    Tile* tile = tile_of(state);
    while (tile->loads == 0 || (tile->loads - 1) % 2 != parity) yield();  // not yet issued
    races::see_load(tile->number);
    if (tile->pending) end(tile->copy, tile->number);
    tile->pending = false;
}

}  // namespace host
