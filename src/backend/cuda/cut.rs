//! How the products of a decode step cut their work into blocks.

use super::launch::{Id, Launch, MAX_DOWN_SPLITS};

/// Most blocks of a skinny product on a multiprocessor.
pub(super) const MOST_SKINNY: u32 = 4;

/// Whether a matrix of `n` by `k`, as the up and the down product of few neurons have, takes so little that the device
/// can hold most of both at once.
pub(super) fn fits_beside(n: u32, k: u32) -> bool {
    2 * u64::from(n) * u64::from(k) <= 16 << 20
}

/// How the down products cut their work, see `linear_down.cu`.
pub(super) struct DownCut {
    /// Of 16.
    pub(super) row_tiles: u32,
    /// Warps side by side, 64 columns each.
    pub(super) column_warps: u32,
    /// Blocks a multiprocessor.
    pub(super) per_sm: u32,
    /// Steps under way.
    pub(super) depth: u32,
}

impl DownCut {
    pub(super) const FEW_ROWS: DownCut = DownCut { row_tiles: 1, column_warps: 2, per_sm: 2, depth: 3 };
}

/// Which of a product's kernels takes so many rows: up to 8, 16, 32 or 64.
pub(super) fn variant(rows: u32) -> usize {
    match rows {
        0..=8 => 0,
        9..=16 => 1,
        17..=32 => 2,
        _ => 3,
    }
}

/// How the skinny products cut their work: by rows, see `linear_skinny.cu`.
pub(super) struct SkinnyCut {
    pub(super) variant: usize,
    /// Of a block.
    pub(super) neurons: u32,
    pub(super) shared: u32,
}

impl SkinnyCut {
    pub(super) const DEPTH: u32 = 4;
    pub(super) const READY_DEPTH: u32 = 5;

    pub(super) fn new(rows: u32, depth: u32) -> SkinnyCut {
        let variant = variant(rows);
        let (nt, mt) = (1u32 << variant, if variant == 3 { 2 } else { 1 });
        let (depth, buffers) = if mt > 1 { (3, 2) } else { (depth, 3) };
        let shared = 4 * depth * mt * 2048 + buffers * nt * 8 * (128 * 2 + 64);
        SkinnyCut { variant, neurons: 64 * mt, shared }
    }

    pub(super) fn launch(&self) -> Launch {
        Launch::new(Id(0), (1, 1), 128, self.shared)
    }
}

/// How the products by warpgroups cut their work, see `linear_wide.cu`.
pub(super) struct WideCut {
    /// By rows.
    pub(super) variant: usize,
    /// Blocks of columns, and parts of k.
    pub(super) grid: (u32, u32),
    /// Bytes of a block.
    pub(super) shared: u32,
}

impl WideCut {
    /// Columns of a block, k of a step.
    pub(super) const COLUMNS: u32 = 128;
    pub(super) const STEP: u32 = 64;
    /// Blocks a multiprocessor, and bytes of each.
    const PER_SM: u32 = 2;
    const ROOM: u32 = 113 << 10;
    /// Blocks of a cluster.
    const MOST_CLUSTER: u32 = 8;
    /// Stages by variant, of matrices stored `[n, k]` and `[k, n]`.
    const DEPTH: [[u32; 4]; 2] = [[6, 6, 5, 4], [6, 5, 5, 4]];

    /// `k_lines`: the matrix is stored `[k, n]`, and may have a list of rows. None where that would take too much room.
    pub(super) fn new(rows: u32, n: u32, k: u32, k_lines: bool, multiprocessors: u32) -> Option<WideCut> {
        let variant = variant(rows);
        let (tiles, steps) = (n.div_ceil(Self::COLUMNS), k.div_ceil(Self::STEP));
        let stages = Self::stages(variant, k_lines);
        let most = (steps / 4).min(MAX_DOWN_SPLITS);
        let mut parts = splits(tiles, Self::PER_SM * multiprocessors, steps, most);
        let mut list = 0;
        if k_lines {
            // A word for each row of a block.
            parts = parts.max((4 * Self::STEP * steps).div_ceil(Self::ROOM - stages));
            list = 4 * Self::STEP * steps.div_ceil(parts);
        }
        let fits = parts <= MAX_DOWN_SPLITS && stages + list <= Self::ROOM;
        fits.then_some(WideCut { variant, grid: (tiles, parts), shared: stages + list })
    }

