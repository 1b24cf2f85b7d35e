//! Selective decode attention over a host's pages: one plan per step, then one launch per layer.

use super::{Launcher, MAX_ROWS, Operator, Ops, Queue, Workspace, count, optional, pointer};
use crate::backend::PAGE_TOKENS;
use crate::backend::cuda::launch::{Kernels, MAX_UNITS};
use crate::backend::cuda::line::{MIN_PAGES, Worker};
use crate::backend::cuda::memory::Places;
use crate::backend::cuda::params::{DecodeParams, NONE, PlanParams, Ptr, SEGMENT_COST, ZeroParams};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// One query token per sequence against its pages. Strides are elements, 0 means packed.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Of q, the pages and the output.
    pub dtype: DType,
    /// Sequences of the batch.
    pub sequences: u32,
    /// Query heads.
    pub heads: u32,
    /// KV heads: what is selected.
    pub kv_heads: u32,
    /// Dimensions of a head.
    pub head_dim: u32,
    /// Entries of one sequence's block table.
    pub max_pages: u32,
    /// From one sequence's block table to the next.
    pub table_stride: u32,
    /// Newest tokens that are seen; 0: all.
    pub window: u32,
    /// Factor of q k; 0: one over the root of the head size.
    pub scale: f32,
    /// From one sequence's q to the next.
    pub q_stride: u64,
    /// From one page to the next.
    pub page_stride: u64,
    /// From one KV head of a page to the next.
    pub head_stride: u64,
    /// `[sequences][heads][head_dim]`
    pub q: Ptr,
    /// `[page][kv_head][K|V][16][head_dim]`
    pub kv: Ptr,
    /// i32 `[sequences][max_pages]`
    pub block_table: Ptr,
    /// i32 `[sequences]`
    pub lengths: Ptr,
    /// i32 `[sequences]`; null: all KV heads.
    pub keep: Ptr,
    /// u16 `[sequences][kv_heads]`; null: the first `keep`.
    pub selected: Ptr,
    /// `[sequences][heads][head_dim]`
    pub out: Ptr,
    /// f32 `[sequences][heads]`; null: not wanted.
    pub lse: Ptr,
    /// Holds the plan and what is merged.
    pub workspace: Workspace,
    /// Rows of `out` and `lse` that are not computed keep what they hold.
    pub leave_rest: bool,
}

/// What lies where in the workspace.
pub(super) struct Layout {
    first_page: Ptr,
    tokens: Ptr,
    skip: Ptr,
    keep: Ptr,
    prefix: Ptr,
    counters: Ptr,
    parts: Ptr,
}

impl Operator for Attention {
    type Layout = Layout;

    fn kernels<'a>(&self, ops: &'a Ops) -> Result<&'a Kernels> {
        count("num_sequences", self.sequences, MAX_ROWS)?;
        count("num_kv_heads", self.kv_heads, MAX_UNITS)?;
        count("num_heads", self.heads, MAX_UNITS * 16)?;
        count("head_dim", self.head_dim, 256)?;
        count("max_pages", self.max_pages, u32::MAX >> 5)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::invalid(format!(
                "num_heads is {}, not a multiple of num_kv_heads {}",
                self.heads, self.kv_heads
            )));
        }
        // The line of virtual pages that the blocks share, and the block tables, are counted in 32 bits.
        let pages = u64::from(self.max_pages) + u64::from(SEGMENT_COST);
        let line = u64::from(self.sequences) * u64::from(self.kv_heads) * pages;
        let table = u64::from(self.sequences) * u64::from(self.table_stride.max(self.max_pages));
        if line.max(table) > u64::from(u32::MAX) {
            return Err(Error::limit(format!(
                "num_sequences {} with max_pages {} and {} KV heads is too much for one call",
                self.sequences, self.max_pages, self.kv_heads
            )));
        }
        if self.table_stride != 0 && self.table_stride < self.max_pages {
            return Err(Error::invalid(format!(
                "block_table_stride is {}, max_pages {}",
                self.table_stride, self.max_pages
            )));
        }
        if !self.scale.is_finite() || self.scale < 0.0 {
            return Err(Error::invalid(format!("scale is {}, allowed is 0 and above", self.scale)));
        }
        ops.kernels(self.dtype, self.head_dim, self.heads / self.kv_heads)
    }

    fn layout(&self, k: &Kernels, p: &mut Places) -> Self::Layout {
        let n = self.sequences as usize;
        let group = (self.heads / self.kv_heads) as usize;
        Layout {
            first_page: p.take(n, 4),
            tokens: p.take(n, 4),
            skip: p.take(n, 4),
            keep: p.take(n, 4),
            prefix: p.take(n + 3, 4),
            counters: p.take(n * self.kv_heads as usize, 4),
            parts: p.take(k.decode_workers() as usize * 2 * group * (self.head_dim as usize + 4), 4),
        }
    }

    fn workspace(&self) -> Workspace {
        self.workspace
    }
}

