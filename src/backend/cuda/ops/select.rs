//! Which KV heads each sequence keeps: a router and its top-k, or the top-k of a host's own scores.

use super::{
    Launcher, MAX_ROWS, Operator, Ops, Queue, Workspace, count, optional, pointer, sum_floats, width,
};
use crate::backend::cuda::launch::{Kernels, MAX_UNITS};
use crate::backend::cuda::memory::Places;
use crate::backend::cuda::params::{Partial, Ptr, SelectParams};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The heads with the largest router logits.
#[derive(Clone, Copy, Debug)]
pub struct HeadSelection {
    /// Of x, the router and what is zeroed.
    pub dtype: DType,
    /// Sequences of the batch.
    pub sequences: u32,
    /// Width of x; not needed with `logits`.
    pub hidden: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Rows of the router: `kv_heads`, or a multiple of it, whose largest then counts.
    pub router_rows: u32,
    /// Width of one KV head's rows in `zero`.
    pub unit_width: u32,
    /// `[sequences][hidden]`
    pub x: Ptr,
    /// `[router_rows][hidden]`
    pub weight: Ptr,
    /// `[router_rows]`; null: none.
    pub bias: Ptr,
    /// f32 `[sequences][router_rows]` instead of a router; null: there is one.
    pub logits: Ptr,
    /// i32 `[sequences]`
    pub keep: Ptr,
    /// u16 `[sequences][kv_heads]`
    pub selected: Ptr,
    /// `[sequences][kv_heads][unit_width]`, 16-byte aligned, zeroed where not selected; null: none.
    pub zero: Ptr,
    /// u32, raised by the number of NaN scores; null: not wanted.
    pub nan_count: Ptr,
    /// Holds the router's sums.
    pub workspace: Workspace,
}

pub(super) struct Layout {
    sums: Ptr,
    nan_count: Ptr,
}

impl Operator for HeadSelection {
    type Layout = Layout;

    fn kernels<'a>(&self, ops: &'a Ops) -> Result<&'a Kernels> {
        count("num_sequences", self.sequences, MAX_ROWS)?;
        count("num_kv_heads", self.kv_heads, MAX_UNITS)?;
        count("router_rows", self.router_rows, MAX_UNITS * 16)?;
        if !self.router_rows.is_multiple_of(self.kv_heads) {
            return Err(Error::invalid(format!(
                "router_rows is {}, not a multiple of num_kv_heads {}",
                self.router_rows, self.kv_heads
            )));
        }
        if self.logits == Ptr::NULL {
            width("hidden_size", self.hidden)?;
        }
        ops.rows(self.dtype)
    }

    fn layout(&self, k: &Kernels, p: &mut Places) -> Self::Layout {
        let mut sums = 0;
        if self.logits == Ptr::NULL {
            let (rows, n) = (self.sequences, self.router_rows);
            sums = sum_floats(k.linear(rows, n, self.hidden).1, rows, n);
        }
        Layout { sums: p.take(sums, 4), nan_count: p.take(1, 4) }
    }

    fn workspace(&self) -> Workspace {
        self.workspace
    }
}

impl Ops {
    /// Bytes of workspace that `op` needs.
    pub fn head_selection_workspace(&self, op: &HeadSelection) -> Result<u64> {
        op.needed(self)
    }

    /// Selects.
    pub fn head_selection(&self, op: &HeadSelection, launcher: &dyn Launcher) -> Result<()> {
        let k = op.kernels(self)?;
        pointer("keep", op.keep, 4)?;
        pointer("selected", op.selected, 2)?;
        optional("bias", op.bias, 2)?;
        optional("attention_out", op.zero, 16)?;
        optional("nan_count", op.nan_count, 4)?;
        if op.zero != Ptr::NULL {
            width("group_width", op.unit_width)?;
        }
        let l = op.places(k)?;
        let queue = Queue::new(launcher);
        let logits = if op.logits == Ptr::NULL {
            pointer("x", op.x, 16)?;
            pointer("weight", op.weight, 16)?;
            let size = (op.sequences, op.router_rows, op.hidden);
            let (launch, logits) = k.product((op.x, op.weight), size, l.sums);
            queue.go(&launch, &logits)?;
            logits.sums()
        } else {
            pointer("logits", op.logits, 4)?;
            Partial { data: op.logits, splits: 1, columns: op.router_rows }
        };
        let params = SelectParams {
            logits,
            bias: op.bias,
            keep: op.keep,
            selected: op.selected,
            attention: op.zero,
            nan_count: if op.nan_count == Ptr::NULL { l.nan_count } else { op.nan_count },
            rows: op.sequences,
            sequences: op.sequences,
            units: op.kv_heads,
            per_unit: op.router_rows / op.kv_heads,
            unit_width: if op.zero == Ptr::NULL { 0 } else { op.unit_width },
            by_unit: 0,
        };
        queue.go(&k.select_heads(op.sequences, op.router_rows), &params)
    }
}