    /// For the product with its activation, whose parts are a cluster's.
    pub(super) fn activated(rows: u32, n: u32, k: u32, multiprocessors: u32) -> WideCut {
        let variant = variant(rows);
        let (tiles, steps) = (n.div_ceil(Self::COLUMNS), k.div_ceil(Self::STEP));
        let time = |parts: u32| {
            // Clusters of more than two find nine places of ten, since the groups of multiprocessors they run in are uneven
            // (an H200 runs 79 of three, 62 of four). One in 64 more than that hardly shows.
            let places = Self::PER_SM * multiprocessors * if parts > 2 { 9 } else { 10 } / 10;
            let waves = (tiles - tiles / 64).div_ceil((places / parts).max(1));
            f64::from(waves) * (f64::from(steps) / f64::from(parts) + FILL_STEPS)
        };
        let most = (steps / 4).clamp(1, Self::MOST_CLUSTER);
        let parts = (1..=most).min_by(|&a, &b| time(a).total_cmp(&time(b))).unwrap_or(1);
        WideCut { variant, grid: (tiles, parts), shared: Self::stages(variant, false) }
    }

    fn stages(variant: usize, k_lines: bool) -> u32 {
        Self::DEPTH[usize::from(k_lines)][variant] * (Self::COLUMNS + (8 << variant)) * 2 * Self::STEP
    }
}

/// How the QKV product that chooses heads cuts its work, see `linear_heads.cu`.
pub(super) struct ChoosingCut {
    /// Blocks that have the router's rows, and parts of their k.
    pub(super) routing: u32,
    pub(super) router_parts: u32,
    /// The other blocks, and parts of the k of k and v.
    pub(super) workers: u32,
    pub(super) parts: u32,
    pub(super) shared: u32,
}

impl ChoosingCut {
    /// Most parts of the router's k.
    const MOST_ROUTER_PARTS: u32 = 8;
    /// Steps that are under way before a block waits for the kernel ahead.
    const AHEAD: u32 = WideCut::DEPTH[0][0] - 1;

    /// For so many columns of q, of k and v, and of the router, and `list` words behind the stages. None where not all blocks
    /// run at once, each with as much of k and v as it takes for the choice to be there, or where q has more than those.
    pub(super) fn new(
        (q, kv, router): (u32, u32, u32),
        k: u32,
        list: u32,
        multiprocessors: u32,
    ) -> Option<ChoosingCut> {
        let [q, kv, router] = [q, kv, router].map(|columns| columns.div_ceil(WideCut::COLUMNS));
        let steps = k.div_ceil(WideCut::STEP);
        let router_parts = (steps / Self::AHEAD).clamp(1, Self::MOST_ROUTER_PARTS);
        let routing = router * router_parts;
        let places = (WideCut::PER_SM * multiprocessors).checked_sub(routing)?;
        let parts = (places / kv).min(steps / (2 * Self::AHEAD)).min(MAX_DOWN_SPLITS);
        let workers = kv * parts;
        let shared = WideCut::stages(0, false) + 4 * list;
        let serves = workers >= q && kv >= q && shared <= WideCut::ROOM;
        serves.then_some(ChoosingCut { routing, router_parts, workers, parts, shared })
    }
}

/// How a product with its activation cuts its work, see `linear_activated.cu`.
pub(super) struct ActivatedCut {
    pub(super) blocks: u32,
    /// Of a block.
    pub(super) threads: u32,
    pub(super) shared: u32,
}

