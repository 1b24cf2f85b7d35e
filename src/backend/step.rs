//! One step's work as plain arrays: what the engine fills and every stage reads.

use crate::error::{Result, try_with_capacity};
use crate::sparsity::{Counts, MlpMode, Plan};

/// [`SeqStep::logits`] of a sequence whose rows need no logits.
pub const NO_LOGITS: u32 = u32::MAX;

/// One sequence's part of a step: rows `first_row..first_row + n_rows`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SeqStep {
    /// The engine's slot, the key for [`super::History`].
    pub slot: u32,
    /// First row of this sequence.
    pub first_row: u32,
    /// Rows: 1 when decoding, a chunk of the prompt when prefilling.
    pub n_rows: u32,
    /// Tokens in the cache once this step's rows are written; the last row's position + 1.
    pub context: u32,
    /// First entry of its block table in [`Step::pages`].
    pub first_page: u32,
    /// Entries of its block table.
    pub n_pages: u32,
    /// A decode row: the plan's sparse rules apply. Prefill rows are dense.
    pub decode: bool,
    /// How this sequence's MLP runs when decoding.
    pub mlp: MlpMode,
    /// Index of its last row's logits in [`Step::logit_rows`], or [`NO_LOGITS`].
    pub logits: u32,
    /// Sample a token from those logits (else the host samples).
    pub sample: bool,
}

/// A step. Decode rows come first, then prefill chunks. Capacities are fixed at creation, so
/// filling one allocates nothing.
#[derive(Debug, Default)]
pub struct Step {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence, from 0.
    pub positions: Vec<u32>,
    /// The sequences, decoding ones first, in row order.
    pub seqs: Vec<SeqStep>,
    /// Block tables, concatenated: page numbers.
    pub pages: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// What is sparse.
    pub plan: Plan,
}

impl Step {
    /// An empty step with room for a whole batch.
    pub fn with_limits(limits: &super::Limits, num_layers: usize) -> Result<Step> {
        let pages_per_seq = limits.max_context.div_ceil(super::PAGE_TOKENS);
        let pages = limits.pages.min(pages_per_seq.saturating_mul(limits.max_batch));
        Ok(Step {
            tokens: try_with_capacity(limits.max_rows, "step tokens")?,
            positions: try_with_capacity(limits.max_rows, "step positions")?,
            seqs: try_with_capacity(limits.max_batch, "step sequences")?,
            pages: try_with_capacity(pages, "step block tables")?,
            logit_rows: try_with_capacity(limits.max_batch, "step logit rows")?,
            plan: Plan::with_limits(num_layers, limits.max_batch)?,
        })
    }

    /// Empties it, keeping the room.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.seqs.clear();
        self.pages.clear();
        self.logit_rows.clear();
        self.plan.clear();
    }

    /// How many of the sequences decode; they are the first ones, one row each.
    pub fn n_decode(&self) -> usize {
        self.seqs.iter().take_while(|s| s.decode).count()
    }

    /// The block table of a sequence.
    pub fn block_table(&self, seq: &SeqStep) -> &[u32] {
        let first = seq.first_page as usize;
        &self.pages[first..first + seq.n_pages as usize]
    }
}

/// A sampled token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub token: u32,
    /// Natural log of its probability under the unmodified logits.
    pub logprob: f32,
    /// Its most likely alternatives in [`Report::top`]: first entry and count.
    pub first_top: u32,
    /// See `first_top`.
    pub n_top: u32,
    /// The logits held no finite value: nothing could be sampled.
    pub broken: bool,
}

/// What a step produced.
#[derive(Debug, Default)]
pub struct Report {
    /// One per entry of [`Step::logit_rows`]; meaningless where the host samples.
    pub sampled: Vec<Sampled>,
    /// Top alternatives, most likely first: token and log probability.
    pub top: Vec<(u32, f32)>,
    /// One per entry of [`Step::seqs`]: what ran in its decode row.
    pub counts: Vec<Counts>,
    /// Router scores that were NaN (sorted last).
    pub nan_scores: u64,
    /// KV bytes attention read for decode rows.
    pub kv_bytes_read: u64,
    /// KV bytes dense attention would have read for them.
    pub kv_bytes_dense: u64,
}

impl Report {
    /// An empty report with room for a whole batch.
    pub fn with_limits(limits: &super::Limits) -> Result<Report> {
        Ok(Report {
            sampled: try_with_capacity(limits.max_batch, "sampled tokens")?,
            top: try_with_capacity(limits.max_batch * crate::sample::MAX_LOGPROBS, "log probabilities")?,
            counts: try_with_capacity(limits.max_batch, "counts")?,
            ..Report::default()
        })
    }

    /// Empties it, keeping the room.
    pub fn clear(&mut self) {
        self.sampled.clear();
        self.top.clear();
        self.counts.clear();
        self.nan_scores = 0;
        self.kv_bytes_read = 0;
        self.kv_bytes_dense = 0;
    }
}
