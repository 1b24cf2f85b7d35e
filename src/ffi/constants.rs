//! Every constant of the ABI. Numbers are literals because cbindgen prints them; tests compare
//! them with `Cargo.toml` and with the Rust types they stand for.

/// Version of the header; compare with `polar_version()`.
pub const POLAR_VERSION_MAJOR: u32 = 0;
/// See `POLAR_VERSION_MAJOR`.
pub const POLAR_VERSION_MINOR: u32 = 1;
/// See `POLAR_VERSION_MAJOR`.
pub const POLAR_VERSION_PATCH: u32 = 0;

/// The ABI this header describes, and the number in the shared library's SONAME. 0 while the
/// library is young: then a new minor version may change the ABI, and a program compares
/// major and minor of `polar_version()` as well.
pub const POLAR_ABI_VERSION: u32 = 0;

/// Most alternatives per token that a request may ask for (`polar_request.n_logprobs`).
pub const POLAR_MAX_LOGPROBS: u32 = 20;
/// Most requests in one `polar_engine_submit`.
pub const POLAR_MAX_SUBMIT: u32 = 65536;

/// Result of a call: 0 is success, 1 to 99 is no error, 100 and up is an error. Treat numbers this
/// header does not list as errors when they are 100 or more.
pub type polar_status = i32;

/// Success.
pub const POLAR_OK: polar_status = 0;
/// The step still runs; nothing finished before the time-out. Call again.
pub const POLAR_PENDING: polar_status = 1;
/// Nothing is queued or running.
pub const POLAR_IDLE: polar_status = 2;
/// The caller's array or buffer is too small; nothing is lost. Call again, with more room if a
/// needed size came back.
pub const POLAR_TRUNCATED: polar_status = 3;
/// NULL, a value out of range, or a combination that makes no sense. The message names it.
pub const POLAR_E_INVALID: polar_status = 100;
/// A `struct_size` that this library cannot serve: header and library do not match.
pub const POLAR_E_ABI: polar_status = 101;
/// An unknown or stale sequence id.
pub const POLAR_E_NOT_FOUND: polar_status = 102;
/// Another thread is inside step, a step is in flight already, or a callback called the library.
pub const POLAR_E_BUSY: polar_status = 103;
/// This build, device or model family cannot do it; also any call in a forked child.
pub const POLAR_E_UNSUPPORTED: polar_status = 104;
/// The progress callback cancelled.
pub const POLAR_E_CANCELLED: polar_status = 105;
/// Host memory ran out.
pub const POLAR_E_NOMEM: polar_status = 200;
/// Device memory ran out.
pub const POLAR_E_DEVICE_NOMEM: polar_status = 201;
/// This sequence alone needs more KV pages than the engine has.
pub const POLAR_E_KV_FULL: polar_status = 202;
/// The queue is full and nothing of the batch was taken; retry later.
pub const POLAR_E_QUEUE_FULL: polar_status = 203;
/// The operating system refused; `os_code` holds errno.
pub const POLAR_E_IO: polar_status = 300;
/// A malformed file.
pub const POLAR_E_FORMAT: polar_status = 301;
/// Well formed, but above a limit.
pub const POLAR_E_LIMIT: polar_status = 302;
/// A valid file that does not fit the model.
pub const POLAR_E_MODEL: polar_status = 303;
/// No usable driver for the device.
pub const POLAR_E_NO_DRIVER: polar_status = 400;
/// A device call failed; the device is still usable.
pub const POLAR_E_DEVICE: polar_status = 401;
/// The device is lost for this process; restart it.
pub const POLAR_E_DEVICE_LOST: polar_status = 402;
/// A bug in the library was caught. An engine it happened in is dead; everything else works.
pub const POLAR_E_PANIC: polar_status = 900;

/// A kind of device.
pub type polar_backend = u32;

/// The best one there is.
pub const POLAR_BACKEND_AUTO: polar_backend = 0;
/// The processor.
pub const POLAR_BACKEND_CPU: polar_backend = 1;
/// NVIDIA GPUs.
pub const POLAR_BACKEND_CUDA: polar_backend = 2;

/// How important a line of the log is, or the least important ones that are written.
pub type polar_log_level = u32;

/// `POLAR_LOG_INFO`.
pub const POLAR_LOG_DEFAULT: polar_log_level = 0;
/// Something failed.
pub const POLAR_LOG_ERROR: polar_log_level = 1;
/// Something is not as it should be, and work goes on.
pub const POLAR_LOG_WARN: polar_log_level = 2;
/// Rare events: loads, creations.
pub const POLAR_LOG_INFO: polar_log_level = 3;
/// Refusals that are part of normal work: a full queue, a stale id.
pub const POLAR_LOG_DEBUG: polar_log_level = 4;
/// Nothing.
pub const POLAR_LOG_OFF: polar_log_level = 5;

/// Bits of `polar_context_options.flags`.
pub type polar_context_flags = u32;

/// On a GPU, large matrix products are done by the kernel that NVIDIA's cuBLASLt proposes first: the same
/// one each time, on the same kind of GPU with the same cuBLASLt. Without this flag its proposals and this
/// library's own kernel are timed when a shape of product is first met, and the fastest is kept. That is
/// faster at some shapes, but two processes may choose different kernels, and then their results may differ
/// in the last bits. The CPU times nothing.
pub const POLAR_CONTEXT_UNTIMED_PRODUCTS: polar_context_flags = 1;

