//! What changes from step to step, as words of device memory: filled on the host, copied once per step,
//! so that a recorded step can be replayed. Only what a step uses is laid out, one list after another,
//! so the copy is small; where a list lies depends on the step's buckets and nothing else that a
//! recorded step does not depend on ([`Tables::layout`]).

use super::buckets::bucket;
use super::device::Device;
use super::launch::{Kernels, TileSize};
use super::line::{Beside, Worker};
use super::memory::HostWords;
use super::params::{NONE, Ptr};
use crate::backend::{Limits, PAGE_TOKENS, SeqStep, Step};
use crate::error::{Error, Result, try_vec};
use crate::sparsity::{MlpMode, Rule};
use std::cmp::Reverse;
use std::sync::Arc;

/// Words of a `PrefillTile`.
const TILE_WORDS: usize = 5;

/// Rows that a step computes: its own and the padding of its buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Rows {
    /// Rows of the residual stream.
    pub(super) all: u32,
    /// The first ones, that decode.
    pub(super) decode: u32,
    /// Rows of logits.
    pub(super) logits: u32,
}

/// Where each list begins, in words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    pub(super) rows: Rows,
    tokens: usize,
    positions: usize,
    kv_slot: usize,
    first_page: usize,
    context: usize,
    skip: usize,
    groups: usize,
    last_group: usize,
    logit_rows: usize,
    plans: usize,
    tiles: usize,
    pages: usize,
}

/// See the module.
pub(super) struct Tables<D: Device> {
    /// Filled in turn: one may be filled while the other is being copied.
    staging: [HostWords<D>; 2],
    turn: usize,
    base: Ptr,
    most_pages: usize,
    limits: Limits,
    layout: Layout,
    used: usize,
    /// Plans used, and which of them each layer uses.
    n_plans: usize,
    pub(super) layer_plan: Vec<u16>,
    /// Of each plan: see [`Line::worker`](super::line::Line::worker).
    pub(super) workers: Vec<Worker>,
    /// Prefill tiles of this step, and their kind.
    pub(super) n_tiles: u32,
    pub(super) tile_size: TileSize,
    /// Some sequence's MLP runs in this mode.
    pub(super) any_reference: bool,
    pub(super) any_invariant: bool,
    /// Every row decodes, its MLP in reference mode.
    pub(super) all_reference: bool,
}

/// Lays lists out one after another.
struct Writer<'a> {
    words: &'a mut [u32],
    next: usize,
}

impl Writer<'_> {
    /// A place for `room` words, all `value`; 16 bytes apart, so that kernels may read four at once.
    fn space(&mut self, room: usize, value: u32) -> usize {
        let at = self.next;
        self.next += room.next_multiple_of(4);
        self.words[at..at + room].fill(value);
        at
    }

    /// A list, filled up with zeros.
    fn list(&mut self, list: &[u32], room: usize) -> usize {
        let at = self.next;
        self.next += room.next_multiple_of(4);
        self.words[at..at + list.len()].copy_from_slice(list);
        self.words[at + list.len()..at + room].fill(0);
        at
    }
}

/// Which groups of rows a layer's neuron selection applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Groups {
    Both,
    Reference,
    Invariant,
}

/// Words for the largest step, and how many pages are among them.
fn room(limits: &Limits, layers: usize, tile_tokens: u32) -> (usize, usize) {
    let (rows, batch) = (limits.max_rows + 3, limits.max_batch + 3);
    let tiles = rows.div_ceil(tile_tokens as usize) + batch;
    let pages_per_seq = limits.max_context.div_ceil(PAGE_TOKENS);
    // As many as `Step::with_limits` has room for.
    let most_pages = limits.pages.min(pages_per_seq.saturating_mul(limits.max_batch));
    let lists = 6 * rows + 4 * batch + (layers + 1) * (2 * batch + 3) + TILE_WORDS * tiles;
    // Each list begins at a multiple of four words: hence the threes above, and these few.
    (most_pages.saturating_add(lists + 16), most_pages)
}

/// Bytes of the tables on the device.
pub(super) fn bytes(limits: &Limits, layers: usize, tile_tokens: u32) -> u64 {
    4 * room(limits, layers, tile_tokens).0 as u64
}

impl<D: Device> Tables<D> {
    /// Words for the largest step, prompts cut into tiles of at least `tile_tokens`.
    pub(super) fn new(
        device: &Arc<D>,
        limits: &Limits,
        layers: usize,
        tile_tokens: u32,
    ) -> Result<Tables<D>> {
        let (room, most_pages) = room(limits, layers, tile_tokens);
        Ok(Tables {
            staging: [HostWords::zeroed(device, room)?, HostWords::zeroed(device, room)?],
            turn: 0,
            base: Ptr::NULL,
            most_pages,
            limits: *limits,
            layout: Layout::default(),
            used: 0,
            n_plans: 0,
            layer_plan: try_vec(layers, 0, "plans")?,
            workers: try_vec(layers + 1, Worker::Small, "plans")?,
            n_tiles: 0,
            tile_size: TileSize::Large,
            any_reference: false,
            any_invariant: false,
            all_reference: false,
        })
    }

