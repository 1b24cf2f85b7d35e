//! The CPU backend: weights in their stored type, f32 sums, the machine's widest instructions, its
//! own threads.
//!
//! Invariant: a row's result depends, bit for bit, neither on the rows beside it, nor on the number
//! of threads, nor on how a prompt was cut into chunks: work is cut along outputs, rows and heads,
//! never along a sum.

mod attention;
mod kv;
mod load;
mod matrix;
mod mlp;
mod parts;
mod product;
mod scratch;
pub(crate) mod simd;
mod sizes;

pub use kv::CpuKv;
pub use load::{CpuRouters, CpuWeights};
pub use scratch::CpuScratch;
pub use simd::Isa;

use super::{Backend, Caps, Footprint, History, Limits, Live, Progress, Report, Site, Step, WeightOptions};
use crate::backend::step::Sampled;
use crate::error::{Error, Result, Status};
use crate::model::{ModelSpec, Position, Weights};
use crate::sample;
use crate::sparsity::router::RouterFile;
use crate::sparsity::{Counts, mlp_break_even};
use crate::sys::ahead::Ahead;
use crate::sys::alloc::{available, counted};
use crate::sys::pool::Pool;
use crate::sys::split::Chunks;
use attention::norm_rows;
use kv::KvShape;
use product::{Cx, Into, product};
use scratch::Kind;
use simd::Pick;

/// The device: an instruction set and threads.
pub struct Cpu {
    isa: Isa,
    pool: Pool,
}

impl Cpu {
    /// The best instruction set; `threads` in all, 0 = one per core.
    pub fn new(threads: usize) -> Result<Cpu> {
        Cpu::with_isa(Isa::best(), threads)
    }

    /// A given instruction set.
    pub fn with_isa(isa: Isa, threads: usize) -> Result<Cpu> {
        Ok(Cpu { isa, pool: Pool::new(threads)? })
    }

    fn cx(&self) -> Cx<'_> {
        Cx { pool: &self.pool, isa: self.isa, ahead: Ahead::NOTHING }
    }

    fn kind(&self, spec: &ModelSpec, bf16: bool, rank: Option<usize>) -> Kind {
        let kv_bf16 = load::meets_bf16(self.isa, spec.dtype);
        Kind { threads: self.pool.threads(), bf16, kv_bf16, rank }
    }

    fn check_layer(w: &CpuWeights, layer: usize) -> Result<()> {
        if layer < w.layers.len() { Ok(()) } else { Err(Error::invalid(format!("layer {layer}"))) }
    }
}

impl Backend for Cpu {
    type Weights = CpuWeights;
    type Routers = CpuRouters;
    type Kv = CpuKv;
    type Scratch = CpuScratch;

    fn caps(&self) -> Caps {
        let threads = self.pool.threads();
        let s = if threads == 1 { "" } else { "s" };
        let name = format!("cpu {}, {threads} thread{s}", self.isa.name());
        Caps { name, asynchronous: false, oracle: true, mlp_break_even }
    }

    fn free_memory(&self) -> Result<u64> {
        available().ok_or_else(|| Error::unsupported("this system does not say how much memory is free"))
    }

    fn footprint(
        &self,
        spec: &ModelSpec,
        options: WeightOptions,
        routers: Option<&RouterFile>,
        limits: Option<&Limits>,
    ) -> Result<Footprint> {
        let dtype = sizes::weight_dtype(spec, options)?;
        let ranks = routers.and_then(|r| r.info().mlp.as_ref()).map(|m| &m.ranks[..]).unwrap_or_default();
        let rank = ranks.iter().flatten().max().map(|&r| r as usize);
        let scratch = match limits {
            // Made, counted, dropped: the sizes stand in one place.
            Some(limits) => {
                let kind = self.kind(spec, load::meets_bf16(self.isa, dtype), rank);
                let (made, bytes) = counted(|| CpuScratch::new(spec, kind, limits));
                made?;
                bytes
            }
            None => 0,
        };
        Ok(Footprint {
            weights: sizes::weight_bytes(spec, dtype),
            routers: routers.map_or(0, |r| sizes::router_bytes(spec, r)),
            page: KvShape::new(spec).page_bytes(),
            scratch,
        })
    }

