//! What changes from step to step, as words at fixed places of device memory: filled on the host,
//! copied once per step, so that a recorded step can be replayed.

use super::device::Device;
use super::params::{NONE, Ptr, SEGMENT_COST};
use crate::backend::{Limits, PAGE_TOKENS, Step};
use crate::error::{Error, Result, try_vec};
use crate::sparsity::{MlpMode, Rule};
use std::cmp::Reverse;

/// Words of a `PrefillTile`.
const TILE_WORDS: usize = 5;

/// Where a table begins, in words, and how many words it holds.
#[derive(Clone, Copy, Debug)]
struct Span {
    at: usize,
    room: usize,
}

/// See the module.
pub(super) struct Tables {
    words: Vec<u32>,
    base: Ptr,
    tokens: Span,
    positions: Span,
    kv_slot: Span,
    first_page: Span,
    context: Span,
    skip: Span,
    groups: Span,
    logit_rows: Span,
    tiles: Span,
    plans: Span,
    pages: Span,
    /// Words of one plan: `keep`, then `prefix`.
    plan_words: usize,
    max_batch: usize,
    max_rows: usize,
    /// Query tokens of a prefill tile.
    tile_tokens: u32,
    /// Plans used, and which of them each layer uses.
    n_plans: usize,
    pub(super) layer_plan: Vec<u16>,
    /// Prefill tiles of this step.
    pub(super) n_tiles: u32,
    /// Sequences whose MLP runs in invariant mode.
    pub(super) n_invariant: u32,
    /// Sequences whose MLP runs in reference mode.
    pub(super) n_reference: u32,
}

/// Which groups of rows a layer's neuron selection applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Groups {
    Both,
    Reference,
    Invariant,
}

impl Tables {
    /// Words for the largest step, prompts cut into tiles of `tile_tokens`.
    pub(super) fn new(limits: &Limits, layers: usize, tile_tokens: u32) -> Result<Tables> {
        let (rows, batch) = (limits.max_rows, limits.max_batch);
        let mut next = 0usize;
        let mut span = |room: usize| {
            let s = Span { at: next, room };
            // 16 bytes apart, so that kernels may read four words at once.
            next += room.next_multiple_of(4);
            s
        };
        let plan_words = (2 * batch + 1).next_multiple_of(4);
        let pages_per_seq = limits.max_context.div_ceil(PAGE_TOKENS);
        let mut t = Tables {
            words: Vec::new(),
            base: Ptr::NULL,
            tokens: span(rows),
            positions: span(rows),
            kv_slot: span(rows),
            first_page: span(batch),
            context: span(batch),
            skip: span(batch),
            groups: span(3 * rows),
            logit_rows: span(batch),
            tiles: span(TILE_WORDS * (rows.div_ceil(tile_tokens as usize) + batch)),
            plans: span((layers + 1) * plan_words),
            pages: span(pages_per_seq.saturating_mul(batch)),
            plan_words,
            max_batch: batch,
            max_rows: rows,
            tile_tokens,
            n_plans: 0,
            layer_plan: try_vec(layers, 0, "plans")?,
            n_tiles: 0,
            n_invariant: 0,
            n_reference: 0,
        };
        t.words = try_vec(next, 0, "step tables")?;
        Ok(t)
    }

    pub(super) fn bytes(&self) -> u64 {
        4 * self.words.len() as u64
    }

    pub(super) fn place(&mut self, at: Ptr) {
        self.base = at;
    }

    fn ptr(&self, s: Span) -> Ptr {
        self.base.offset(4 * s.at as u64)
    }
    pub(super) fn tokens(&self) -> Ptr {
        self.ptr(self.tokens)
    }
    pub(super) fn positions(&self) -> Ptr {
        self.ptr(self.positions)
    }
    pub(super) fn kv_slot(&self) -> Ptr {
        self.ptr(self.kv_slot)
    }
    pub(super) fn first_page(&self) -> Ptr {
        self.ptr(self.first_page)
    }
    pub(super) fn context(&self) -> Ptr {
        self.ptr(self.context)
    }
    pub(super) fn skip(&self) -> Ptr {
        self.ptr(self.skip)
    }
    pub(super) fn logit_rows(&self) -> Ptr {
        self.ptr(self.logit_rows)
    }
    pub(super) fn tiles(&self) -> Ptr {
        self.ptr(self.tiles)
    }
    pub(super) fn pages(&self) -> Ptr {
        self.ptr(self.pages)
    }
    pub(super) fn groups(&self, which: Groups) -> Ptr {
        self.ptr(self.groups).offset((4 * self.max_rows * which as usize) as u64)
    }
    /// `keep` and `prefix` of plan `i`; plan 0 keeps every head.
    pub(super) fn plan(&self, i: u16) -> (Ptr, Ptr) {
        let at = self.ptr(self.plans).offset((4 * self.plan_words * i as usize) as u64);
        (at, at.offset(4 * self.max_batch as u64))
    }

    fn put(&mut self, s: Span, i: usize, v: u32) {
        debug_assert!(i < s.room);
        self.words[s.at + i] = v;
    }

