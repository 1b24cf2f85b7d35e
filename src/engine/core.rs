//! A step as a transaction: gather what arrived, decide, reserve pages, compute, commit. When
//! computing fails the reservation is undone and nothing else has changed.

use super::events::EventQueue;
use super::inbox::{Arrival, Inbox};
use super::seq::Seq;
use super::types::{Event, FinishReason, SeqId, Stats};
use crate::backend::decode::{Run, enqueue};
use crate::backend::{Backend, History, Limits, NO_LOGITS, Report, Sampled, SeqStep, Step};
use crate::error::{Error, Result, Status, try_with_capacity};
use crate::kv::PagePool;
use crate::model::ModelSpec;
use crate::sample::Params;
use crate::sched::policy::{Bounds, Decision, View};
use crate::sparsity::{Policy, SeqDemand};
use std::sync::Arc;

/// A model on its device.
pub(crate) struct Loaded<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) weights: B::Weights,
}

pub(crate) struct Core<B: Backend> {
    pub(crate) model: Arc<Loaded<B>>,
    routers: Option<Arc<B::Routers>>,
    policy: Policy,
    limits: Limits,
    eos: Vec<u32>,
    kv: B::Kv,
    scratch: B::Scratch,
    pool: PagePool,
    /// By slot.
    seqs: Vec<Option<Seq>>,
    /// Slots in order of service.
    running: Vec<u32>,
    waiting: Vec<u32>,
    running_views: Vec<View>,
    waiting_views: Vec<View>,
    cancelled: Vec<u32>,
    decision: Decision,
    demands: Vec<SeqDemand>,
    step: Step,
    report: Report,
    pub(crate) events: EventQueue,
    pub(crate) stats: Stats,
}

/// Sizes of an engine, defaults applied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) limits: Limits,
    pub(crate) max_queue: usize,
}

impl<B: Backend> Core<B> {
    pub(crate) fn new(
        model: Arc<Loaded<B>>,
        routers: Option<Arc<B::Routers>>,
        policy: Policy,
        sizes: &Sizes,
        stats: Stats,
    ) -> Result<Core<B>> {
        let limits = sizes.limits;
        let slots = sizes.max_queue + limits.max_batch;
        let b = &model.backend;
        let spec = b.spec(&model.weights);
        let mut seqs = Vec::new();
        seqs.try_reserve_exact(slots).map_err(|_| Error::no_memory("sequence slots"))?;
        seqs.resize_with(slots, || None);
        Ok(Core {
            eos: spec.eos_tokens.clone(),
            kv: b.kv(&model.weights, &limits)?,
            scratch: b.scratch(&model.weights, routers.as_deref(), &limits)?,
            pool: PagePool::new(limits.pages)?,
            seqs,
            running: try_with_capacity(limits.max_batch, "running list")?,
            waiting: try_with_capacity(slots, "waiting list")?,
            running_views: try_with_capacity(limits.max_batch, "running list")?,
            waiting_views: try_with_capacity(limits.max_batch, "waiting list")?,
            cancelled: try_with_capacity(slots, "cancel list")?,
            decision: Decision::with_room(limits.max_batch)?,
            demands: try_with_capacity(limits.max_batch, "plan")?,
            step: Step::with_limits(&limits, spec.num_layers as usize)?,
            report: Report::with_limits(&limits)?,
            events: EventQueue::new(
                slots + 3 * limits.max_batch,
                limits.max_batch * crate::sample::MAX_LOGPROBS,
            )?,
            stats,
            model,
            routers,
            policy,
            limits,
        })
    }

    pub(crate) fn spec(&self) -> &ModelSpec {
        self.model.backend.spec(&self.model.weights)
    }

    /// Gathers, decides and reserves. True when there is something to compute.
    pub(crate) fn begin(&mut self, inbox: &Inbox) -> bool {
        self.gather(inbox);
        loop {
            self.running_views.clear();
            self.running_views.extend(self.running.iter().filter_map(|&s| view(&self.seqs, s)));
            self.waiting_views.clear();
            // No more than a batch is admitted at once, so a long queue costs nothing here.
            let ready = self.waiting.iter().filter_map(|&s| view(&self.seqs, s)).filter(|v| v.ready);
            self.waiting_views.extend(ready.take(self.limits.max_batch));
            let bounds = Bounds {
                max_batch: self.limits.max_batch,
                step_tokens: self.limits.max_rows,
                free_pages: self.pool.free(),
            };
            self.decision.plan(&self.running_views, &self.waiting_views, bounds);
            for i in 0..self.decision.preempt.len() {
                self.preempt(self.decision.preempt[i]);
            }
            let Some(slot) = self.decision.stuck else { break };
            // It has the whole cache and needs more. The plan may have counted on it: decide again.
            self.finish(inbox, slot, FinishReason::Error, Status::E_KV_FULL, None);
        }
        self.admit(inbox);
        self.fill_step();
        self.publish(inbox);
        !self.step.seqs.is_empty()
    }

