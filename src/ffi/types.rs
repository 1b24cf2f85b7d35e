//! Handles and structs of the ABI, with their sizes asserted.

use super::constants::*;
use std::ffi::c_char;

/// Where devices are found and models are loaded from; owns the log.
pub struct polar_context {
    _opaque: [u8; 0],
}

/// Immutable weights on a device.
pub struct polar_model {
    _opaque: [u8; 0],
}

/// Immutable router weights for one model.
pub struct polar_routers {
    _opaque: [u8; 0],
}

/// A scheduler, a KV cache and one model.
pub struct polar_engine {
    _opaque: [u8; 0],
}

/// Text to tokens and back.
pub struct polar_tokenizer {
    _opaque: [u8; 0],
}

/// A request the engine accepted. Not a pointer and not to be freed: a stale one is an error code.
/// 0 is never valid.
pub type polar_seq = u64;

/// What went wrong, in the caller's memory. Written only when a call returns an error. Start with
/// `polar_error err = POLAR_ERROR_INIT;`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_error {
    /// `sizeof(polar_error)`, set by the caller; with a smaller one every call answers `POLAR_E_ABI`.
    pub struct_size: u32,
    /// What the call returned.
    pub code: polar_status,
    /// errno when the operating system refused, else 0.
    pub os_code: i32,
    /// The driver's code when a device refused, else 0.
    pub device_code: i32,
    /// One line of UTF-8 with its terminator; a longer text is cut here and whole in the log.
    pub message: [c_char; 240],
}

/// How to make a context. Zero in a field means the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_context_options {
    /// Set by `polar_context_options_init`.
    pub struct_size: u32,
    /// Which devices to offer.
    pub backend: polar_backend,
    /// Threads of the CPU backend's pool; 0 = one per core.
    pub threads: u32,
    /// What is logged.
    pub log_level: polar_log_level,
    /// Size of the log that `polar_log_drain` reads; 0 = 64 KiB.
    pub log_ring_kib: u32,
    /// `POLAR_CONTEXT_` bits.
    pub flags: polar_context_flags,
    /// Most bytes of a model's or a router file's tensors.
    pub max_file_bytes: u64,
    /// Largest safetensors header that is read, in bytes.
    pub max_header_bytes: u64,
}

/// A device.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_device_info {
    /// `sizeof(polar_device_info)`, set by the caller.
    pub struct_size: u32,
    /// Its number within its backend.
    pub ordinal: u32,
    /// `POLAR_BACKEND_CPU` or `POLAR_BACKEND_CUDA`.
    pub backend: polar_backend,
    /// CUDA compute capability, 90 for 9.0; 0 for a CPU.
    pub compute_capability: u32,
    /// Bytes of memory.
    pub memory_total: u64,
    /// Bytes of it that are free now.
    pub memory_free: u64,
    /// 1 if a model can be loaded there; 0 if not, and then `name` says why.
    pub usable: u32,
    /// 0.
    pub reserved: u32,
    /// Name, or why it is not usable; terminated UTF-8.
    pub name: [c_char; 96],
    /// Identifier that stays the same over restarts, or empty.
    pub uuid: [c_char; 40],
}

/// How to load a model or routers. Zero in a field means the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_load_options {
    /// Set by `polar_load_options_init`.
    pub struct_size: u32,
    /// Ordinal of the device.
    pub device: u32,
    /// `POLAR_DTYPE_STORED` or `POLAR_DTYPE_I8`.
    pub weight_dtype: polar_dtype,
    /// `POLAR_LOAD_` bits.
    pub flags: polar_load_flags,
}