    pub(super) fn place(&mut self, at: Ptr) {
        self.base = at;
    }

    /// Where this step's lists lie: a recorded step is for one layout.
    pub(super) fn layout(&self) -> Layout {
        // Pages come last, and how many there are moves nothing.
        self.layout
    }

    /// Rows this step computes.
    pub(super) fn rows(&self) -> Rows {
        self.layout.rows
    }

    fn ptr(&self, at: usize) -> Ptr {
        self.base.offset(4 * at as u64)
    }
    pub(super) fn tokens(&self) -> Ptr {
        self.ptr(self.layout.tokens)
    }
    pub(super) fn positions(&self) -> Ptr {
        self.ptr(self.layout.positions)
    }
    pub(super) fn kv_slot(&self) -> Ptr {
        self.ptr(self.layout.kv_slot)
    }
    pub(super) fn first_page(&self) -> Ptr {
        self.ptr(self.layout.first_page)
    }
    pub(super) fn context(&self) -> Ptr {
        self.ptr(self.layout.context)
    }
    pub(super) fn skip(&self) -> Ptr {
        self.ptr(self.layout.skip)
    }
    pub(super) fn logit_rows(&self) -> Ptr {
        self.ptr(self.layout.logit_rows)
    }
    pub(super) fn tiles(&self) -> Ptr {
        self.ptr(self.layout.tiles)
    }
    pub(super) fn pages(&self) -> Ptr {
        self.ptr(self.layout.pages)
    }
    /// Group of each row.
    pub(super) fn groups(&self, which: Groups) -> Ptr {
        self.ptr(self.layout.groups + which as usize * self.layout.rows.all as usize)
    }
    /// The last group that has rows.
    pub(super) fn last_group(&self) -> Ptr {
        self.ptr(self.layout.last_group)
    }
    /// `keep` and `prefix` of plan `i`; plan 0 keeps every head.
    pub(super) fn plan(&self, i: u16) -> (Ptr, Ptr) {
        let decode = self.layout.rows.decode as usize;
        let at = self.layout.plans + i as usize * plan_words(decode);
        (self.ptr(at), self.ptr(at + decode))
    }

    /// Fills the tables for a step that was checked, and starts their copy.
    pub(super) fn send(
        &mut self,
        step: &Step,
        kernels: &Kernels,
        kv_heads: u32,
        window: Option<u32>,
    ) -> Result<()> {
        if step.pages.len() > self.most_pages {
            return Err(Error::invalid("step: more block table entries than the engine was made for"));
        }
        let n_decode = step.n_decode();
        let all = bucket(step.tokens.len(), self.limits.max_rows);
        let decode = bucket(n_decode, self.limits.max_batch).min(all);
        let logits = bucket(step.logit_rows.len(), self.limits.max_batch);
        self.turn ^= 1;
        let mut w = Writer { words: self.staging[self.turn].words_mut()?, next: 0 };
        let t = Layout {
            rows: Rows { all: all as u32, decode: decode as u32, logits: logits as u32 },
            tokens: w.list(&step.tokens, all),
            positions: w.list(&step.positions, all),
            kv_slot: w.space(all, NONE),
            groups: w.space(3 * all, NONE),
            last_group: w.space(1, 0),
            logit_rows: w.list(&step.logit_rows, logits),
            first_page: w.space(decode, 0),
            context: w.space(decode, 0),
            skip: w.space(decode, 0),
            ..Layout::default()
        };
        let window = window.unwrap_or(u32::MAX);
        let (mut n_reference, mut n_invariant) = (0, 0);
        for (b, seq) in step.seqs.iter().enumerate() {
            for row in seq.first_row..seq.first_row + seq.n_rows {
                let position = step.positions[row as usize];
                let page = step.pages[seq.first_page as usize + position as usize / PAGE_TOKENS];
                w.words[t.kv_slot + row as usize] = page * 16 + position % 16;
            }
            if !seq.decode {
                continue;
            }
            let start = seq.context.saturating_sub(window);
            w.words[t.first_page + b] = seq.first_page + start / 16;
            w.words[t.context + b] = seq.context - start / 16 * 16;
            w.words[t.skip + b] = start % 16;
            let (group, own) = match seq.mlp {
                MlpMode::Dense => continue,
                MlpMode::Reference => {
                    n_reference += 1;
                    (0, Groups::Reference)
                }
                MlpMode::Invariant => {
                    n_invariant += 1;
                    (n_invariant, Groups::Invariant)
                }
            };
            for which in [Groups::Both, own] {
                w.words[t.groups + which as usize * all + b] = group;
            }
        }
        w.words[t.last_group] = n_invariant;
        self.layout = Layout { plans: w.next, ..t };
        let plans = (&mut self.layer_plan[..], &mut self.workers[..]);
        self.n_plans = fill_plans(&mut w, &t, step, (kernels, kv_heads), plans);
        self.layout.tiles = w.next;
        let large = kernels.tile_tokens(TileSize::Large);
        let tiles = step.seqs.iter().flat_map(|s| tiles_of(s, large));
        self.tile_size = kernels.tile_size(tiles.map(|t| seen(&t, window)), kv_heads);
        let tokens = kernels.tile_tokens(self.tile_size);
        for tile in step.seqs.iter().flat_map(|s| tiles_of(s, tokens)) {
            w.words[w.next..w.next + TILE_WORDS].copy_from_slice(&tile);
            w.next += TILE_WORDS;
        }
        let (tiles, _) = w.words[self.layout.tiles..w.next].as_chunks_mut::<TILE_WORDS>();
        // The tiles that see the most tokens start first, over all prompts of the step.
        tiles.sort_unstable_by_key(|t| (Reverse(seen(t, window)), t[0]));
        self.n_tiles = tiles.len() as u32;
        w.next = w.next.next_multiple_of(4);
        self.layout.pages = w.list(&step.pages, step.pages.len());
        self.any_reference = n_reference > 0;
        self.any_invariant = n_invariant > 0;
        self.all_reference = n_reference == step.tokens.len();
        self.used = w.next;
        self.staging[self.turn].send(self.base, self.used)
    }