    fn gather(&mut self, inbox: &Inbox) {
        let mut cancelled = std::mem::take(&mut self.cancelled);
        let (seqs, waiting, stats) = (&mut self.seqs, &mut self.waiting, &mut self.stats);
        inbox.drain(|slot, arrival| match arrival {
            Arrival::Request(seq) => {
                seqs[slot as usize] = Some(seq);
                insert_by_urgency(seqs, waiting, slot);
            }
            Arrival::Token(token) => {
                if let Some(seq) = &mut seqs[slot as usize] {
                    seq.awaits_host = false;
                    seq.tokens.push(token);
                    stats.tokens_out += 1;
                }
            }
            Arrival::Cancel => cancelled.push(slot),
        });
        for slot in cancelled.drain(..) {
            self.finish(inbox, slot, FinishReason::Cancelled, Status::OK, None);
        }
        self.cancelled = cancelled;
        // A host may have pushed a token that ends its sequence.
        for i in (0..self.running.len()).rev() {
            self.end_if_pushed_token_ends(inbox, self.running[i]);
        }
        for i in (0..self.waiting.len()).rev() {
            self.end_if_pushed_token_ends(inbox, self.waiting[i]);
        }
    }

    fn end_if_pushed_token_ends(&mut self, inbox: &Inbox, slot: u32) {
        let Some(seq) = &self.seqs[slot as usize] else { return };
        if !seq.host_samples || seq.awaits_host || seq.n_generated() == 0 || seq.computed >= seq.tokens.len()
        {
            return;
        }
        let last = seq.tokens[seq.tokens.len() - 1];
        if is_stop(seq, &self.eos, last) {
            if let Some(seq) = &mut self.seqs[slot as usize] {
                seq.tokens.pop();
            }
            self.finish(inbox, slot, FinishReason::Stop, Status::OK, Some(last));
        } else if seq.tokens.len() >= seq.max_tokens {
            self.finish(inbox, slot, FinishReason::Length, Status::OK, None);
        }
    }

    fn preempt(&mut self, slot: u32) {
        let Some(seq) = &mut self.seqs[slot as usize] else { return };
        seq.table.shrink(0, &mut self.pool);
        seq.computed = 0;
        let event = Event { preempted: true, ..blank(seq) };
        self.events.push(event, &[]);
        self.stats.preemptions += 1;
        self.running.retain(|&s| s != slot);
        insert_by_urgency(&self.seqs, &mut self.waiting, slot);
    }

    fn admit(&mut self, inbox: &Inbox) {
        for i in 0..self.decision.admit.len() {
            let slot = self.decision.admit[i];
            self.waiting.retain(|&s| s != slot);
            insert_by_urgency(&self.seqs, &mut self.running, slot);
            if let Some(seq) = &mut self.seqs[slot as usize]
                && !seq.admitted
            {
                seq.admitted = true;
                inbox.left_queue();
            }
        }
    }

    /// Turns the decision into rows. Pages were counted by the policy, so growing succeeds; should
    /// it not, the sequence sits this step out.
    fn fill_step(&mut self) {
        self.step.clear();
        self.demands.clear();
        for share in &self.decision.run {
            let Some(seq) = &mut self.seqs[share.slot as usize] else { continue };
            let end = seq.computed + share.rows as usize;
            if end > seq.tokens.len() || !seq.table.grow(end, &mut self.pool) {
                debug_assert!(false, "the policy planned rows or pages that do not exist");
                continue;
            }
            let step = &mut self.step;
            let first_row = step.tokens.len() as u32;
            step.tokens.extend_from_slice(&seq.tokens[seq.computed..end]);
            step.positions.extend(seq.computed as u32..end as u32);
            let first_page = step.pages.len() as u32;
            step.pages.extend_from_slice(seq.table.pages());
            let logits = if end == seq.tokens.len() {
                step.logit_rows.push(first_row + share.rows - 1);
                step.logit_rows.len() as u32 - 1
            } else {
                NO_LOGITS
            };
            step.seqs.push(SeqStep {
                slot: share.slot,
                first_row,
                n_rows: share.rows,
                context: end as u32,
                first_page,
                n_pages: seq.table.pages().len() as u32,
                decode: share.decode,
                mlp: seq.setting.mlp,
                logits,
                sample: !seq.host_samples,
            });
            if share.decode {
                self.demands.push(SeqDemand { setting: seq.setting, context: end as u32 });
            }
        }
        self.policy.fill(&mut self.step.plan, &self.demands);
    }