/// What a model is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_model_info {
    /// `sizeof(polar_model_info)`, set by the caller.
    pub struct_size: u32,
    /// Tokens are 0 up to, not including, this; as many logits.
    pub vocab_size: u32,
    /// Decoder layers.
    pub num_layers: u32,
    /// Query heads.
    pub num_heads: u32,
    /// Key/value heads: the units of attention sparsity.
    pub num_kv_heads: u32,
    /// Dimensions of one head.
    pub head_dim: u32,
    /// Width of the hidden state.
    pub hidden_size: u32,
    /// MLP neurons of a layer.
    pub ffn_size: u32,
    /// Longest context, prompt and output together.
    pub max_positions: u32,
    /// `POLAR_DTYPE_` of the stored weights.
    pub dtype: polar_dtype,
    /// Token that begins a text, or -1.
    pub bos_token: i32,
    /// End-of-sequence tokens the model has; the first 8 are in `eos_tokens`.
    pub n_eos: u32,
    /// See `n_eos`; -1 where there is none.
    pub eos_tokens: [i32; 8],
    /// Bytes of the weights on the device.
    pub weight_bytes: u64,
    /// Family as its config names it: `opt`, `llama`, `mistral`, `qwen2`, `qwen3`; terminated.
    pub family: [c_char; 16],
    /// Device and instruction set it runs on; terminated UTF-8.
    pub device_name: [c_char; 96],
}

/// What a model and an engine would take on a device, and what fits. All sizes are the device's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_estimate {
    /// `sizeof(polar_estimate)`, set by the caller.
    pub struct_size: u32,
    /// 1 if all of it fits into what is free now.
    pub fits: u32,
    /// Sequences in a step, with the default applied.
    pub max_batch: u32,
    /// Longest context, with the default applied.
    pub max_context: u32,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Bytes of the routers.
    pub router_bytes: u64,
    /// Bytes of activations, sums and tables of a step.
    pub scratch_bytes: u64,
    /// Bytes of one KV page: 16 tokens, all layers.
    pub page_bytes: u64,
    /// Bytes of KV cache for one token.
    pub token_bytes: u64,
    /// Pages the engine would take.
    pub kv_pages: u64,
    /// Bytes of all of the above together, with that many pages.
    pub needed_bytes: u64,
    /// Bytes that are free now.
    pub free_bytes: u64,
    /// Most pages that fit, whatever the engine's options say.
    pub max_kv_pages: u64,
    /// Contexts of `max_context` tokens that they hold.
    pub max_contexts: u64,
}

/// How to make an engine. Zero in a field means the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_engine_options {
    /// Set by `polar_engine_options_init`.
    pub struct_size: u32,
    /// Most sequences in one step; 0 = 32.
    pub max_batch: u32,
    /// Most requests that wait; 0 = 1024.
    pub max_queue: u32,
    /// Tokens of a KV page: 0 or 16.
    pub page_tokens: u32,
    /// Most tokens one step computes, decode and prefill together; 0 = 512.
    pub step_tokens: u32,
    /// Longest context of a request, prompt and output; 0 = the model's.
    pub max_context: u32,
    /// Bytes of KV cache; 0 = half of what is free, at most what `max_batch` full contexts need.
    pub kv_bytes: u64,
    /// Share of attention heads a decode step computes, layer 0 excepted; 0 = as the router file
    /// says, where it pays; 1 = dense.
    pub attn_density: f32,
    /// Share of MLP neurons; 0 = the router file's tables; 1 = dense.
    pub mlp_density: f32,
    /// A layer whose share of neurons would be above this runs dense and skips its router; 0 = where
    /// selecting stops paying on the device: 0.8 on the CPU, less with larger batches on a GPU.
    pub mlp_dense_above: f32,
    /// For requests that name none.
    pub mlp_mode: polar_mlp_mode,
    /// Where selections of heads come from; other than the routers only for measurements.
    pub attn_source: polar_attn_source,
    /// Must be 0.
    pub flags: u32,
    /// Seed of `POLAR_SOURCE_RANDOM`.
    pub attn_seed: u64,
}