    /// Groups to select neurons for in a layer, or none.
    pub(super) fn layer_groups(&self, step: &Step, layer: usize) -> Option<Groups> {
        let rule = step.plan.mlp_rule(layer);
        let reference = self.any_reference && rule.reference != Rule::Dense;
        let invariant = self.any_invariant && rule.invariant != Rule::Dense;
        match (reference, invariant) {
            (true, true) => Some(Groups::Both),
            (true, false) => Some(Groups::Reference),
            (false, true) => Some(Groups::Invariant),
            (false, false) => None,
        }
    }
}

/// Words of one plan: `keep`, then `prefix`, then how many workers and the least pages of a piece.
fn plan_words(decode: usize) -> usize {
    (2 * decode + 3).next_multiple_of(4)
}

/// One plan per distinct list of kept heads; how many there are.
fn fill_plans(
    w: &mut Writer<'_>,
    t: &Layout,
    step: &Step,
    (kernels, kv_heads): (&Kernels, u32),
    (of_layer, workers): (&mut [u16], &mut [Worker]),
) -> usize {
    let n = step.n_decode();
    let first = w.next;
    let beside = match (0..of_layer.len()).any(|l| step.plan.mlp_sparse(l)) {
        false => Beside::Nothing,
        true if kernels.takes_scores(t.rows.decode) => Beside::Scores,
        true => Beside::Kernels,
    };
    workers[0] = put_plan(w, t, n, kernels, beside, |_| kv_heads);
    let mut plans = 1;
    for (layer, plan) in of_layer.iter_mut().enumerate() {
        *plan = 0;
        if n == 0 || !step.plan.attn_sparse(layer) {
            continue;
        }
        let same = (0..plans).find(|&p| {
            let at = first + p * plan_words(t.rows.decode as usize);
            (0..n).all(|b| w.words[at + b] == step.plan.attn_k(layer, b))
        });
        *plan = same.unwrap_or_else(|| {
            workers[plans] = put_plan(w, t, n, kernels, beside, |b| step.plan.attn_k(layer, b));
            plans += 1;
            plans - 1
        }) as u16;
    }
    plans
}

/// Padding keeps no head and owns no piece of the line. Of which kind workers are.
fn put_plan(
    w: &mut Writer<'_>,
    t: &Layout,
    n: usize,
    kernels: &Kernels,
    beside: Beside,
    keep: impl Fn(usize) -> u32,
) -> Worker {
    let decode = t.rows.decode as usize;
    let at = w.space(plan_words(decode), 0);
    let (lists, plan) = w.words.split_at_mut(at);
    let (kept, prefix) = plan.split_at_mut(decode);
    for (b, kept) in kept[..n].iter_mut().enumerate() {
        *kept = keep(b);
    }
    let pages = lists[t.context..].iter().map(|tokens| tokens.div_ceil(16));
    let pieces = kept.iter().copied().zip(pages);
    let line = kernels.line(pieces.clone(), beside);
    prefix.iter_mut().zip(line.prefix(pieces)).for_each(|(word, value)| *word = value);
    line.worker
}

/// Tiles of a sequence's prompt, as a `PrefillTile` of the kernels; none of one that decodes.
fn tiles_of(seq: &SeqStep, tile_tokens: u32) -> impl Iterator<Item = [u32; TILE_WORDS]> {
    let rows = if seq.decode { 0 } else { seq.n_rows };
    (0..rows).step_by(tile_tokens as usize).map(move |at| {
        let tokens = tile_tokens.min(rows - at);
        [seq.first_row + at, tokens, seq.context - rows + at, seq.context, seq.first_page]
    })
}

/// Tokens of the cache that a tile sees, about.
fn seen(&[_, tokens, position, ..]: &[u32; TILE_WORDS], window: u32) -> u32 {
    position.min(window) + tokens
}