    /// Computes the step (or starts it, on an asynchronous backend).
    pub(crate) fn compute(&mut self) -> Result<()> {
        self.report.clear();
        let mut run = Run {
            backend: &*self.model.backend,
            weights: &self.model.weights,
            routers: self.routers.as_deref(),
            kv: &mut self.kv,
            scratch: &mut self.scratch,
        };
        enqueue(&mut run, &self.step, &Histories(&self.seqs), &mut self.report)
    }

    /// Waits for an asynchronous backend; true when the step is done.
    pub(crate) fn poll(&mut self, timeout_ns: u64) -> Result<bool> {
        self.model.backend.poll(&mut self.scratch, &self.step, &mut self.report, timeout_ns)
    }

    /// Gives back what [`Core::begin`] reserved for a step that failed.
    pub(crate) fn roll_back(&mut self) {
        for s in &self.step.seqs {
            if let Some(seq) = &mut self.seqs[s.slot as usize] {
                seq.table.shrink(seq.computed, &mut self.pool);
            }
        }
        self.step.clear();
    }

    /// Makes a computed step final: tokens appended, events queued.
    pub(crate) fn commit(&mut self, inbox: &Inbox, elapsed_ns: u64) -> Result<()> {
        for i in 0..self.step.seqs.len() {
            let s = self.step.seqs[i];
            let counts = self.report.counts.get(i).copied().unwrap_or_default();
            let Some(seq) = &mut self.seqs[s.slot as usize] else { continue };
            seq.computed = s.context as usize;
            seq.counts.add(&counts);
            self.stats.counts.add(&counts);
            self.stats.tokens_in += u64::from(if s.decode { 0 } else { s.n_rows });
            if s.logits == NO_LOGITS {
                continue;
            }
            if seq.host_samples {
                self.offer_logits(inbox, s.slot, s.logits as usize)?;
            } else {
                let sampled = self.report.sampled.get(s.logits as usize).copied().unwrap_or_default();
                self.append(inbox, s.slot, sampled);
            }
        }
        let stats = &mut self.stats;
        stats.steps += 1;
        stats.kv_bytes_read += self.report.kv_bytes_read;
        stats.kv_bytes_dense += self.report.kv_bytes_dense;
        stats.nan_scores += self.report.nan_scores;
        stats.step_ns_last = elapsed_ns;
        stats.step_ns_max = stats.step_ns_max.max(elapsed_ns);
        stats.step_ns_total += elapsed_ns;
        self.step.clear();
        self.publish(inbox);
        debug_assert_eq!(self.check(), Ok(()));
        Ok(())
    }

    fn offer_logits(&mut self, inbox: &Inbox, slot: u32, index: usize) -> Result<()> {
        let vocab = self.spec().vocab_size as usize;
        let Some(seq) = &mut self.seqs[slot as usize] else { return Ok(()) };
        seq.logits.resize(vocab, 0.0);
        self.model.backend.read_logits(&mut self.scratch, index, &mut seq.logits)?;
        seq.awaits_host = true;
        let event = Event { logits: true, ..blank(seq) };
        self.events.push(event, &[]);
        inbox.await_token(slot);
        Ok(())
    }

    fn append(&mut self, inbox: &Inbox, slot: u32, sampled: Sampled) {
        let Some(seq) = &mut self.seqs[slot as usize] else { return };
        if sampled.broken {
            self.finish(inbox, slot, FinishReason::Error, Status::E_MODEL, None);
            return;
        }
        self.stats.tokens_out += 1;
        if is_stop(seq, &self.eos, sampled.token) {
            self.finish(inbox, slot, FinishReason::Stop, Status::OK, Some(sampled.token));
            return;
        }
        seq.tokens.push(sampled.token);
        let first = sampled.first_top as usize;
        let top = &self.report.top[first..first + sampled.n_top as usize];
        let event = Event {
            token: Some(sampled.token),
            is_output: true,
            logprob: if seq.params.logprob { sampled.logprob } else { f32::NAN },
            finished: (seq.tokens.len() >= seq.max_tokens).then_some(FinishReason::Length),
            ..blank(seq)
        };
        self.events.push(event, top);
        if event.finished.is_some() {
            self.remove(inbox, slot);
        }
    }

