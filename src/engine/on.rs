//! An engine on one kind of backend.

use super::core::{Core, Loaded, Sizes};
use super::driver::Driver;
use super::events::EventSink;
use super::inbox::Inbox;
use super::seq::Admission;
use super::types::{Delivered, EngineOptions, Health, Request, SeqId, Stats};
use crate::backend::{Backend, Footprint, Limits, PAGE_TOKENS, WeightOptions};
use crate::error::{Error, Result};
use crate::kv::pages_for;
use crate::model::ModelSpec;
use crate::sparsity::{Counts, Policy, RouterFile, RouterInfo};
use std::sync::Arc;

const DEFAULT_BATCH: u32 = 32;
const DEFAULT_QUEUE: u32 = 1024;
const DEFAULT_STEP_TOKENS: u32 = 512;
/// Bounds on options, so that no product of theirs overflows and no option alone takes gigabytes.
const MAX_BATCH: u32 = 4096;
const MAX_QUEUE: u32 = 1 << 20;
const MAX_STEP_TOKENS: u32 = 1 << 16;

/// A model on its device, shared by the engines that run it.
pub struct ModelOn<B: Backend>(Arc<Loaded<B>>);

impl<B: Backend> ModelOn<B> {
    /// Weights that `backend` uploaded.
    pub fn new(backend: Arc<B>, weights: B::Weights) -> ModelOn<B> {
        ModelOn(Arc::new(Loaded { backend, weights }))
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.0.backend
    }

    /// The model's plain numbers.
    pub fn spec(&self) -> &ModelSpec {
        self.0.backend.spec(&self.0.weights)
    }

    /// Bytes of its weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.0.backend.weight_bytes(&self.0.weights)
    }

    /// Whether `other` is this very model.
    pub fn is(&self, other: &ModelOn<B>) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<B: Backend> Clone for ModelOn<B> {
    fn clone(&self) -> Self {
        ModelOn(Arc::clone(&self.0))
    }
}

/// Routers on a device, with the model they were checked against.
pub struct RoutersOn<B: Backend> {
    model: ModelOn<B>,
    routers: Arc<B::Routers>,
    info: RouterInfo,
}

impl<B: Backend> RoutersOn<B> {
    /// Routers of `model` that its backend uploaded.
    pub fn new(model: &ModelOn<B>, routers: B::Routers, info: RouterInfo) -> RoutersOn<B> {
        RoutersOn { model: model.clone(), routers: Arc::new(routers), info }
    }

    /// What the file said.
    pub fn info(&self) -> &RouterInfo {
        &self.info
    }
}

/// Scheduler, KV cache and one model, on backend `B`.
pub struct EngineOn<B: Backend> {
    driver: Driver<B>,
}

impl<B: Backend> EngineOn<B> {
    /// Takes all the memory the engine will use.
    pub fn new(
        model: &ModelOn<B>,
        routers: Option<&RoutersOn<B>>,
        options: &EngineOptions,
    ) -> Result<EngineOn<B>> {
        if let Some(r) = routers
            && !r.model.is(model)
        {
            return Err(Error::invalid("the routers were loaded for another model handle"));
        }
        let loaded = Arc::clone(&model.0);
        let (b, w) = (&loaded.backend, &loaded.weights);
        let spec = b.spec(w);
        if options.sparsity.source == crate::sparsity::Source::Oracle && !b.caps().oracle {
            return Err(Error::unsupported("this backend cannot select by oracle"));
        }
        let sizes = sizes(options, spec, b.page_bytes(w), || b.free_memory())?;
        b.check_room(w, routers.map(|r| &*r.routers), &sizes.limits)?;
        let kv_per_token = b.page_bytes(w) / PAGE_TOKENS as u64;
        let info = routers.map(|r| r.info.clone());
        let policy = Policy::new(spec, info, options.sparsity, b.weight_bytes(w), kv_per_token)?
            .with_break_even(b.caps().mlp_break_even);
        let stats = empty_stats(sizes.limits.pages);
        let admission = Admission {
            vocab_size: spec.vocab_size,
            max_context: sizes.limits.max_context,
            total_pages: sizes.limits.pages,
            policy: policy.clone(),
        };
        let inbox = Arc::new(Inbox::new(admission, sizes.max_queue, sizes.limits.max_batch, stats)?);
        let core = Core::new(loaded, routers.map(|r| Arc::clone(&r.routers)), policy, &sizes, stats)?;
        Ok(EngineOn { driver: Driver::new(core, inbox) })
    }