/// Type of weights.
pub type polar_dtype = u32;

/// As the files have them.
pub const POLAR_DTYPE_STORED: polar_dtype = 0;
/// IEEE binary32.
pub const POLAR_DTYPE_F32: polar_dtype = 1;
/// IEEE binary16.
pub const POLAR_DTYPE_F16: polar_dtype = 2;
/// bfloat16.
pub const POLAR_DTYPE_BF16: polar_dtype = 3;
/// Signed bytes with one scale per row; made while loading.
pub const POLAR_DTYPE_I8: polar_dtype = 4;

/// Bits of `polar_load_options.flags`.
pub type polar_load_flags = u32;

/// Refuse weights that hold NaN or infinity. Costs a pass over them.
pub const POLAR_LOAD_CHECK_FINITE: polar_load_flags = 1;
/// Take routers although they name another model. Shapes still must fit.
pub const POLAR_LOAD_IGNORE_FINGERPRINT: polar_load_flags = 2;

/// How a request's MLP runs while it decodes.
pub type polar_mlp_mode = u32;

/// In a request: the engine's. In an engine: reference if there are MLP routers, else dense.
pub const POLAR_MLP_DEFAULT: polar_mlp_mode = 0;
/// Every neuron.
pub const POLAR_MLP_DENSE: polar_mlp_mode = 1;
/// The paper's rule: one list of neurons for all sequences of the step in this mode, so a request's
/// result depends on its neighbours.
pub const POLAR_MLP_REFERENCE: polar_mlp_mode = 2;
/// Each sequence uses only its own neurons, whatever else is in the batch; on the CPU also the same bits
/// alone and in any batch, on a GPU the same up to rounding.
pub const POLAR_MLP_BATCH_INVARIANT: polar_mlp_mode = 3;

/// Where selections of attention heads come from.
pub type polar_attn_source = u32;

/// The routers.
pub const POLAR_SOURCE_ROUTER: polar_attn_source = 0;
/// The true norm of each head's output. Saves nothing: an upper bound for quality measurements.
pub const POLAR_SOURCE_ORACLE: polar_attn_source = 1;
/// Random heads from `attn_seed`: a lower bound for quality measurements.
pub const POLAR_SOURCE_RANDOM: polar_attn_source = 2;

/// Bits of `polar_request.flags`.
pub type polar_request_flags = u32;

/// The model's end-of-sequence tokens do not end this request.
pub const POLAR_REQUEST_IGNORE_EOS: polar_request_flags = 1;
/// The host samples. Each step ends in a `POLAR_EVENT_LOGITS`; read them with
/// `polar_engine_logits` and answer with `polar_engine_push_token`.
pub const POLAR_REQUEST_HOST_SAMPLES: polar_request_flags = 2;
/// Fill `polar_event.logprob`.
pub const POLAR_REQUEST_LOGPROB: polar_request_flags = 4;

/// Bits of `polar_event.flags`. Ignore those this header does not list.
pub type polar_event_flags = u32;

/// `token` is part of the output.
pub const POLAR_EVENT_TOKEN: polar_event_flags = 1;
/// The request's last event; its id is stale now. Exactly one per accepted request.
pub const POLAR_EVENT_FINISHED: polar_event_flags = 2;
/// Pages ran out and the request went back into the queue. Nothing is lost.
pub const POLAR_EVENT_PREEMPTED: polar_event_flags = 4;
/// Logits wait for the host (`POLAR_REQUEST_HOST_SAMPLES`).
pub const POLAR_EVENT_LOGITS: polar_event_flags = 8;

/// Why a request ended.
pub type polar_finish_reason = u32;

/// It has not.
pub const POLAR_FINISH_NONE: polar_finish_reason = 0;
/// A stop or end-of-sequence token. `token` is that token, without
/// `POLAR_EVENT_TOKEN`, since it is not part of the output.
pub const POLAR_FINISH_STOP: polar_finish_reason = 1;
/// `max_new_tokens` or the longest context.
pub const POLAR_FINISH_LENGTH: polar_finish_reason = 2;
/// The host cancelled.
pub const POLAR_FINISH_CANCELLED: polar_finish_reason = 3;
/// See the event's `status`.
pub const POLAR_FINISH_ERROR: polar_finish_reason = 4;

/// Health of an engine.
pub type polar_health = u32;

/// Works.
pub const POLAR_HEALTH_OK: polar_health = 0;
/// A bug was caught; only stats and free answer.
pub const POLAR_HEALTH_DEAD: polar_health = 1;
/// The device is lost for this process.
pub const POLAR_HEALTH_DEVICE_LOST: polar_health = 2;

/// Bits of the `flags` of `polar_tokenizer_encode` and `polar_tokenizer_decode`.
pub type polar_text_flags = u32;

/// Encode: do not add the tokens that start or end a text.
pub const POLAR_ENCODE_NO_SPECIAL: polar_text_flags = 1;
/// Decode: keep special tokens in the text.
pub const POLAR_DECODE_KEEP_SPECIAL: polar_text_flags = 1;
