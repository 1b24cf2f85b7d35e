// The MLP router's second product as a kernel of its own, and what makes its input: where decode attention does not
// take it along. See router_bytes.cuh.
#include "router_bytes.cuh"

// A block has 64 neurons. Up to 64 rows.
KERNEL(128, 2) router_scores_bytes(const GRID_CONSTANT RouterBytesParams p) {
    let_next_start();
    SHARED_BYTES(shared);
    router_bytes::Tile tile(p, shared, 4 * block_x() + warp_index());
    int* sums = (int*)(shared + router_bytes::room(p.rows) + warp_index() * tile.sums_size());
    tile.load_w();
    wait_for_previous();
    for (;;) {
        tile.copy_z();
        tile.wait_z();
        tile.multiply(sums, tile.from > 0);
        tile.from += router_bytes::HELD;
        if (tile.from >= p.pieces) break;
        sync_block();
        tile.load_w();
    }
    tile.deliver(sums);
}
KERNEL(256, 1) narrow_rows(const GRID_CONSTANT NarrowParams p) {
    begin_kernel();
    SHARED_BYTES(shared);
    router_bytes::narrow(p, block_x(), (float*)shared);
}