    fn upload(
        &self,
        src: &dyn Weights,
        options: WeightOptions,
        progress: Progress<'_>,
    ) -> Result<CpuWeights> {
        let d = src.spec().head_dim as usize;
        if d == 0 || d > attention::MAX_HEAD_DIM {
            return Err(Error::limit(format!("head_dim {d}, at most {} allowed", attention::MAX_HEAD_DIM)));
        }
        load::upload(&self.pool, self.isa, src, options, progress)
    }

    fn spec<'a>(&self, w: &'a CpuWeights) -> &'a ModelSpec {
        &w.spec
    }

    fn weight_bytes(&self, w: &CpuWeights) -> u64 {
        w.bytes
    }

    fn upload_routers(&self, spec: &ModelSpec, file: &RouterFile) -> Result<CpuRouters> {
        load::upload_routers(&self.pool, spec, file)
    }

    fn page_bytes(&self, w: &CpuWeights) -> u64 {
        KvShape::new(&w.spec).page_bytes()
    }

    fn kv(&self, w: &CpuWeights, limits: &Limits) -> Result<CpuKv> {
        let shape = KvShape::new(&w.spec);
        // Untouched memory costs nothing, so the system would agree to any size, and end the
        // process later.
        let wanted = shape.page_bytes().saturating_mul(limits.pages as u64);
        if let Some(free) = available().filter(|free| wanted > *free) {
            return Err(Error::new(
                Status::E_NOMEM,
                format!("KV pages: {wanted} bytes are needed, {free} are free"),
            ));
        }
        CpuKv::new(shape, limits.pages)
    }

    fn scratch(&self, w: &CpuWeights, r: Option<&CpuRouters>, limits: &Limits) -> Result<CpuScratch> {
        let rank = r.filter(|r| r.layers.iter().any(|l| l.mlp.is_some())).map(|r| r.rank);
        CpuScratch::new(&w.spec, self.kind(&w.spec, w.bf16, rank), limits)
    }

    fn begin(&self, w: &CpuWeights, s: &mut CpuScratch, step: &Step) -> Result<()> {
        s.check(step)?;
        self.pool.wake();
        attention::plan_units(s, step);
        s.counts.fill(Counts::default());
        s.nan_scores = 0;
        s.kv_bytes_read = 0;
        s.kv_bytes_dense = 0;
        s.select.attn_layer = None;
        s.select.mlp_layer = None;
        if let Position::Rope { inv_freq } = &w.spec.position {
            let half = inv_freq.len();
            for (row, &p) in step.positions.iter().enumerate() {
                let (cos, sin) = (&mut s.cos[row * half..][..half], &mut s.sin[row * half..][..half]);
                for ((c, s), f) in cos.iter_mut().zip(sin).zip(inv_freq) {
                    // As the reference does: the angle is rounded to f32 first.
                    (*s, *c) = (p as f32 * f).sin_cos();
                }
            }
        }
        Ok(())
    }

    fn embed(&self, w: &CpuWeights, s: &mut CpuScratch, step: &Step) -> Result<()> {
        let n = step.tokens.len();
        let CpuScratch { x, h, hidden_stride, .. } = s;
        let rows = x.chunks_exact_mut(*hidden_stride).zip(h.chunks_exact_mut(*hidden_stride));
        for ((x, extra), (&token, &p)) in rows.take(n).zip(step.tokens.iter().zip(&step.positions)) {
            w.embed.row(token as usize, x);
            if let (Some(table), Position::Learned { offset }) = (&w.positions, &w.spec.position) {
                let row = p as usize + *offset as usize;
                if row >= table.rows {
                    return Err(Error::invalid(format!(
                        "position {p}, the model has {}",
                        w.spec.max_positions
                    )));
                }
                table.row(row, extra);
                product::add(x, extra);
            }
        }
        // The rest of `h` beyond the model's width stays zero: `row` wrote the width only.
        Ok(())
    }

    fn project(
        &self,
        w: &CpuWeights,
        _: Option<&CpuRouters>,
        kv: &mut CpuKv,
        s: &mut CpuScratch,
        step: &Step,
        layer: usize,
    ) -> Result<()> {
        Self::check_layer(w, layer)?;
        if layer == 0 && step.pages.iter().any(|&p| p as usize >= kv.pages) {
            return Err(Error::invalid("step: a page is not in the cache"));
        }
        attention::project(self.cx(), w, kv, s, step, layer);
        Ok(())
    }

    fn route(&self, r: &CpuRouters, s: &mut CpuScratch, step: &Step, layer: usize, site: Site) -> Result<()> {
        mlp::route(self.cx(), r, s, step, layer, site)
    }

    fn select(&self, s: &mut CpuScratch, step: &Step, layer: usize, site: Site) -> Result<()> {
        mlp::select(s, step, layer, site)
    }

    fn attend(
        &self,
        w: &CpuWeights,
        kv: &mut CpuKv,
        s: &mut CpuScratch,
        step: &Step,
        layer: usize,
        live: Live,
    ) -> Result<()> {
        Self::check_layer(w, layer)?;
        attention::attend(self.cx(), w, kv, s, step, layer, live)
    }

    fn mlp(&self, w: &CpuWeights, s: &mut CpuScratch, step: &Step, layer: usize, live: Live) -> Result<()> {
        Self::check_layer(w, layer)?;
        mlp::mlp(self.cx(), w, s, step, layer, live);
        Ok(())
    }

    fn logits(&self, w: &CpuWeights, s: &mut CpuScratch, step: &Step) -> Result<()> {
        let n = step.logit_rows.len();
        let stride = s.hidden_stride;
        // `h` is free by now: it gathers the rows before their norm.
        for (i, &row) in step.logit_rows.iter().enumerate() {
            let row = row as usize;
            s.h[i * stride..(i + 1) * stride].copy_from_slice(&s.x[row * stride..(row + 1) * stride]);
        }
        let to = (&mut s.last, &mut s.last_acts);
        norm_rows(self.cx(), &w.spec, &w.final_norm, (&s.h, stride), n, to);
        let x = CpuScratch::normed(&s.last, &s.last_acts, stride);
        let head = w.head.as_ref().unwrap_or(&w.embed);
        let to = (&mut s.logits[..], w.spec.vocab_size as usize);
        product(self.cx(), &mut s.locals, x, Pick::Range(0, n), (head, None), Into::Store, to);
        Ok(())
    }

    fn sample(&self, s: &mut CpuScratch, step: &Step, history: &dyn History) -> Result<()> {
        let n = step.logit_rows.len();
        let CpuScratch { locals, logits, choices, vocab, .. } = s;
        self.pool.split(Chunks::new(&mut choices[..n], 1), locals, Ahead::NOTHING, |local, choice, i| {
            let choice = &mut choice[0];
            choice.sampled = Sampled::default();
            let Some(seq) = step.seqs.iter().find(|q| q.logits == i as u32 && q.sample) else { return };
            let (tokens, prompt) = history.tokens(seq.slot);
            let logits = &logits[i * *vocab..(i + 1) * *vocab];
            let params = history.params(seq.slot);
            let mut n_top = 0;
            let put = |token, logprob| {
                choice.top[n_top] = (token, logprob);
                n_top += 1;
            };
            match sample::sample(logits, tokens, prompt, params, &mut local.sampler, put) {
                Some(c) => {
                    choice.sampled.token = c.token;
                    choice.sampled.logprob = c.logprob;
                    choice.sampled.n_top = n_top as u32;
                }
                None => choice.sampled.broken = true,
            }
        });
        Ok(())
    }

    fn end(&self, s: &mut CpuScratch, step: &Step, report: &mut Report) -> Result<()> {
        report.clear();
        for choice in &s.choices[..step.logit_rows.len()] {
            let mut sampled = choice.sampled;
            sampled.first_top = report.top.len() as u32;
            report.top.extend_from_slice(&choice.top[..sampled.n_top as usize]);
            report.sampled.push(sampled);
        }
        report.counts.extend_from_slice(&s.counts[..step.seqs.len()]);
        report.nan_scores = s.nan_scores;
        report.kv_bytes_read = s.kv_bytes_read;
        report.kv_bytes_dense = s.kv_bytes_dense;
        Ok(())
    }

    fn poll(&self, _: &mut CpuScratch, _: &Step, _: &mut Report, _: u64) -> Result<bool> {
        Ok(true)
    }

    fn read_logits(&self, s: &mut CpuScratch, index: usize, out: &mut [f32]) -> Result<()> {
        let from = s.logits.get(index * s.vocab..).and_then(|l| l.get(..out.len()));
        match from {
            Some(from) if out.len() <= s.vocab => out.copy_from_slice(from),
            _ => return Err(Error::invalid(format!("logits {index}: {} values asked for", out.len()))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