    /// Accepts all of `requests` or none; ids go to `out`. Any thread.
    pub fn submit(&self, requests: &[Request], tokens: &[i32], out: &mut [SeqId]) -> Result<()> {
        self.driver.inbox().check_health()?;
        self.driver.inbox().submit(requests, tokens, out)
    }

    /// Ends sequences at the next step; unknown and finished ids are ignored. Any thread.
    pub fn cancel(&self, ids: &[SeqId]) -> Result<()> {
        self.driver.inbox().check_health()?;
        self.driver.inbox().cancel(ids);
        Ok(())
    }

    /// The token the host chose for a sequence that waits for one. Any thread.
    pub fn push_token(&self, id: SeqId, token: i32) -> Result<()> {
        self.driver.inbox().check_health()?;
        self.driver.inbox().push_token(id, token)
    }

    /// Counters. Any thread, also on a dead engine.
    pub fn stats(&self) -> Stats {
        self.driver.inbox().stats()
    }

    /// Starts a step without waiting for it.
    pub fn begin(&self) -> Result<()> {
        self.driver.begin()
    }

    /// Waits for the step in flight and delivers its events.
    pub fn finish(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        self.driver.finish(timeout_ns, sink)
    }

    /// `finish` if a step is in flight, else a whole step.
    pub fn step(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        self.driver.step(timeout_ns, sink)
    }

    /// Copies the last logits of a sequence whose host samples; how many.
    pub fn logits(&self, id: SeqId, out: &mut [f32]) -> Result<usize> {
        self.driver.logits(id, out)
    }

    /// Declares the engine dead after a panic was caught outside it.
    pub fn kill(&self) {
        self.driver.inbox().set_health(Health::Dead);
    }
}

/// What a model and an engine of it take on a device, and what fits, before anything is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of weights, routers, one page and scratch.
    pub footprint: Footprint,
    /// Sequences in a step and tokens of a context, defaults applied.
    pub max_batch: u32,
    /// See `max_batch`.
    pub max_context: u32,
    /// Pages the engine would take.
    pub pages: u64,
    /// Bytes in all with these pages.
    pub needed: u64,
    /// Bytes that are free now.
    pub free: u64,
    /// Most pages that fit, whatever the options say.
    pub max_pages: u64,
}

impl Estimate {
    /// For a model that is not loaded yet.
    pub(super) fn new<B: Backend>(
        backend: &B,
        spec: &ModelSpec,
        weights: WeightOptions,
        routers: Option<&RouterFile>,
        options: &EngineOptions,
    ) -> Result<Estimate> {
        let free = backend.free_memory()?;
        let mut f = backend.footprint(spec, weights, routers, None)?;
        let bounds = Bounds::new(options, spec)?;
        let left = free.saturating_sub(f.weights).saturating_sub(f.routers);
        let pages = bounds.pages(options, f.page, left);
        f.scratch = backend.footprint(spec, weights, routers, Some(&bounds.limits(pages)))?.scratch;
        let needed = [f.routers, f.scratch, f.page.saturating_mul(pages)];
        Ok(Estimate {
            footprint: f,
            max_batch: bounds.max_batch,
            max_context: bounds.max_context,
            pages,
            needed: needed.into_iter().fold(f.weights, u64::saturating_add),
            free,
            max_pages: left.saturating_sub(f.scratch) / f.page.max(1),
        })
    }

