//! What a step needs beside weights and pages, sized once.

use super::matrix::padded;
use super::parts::{Cut, most_cuts, state_size};
use super::product::{MAX_BLOCK, ROW_BLOCK};
use super::simd::Acts;
use crate::backend::{Limits, PAGE_TOKENS, Sampled, Step};
use crate::error::{Error, Result, try_vec, try_with_capacity};
use crate::model::{ModelSpec, Position};
use crate::sample;
use crate::sparsity::Counts;
use crate::sparsity::router::AttnUnit;
use crate::sparsity::select::Selector;
use crate::sys::alloc::Buf;
use crate::sys::split::Band;

/// Rows of activations in the form that meets the weights.
pub(super) struct ActBuf {
    pub(super) f32: Buf<f32>,
    pub(super) bf16: Buf<u16>,
    pub(super) stride: usize,
    is_bf16: bool,
}

impl ActBuf {
    fn new(bf16: bool, rows: usize, columns: usize) -> Result<ActBuf> {
        let stride = padded(columns);
        let n = rows.saturating_mul(stride);
        let (f, b) = if bf16 { (0, n) } else { (n, 0) };
        Ok(ActBuf {
            f32: Buf::zeroed(f, "activations")?,
            bf16: Buf::zeroed(b, "activations")?,
            stride,
            is_bf16: bf16,
        })
    }

    /// Rows for a product.
    pub(super) fn acts(&self) -> (Acts<'_>, usize) {
        (if self.is_bf16 { Acts::Bf16(&self.bf16) } else { Acts::F32(&self.f32) }, self.stride)
    }

    pub(super) fn is_bf16(&self) -> bool {
        self.is_bf16
    }
}

/// One worker's own memory.
pub(super) struct Local {
    pub(super) tile: Buf<f32>,
    pub(super) tile2: Buf<f32>,
    pub(super) tile16: Buf<u16>,
    /// Sums between passes of long rows.
    pub(super) spill: Buf<f32>,
    /// Queries of one unit, f32 or bf16.
    pub(super) q32: Buf<f32>,
    pub(super) q16: Buf<u16>,
    pub(super) visible: Vec<(u8, u8)>,
    /// Softmax state of one unit, and of a later part of its context.
    pub(super) state: Buf<f32>,
    pub(super) later: Buf<f32>,
    pub(super) sampler: sample::Scratch,
}

/// One token's choice and its alternatives.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    pub(super) sampled: Sampled,
    pub(super) top: [(u32, f32); sample::MAX_LOGPROBS],
}

/// What attention computes in one task: consecutive rows of one sequence within one page.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    /// Index in `Step::seqs`.
    pub(super) seq: u32,
    pub(super) decode: bool,
}

/// See the module.
pub struct CpuScratch {
    pub(super) limits: Limits,
    pub(super) locals: Vec<Local>,
    /// Residual stream, `[row][hidden, padded]`.
    pub(super) x: Buf<f32>,
    /// Output of the last norm, in f32 and in the form that meets the weights (if that differs).
    pub(super) h: Buf<f32>,
    pub(super) h_acts: ActBuf,
    pub(super) hidden_stride: usize,
    pub(super) qkv: Buf<f32>,
    pub(super) qkv_width: usize,
    /// Queries of attention, `[row][head][dims]`, f32 or bf16.
    pub(super) q32: Buf<f32>,
    pub(super) q16: Buf<u16>,
    /// Attention output.
    pub(super) attn: ActBuf,
    /// MLP activations.
    pub(super) z: ActBuf,
    /// Sums of the ReLU MLP's down projection.
    pub(super) y: Buf<f32>,
    pub(super) cos: Buf<f32>,
    pub(super) sin: Buf<f32>,
    pub(super) bands: Vec<Band>,
    pub(super) units: Vec<Unit>,
    /// Parts of long contexts that are tasks of their own, and what they saw.
    pub(super) cuts: Vec<Cut>,
    pub(super) states: Buf<f32>,
    /// Normed rows that want logits, and the logits.
    pub(super) last: Buf<f32>,
    pub(super) last_acts: ActBuf,
    pub(super) logits: Buf<f32>,
    pub(super) vocab: usize,
    pub(super) choices: Vec<Choice>,
    pub(super) select: Selection,
    pub(super) counts: Vec<Counts>,
    pub(super) nan_scores: u64,
    pub(super) kv_bytes_read: u64,
    pub(super) kv_bytes_dense: u64,
}

