//! How the products of a decode step cut their work into blocks.

use super::launch::{Id, Launch};

/// Most blocks of a skinny product on a multiprocessor.
pub(super) const MOST_SKINNY: u32 = 4;

/// Whether a matrix of `n` by `k`, as the up and the down product of few neurons have, takes so little that the device
/// can hold most of both at once.
pub(super) fn fits_beside(n: u32, k: u32) -> bool {
    2 * u64::from(n) * u64::from(k) <= 16 << 20
}

/// Blocks of the decode attention, of `all` that run at once.
///
/// Heads and small batches mostly come in powers of two, so that with a multiple of 32 blocks few of them have to share a
/// sequence's head; and the places left over are for what comes next, or runs beside. On an H200 (256 blocks of
/// 264) that makes steps of 8 sequences 2 to 5 % faster, at 32 only those with work beside; at 64 and 128 some steps are
/// up to 8 % slower.
pub(super) fn even_workers(all: u32, sequences: u32, beside: bool) -> u32 {
    const STEP: u32 = 32;
    let few = sequences <= if beside { 32 } else { 16 };
    let even = all / STEP * STEP;
    // A small GPU would lose too much.
    if few && 10 * even >= 9 * all { even } else { all }
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

    /// With a matrix of 8-bit numbers: steps of 128 columns, and as many buffers of the other side as steps.
    pub(super) fn bytes(rows: u32) -> SkinnyCut {
        let cut = SkinnyCut::new(rows, SkinnyCut::DEPTH);
        let (nt, mt) = (1u32 << cut.variant, cut.neurons / 64);
        let depth = if mt > 1 { 3 } else { 4 };
        SkinnyCut { shared: depth * (4 * mt * 2048 + nt * 8 * (128 * 2 + 64)), ..cut }
    }

    /// With all of the other side, of up to 8 rows, made by each block.
    pub(super) fn bytes_made(rank: u32) -> SkinnyCut {
        let shared = 4 * 8 * 2048 + 8 * (rank.next_multiple_of(128) * 2 + 64);
        SkinnyCut { variant: 0, neurons: 64, shared }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_sequences_have_even_workers_on_a_large_gpu() {
        for (all, sequences, beside, want) in [
            (264, 1, false, 256), // H100, H200
            (264, 16, false, 256),
            (264, 17, false, 264),
            (264, 32, true, 256),
            (264, 33, true, 264),
            (296, 8, false, 288), // B200
            (216, 8, false, 216), // A100: 192 would be too few
            (40, 8, false, 40),
            (10, 1, false, 10),
        ] {
            assert_eq!(even_workers(all, sequences, beside), want, "{all} {sequences} {beside}");
        }
    }
}