    /// Whether model and engine fit.
    pub fn fits(&self) -> bool {
        self.pages > 0 && self.needed <= self.free
    }

    /// Full contexts that fit.
    pub fn max_contexts(&self) -> u64 {
        self.max_pages / pages_for(self.max_context as usize).max(1) as u64
    }
}

/// Options with defaults applied, within their bounds.
struct Bounds {
    max_batch: u32,
    max_queue: u32,
    step_tokens: u32,
    max_context: u32,
}

impl Bounds {
    fn new(options: &EngineOptions, spec: &ModelSpec) -> Result<Bounds> {
        let max_batch = bounded("max_batch", options.max_batch, DEFAULT_BATCH, MAX_BATCH)?;
        let max_queue = bounded("max_queue", options.max_queue, DEFAULT_QUEUE, MAX_QUEUE)?;
        let default = DEFAULT_STEP_TOKENS.max(max_batch);
        let step_tokens = bounded("step_tokens", options.step_tokens, default, MAX_STEP_TOKENS)?;
        if step_tokens < max_batch {
            return Err(Error::invalid(format!(
                "step_tokens is {step_tokens}, max_batch {max_batch} needs as many"
            )));
        }
        let max_context =
            bounded("max_context", options.max_context, spec.max_positions, spec.max_positions)?;
        Ok(Bounds { max_batch, max_queue, step_tokens, max_context })
    }

    /// Pages an engine takes when `free` bytes are left for it.
    fn pages(&self, options: &EngineOptions, page_bytes: u64, free: u64) -> u64 {
        let all = (pages_for(self.max_context as usize) as u64).saturating_mul(u64::from(self.max_batch));
        let bytes = if options.kv_bytes == 0 { free / 2 } else { options.kv_bytes };
        (bytes / page_bytes.max(1)).min(all).min(u64::from(u32::MAX))
    }

    fn limits(&self, pages: u64) -> Limits {
        let pages = usize::try_from(pages).unwrap_or(usize::MAX);
        Limits {
            max_batch: self.max_batch as usize,
            max_rows: self.step_tokens as usize,
            pages,
            max_context: (self.max_context as usize).min(pages.saturating_mul(PAGE_TOKENS)),
        }
    }
}

/// Applies defaults and bounds.
fn sizes(
    options: &EngineOptions,
    spec: &ModelSpec,
    page_bytes: u64,
    free_memory: impl FnOnce() -> Result<u64>,
) -> Result<Sizes> {
    let bounds = Bounds::new(options, spec)?;
    let free = if options.kv_bytes == 0 { free_memory()? } else { 0 };
    let pages = bounds.pages(options, page_bytes, free);
    if pages == 0 {
        let given = if options.kv_bytes > 0 { options.kv_bytes } else { page_bytes.saturating_sub(1) };
        return Err(Error::new(
            crate::Status::E_KV_FULL,
            format!("kv_bytes {given} holds no page, one takes {page_bytes}"),
        ));
    }
    Ok(Sizes { limits: bounds.limits(pages), max_queue: bounds.max_queue as usize })
}

fn bounded(name: &str, value: u32, default: u32, most: u32) -> Result<u32> {
    match value {
        0 => Ok(default),
        v if v <= most => Ok(v),
        v => Err(Error::limit(format!("{name} is {v}, at most {most}"))),
    }
}

fn empty_stats(pages: usize) -> Stats {
    Stats {
        health: Health::Ok,
        steps: 0,
        tokens_in: 0,
        tokens_out: 0,
        requests_accepted: 0,
        requests_finished: 0,
        admission_refusals: 0,
        preemptions: 0,
        waiting: 0,
        running: 0,
        kv_pages_total: pages as u64,
        kv_pages_free: pages as u64,
        counts: Counts::default(),
        kv_bytes_read: 0,
        kv_bytes_dense: 0,
        nan_scores: 0,
        step_ns_last: 0,
        step_ns_max: 0,
        step_ns_total: 0,
    }
}
