//! Attention over a context in parts, and the parts of few heads shared among threads.
//!
//! A row's softmax runs over the pages of one part, then joins what earlier parts left. Where parts
//! begin depends on positions alone and they join in ascending order, so no bit depends on who
//! computed which part: one thread in a row, or several at once.

use super::simd::merge;
use crate::backend::PAGE_TOKENS;

/// Pages of a part.
pub(super) const PART_PAGES: usize = 32;

/// Softmax state of some query rows: largest score, sixteen sums of weights, weighted sums of V.
pub(super) struct State<T> {
    pub(super) max: T,
    pub(super) sum: T,
    pub(super) out: T,
}

/// Elements of a state of `rows` rows of `dims` dimensions.
pub(super) const fn state_size(rows: usize, dims: usize) -> usize {
    rows.saturating_mul(dims.saturating_add(17))
}

impl<'a> State<&'a mut [f32]> {
    /// A state in `memory` that has seen nothing.
    pub(super) fn new(memory: &'a mut [f32], rows: usize, dims: usize) -> Self {
        let (max, rest) = memory[..state_size(rows, dims)].split_at_mut(rows);
        let (sum, out) = rest.split_at_mut(16 * rows);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        out.fill(0.0);
        State { max, sum, out }
    }

    /// Adds what a later part saw.
    pub(super) fn join(&mut self, isa: super::Isa, later: &State<&[f32]>) {
        merge(isa, (self.max, self.sum, self.out), (later.max, later.sum, later.out));
    }

    pub(super) fn as_ref(&self) -> State<&[f32]> {
        State { max: self.max, sum: self.sum, out: self.out }
    }
}

impl<'a> State<&'a [f32]> {
    /// The state that `memory` holds.
    pub(super) fn of(memory: &'a [f32], rows: usize, dims: usize) -> Self {
        let (max, rest) = memory[..state_size(rows, dims)].split_at(rows);
        let (sum, out) = rest.split_at(16 * rows);
        State { max, sum, out }
    }
}

/// One part of a unit (index in the step's units and KV head) that is a task of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) unit: u32,
    pub(super) head: u32,
    pub(super) part: u32,
}

/// The cuts of one unit and head, which are consecutive: first and count.
pub(super) fn cuts_of(cuts: &[Cut], unit: usize, head: usize) -> std::ops::Range<usize> {
    let key = |c: &Cut| (c.unit as usize, c.head as usize);
    cuts.partition_point(|c| key(c) < (unit, head))..cuts.partition_point(|c| key(c) <= (unit, head))
}

/// Most cuts of a layer: with as many whole contexts as threads in parts, every thread has work.
pub(super) fn most_cuts(threads: usize, max_context: usize, units: usize) -> usize {
    let parts = max_context.div_ceil(PART_PAGES * PAGE_TOKENS) + 1;
    if threads == 1 { 0 } else { parts.saturating_mul(threads.min(units)) }
}