/// One request: 128 bytes, frozen. Zero everywhere but `n_tokens` and `max_new_tokens` is a greedy
/// request with the engine's sparsity. Prompt and stop tokens are slices of the one token array that
/// `polar_engine_submit` gets.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_request {
    /// Echoed in every event.
    pub user_tag: u64,
    /// Seed of this request's own random numbers.
    pub random_seed: u64,
    /// Prompt: index of its first token.
    pub first_token: u32,
    /// Prompt: number of tokens, at least 1.
    pub n_tokens: u32,
    /// Stop tokens: index of the first.
    pub first_stop: u32,
    /// Stop tokens: how many.
    pub n_stop: u32,
    /// Tokens to generate, at least 1.
    pub max_new_tokens: u32,
    /// `POLAR_REQUEST_` bits.
    pub flags: polar_request_flags,
    /// Higher runs first and is preempted last.
    pub priority: u32,
    /// Likeliest alternatives wanted with each token, up to `POLAR_MAX_LOGPROBS`.
    pub n_logprobs: u32,
    /// 0 = greedy.
    pub temperature: f32,
    /// Keep the smallest set of likeliest tokens with this mass; 0 or 1 = all.
    pub top_p: f32,
    /// Keep tokens at least this share as likely as the likeliest; 0 = all.
    pub min_p: f32,
    /// Keep so many of the likeliest tokens; 0 = all.
    pub top_k: u32,
    /// Divides (or multiplies, if negative) the logits of tokens in prompt or output; 0 or 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the output.
    pub presence_penalty: f32,
    /// Subtracted from them per occurrence.
    pub frequency_penalty: f32,
    /// Share of attention heads this request computes; 0 = the engine's, 1 = dense.
    pub attn_density: f32,
    /// How its MLP runs.
    pub mlp_mode: polar_mlp_mode,
    /// Must be 0.
    pub reserved: [u32; 11],
}

/// What happened to one request in a step: 64 bytes, frozen.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_event {
    /// The request.
    pub seq: polar_seq,
    /// Its tag.
    pub user_tag: u64,
    /// A token, or -1.
    pub token: i32,
    /// Natural log of its probability under the model, before temperature and penalties; NaN unless
    /// `POLAR_REQUEST_LOGPROB` asked for it.
    pub logprob: f32,
    /// `POLAR_EVENT_` bits.
    pub flags: polar_event_flags,
    /// Why it ended.
    pub reason: polar_finish_reason,
    /// Why it ended, when `reason` is `POLAR_FINISH_ERROR`; else `POLAR_OK`.
    pub status: polar_status,
    /// Alternatives of this token in the call's `logprobs` array: how many.
    pub n_logprobs: u32,
    /// And the index of the first, likeliest first.
    pub first_logprob: u32,
    /// Tokens generated so far.
    pub n_generated: u32,
    /// Share of attention heads that this request's decode steps really computed so far, over all
    /// layers; 1 before the first.
    pub attn_density: f32,
    /// The same for MLP neurons.
    pub mlp_density: f32,
    /// 0.
    pub reserved: [u32; 2],
}

/// One alternative of a token: 8 bytes, frozen.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_logprob {
    /// The token.
    pub token: i32,
    /// Natural log of its probability.
    pub logprob: f32,
}

/// Counters of an engine since its creation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_stats {
    /// `sizeof(polar_stats)`, set by the caller.
    pub struct_size: u32,
    /// Whether it works.
    pub health: polar_health,
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
    /// Requests put back because pages ran out.
    pub preemptions: u64,
    /// Requests waiting now.
    pub waiting: u64,
    /// Requests running now.
    pub running: u64,
    /// KV pages in all.
    pub kv_pages_total: u64,
    /// KV pages free now.
    pub kv_pages_free: u64,
    /// Attention units (KV heads) that decode steps computed, over layers, tokens and requests.
    pub attn_units_run: u64,
    /// And that a dense model would have computed.
    pub attn_units_total: u64,
    /// MLP neurons that decode steps computed.
    pub mlp_units_run: u64,
    /// And that a dense model would have computed.
    pub mlp_units_total: u64,
    /// KV bytes that decode attention read.
    pub kv_bytes_read: u64,
    /// And that dense decode attention would have read.
    pub kv_bytes_dense: u64,
    /// Router scores that were NaN; they sort last.
    pub nan_scores: u64,
    /// Nanoseconds of the last step.
    pub step_ns_last: u64,
    /// Of the longest.
    pub step_ns_max: u64,
    /// Of all together.
    pub step_ns_total: u64,
    /// Log lines lost because nobody drained the context's log.
    pub log_lines_dropped: u64,
}

const _: () = {
    assert!(size_of::<polar_error>() == 256);
    assert!(size_of::<polar_request>() == 128);
    assert!(size_of::<polar_event>() == 64);
    assert!(size_of::<polar_logprob>() == 8);
};
