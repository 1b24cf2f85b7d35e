//! How the products of a decode step cut their work into blocks.

use super::launch::{Id, Launch};

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
        let variant = match rows {
            0..=8 => 0,
            9..=16 => 1,
            17..=32 => 2,
            _ => 3,
        };
        let (nt, mt) = (1u32 << variant, if variant == 3 { 2 } else { 1 });
        let (depth, buffers) = if mt > 1 { (3, 2) } else { (depth, 3) };
        let shared = 4 * depth * mt * 2048 + buffers * nt * 8 * (128 * 2 + 64);
        SkinnyCut { variant, neurons: 64 * mt, shared }
    }

    pub(super) fn launch(&self) -> Launch {
        Launch { kernel: Id(0), grid: (1, 1), threads: 128, shared: self.shared }
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
