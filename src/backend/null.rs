//! A backend that computes nothing: the next token is the last one plus one. It measures what the
//! host costs, and fails or panics where a test tells it to.

use super::step::Sampled;
use super::{
    Backend, Caps, Footprint, History, Limits, Live, NO_LOGITS, Progress, Report, Site, Step, WeightOptions,
};
use crate::error::{Error, Result, Status, try_vec};
use crate::model::{ModelSpec, Weights};
use crate::sparsity::router::RouterFile;
use crate::sparsity::{Counts, mlp_break_even};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What happens at the chosen stage call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fault {
    /// Nothing.
    None,
    /// [`Status::E_DEVICE`].
    Error,
    /// [`Status::E_DEVICE_LOST`].
    Lost,
    /// A panic.
    Panic,
}

/// The backend.
#[derive(Debug)]
pub struct Null {
    /// Stage calls so far.
    calls: AtomicU64,
    /// The call at which the fault happens.
    at: AtomicU64,
    fault: AtomicU8,
}

/// A model's numbers.
#[derive(Debug)]
pub struct NullWeights {
    spec: ModelSpec,
}

/// The sampled tokens of the step.
#[derive(Debug)]
pub struct NullScratch {
    vocab: u32,
    tokens: Vec<u32>,
    n: usize,
}

impl Default for Null {
    fn default() -> Null {
        Null { calls: AtomicU64::new(0), at: AtomicU64::new(u64::MAX), fault: AtomicU8::new(0) }
    }
}

impl Null {
    /// A backend that does not fail.
    pub fn new() -> Null {
        Null::default()
    }

    /// Makes the `k`-th stage call from now on (0 = the next) do `fault`, once.
    pub fn fail_at(&self, k: u64, fault: Fault) {
        self.fault.store(fault as u8, Ordering::Relaxed);
        self.at.store(self.calls.load(Ordering::Relaxed).saturating_add(k), Ordering::Relaxed);
    }

    /// Stage calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    fn stage(&self) -> Result<()> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if call != self.at.load(Ordering::Relaxed) {
            return Ok(());
        }
        let fault = self.fault.load(Ordering::Relaxed);
        if fault == Fault::Error as u8 {
            Err(Error::new(Status::E_DEVICE, "the null device was told to fail"))
        } else if fault == Fault::Lost as u8 {
            Err(Error::new(Status::E_DEVICE_LOST, "the null device was told to be lost"))
        } else {
            assert_ne!(fault, Fault::Panic as u8, "the null device was told to panic");
            Ok(())
        }
    }
}

/// What an f16 cache would take, so that page counts are those of a real model.
fn page_bytes(spec: &ModelSpec) -> u64 {
    u64::from(spec.num_layers) * spec.kv_size() as u64 * 2 * 2 * super::PAGE_TOKENS as u64
}

impl Backend for Null {
    type Weights = NullWeights;
    type Routers = ();
    type Kv = ();
    type Scratch = NullScratch;

    fn caps(&self) -> Caps {
        Caps { name: "null".to_owned(), asynchronous: false, oracle: true, mlp_break_even }
    }

    fn free_memory(&self) -> Result<u64> {
        Ok(1 << 30)
    }

    fn footprint(
        &self,
        spec: &ModelSpec,
        _: WeightOptions,
        _: Option<&RouterFile>,
        _: Option<&Limits>,
    ) -> Result<Footprint> {
        Ok(Footprint { page: page_bytes(spec), ..Footprint::default() })
    }

    fn upload(&self, src: &dyn Weights, _: WeightOptions, progress: Progress<'_>) -> Result<NullWeights> {
        let total = src.total_bytes();
        match progress(total, total) {
            0 => Ok(NullWeights { spec: src.spec().clone() }),
            _ => Err(Error::new(Status::E_CANCELLED, "loading was cancelled by the progress callback")),
        }
    }

    fn spec<'a>(&self, w: &'a NullWeights) -> &'a ModelSpec {
        &w.spec
    }

    fn weight_bytes(&self, _: &NullWeights) -> u64 {
        0
    }

    fn upload_routers(&self, _: &ModelSpec, _: &RouterFile) -> Result<()> {
        Ok(())
    }

    fn page_bytes(&self, w: &NullWeights) -> u64 {
        page_bytes(&w.spec)
    }

    fn kv(&self, _: &NullWeights, _: &Limits) -> Result<()> {
        Ok(())
    }

    fn scratch(&self, w: &NullWeights, _: Option<&()>, limits: &Limits) -> Result<NullScratch> {
        let vocab = w.spec.vocab_size.max(1);
        Ok(NullScratch { vocab, tokens: try_vec(limits.max_batch, 0, "null tokens")?, n: 0 })
    }

    fn begin(&self, _: &NullWeights, s: &mut NullScratch, _: &Step) -> Result<()> {
        s.n = 0;
        self.stage()
    }

    fn embed(&self, _: &NullWeights, _: &mut NullScratch, _: &Step) -> Result<()> {
        self.stage()
    }

    fn project(
        &self,
        _: &NullWeights,
        _: Option<&()>,
        _: &mut (),
        _: &mut NullScratch,
        _: &Step,
        _: usize,
    ) -> Result<()> {
        self.stage()
    }

    fn route(&self, _: &(), _: &mut NullScratch, _: &Step, _: usize, _: Site) -> Result<()> {
        self.stage()
    }

    fn select(&self, _: &mut NullScratch, _: &Step, _: usize, _: Site) -> Result<()> {
        self.stage()
    }

    fn attend(
        &self,
        _: &NullWeights,
        _: &mut (),
        _: &mut NullScratch,
        _: &Step,
        _: usize,
        _: Live,
    ) -> Result<()> {
        self.stage()
    }

    fn mlp(&self, _: &NullWeights, _: &mut NullScratch, _: &Step, _: usize, _: Live) -> Result<()> {
        self.stage()
    }

    fn logits(&self, _: &NullWeights, _: &mut NullScratch, _: &Step) -> Result<()> {
        self.stage()
    }

    fn sample(&self, s: &mut NullScratch, step: &Step, history: &dyn History) -> Result<()> {
        s.n = step.logit_rows.len();
        for seq in step.seqs.iter().filter(|q| q.logits != NO_LOGITS) {
            let last = history.tokens(seq.slot).0.last().copied().unwrap_or(0);
            if let Some(token) = s.tokens.get_mut(seq.logits as usize) {
                *token = last.wrapping_add(1) % s.vocab;
            }
        }
        self.stage()
    }

    fn end(&self, s: &mut NullScratch, step: &Step, report: &mut Report) -> Result<()> {
        report.clear();
        report.sampled.extend(s.tokens[..s.n].iter().map(|&token| Sampled { token, ..Sampled::default() }));
        report.counts.extend(step.seqs.iter().map(|_| Counts::default()));
        self.stage()
    }

    fn poll(&self, _: &mut NullScratch, _: &Step, _: &mut Report, _: u64) -> Result<bool> {
        Ok(true)
    }

    fn read_logits(&self, _: &mut NullScratch, _: usize, out: &mut [f32]) -> Result<()> {
        out.fill(0.0);
        Ok(())
    }
}
