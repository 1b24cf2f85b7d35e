//! Few sequences' steps leave out of QKV's product and of the output projection what belongs to heads that none of them
//! keeps, see `cuda/linear_heads.cu`: with one sequence as large a part of both as of its heads.

use super::cut::{ChoosingCut, WideCut};
use super::launch::{Kernels, Launch, MAX_UNITS};
use super::params::{ChoosingParams, ChosenParams, LinearParams, Partial, Ptr, SelectParams};
use super::shape::Shape;

/// Sequences up to which the output projection leaves out heads. Of two it hardly matters, more keep nearly all together (on
/// an H200 steps of 1, 2 and 4 get 1.5, up to 1 and -2 to 1 % faster); QKV of two is as fast whole, of four 3 % faster.
const MOST_SEQUENCES: u32 = 2;
/// Words of shared memory for a choice, beside the router's columns (`heads::KEYS` in `cuda/heads.cuh`).
const CHOICE_WORDS: u32 = 2 * MAX_UNITS + 8;
/// Most steps of the output projection, whose list is in a block's shared memory.
const MOST_STEPS: u32 = 1024;

/// Heads of a layer as units that are kept or not: as many as it has KV heads.
#[derive(Clone, Copy, Debug)]
pub struct Units {
    /// How many.
    pub count: u32,
    /// Columns of q of each.
    pub width: u32,
}

impl Units {
    pub(super) fn of(shape: &Shape) -> Units {
        Units { count: shape.kv_heads as u32, width: (shape.q() / shape.kv_heads) as u32 }
    }
}

impl Kernels {
    /// Whether the output projection of a step leaves out heads: of so many rows, and sequences that decode.
    pub fn leaves_out(&self, (rows, sequences): (u32, u32), units: Units) -> bool {
        self.tuning.heads
            && self.warpgroups
            && rows <= MOST_SEQUENCES
            && rows == sequences
            && units.count <= MAX_UNITS
            && units.width.is_multiple_of(WideCut::STEP)
            && units.count * units.width / WideCut::STEP <= MOST_STEPS
    }

    /// QKV's product of a step of one sequence, with the attention router's rows (`more`), that chooses heads by `select`;
    /// `first`: columns of q, k and v. None where it cannot, or is not worth it.
    pub fn choosing(
        &self,
        (x, w, more, out): (Ptr, Ptr, Ptr, Ptr),
        (rows, first, k): (u32, u32, u32),
        select: &SelectParams,
        arrived: Ptr,
    ) -> Option<(Launch, ChoosingParams)> {
        let q = select.units * select.unit_width;
        let units = Units { count: select.units, width: select.unit_width };
        let whole = |columns: u32| columns.is_multiple_of(WideCut::COLUMNS);
        let whole = whole(units.width) && whole(first) && self.head_dim <= 128;
        if rows != 1 || !whole || !self.leaves_out((rows, select.sequences), units) {
            return None;
        }
        let columns = select.units * select.per_unit;
        let n = first + columns.next_multiple_of(4);
        let cut =
            ChoosingCut::new((q, first - q, n - first), k, CHOICE_WORDS + columns, self.multiprocessors)?;
        let product =
            LinearParams { x, w, out, rows, n, k, splits: cut.parts, more, first, ..Default::default() };
        let data = out.offset(4 * u64::from(first));
        let logits = Partial { data, splits: cut.router_parts, columns: n };
        let launch = Launch::new(self.heads[0], (cut.routing + cut.workers, 1), 256, cut.shared);
        let select = SelectParams { logits, ..*select };
        Some((launch, ChoosingParams { product, select, arrived, q, routing: cut.routing }))
    }

    /// What comes behind it: as [`Kernels::qkv`] says, of so many heads.
    pub fn qkv_chosen(&self, heads: u32) -> Launch {
        Launch { kernel: self.qkv_chosen, ..self.qkv((1, heads, 2), 0, false) }
    }

    /// The output projection to `n` columns of what attention over selected heads left, where [`Kernels::leaves_out`] says so: the
    /// product's launch with a list of steps. `selected` and `keep` were complete before attention let it start.
    pub fn chosen(
        &self,
        (x, w, out): (Ptr, Ptr, Ptr),
        (rows, n): (u32, u32),
        units: Units,
        (selected, keep): (Ptr, Ptr),
    ) -> (Launch, ChosenParams) {
        let k = units.count * units.width;
        let (launch, product) = self.product((x, w), (rows, n, k), out);
        let list = 4 * (k / WideCut::STEP);
        let params = ChosenParams { product, selected, keep, sequences: rows, units: units.count };
        (Launch { kernel: self.heads[1], shared: launch.shared + list, ..launch }, params)
    }
}