/// Router logits and what was selected.
pub(super) struct Selection {
    pub(super) selector: Selector,
    pub(super) kv_heads: usize,
    /// Query heads per KV head.
    pub(super) group: usize,
    /// `[decode row][units of the router]`.
    pub(super) attn_logits: Buf<f32>,
    pub(super) attn_width: usize,
    /// Layer whose router logits are there, and what they score.
    pub(super) attn_layer: Option<(usize, AttnUnit)>,
    /// `[decode row][kv head]`.
    pub(super) live: Vec<bool>,
    pub(super) unit_scores: Vec<f32>,
    pub(super) chosen: Vec<u32>,
    /// Output of the router's first matrix.
    pub(super) low: Buf<f32>,
    pub(super) low_stride: usize,
    /// `[routed row][neuron]`.
    pub(super) mlp_logits: Buf<f32>,
    /// Layer whose router logits are there, and their width.
    pub(super) mlp_layer: Option<(usize, usize)>,
    /// Rows in the order of `mlp_logits`: reference rows, then invariant rows.
    pub(super) routed: Vec<u32>,
    pub(super) n_reference: usize,
    pub(super) reference: Vec<u32>,
    /// One list per invariant row.
    pub(super) invariant: Vec<Vec<u32>>,
    /// Rows that run every neuron.
    pub(super) dense: Vec<u32>,
}

/// What the sizes depend on beside the model's.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub(super) threads: usize,
    /// Activations that meet the weights are bf16.
    pub(super) bf16: bool,
    pub(super) kv_bf16: bool,
    /// Widest middle of an MLP router; `None`: there is none.
    pub(super) rank: Option<usize>,
}

impl CpuScratch {
    pub(super) fn new(spec: &ModelSpec, kind: Kind, limits: &Limits) -> Result<CpuScratch> {
        let Kind { threads, bf16, kv_bf16, rank } = kind;
        let (rows, batch) = (limits.max_rows, limits.max_batch);
        let hidden = spec.hidden_size as usize;
        let hidden_stride = padded(hidden);
        let vocab = spec.vocab_size as usize;
        let qkv_width = spec.q_size() + 2 * spec.kv_size();
        let dims = (spec.head_dim as usize).next_multiple_of(16);
        let q_width = spec.num_heads as usize * dims;
        let half = match spec.position {
            Position::Rope { .. } => spec.head_dim as usize / 2,
            Position::Learned { .. } => 0,
        };
        let f32s = |rows: usize, width: usize| Buf::<f32>::zeroed(rows.saturating_mul(width), "activations");
        let mut locals = try_with_capacity(threads, "worker memory")?;
        for _ in 0..threads {
            locals.push(Local::new(spec, limits, dims, kv_bf16)?);
        }
        let y_rows = if spec.activation.gated() { 0 } else { rows };
        let choice = Choice { sampled: Sampled::default(), top: [(0, 0.0); sample::MAX_LOGPROBS] };
        let none = Unit { seq: 0, decode: false };
        // A chunk of n rows touches at most n/16 + 2 pages.
        let bands = batch.saturating_mul(2).saturating_add(rows);
        let cuts = most_cuts(threads, limits.max_context, batch.saturating_mul(spec.num_kv_heads as usize));
        Ok(CpuScratch {
            limits: *limits,
            locals,
            x: f32s(rows, hidden_stride)?,
            h: f32s(rows, hidden_stride)?,
            h_acts: ActBuf::new(bf16, if bf16 { rows } else { 0 }, hidden)?,
            hidden_stride,
            qkv: f32s(rows, qkv_width)?,
            qkv_width,
            q32: f32s(if kv_bf16 { 0 } else { rows }, q_width)?,
            q16: Buf::zeroed(if kv_bf16 { rows.saturating_mul(q_width) } else { 0 }, "activations")?,
            attn: ActBuf::new(bf16, rows, spec.q_size())?,
            z: ActBuf::new(bf16, rows, spec.ffn_size as usize)?,
            y: f32s(y_rows, hidden_stride)?,
            cos: f32s(rows, half)?,
            sin: f32s(rows, half)?,
            bands: filled(bands, Band { first: 0, rows: 0 })?,
            units: filled(bands, none)?,
            cuts: filled(cuts, Cut::default())?,
            states: f32s(cuts, state_size(spec.group() as usize, dims))?,
            last: f32s(batch, hidden_stride)?,
            last_acts: ActBuf::new(bf16, if bf16 { batch } else { 0 }, hidden)?,
            logits: f32s(batch, vocab)?,
            vocab,
            choices: try_vec(batch, choice, "sampled tokens")?,
            select: Selection::new(spec, rank, limits)?,
            counts: try_vec(batch, Counts::default(), "counts")?,
            nan_scores: 0,
            kv_bytes_read: 0,
            kv_bytes_dense: 0,
        })
    }