    /// Ends a sequence; `token` is the stop token that ended it, which is not output.
    fn finish(&mut self, inbox: &Inbox, slot: u32, reason: FinishReason, status: Status, token: Option<u32>) {
        let Some(seq) = &self.seqs[slot as usize] else { return };
        let event = Event { token, finished: Some(reason), status, ..blank(seq) };
        self.events.push(event, &[]);
        self.remove(inbox, slot);
    }

    fn remove(&mut self, inbox: &Inbox, slot: u32) {
        let Some(mut seq) = self.seqs[slot as usize].take() else { return };
        seq.table.shrink(0, &mut self.pool);
        if !seq.admitted {
            inbox.left_queue();
        }
        self.running.retain(|&s| s != slot);
        self.waiting.retain(|&s| s != slot);
        self.stats.requests_finished += 1;
        inbox.release(slot);
    }

    fn publish(&mut self, inbox: &Inbox) {
        self.stats.kv_pages_free = self.pool.free() as u64;
        self.stats.waiting = self.waiting.len() as u64;
        self.stats.running = self.running.len() as u64;
        inbox.publish(&self.stats);
    }

    /// The last logits of a sequence whose host samples.
    pub(crate) fn logits(&self, id: SeqId) -> Option<&[f32]> {
        self.seqs.iter().flatten().find(|s| s.id == id && s.host_samples).map(|s| s.logits.as_slice())
    }

    /// Invariants between steps: pages add up, lists hold each sequence once.
    pub(crate) fn check(&mut self) -> std::result::Result<(), String> {
        self.pool.check(self.seqs.iter().flatten().flat_map(|s| s.table.pages()))?;
        let live = self.seqs.iter().filter(|s| s.is_some()).count();
        if live != self.running.len() + self.waiting.len() {
            return Err(format!(
                "{live} sequences, {} running and {} waiting",
                self.running.len(),
                self.waiting.len()
            ));
        }
        for &slot in self.running.iter().chain(&self.waiting) {
            let Some(seq) = &self.seqs[slot as usize] else {
                return Err(format!("slot {slot} listed, empty"));
            };
            if seq.computed > seq.table.room() || seq.computed > seq.tokens.len() {
                return Err(format!("slot {slot}: {} computed, {} tokens", seq.computed, seq.tokens.len()));
            }
        }
        Ok(())
    }
}

struct Histories<'a>(&'a [Option<Seq>]);

impl History for Histories<'_> {
    fn id(&self, slot: u32) -> u64 {
        self.0[slot as usize].as_ref().map_or(0, |seq| seq.id.0)
    }

    fn tokens(&self, slot: u32) -> (&[u32], usize) {
        match &self.0[slot as usize] {
            Some(seq) => (&seq.tokens, seq.prompt_len),
            None => (&[], 0),
        }
    }

    fn params(&self, slot: u32) -> &Params {
        match &self.0[slot as usize] {
            Some(seq) => &seq.params,
            // An empty slot; no step samples from one.
            None => &Params::GREEDY,
        }
    }
}

fn blank(seq: &Seq) -> Event {
    Event {
        seq: seq.id,
        user_tag: seq.user_tag,
        token: None,
        is_output: false,
        logprob: f32::NAN,
        n_logprobs: 0,
        finished: None,
        preempted: false,
        logits: false,
        status: Status::OK,
        n_generated: seq.n_generated(),
        counts: seq.counts,
    }
}

fn is_stop(seq: &Seq, eos: &[u32], token: u32) -> bool {
    seq.stop.contains(&token) || (!seq.ignore_eos && eos.contains(&token))
}

fn view(seqs: &[Option<Seq>], slot: u32) -> Option<View> {
    seqs[slot as usize].as_ref().map(|s| s.view(slot))
}

fn insert_by_urgency(seqs: &[Option<Seq>], list: &mut Vec<u32>, slot: u32) {
    let key = |s: u32| seqs[s as usize].as_ref().map(Seq::urgency);
    let at = list.partition_point(|&s| key(s) < key(slot));
    list.insert(at, slot);
}
