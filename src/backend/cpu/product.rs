//! Matrix products over the pool, cut along outputs, never along the reduction.

use super::load::Linear;
use super::matrix::Mat;
use super::scratch::Local;
use super::simd::{Acts, Isa, Pick, dots, to_bf16};
use crate::sys::ahead::Ahead;
use crate::sys::alloc::Pod;
use crate::sys::pool::Pool;
use crate::sys::split::Grid;

/// Threads and instruction set of a stage.
#[derive(Clone, Copy)]
pub(super) struct Cx<'a> {
    pub(super) pool: &'a Pool,
    pub(super) isa: Isa,
    /// What the stage after this one reads first.
    pub(super) ahead: Ahead,
}

impl<'a> Cx<'a> {
    /// The same, knowing that a product with `mats` (of one shape) comes next.
    pub(super) fn before(self, mats: &[&Mat]) -> Cx<'a> {
        let Some(first) = mats.first() else { return self };
        let row_bytes = first.row_bytes();
        let piece = block(self, first.rows, mats.len() * row_bytes) * row_bytes;
        let array = |i: usize| mats.get(i).map_or(&[][..], |m| m.raw());
        Cx { ahead: Ahead::pieces([array(0), array(1)], piece), ..self }
    }
}

/// Activation rows that share a block of weights: small enough that they stay in the second-level
/// cache beside it.
pub(super) const ROW_BLOCK: usize = 96;
/// Most outputs of one task.
pub(super) const MAX_BLOCK: usize = 64;
/// Weight bytes of one task: enough to stream, small enough to stay in the second-level cache while
/// row blocks pass.
const TASK_BYTES: usize = 256 << 10;

/// What becomes of a result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Into {
    /// Replaces.
    Store,
    /// Is added: the residual stream.
    Add,
}

/// Outputs per task for a matrix of `outs` rows of `row_bytes`.
pub(super) fn block(cx: Cx<'_>, outs: usize, row_bytes: usize) -> usize {
    let by_bytes = TASK_BYTES / row_bytes.max(1);
    let by_threads = outs.div_ceil(4 * cx.pool.threads());
    by_bytes.min(by_threads).clamp(8, MAX_BLOCK).next_multiple_of(8)
}

/// `out[i] (+)= linear(x[rows.at(i)])`, rows of `out` `stride_out` apart.
pub(super) fn product(
    cx: Cx<'_>,
    locals: &mut [Local],
    x: (Acts<'_>, usize),
    rows: Pick<'_>,
    (mat, bias): (&Mat, Option<&[f32]>),
    into: Into,
    (out, stride_out): (&mut [f32], usize),
) {
    let n = rows.len();
    if n == 0 {
        return;
    }
    let size = block(cx, mat.rows, mat.row_bytes());
    let grid = Grid::columns(&mut out[..n * stride_out], stride_out, mat.rows, size);
    cx.pool.split(grid, locals, cx.ahead, |local, mut part, _| {
        let outs = part.columns();
        let width = outs.len();
        for first in (0..n).step_by(ROW_BLOCK) {
            let count = ROW_BLOCK.min(n - first);
            let tile = &mut local.tile[..count * width];
            let picked = Pick::Range(outs.start, width);
            dots(
                cx.isa,
                x,
                rows.part(first, count),
                (mat.view(), mat.stride),
                picked,
                mat.stride,
                (tile, width),
                &mut local.spill,
            );
            for (r, values) in tile.chunks_exact_mut(width).enumerate() {
                if let Some(bias) = bias {
                    add(values, &bias[outs.clone()]);
                }
                let out = part.row(first + r);
                match into {
                    Into::Store => out.copy_from_slice(values),
                    Into::Add => add(out, values),
                }
            }
        }
    });
}

impl Linear {
    /// For [`product`].
    pub(super) fn parts(&self) -> (&Mat, Option<&[f32]>) {
        (&self.mat, self.bias.as_deref())
    }
}

pub(super) fn add(to: &mut [f32], values: &[f32]) {
    for (t, v) in to.iter_mut().zip(values) {
        *t += v;
    }
}

/// An element of activations.
pub(super) trait Act: Pod {
    /// Converts a row.
    fn put(isa: Isa, values: &[f32], out: &mut [Self]);
}

impl Act for f32 {
    fn put(_: Isa, values: &[f32], out: &mut [f32]) {
        out.copy_from_slice(values);
    }
}

impl Act for u16 {
    fn put(isa: Isa, values: &[f32], out: &mut [u16]) {
        to_bf16(isa, values, out);
    }
}