    /// Fills every table from a step that was checked.
    pub(super) fn fill(&mut self, step: &Step, kv_heads: u32, window: Option<u32>) -> Result<()> {
        let window = window.unwrap_or(u32::MAX);
        if step.pages.len() > self.pages.room {
            return Err(Error::invalid("step: more block table entries than the engine was made for"));
        }
        for (span, list) in [
            (self.tokens, &step.tokens),
            (self.positions, &step.positions),
            (self.logit_rows, &step.logit_rows),
            (self.pages, &step.pages),
        ] {
            self.words[span.at..span.at + list.len()].copy_from_slice(list);
        }
        self.n_tiles = 0;
        self.n_invariant = 0;
        self.n_reference = 0;
        for i in 0..3 * self.max_rows {
            self.put(self.groups, i, NONE);
        }
        for (b, seq) in step.seqs.iter().enumerate() {
            for row in seq.first_row..seq.first_row + seq.n_rows {
                let position = step.positions[row as usize];
                let page = step.pages[seq.first_page as usize + position as usize / PAGE_TOKENS];
                self.put(self.kv_slot, row as usize, page * 16 + position % 16);
            }
            if seq.decode {
                let start = seq.context.saturating_sub(window);
                self.put(self.first_page, b, seq.first_page + start / 16);
                self.put(self.context, b, seq.context - start / 16 * 16);
                self.put(self.skip, b, start % 16);
                self.put_group(b, seq.mlp);
            } else {
                self.put_tiles(seq);
            }
        }
        self.sort_tiles(window);
        self.fill_plans(step, kv_heads);
        Ok(())
    }

    fn put_group(&mut self, row: usize, mode: MlpMode) {
        let group = match mode {
            MlpMode::Dense => return,
            MlpMode::Reference => {
                self.n_reference += 1;
                0
            }
            MlpMode::Invariant => {
                self.n_invariant += 1;
                self.n_invariant
            }
        };
        let own = if mode == MlpMode::Reference { Groups::Reference } else { Groups::Invariant };
        for which in [Groups::Both, own] {
            self.put(self.groups, which as usize * self.max_rows + row, group);
        }
    }

    fn put_tiles(&mut self, seq: &crate::backend::SeqStep) {
        for at in (0..seq.n_rows).step_by(self.tile_tokens as usize) {
            let tokens = self.tile_tokens.min(seq.n_rows - at);
            let tile =
                [seq.first_row + at, tokens, seq.context - seq.n_rows + at, seq.context, seq.first_page];
            for (j, v) in tile.into_iter().enumerate() {
                self.put(self.tiles, TILE_WORDS * self.n_tiles as usize + j, v);
            }
            self.n_tiles += 1;
        }
    }

    /// The tiles that see the most tokens start first, over all prompts of the step.
    fn sort_tiles(&mut self, window: u32) {
        let words = &mut self.words[self.tiles.at..][..TILE_WORDS * self.n_tiles as usize];
        let (tiles, _) = words.as_chunks_mut::<TILE_WORDS>();
        tiles.sort_unstable_by_key(|&[row, tokens, position, ..]| {
            (Reverse(position.min(window) + tokens), row)
        });
    }

    /// One plan per distinct list of kept heads.
    fn fill_plans(&mut self, step: &Step, kv_heads: u32) {
        let n = step.n_decode();
        self.n_plans = 0;
        self.put_plan(n, |_| kv_heads);
        for layer in 0..self.layer_plan.len() {
            if n == 0 || !step.plan.attn_sparse(layer) {
                self.layer_plan[layer] = 0;
                continue;
            }
            let same = (0..self.n_plans).find(|&p| {
                let at = self.plans.at + p * self.plan_words;
                (0..n).all(|b| self.words[at + b] == step.plan.attn_k(layer, b))
            });
            self.layer_plan[layer] = match same {
                Some(p) => p as u16,
                None => self.put_plan(n, |b| step.plan.attn_k(layer, b)),
            };
        }
    }

    fn put_plan(&mut self, n: usize, keep: impl Fn(usize) -> u32) -> u16 {
        let i = self.n_plans;
        let at = self.plans.at + i * self.plan_words;
        let mut sum = 0u32;
        self.words[at + self.max_batch] = 0;
        for b in 0..n {
            let k = keep(b);
            let pages = self.words[self.context.at + b].div_ceil(16);
            sum += k * (pages + SEGMENT_COST);
            self.words[at + b] = k;
            self.words[at + self.max_batch + b + 1] = sum;
        }
        self.n_plans += 1;
        i as u16
    }

    /// Copies what this step uses.
    pub(super) fn upload<D: Device>(&self, device: &D, step: &Step) -> Result<()> {
        // Everything before the plans lies together and is small; then the plans used; then the pages.
        let plans = self.plans.at + self.n_plans * self.plan_words;
        for (from, to) in [(0, plans), (self.pages.at, self.pages.at + step.pages.len())] {
            let words = &self.words[from..to];
            // SAFETY: words are plain numbers, read as bytes.
            let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), 4 * words.len()) };
            device.copy_in(self.base.offset(4 * from as u64), bytes)?;
        }
        Ok(())
    }

    /// Groups to select neurons for in a layer, or none.
    pub(super) fn layer_groups(&self, step: &Step, layer: usize) -> Option<Groups> {
        let rule = step.plan.mlp_rule(layer);
        let reference = self.n_reference > 0 && rule.reference != Rule::Dense;
        let invariant = self.n_invariant > 0 && rule.invariant != Rule::Dense;
        match (reference, invariant) {
            (true, true) => Some(Groups::Both),
            (true, false) => Some(Groups::Reference),
            (false, true) => Some(Groups::Invariant),
            (false, false) => None,
        }
    }
}
