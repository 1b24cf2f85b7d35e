//! An engine on one kind of backend.

use super::core::{Core, Loaded, Sizes};
use super::driver::Driver;
use super::events::EventSink;
use super::inbox::Inbox;
use super::seq::Admission;
use super::types::{Delivered, EngineOptions, Health, Request, SeqId, Stats};
use crate::backend::{Backend, Limits, PAGE_TOKENS};
use crate::error::{Error, Result};
use crate::kv::pages_for;
use crate::model::ModelSpec;
use crate::sparsity::{Counts, Policy, RouterInfo};
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
        let kv_per_token = b.page_bytes(w) / PAGE_TOKENS as u64;
        let info = routers.map(|r| r.info.clone());
        let policy = Policy::new(spec, info, options.sparsity, b.weight_bytes(w), kv_per_token)?;
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

/// Applies defaults and bounds.
fn sizes(
    options: &EngineOptions,
    spec: &ModelSpec,
    page_bytes: u64,
    free_memory: impl FnOnce() -> Result<u64>,
) -> Result<Sizes> {
    let max_batch = bounded("max_batch", options.max_batch, DEFAULT_BATCH, MAX_BATCH)?;
    let max_queue = bounded("max_queue", options.max_queue, DEFAULT_QUEUE, MAX_QUEUE)?;
    let step_tokens =
        bounded("step_tokens", options.step_tokens, DEFAULT_STEP_TOKENS.max(max_batch), MAX_STEP_TOKENS)?;
    if step_tokens < max_batch {
        return Err(Error::invalid(format!(
            "step_tokens is {step_tokens}, max_batch {max_batch} needs as many"
        )));
    }
    let wanted = bounded("max_context", options.max_context, spec.max_positions, spec.max_positions)?;
    let all = (pages_for(wanted as usize) as u64).saturating_mul(u64::from(max_batch));
    let pages = match options.kv_bytes {
        0 => (free_memory()? / 2 / page_bytes).min(all),
        bytes => (bytes / page_bytes).min(all),
    };
    if pages == 0 {
        let given = if options.kv_bytes > 0 { options.kv_bytes } else { page_bytes.saturating_sub(1) };
        return Err(Error::new(
            crate::Status::E_KV_FULL,
            format!("kv_bytes {given} holds no page, one takes {page_bytes}"),
        ));
    }
    let pages = usize::try_from(pages.min(u64::from(u32::MAX))).unwrap_or(usize::MAX);
    let limits = Limits {
        max_batch: max_batch as usize,
        max_rows: step_tokens as usize,
        pages,
        max_context: (wanted as usize).min(pages.saturating_mul(PAGE_TOKENS)),
    };
    Ok(Sizes { limits, max_queue: max_queue as usize })
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