impl ActivatedCut {
    const MOST_ROWS: u32 = 8;
    const WARPS: u32 = 8;
    /// Steps under way, each 8 lines of 256 k; most steps of k that a warp keeps its x of.
    const DEPTH: u32 = 3;
    const LINES: u32 = 8;
    const STEP: u32 = 256;
    const SUBS: u32 = 2;
    /// Lines whose sums are added at a time.
    const ROUND: u32 = 7 * Self::LINES;

    /// For so many lines of `w` of `k`, `per` for each neuron; `reserved`: multiprocessors where the kernel ahead leaves no room
    /// for a second block, which would start on its weights late. None where the kernel does not serve, or two blocks have no
    /// room on a multiprocessor.
    pub(super) fn new(
        rows: u32,
        (n, per, k): (u32, u32, u32),
        (multiprocessors, reserved): (u32, u32),
        shared_per_block: u32,
    ) -> Option<ActivatedCut> {
        let free = if multiprocessors > 4 * reserved { multiprocessors - reserved } else { multiprocessors };
        let blocks = (n * per).div_ceil(Self::LINES).clamp(1, 2 * free);
        let lines = (n.div_ceil(blocks) * per).next_multiple_of(Self::LINES);
        let shared =
            Self::WARPS * (Self::DEPTH * Self::LINES * Self::STEP * 2 + Self::ROUND * 8 * 4) + 8 * lines;
        let serves = rows <= Self::MOST_ROWS
            && k.div_ceil(Self::STEP) <= Self::SUBS * Self::WARPS
            && 2 * (shared + 1024) <= shared_per_block + 1024;
        serves.then_some(ActivatedCut { blocks, threads: 32 * Self::WARPS, shared })
    }
}

/// Steps of the loop that filling and draining a block's pipeline costs.
const FILL_STEPS: f64 = 4.0;

/// Parts of a sum of `steps` steps so that `tiles` blocks times parts fill `slots` places evenly and
/// no block is too short; at most `most`, at least 1.
pub(super) fn splits(tiles: u32, slots: u32, steps: u32, most: u32) -> u32 {
    let most = most.clamp(1, 32);
    (1..=most)
        .map(|s| {
            let waves = f64::from((tiles * s).div_ceil(slots));
            // Each part is also written once and read once by the kernel that adds them.
            (s, waves * (f64::from(steps) / f64::from(s) + FILL_STEPS) + 0.15 * f64::from(s))
        })
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(1, |(s, _)| s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_warpgroups_fit_twice_a_multiprocessor_or_are_left_to_others() {
        for rows in [1, 8, 9, 16, 17, 32, 33, 64] {
            for (n, k) in
                [(8, 8), (4096, 1632), (12_288, 4096), (4096, 16_384), (7168, 28_672), (128, 32_768)]
            {
                for k_lines in [false, true] {
                    let cut = WideCut::new(rows, n, k, k_lines, 132).unwrap();
                    assert!(2 * (cut.shared + 1024) <= 228 << 10, "{rows} rows, {n} x {k}: {}", cut.shared);
                    assert!(cut.grid.1 <= MAX_DOWN_SPLITS && cut.grid.0 * 128 >= n);
                }
            }
            // With their activation the parts are a cluster's.
            for (n, k, want) in
                [(8, 8, 1), (10_160, 4096, 3), (8448, 4096, 3), (16_384, 4096, 2), (1632, 4096, 8)]
            {
                let cut = WideCut::activated(rows, n, k, 132);
                assert_eq!(cut.grid, (n.div_ceil(128), want), "{rows} rows, {n} x {k}");
                assert!(2 * (cut.shared + 1024) <= 228 << 10);
            }
            // A list of more rows than 16 parts have room for.
            assert!(WideCut::new(rows, 4096, 400_000, true, 132).is_none());
            assert!(WideCut::new(rows, 4096, 400_000, false, 132).is_some());
        }
    }
}