impl Attention {
    /// A stride that was given, or the packed one; both at least `least` and good for 16-byte copies.
    fn stride(name: &str, given: u64, packed: u64, least: u64) -> Result<u64> {
        let stride = if given == 0 { packed } else { given };
        if stride < least || !stride.is_multiple_of(8) || stride > 1 << 48 {
            return Err(Error::invalid(format!(
                "{name} is {stride}, it must be a multiple of 8 and at least {least}"
            )));
        }
        Ok(stride)
    }
}

impl Ops {
    /// Bytes of workspace that `op` needs.
    pub fn attention_workspace(&self, op: &Attention) -> Result<u64> {
        op.needed(self)
    }

    /// Turns lengths and counts of kept heads into the tables of every layer's attention.
    pub fn attention_plan(&self, op: &Attention, launcher: &dyn Launcher) -> Result<()> {
        let k = op.kernels(self)?;
        pointer("seq_lens", op.lengths, 4)?;
        optional("keep", op.keep, 4)?;
        let l = op.places(k)?;
        let params = PlanParams {
            lengths: op.lengths,
            wanted: op.keep,
            first_page: l.first_page,
            tokens: l.tokens,
            skip: l.skip,
            keep: l.keep,
            prefix: l.prefix,
            counters: l.counters,
            sequences: op.sequences,
            kv_heads: op.kv_heads,
            max_pages: op.max_pages,
            table_stride: op.table_stride.max(op.max_pages),
            window: if op.window == 0 { NONE } else { op.window },
            segment_cost: SEGMENT_COST,
            min_pages: MIN_PAGES,
        };
        Queue::new(launcher).go(&k.plan(op.sequences, op.kv_heads), &params)
    }

    /// The attention of one layer, by the plan that the workspace holds.
    pub fn attention(&self, op: &Attention, launcher: &dyn Launcher) -> Result<()> {
        let k = op.kernels(self)?;
        let group = op.heads / op.kv_heads;
        let piece = (2 * PAGE_TOKENS) as u64 * u64::from(op.head_dim);
        let head_stride = Attention::stride("head_stride", op.head_stride, piece, piece)?;
        let all_heads = head_stride.saturating_mul(u64::from(op.kv_heads));
        let page_stride = Attention::stride("page_stride", op.page_stride, all_heads, piece)?;
        let row = u64::from(op.heads) * u64::from(op.head_dim);
        let q_stride = Attention::stride("q_stride", op.q_stride, row, row)?;
        for (name, at) in [("q", op.q), ("kv", op.kv), ("out", op.out)] {
            pointer(name, at, 16)?;
        }
        pointer("block_table", op.block_table, 4)?;
        optional("selected", op.selected, 2)?;
        optional("lse", op.lse, 4)?;
        let l = op.places(k)?;
        let queue = Queue::new(launcher);
        if !op.leave_rest {
            let params = ZeroParams {
                selected: op.selected,
                keep: l.keep,
                out: op.out,
                lse: op.lse,
                kv_heads: op.kv_heads,
                unit_width: group * op.head_dim,
                group,
            };
            queue.go(&k.zero_heads(op.sequences), &params)?;
        }
        let scale = if op.scale == 0.0 { 1.0 / (op.head_dim as f32).sqrt() } else { op.scale };
        let params = DecodeParams {
            q: op.q,
            kv: op.kv,
            pages: op.block_table,
            first_page: l.first_page,
            tokens: l.tokens,
            skip: l.skip,
            selected: op.selected,
            keep: l.keep,
            prefix: l.prefix,
            out: op.out,
            lse: op.lse,
            parts: l.parts,
            counters: l.counters,
            page_stride: 2 * page_stride,
            head_stride: 2 * head_stride,
            q_stride,
            sequences: op.sequences,
            heads: op.heads,
            kv_heads: op.kv_heads,
            stages: k.stages,
            segment_cost: SEGMENT_COST,
            // The host's pages may be written by what it queued just before.
            early: 0,
            scale: scale * std::f32::consts::LOG2_E,
            ..Default::default()
        };
        queue.go(&k.decode(op.sequences, Worker::Small, false), &params)
    }
}
