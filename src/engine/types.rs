//! What goes into an engine and what comes out, as plain data.

use crate::error::Status;
use crate::sample::Params;
use crate::sparsity::{self, Counts, MlpMode};

/// A sequence: slot and generation, so that a stale id is an error and never another's data.
/// 0 is never valid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SeqId(pub u64);

/// Options of an engine; zero means the default.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineOptions {
    /// Most sequences in one step; 0 = 32.
    pub max_batch: u32,
    /// Most requests that wait; 0 = 1024.
    pub max_queue: u32,
    /// Most tokens one step computes, decode and prefill together; 0 = 512. Never below `max_batch`.
    pub step_tokens: u32,
    /// Longest context of a request, prompt and output; 0 = the model's `max_positions`.
    pub max_context: u32,
    /// Bytes of KV cache; 0 = half of what is free, at most what `max_batch` full contexts need.
    pub kv_bytes: u64,
    /// What is sparse.
    pub sparsity: sparsity::Options,
}

/// One request. Token slices live in the array passed beside it.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Echoed in every event.
    pub user_tag: u64,
    /// Prompt: first element in the token array.
    pub first_token: u32,
    /// Prompt length, at least 1.
    pub n_tokens: u32,
    /// Extra tokens that end generation: first element in the token array.
    pub first_stop: u32,
    /// How many.
    pub n_stop: u32,
    /// Tokens to generate, at least 1.
    pub max_new_tokens: u32,
    /// Higher runs first and is preempted last.
    pub priority: u32,
    /// The model's end-of-sequence tokens do not end this one.
    pub ignore_eos: bool,
    /// The host samples: each step ends in a LOGITS event, [`super::Engine::logits`] reads them, and
    /// the sequence waits for [`super::Engine::push_token`].
    pub host_samples: bool,
    /// How to sample.
    pub params: Params,
    /// Attention density: 0 = engine default, 1 = dense.
    pub attn_density: f32,
    /// MLP mode; `None` = engine default.
    pub mlp_mode: Option<MlpMode>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop or end-of-sequence token; the event carries it, without the token flag.
    Stop,
    /// `max_new_tokens` or the context limit.
    Length,
    /// The host cancelled.
    Cancelled,
    /// See the event's status.
    Error,
}

/// What happened to one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// The sequence; stale once `finished` is set.
    pub seq: SeqId,
    /// The request's tag.
    pub user_tag: u64,
    /// A generated token, or the stop token of a finish by stop.
    pub token: Option<u32>,
    /// Whether `token` is part of the output.
    pub is_output: bool,
    /// Natural log of the token's probability under the model's logits; NaN if not asked for.
    pub logprob: f32,
    /// Alternatives with log probabilities, as many as the request asked for: see [`TopLogprob`].
    pub n_logprobs: u32,
    /// Set once per accepted request, in its last event.
    pub finished: Option<FinishReason>,
    /// Pages ran out and this sequence was put back into the queue; its tokens are kept.
    pub preempted: bool,
    /// Logits wait for the host.
    pub logits: bool,
    /// Why it ended, when `finished` is `Error`.
    pub status: Status,
    /// Tokens generated so far.
    pub n_generated: u32,
    /// What really ran for this request so far, decode steps only.
    pub counts: Counts,
}

/// One alternative of a token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TopLogprob {
    /// Token id.
    pub token: u32,
    /// Natural log of its probability.
    pub logprob: f32,
}

/// An engine's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Works.
    Ok,
    /// A bug was caught; only stats and free answer.
    Dead,
    /// The device is lost for this process.
    DeviceLost,
}

/// Counters since creation. Any thread may read them at any time.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Health.
    pub health: Health,
    /// Steps completed.
    pub steps: u64,
    /// Prompt tokens computed, recomputation included.
    pub tokens_in: u64,
    /// Tokens generated.
    pub tokens_out: u64,
    /// Requests accepted.
    pub requests_accepted: u64,
    /// Requests finished, whatever the reason.
    pub requests_finished: u64,
    /// Requests refused because the queue was full.
    pub admission_refusals: u64,
    /// Sequences put back because pages ran out.
    pub preemptions: u64,
    /// Requests waiting now.
    pub waiting: u64,
    /// Sequences running now.
    pub running: u64,
    /// KV pages in all.
    pub kv_pages_total: u64,
    /// KV pages free now.
    pub kv_pages_free: u64,
    /// Decode attention units and neurons that ran, and that a dense model would have run.
    pub counts: Counts,
    /// KV bytes decode attention read.
    pub kv_bytes_read: u64,
    /// KV bytes dense decode attention would have read.
    pub kv_bytes_dense: u64,
    /// Router scores that were NaN.
    pub nan_scores: u64,
    /// Time of the last step, begin to collected.
    pub step_ns_last: u64,
    /// Longest step.
    pub step_ns_max: u64,
    /// Sum over steps.
    pub step_ns_total: u64,
}

/// What a finish or step call delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivered {
    /// OK, PENDING, IDLE or TRUNCATED.
    pub status: Status,
    /// Events written.
    pub n_events: usize,
    /// Alternatives written.
    pub n_logprobs: usize,
}
