// Which heads a decode step computes, as a kernel of its own: see heads.cuh.
#include "heads.cuh"

KERNEL(256, 1) select_heads_bf16(const GRID_CONSTANT SelectParams p) { begin_kernel(); heads::select<bf16>(p, block_x()); }
KERNEL(256, 1) select_heads_f16(const GRID_CONSTANT SelectParams p) { begin_kernel(); heads::select<f16>(p, block_x()); }