    /// Whether a step fits what was sized, so that no stage has to ask again.
    pub(super) fn check(&self, step: &Step) -> Result<()> {
        let rows = step.tokens.len();
        let bad = |what: &str| Err(Error::invalid(format!("step: {what}")));
        if rows > self.limits.max_rows || step.positions.len() != rows {
            return bad("more rows than the engine was made for");
        }
        if step.seqs.len() > self.limits.max_batch || step.logit_rows.len() > self.limits.max_batch {
            return bad("more sequences than the engine was made for");
        }
        if step.tokens.iter().any(|&t| t as usize >= self.vocab) {
            return bad("a token is not in the vocabulary");
        }
        if step.logit_rows.len() > rows || step.logit_rows.iter().any(|&r| r as usize >= rows) {
            return bad("logits of a row that is not there");
        }
        let mut next = 0;
        for (i, s) in step.seqs.iter().enumerate() {
            if s.first_row != next || s.n_rows == 0 || s.decode && (s.n_rows != 1 || s.first_row != i as u32)
            {
                return bad("rows of a sequence are out of order");
            }
            next += s.n_rows;
            let table = s.first_page as usize + s.n_pages as usize;
            let needed = (s.context as usize).div_ceil(PAGE_TOKENS);
            if table > step.pages.len() || needed > s.n_pages as usize || s.context < s.n_rows {
                return bad("a block table is too short");
            }
            for r in 0..s.n_rows {
                let row = (s.first_row + r) as usize;
                if row >= rows || step.positions[row] != s.context - s.n_rows + r {
                    return bad("positions and context disagree");
                }
            }
            if s.logits != crate::backend::NO_LOGITS && s.logits as usize >= step.logit_rows.len() {
                return bad("a sequence's logits are not there");
            }
        }
        if next as usize != rows { bad("rows without a sequence") } else { Ok(()) }
    }

    /// Output of the last norm in the form that meets the weights.
    pub(super) fn normed<'a>(h: &'a Buf<f32>, acts: &'a ActBuf, stride: usize) -> (Acts<'a>, usize) {
        if acts.is_bf16() { acts.acts() } else { (Acts::F32(h), stride) }
    }
}

fn filled<T: Clone>(capacity: usize, value: T) -> Result<Vec<T>> {
    let mut v = try_vec(capacity, value, "attention units")?;
    v.clear();
    Ok(v)
}

impl Local {
    fn new(spec: &ModelSpec, limits: &Limits, dims: usize, kv_bf16: bool) -> Result<Local> {
        let group = spec.group() as usize;
        let queries = group.saturating_mul(PAGE_TOKENS.min(limits.max_rows.max(1)));
        let tile = ROW_BLOCK * MAX_BLOCK;
        let block = ROW_BLOCK.min(limits.max_rows);
        let zeros = |n: usize| Buf::<f32>::zeroed(n, "worker memory");
        Ok(Local {
            tile: zeros(tile)?,
            tile2: zeros(tile)?,
            tile16: Buf::zeroed(tile, "worker memory")?,
            spill: zeros(16 * tile.min(block * MAX_BLOCK))?,
            q32: zeros(if kv_bf16 { 0 } else { queries * dims })?,
            q16: Buf::zeroed(if kv_bf16 { queries * dims } else { 0 }, "worker memory")?,
            visible: try_vec(queries, (0, 0), "worker memory")?,
            state: zeros(state_size(queries, dims))?,
            later: zeros(state_size(queries, dims))?,
            sampler: sample::Scratch::new(spec.vocab_size as usize)?,
        })
    }
}

impl Selection {
    fn new(spec: &ModelSpec, rank: Option<usize>, limits: &Limits) -> Result<Selection> {
        let batch = limits.max_batch;
        let (heads, kv_heads) = (spec.num_heads as usize, spec.num_kv_heads as usize);
        let ffn = spec.ffn_size as usize;
        let low_stride = padded(rank.unwrap_or(0));
        let (routed, neurons) = if rank.is_some() { (batch, ffn) } else { (0, 0) };
        let mut invariant = try_with_capacity(routed, "selections")?;
        for _ in 0..routed {
            invariant.push(try_with_capacity(neurons, "selections")?);
        }
        Ok(Selection {
            selector: Selector::new(neurons.max(kv_heads))?,
            kv_heads,
            group: spec.group() as usize,
            attn_logits: Buf::zeroed(batch * heads, "router logits")?,
            attn_width: heads,
            attn_layer: None,
            live: try_vec(batch * kv_heads, true, "selections")?,
            unit_scores: try_vec(kv_heads, 0.0, "router scores")?,
            chosen: try_with_capacity(kv_heads, "selections")?,
            low: Buf::zeroed(routed * low_stride, "router activations")?,
            low_stride,
            mlp_logits: Buf::zeroed(routed.saturating_mul(neurons), "router logits")?,
            mlp_layer: None,
            routed: try_with_capacity(batch, "selections")?,
            n_reference: 0,
            reference: try_with_capacity(neurons, "selections")?,
            invariant,
            dense: try_with_capacity(limits.max_rows, "selections")?,
        })
    }
}
