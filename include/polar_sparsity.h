/* polar_sparsity.h - batched LLM decoding with Polar Sparsity, in your process.
 *
 * Generated from src/ffi by cbindgen; do not edit.
 * SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * The way through this header:
 *
 *   polar_context_create    devices, log, limits
 *   polar_model_load        a Hugging Face folder: config.json and *.safetensors
 *   polar_routers_load      which heads and neurons matter, learned for that model; optional
 *   polar_engine_create     KV cache and scheduler
 *   polar_engine_submit     a batch of requests, from any thread, at any time
 *   polar_engine_step       one token for each running request; read its events; repeat
 *   polar_*_free            in any order
 *
 * examples-c/generate.c walks it in full; polar_sparsity.hpp wraps it for C++17.
 *
 * Below that way, for stacks that own their weights, KV pages and stream, the operators alone; they
 * need none of the above. examples-c/operators.c runs a layer with them, examples-python/operators.py
 * does it on torch tensors:
 *
 *   polar_op_library_create     the kernels, in the host's CUDA context
 *   polar_op_attention_plan     once per step: lengths to work for every multiprocessor
 *   polar_op_head_selection_run, polar_op_attention_run       per layer: which heads, then only those
 *   polar_op_neuron_selection_run, polar_op_mlp_run           per layer: which neurons, then only those
 *
 * Rules that hold everywhere:
 *
 *   Errors      A call that can fail returns a polar_status and takes a polar_error last, which may
 *               be NULL. On an error nothing has changed and no output is written, unless its text
 *               says otherwise. Nothing aborts, nothing is printed.
 *   Arguments   Inputs first, then outputs. Pointers must not be NULL unless the text allows it; an
 *               array of length 0 may be NULL. A NULL, freed or foreign handle is
 *               POLAR_E_INVALID, as far as can be told.
 *   Ownership   The caller owns every byte it passes and the library keeps none of it. What comes
 *               back through a T **out is the caller's, to be freed with polar_T_free. Handles are
 *               counted inside: free them in any order.
 *   Structs     A struct that starts with struct_size may grow at its end. Let the _init function
 *               fill it, or set struct_size to its sizeof. Zero in a new field means the old
 *               behaviour. Structs without a size (request, event, logprob) never change.
 *   Strings     UTF-8. Inputs are pointer and length, outputs are terminated.
 *   Threads     Handles may be used from any thread at once, except that one thread at a time drives
 *               an engine (step, begin, finish, logits) and that free must be the last call on a
 *               handle. There is no state per thread.
 *   Processes   No signal handler, no environment variable, no exit handler. Threads: the CPU
 *               backend's pool and, after begin, one per engine. A forked child may exec or _exit;
 *               other calls in it answer POLAR_E_UNSUPPORTED.
 */


#ifndef POLAR_SPARSITY_H
#define POLAR_SPARSITY_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) || defined(__clang__)
#define POLAR_MUST_USE __attribute__((warn_unused_result))
#else
#define POLAR_MUST_USE
#endif

/* Whether a polar_status is an error. */
#define POLAR_IS_ERROR(status) ((status) >= 100)

/* An empty polar_error: polar_error err = POLAR_ERROR_INIT; */
#define POLAR_ERROR_INIT { sizeof(polar_error), 0, 0, 0, { 0 } }


// Version of the header; compare with `polar_version()`.
#define POLAR_VERSION_MAJOR 0

// See `POLAR_VERSION_MAJOR`.
#define POLAR_VERSION_MINOR 1

// See `POLAR_VERSION_MAJOR`.
#define POLAR_VERSION_PATCH 0

// The ABI this header describes, and the number in the shared library's SONAME. 0 while the
// library is young: then a new minor version may change the ABI, and a program compares
// major and minor of `polar_version()` as well.
#define POLAR_ABI_VERSION 0

// Most alternatives per token that a request may ask for (`polar_request.n_logprobs`).
#define POLAR_MAX_LOGPROBS 20

// Most requests in one `polar_engine_submit`.
#define POLAR_MAX_SUBMIT 65536

// Where devices are found and models are loaded from; owns the log.
typedef struct polar_context polar_context;

// A scheduler, a KV cache and one model.
typedef struct polar_engine polar_engine;

// Immutable weights on a device.
typedef struct polar_model polar_model;

// The kernels, loaded into one CUDA context of the host.
typedef struct polar_op_library polar_op_library;

// Immutable router weights for one model.
typedef struct polar_routers polar_routers;

// Text to tokens and back.
typedef struct polar_tokenizer polar_tokenizer;

// Result of a call: 0 is success, 1 to 99 is no error, 100 and up is an error. Treat numbers this
// header does not list as errors when they are 100 or more.
typedef int32_t polar_status;

// A kind of device.
typedef uint32_t polar_backend;

// How important a line of the log is, or the least important ones that are written.
typedef uint32_t polar_log_level;

// Bits of `polar_context_options.flags`.
typedef uint32_t polar_context_flags;

// How to make a context. Zero in a field means the default.
typedef struct {
  // Set by `polar_context_options_init`.
  uint32_t struct_size;
  // Which devices to offer.
  polar_backend backend;
  // Threads of the CPU backend's pool; 0 = one per core.
  uint32_t threads;
  // What is logged.
  polar_log_level log_level;
  // Size of the log that `polar_log_drain` reads; 0 = 64 KiB.
  uint32_t log_ring_kib;
  // `POLAR_CONTEXT_` bits.
  polar_context_flags flags;
  // Most bytes of a model's or a router file's tensors.
  uint64_t max_file_bytes;
  // Largest safetensors header that is read, in bytes.
  uint64_t max_header_bytes;
} polar_context_options;

// What went wrong, in the caller's memory. Written only when a call returns an error. Start with
// `polar_error err = POLAR_ERROR_INIT;`.
typedef struct {
  // `sizeof(polar_error)`, set by the caller; with a smaller one every call answers `POLAR_E_ABI`.
  uint32_t struct_size;
  // What the call returned.
  polar_status code;
  // errno when the operating system refused, else 0.
  int32_t os_code;
  // The driver's code when a device refused, else 0.
  int32_t device_code;
  // One line of UTF-8 with its terminator; a longer text is cut here and whole in the log.
  char message[240];
} polar_error;

// A device.
typedef struct {
  // `sizeof(polar_device_info)`, set by the caller.
  uint32_t struct_size;
  // Its number within its backend.
  uint32_t ordinal;
  // `POLAR_BACKEND_CPU` or `POLAR_BACKEND_CUDA`.
  polar_backend backend;
  // CUDA compute capability, 90 for 9.0; 0 for a CPU.
  uint32_t compute_capability;
  // Bytes of memory.
  uint64_t memory_total;
  // Bytes of it that are free now.
  uint64_t memory_free;
  // 1 if a model can be loaded there; 0 if not, and then `name` says why.
  uint32_t usable;
  // 0.
  uint32_t reserved;
  // Name, or why it is not usable; terminated UTF-8.
  char name[96];
  // Identifier that stays the same over restarts, or empty.
  char uuid[40];
} polar_device_info;

// Gets one line of the log: its level and `len` bytes of UTF-8, valid only during the
// call and not terminated. Runs on any thread, with a lock held: it must be quick, must not throw,
// and must not call the library; calls that try get `POLAR_E_BUSY`.
typedef void (*polar_log_fn)(void *user, polar_log_level level, const char *text, size_t len);

// Type of weights.
typedef uint32_t polar_dtype;

// Bits of `polar_load_options.flags`.
typedef uint32_t polar_load_flags;

// How to load a model or routers. Zero in a field means the default.
typedef struct {
  // Set by `polar_load_options_init`.
  uint32_t struct_size;
  // Ordinal of the device.
  uint32_t device;
  // `POLAR_DTYPE_STORED` or `POLAR_DTYPE_I8`.
  polar_dtype weight_dtype;
  // `POLAR_LOAD_` bits.
  polar_load_flags flags;
} polar_load_options;

// Hears how far a load has come, in bytes. Returns 0 to go on, anything else to cancel. Runs on the
// thread that loads; must not throw, and must not call the library: calls that try get
// `POLAR_E_BUSY`.
typedef int32_t (*polar_progress_fn)(void *user, uint64_t done, uint64_t total);

// How a request's MLP runs while it decodes.
typedef uint32_t polar_mlp_mode;

// Where selections of attention heads come from.
typedef uint32_t polar_attn_source;

// How to make an engine. Zero in a field means the default.
typedef struct {
  // Set by `polar_engine_options_init`.
  uint32_t struct_size;
  // Most sequences in one step; 0 = 32.
  uint32_t max_batch;
  // Most requests that wait; 0 = 1024.
  uint32_t max_queue;
  // Tokens of a KV page: 0 or 16.
  uint32_t page_tokens;
  // Most tokens one step computes, decode and prefill together; 0 = 512.
  uint32_t step_tokens;
  // Longest context of a request, prompt and output; 0 = the model's.
  uint32_t max_context;
  // Bytes of KV cache; 0 = half of what is free, at most what `max_batch` full contexts need.
  uint64_t kv_bytes;
  // Share of attention heads a decode step computes, layer 0 excepted; 0 = as the router file
  // says, where it pays; 1 = dense.
  float attn_density;
  // Share of MLP neurons; 0 = the router file's tables; 1 = dense.
  float mlp_density;
  // A layer whose share of neurons would be above this runs dense and skips its router; 0 = where
  // selecting stops paying on the device: 0.8 on the CPU, less with larger batches on a GPU.
  float mlp_dense_above;
  // For requests that name none.
  polar_mlp_mode mlp_mode;
  // Where selections of heads come from; other than the routers only for measurements.
  polar_attn_source attn_source;
  // Must be 0.
  uint32_t flags;
  // Seed of `POLAR_SOURCE_RANDOM`.
  uint64_t attn_seed;
} polar_engine_options;

// What a model and an engine would take on a device, and what fits. All sizes are the device's.
typedef struct {
  // `sizeof(polar_estimate)`, set by the caller.
  uint32_t struct_size;
  // 1 if all of it fits into what is free now.
  uint32_t fits;
  // Sequences in a step, with the default applied.
  uint32_t max_batch;
  // Longest context, with the default applied.
  uint32_t max_context;
  // Bytes of the weights.
  uint64_t weight_bytes;
  // Bytes of the routers.
  uint64_t router_bytes;
  // Bytes of activations, sums and tables of a step.
  uint64_t scratch_bytes;
  // Bytes of one KV page: 16 tokens, all layers.
  uint64_t page_bytes;
  // Bytes of KV cache for one token.
  uint64_t token_bytes;
  // Pages the engine would take.
  uint64_t kv_pages;
  // Bytes of all of the above together, with that many pages.
  uint64_t needed_bytes;
  // Bytes that are free now.
  uint64_t free_bytes;
  // Most pages that fit, whatever the engine's options say.
  uint64_t max_kv_pages;
  // Contexts of `max_context` tokens that they hold.
  uint64_t max_contexts;
} polar_estimate;

// What a model is.
typedef struct {
  // `sizeof(polar_model_info)`, set by the caller.
  uint32_t struct_size;
  // Tokens are 0 up to, not including, this; as many logits.
  uint32_t vocab_size;
  // Decoder layers.
  uint32_t num_layers;
  // Query heads.
  uint32_t num_heads;
  // Key/value heads: the units of attention sparsity.
  uint32_t num_kv_heads;
  // Dimensions of one head.
  uint32_t head_dim;
  // Width of the hidden state.
  uint32_t hidden_size;
  // MLP neurons of a layer.
  uint32_t ffn_size;
  // Longest context, prompt and output together.
  uint32_t max_positions;
  // `POLAR_DTYPE_` of the stored weights.
  polar_dtype dtype;
  // Token that begins a text, or -1.
  int32_t bos_token;
  // End-of-sequence tokens the model has; the first 8 are in `eos_tokens`.
  uint32_t n_eos;
  // See `n_eos`; -1 where there is none.
  int32_t eos_tokens[8];
  // Bytes of the weights on the device.
  uint64_t weight_bytes;
  // Family as its config names it: `opt`, `llama`, `mistral`, `qwen2`, `qwen3`; terminated.
  char family[16];
  // Device and instruction set it runs on; terminated UTF-8.
  char device_name[96];
} polar_model_info;

// Bits of the `flags` of `polar_tokenizer_encode` and `polar_tokenizer_decode`.
typedef uint32_t polar_text_flags;

// Bits of `polar_request.flags`.
typedef uint32_t polar_request_flags;

// One request: 128 bytes, frozen. Zero everywhere but `n_tokens` and `max_new_tokens` is a greedy
// request with the engine's sparsity. Prompt and stop tokens are slices of the one token array that
// `polar_engine_submit` gets.
typedef struct {
  // Echoed in every event.
  uint64_t user_tag;
  // Seed of this request's own random numbers.
  uint64_t random_seed;
  // Prompt: index of its first token.
  uint32_t first_token;
  // Prompt: number of tokens, at least 1.
  uint32_t n_tokens;
  // Stop tokens: index of the first.
  uint32_t first_stop;
  // Stop tokens: how many.
  uint32_t n_stop;
  // Tokens to generate, at least 1.
  uint32_t max_new_tokens;
  // `POLAR_REQUEST_` bits.
  polar_request_flags flags;
  // Higher runs first and is preempted last.
  uint32_t priority;
  // Likeliest alternatives wanted with each token, up to `POLAR_MAX_LOGPROBS`.
  uint32_t n_logprobs;
  // 0 = greedy.
  float temperature;
  // Keep the smallest set of likeliest tokens with this mass; 0 or 1 = all.
  float top_p;
  // Keep tokens at least this share as likely as the likeliest; 0 = all.
  float min_p;
  // Keep so many of the likeliest tokens; 0 = all.
  uint32_t top_k;
  // Divides (or multiplies, if negative) the logits of tokens in prompt or output; 0 or 1 = off.
  float repetition_penalty;
  // Subtracted once from the logits of tokens in the output.
  float presence_penalty;
  // Subtracted from them per occurrence.
  float frequency_penalty;
  // Share of attention heads this request computes; 0 = the engine's, 1 = dense.
  float attn_density;
  // How its MLP runs.
  polar_mlp_mode mlp_mode;
  // Must be 0.
  uint32_t reserved[11];
} polar_request;

// A request the engine accepted. Not a pointer and not to be freed: a stale one is an error code.
// 0 is never valid.
typedef uint64_t polar_seq;

// Health of an engine.
typedef uint32_t polar_health;

// Counters of an engine since its creation.
typedef struct {
  // `sizeof(polar_stats)`, set by the caller.
  uint32_t struct_size;
  // Whether it works.
  polar_health health;
  // Steps completed.
  uint64_t steps;
  // Prompt tokens computed, recomputation included.
  uint64_t tokens_in;
  // Tokens generated.
  uint64_t tokens_out;
  // Requests accepted.
  uint64_t requests_accepted;
  // Requests finished, whatever the reason.
  uint64_t requests_finished;
  // Requests refused because the queue was full.
  uint64_t admission_refusals;
  // Requests put back because pages ran out.
  uint64_t preemptions;
  // Requests waiting now.
  uint64_t waiting;
  // Requests running now.
  uint64_t running;
  // KV pages in all.
  uint64_t kv_pages_total;
  // KV pages free now.
  uint64_t kv_pages_free;
  // Attention units (KV heads) that decode steps computed, over layers, tokens and requests.
  uint64_t attn_units_run;
  // And that a dense model would have computed.
  uint64_t attn_units_total;
  // MLP neurons that decode steps computed.
  uint64_t mlp_units_run;
  // And that a dense model would have computed.
  uint64_t mlp_units_total;
  // KV bytes that decode attention read.
  uint64_t kv_bytes_read;
  // And that dense decode attention would have read.
  uint64_t kv_bytes_dense;
  // Router scores that were NaN; they sort last.
  uint64_t nan_scores;
  // Nanoseconds of the last step.
  uint64_t step_ns_last;
  // Of the longest.
  uint64_t step_ns_max;
  // Of all together.
  uint64_t step_ns_total;
  // Log lines lost because nobody drained the context's log.
  uint64_t log_lines_dropped;
} polar_stats;

// Bits of `polar_event.flags`. Ignore those this header does not list.
typedef uint32_t polar_event_flags;

// Why a request ended.
typedef uint32_t polar_finish_reason;

// What happened to one request in a step: 64 bytes, frozen.
typedef struct {
  // The request.
  polar_seq seq;
  // Its tag.
  uint64_t user_tag;
  // A token, or -1.
  int32_t token;
  // Natural log of its probability under the model, before temperature and penalties; NaN unless
  // `POLAR_REQUEST_LOGPROB` asked for it.
  float logprob;
  // `POLAR_EVENT_` bits.
  polar_event_flags flags;
  // Why it ended.
  polar_finish_reason reason;
  // Why it ended, when `reason` is `POLAR_FINISH_ERROR`; else `POLAR_OK`.
  polar_status status;
  // Alternatives of this token in the call's `logprobs` array: how many.
  uint32_t n_logprobs;
  // And the index of the first, likeliest first.
  uint32_t first_logprob;
  // Tokens generated so far.
  uint32_t n_generated;
  // Share of attention heads that this request's decode steps really computed so far, over all
  // layers; 1 before the first.
  float attn_density;
  // The same for MLP neurons.
  float mlp_density;
  // 0.
  uint32_t reserved[2];
} polar_event;

// One alternative of a token: 8 bytes, frozen.
typedef struct {
  // The token.
  int32_t token;
  // Natural log of its probability.
  float logprob;
} polar_logprob;

// Bits of `polar_op_attention.flags`.
typedef uint32_t polar_op_flags;

// An address in device memory: a `CUdeviceptr`, or a pointer of the CUDA runtime as an integer
// (torch: `tensor.data_ptr()`). 0 is NULL.
typedef uint64_t polar_device_ptr;

// Decode attention over pages of the host's KV cache: one query token per sequence, only the KV heads
// that the sequence keeps. Dense attention is the same with `keep` and `selected` 0.
//
// A page is 16 tokens of one layer, head by head, so that a head that is not kept is not read at all:
// `kv[page][kv_head][K or V][16][head_dim]`. K and V of a head and its 16 tokens lie together; pages and
// heads may lie anywhere (`page_stride`, `head_stride`), so one pool may hold all layers.
//
// `keep`, `seq_lens` and the block table are read on the device, so a recorded graph follows them.
typedef struct {
  // `sizeof(polar_op_attention)`, set by the caller.
  uint32_t struct_size;
  // `POLAR_DTYPE_F16` or `POLAR_DTYPE_BF16`: of q, pages and output. Sums are f32.
  polar_dtype dtype;
  // Sequences in the batch, padding included.
  uint32_t num_sequences;
  // Query heads.
  uint32_t num_heads;
  // KV heads, at most 256. Query heads h * group and up share KV head h, with
  // group = num_heads / num_kv_heads from 1 to 16.
  uint32_t num_kv_heads;
  // 64, 80, 96, 128 or (up to 8 query heads per KV head) 256.
  uint32_t head_dim;
  // Entries of a sequence's block table. A sequence longer than 16 times this is cut.
  uint32_t max_pages;
  // From one sequence's block table to the next; 0 = `max_pages`.
  uint32_t block_table_stride;
  // Only so many newest tokens are seen; 0 = all.
  uint32_t window;
  // Factor of q k; 0 = 1 / sqrt(head_dim).
  float scale;
  // `POLAR_OP_` bits.
  polar_op_flags flags;
  // Must be 0.
  uint32_t reserved;
  // From one sequence's q to the next, a multiple of 8; 0 = packed. For q inside a fused QKV output.
  uint64_t q_stride;
  // From one page to the next, a multiple of 8; 0 = packed.
  uint64_t page_stride;
  // From one KV head of a page to the next, a multiple of 8; 0 = packed.
  uint64_t head_stride;
  // Queries, `[num_sequences][num_heads][head_dim]`, rotated; 16-byte aligned.
  polar_device_ptr q;
  // Pages; 16-byte aligned, best 128.
  polar_device_ptr kv;
  // int32 `[num_sequences][max_pages]`: numbers of pages, the oldest first. Entries behind a sequence's
  // last page are not read.
  polar_device_ptr block_table;
  // int32 `[num_sequences]`: tokens in the cache, the one that is decoded included. 0 (or less) =
  // padding.
  polar_device_ptr seq_lens;
  // int32 `[num_sequences]`: KV heads each sequence keeps; what is outside 0 to `num_kv_heads` means
  // all. 0 = all of every sequence.
  polar_device_ptr keep;
  // uint16 `[num_sequences][num_kv_heads]`: the kept heads, `keep[b]` of them, each once. 0 = the
  // first ones.
  polar_device_ptr selected;
  // Result, packed `[num_sequences][num_heads][head_dim]`; zeros for heads that are not kept and for
  // padding. 16-byte aligned.
  polar_device_ptr out;
  // float `[num_sequences][num_heads]`: natural log of the sum of exponentials, to merge with other
  // attention over the same query; -infinity where nothing was computed. 0 = not wanted.
  polar_device_ptr lse;
  // `polar_op_attention_workspace` bytes, 256-byte aligned; holds the plan.
  polar_device_ptr workspace;
  // Its size.
  uint64_t workspace_bytes;
} polar_op_attention;

// The KV heads each sequence keeps: those with the largest scores, ties to the lower head, NaN last.
// Scores come from a linear router, `x weight^T + bias`, or from the host.
typedef struct {
  // `sizeof(polar_op_head_selection)`, set by the caller.
  uint32_t struct_size;
  // `POLAR_DTYPE_F16` or `POLAR_DTYPE_BF16`: of x, weight, bias and `attention_out`.
  polar_dtype dtype;
  // Sequences in the batch.
  uint32_t num_sequences;
  // KV heads, at most 256.
  uint32_t num_kv_heads;
  // Scores per sequence: `num_kv_heads`, or one per query head, of which the largest of a group counts.
  uint32_t router_rows;
  // Width of x, a multiple of 8. Not read with `logits`.
  uint32_t hidden_size;
  // Elements of one KV head in `attention_out`, a multiple of 8: its query heads times head_dim.
  uint32_t group_width;
  // Must be 0.
  uint32_t reserved;
  // `[num_sequences][hidden_size]`: the layer's input after its norm. 16-byte aligned.
  polar_device_ptr x;
  // `[router_rows][hidden_size]`, 16-byte aligned.
  polar_device_ptr weight;
  // `[router_rows]`; 0 = none. Added to `logits` too.
  polar_device_ptr bias;
  // float `[num_sequences][router_rows]`: scores of the host's own making, then `x` and `weight` are
  // not read; 0 = the router makes them.
  polar_device_ptr logits;
  // int32 `[num_sequences]`: heads to keep. For density d: max(1, floor(d * num_kv_heads)).
  polar_device_ptr keep;
  // Result, uint16 `[num_sequences][num_kv_heads]`: the first `keep[b]` are the kept heads, ascending;
  // the rest is not written.
  polar_device_ptr selected;
  // The attention's `out`, to be zeroed where heads are not kept (then the attention can run with
  // `POLAR_OP_LEAVE_REST`), 16-byte aligned; 0 = not wanted.
  polar_device_ptr attention_out;
  // uint32, raised by one for every score that is NaN; 0 = not wanted.
  polar_device_ptr nan_count;
  // `polar_op_head_selection_workspace` bytes, 256-byte aligned.
  polar_device_ptr workspace;
  // Its size.
  uint64_t workspace_bytes;
} polar_op_head_selection;

// The neurons a batch runs: those with the largest sums, over its rows, of positive router scores; ties
// to the lower neuron, NaN last. The router is `x router_down^T router_up^T`, or the host brings scores.
typedef struct {
  // `sizeof(polar_op_neuron_selection)`, set by the caller.
  uint32_t struct_size;
  // `POLAR_DTYPE_F16` or `POLAR_DTYPE_BF16`: of x and the router.
  polar_dtype dtype;
  // Rows (sequences) in the batch.
  uint32_t num_rows;
  // Neurons of the layer, a multiple of 8.
  uint32_t num_neurons;
  // Neurons to keep, at least 1.
  uint32_t keep;
  // Width of x, a multiple of 8. Not read with `logits`.
  uint32_t hidden_size;
  // Width of the router's middle, a multiple of 8. Not read with `logits`.
  uint32_t rank;
  // Must be 0.
  uint32_t reserved;
  // `[num_rows][hidden_size]`, 16-byte aligned.
  polar_device_ptr x;
  // `[rank][hidden_size]`, 16-byte aligned.
  polar_device_ptr router_down;
  // `[num_neurons][rank]`, 16-byte aligned.
  polar_device_ptr router_up;
  // float `[num_rows][num_neurons]`: scores of the host's own making, then x and the router are not
  // read; 0 = the router makes them.
  polar_device_ptr logits;
  // int32, one: rows from this number on are padding and have no say; 0 = there is none.
  polar_device_ptr active_rows;
  // Result, uint32 `[keep up to a multiple of 8]`: the kept neurons, ascending, then zeros. 16-byte
  // aligned.
  polar_device_ptr index;
  // uint32, raised by one for every sum that is NaN; 0 = not wanted.
  polar_device_ptr nan_count;
  // `polar_op_neuron_selection_workspace` bytes, 256-byte aligned.
  polar_device_ptr workspace;
  // Its size.
  uint64_t workspace_bytes;
} polar_op_neuron_selection;

// A ReLU MLP, `relu(x up^T + up_bias) down + down_bias`, of the listed neurons only: a neuron is a row
// of `up` and a row of `down`, and those of the others are not read.
typedef struct {
  // `sizeof(polar_op_mlp)`, set by the caller.
  uint32_t struct_size;
  // `POLAR_DTYPE_F16` or `POLAR_DTYPE_BF16`: of x, weights and output. Sums are f32.
  polar_dtype dtype;
  // Rows in the batch; at most 64 with `index`.
  uint32_t num_rows;
  // Width of x and out, a multiple of 8.
  uint32_t hidden_size;
  // Neurons of the layer, a multiple of 8.
  uint32_t num_neurons;
  // Neurons in `index`. Not read without it.
  uint32_t keep;
  // `[num_rows][hidden_size]`, 16-byte aligned.
  polar_device_ptr x;
  // `[num_neurons][hidden_size]`, 16-byte aligned.
  polar_device_ptr up;
  // `[num_neurons]`; 0 = none.
  polar_device_ptr up_bias;
  // `[num_neurons][hidden_size]`: the transpose of how checkpoints have it, so that a neuron is a row.
  // 16-byte aligned.
  polar_device_ptr down;
  // `[hidden_size]`, 8-byte aligned; 0 = none.
  polar_device_ptr down_bias;
  // As `polar_op_neuron_selection_run` leaves it; 0 = every neuron.
  polar_device_ptr index;
  // Result, `[num_rows][hidden_size]`, 16-byte aligned.
  polar_device_ptr out;
  // `polar_op_mlp_workspace` bytes, 256-byte aligned.
  polar_device_ptr workspace;
  // Its size.
  uint64_t workspace_bytes;
} polar_op_mlp;

// Success.
#define POLAR_OK 0

// The step still runs; nothing finished before the time-out. Call again.
#define POLAR_PENDING 1

// Nothing is queued or running.
#define POLAR_IDLE 2

// The caller's array or buffer is too small; nothing is lost. Call again, with more room if a
// needed size came back.
#define POLAR_TRUNCATED 3

// NULL, a value out of range, or a combination that makes no sense. The message names it.
#define POLAR_E_INVALID 100

// A `struct_size` that this library cannot serve: header and library do not match.
#define POLAR_E_ABI 101

// An unknown or stale sequence id.
#define POLAR_E_NOT_FOUND 102

// Another thread is inside step, a step is in flight already, or a callback called the library.
#define POLAR_E_BUSY 103

// This build, device or model family cannot do it; also any call in a forked child.
#define POLAR_E_UNSUPPORTED 104

// The progress callback cancelled.
#define POLAR_E_CANCELLED 105

// Host memory ran out.
#define POLAR_E_NOMEM 200

// Device memory ran out.
#define POLAR_E_DEVICE_NOMEM 201

// This sequence alone needs more KV pages than the engine has.
#define POLAR_E_KV_FULL 202

// The queue is full and nothing of the batch was taken; retry later.
#define POLAR_E_QUEUE_FULL 203

// The operating system refused; `os_code` holds errno.
#define POLAR_E_IO 300

// A malformed file.
#define POLAR_E_FORMAT 301

// Well formed, but above a limit.
#define POLAR_E_LIMIT 302

// A valid file that does not fit the model.
#define POLAR_E_MODEL 303

// No usable driver for the device.
#define POLAR_E_NO_DRIVER 400

// A device call failed; the device is still usable.
#define POLAR_E_DEVICE 401

// The device is lost for this process; restart it.
#define POLAR_E_DEVICE_LOST 402

// A bug in the library was caught. An engine it happened in is dead; everything else works.
#define POLAR_E_PANIC 900

// The best one there is.
#define POLAR_BACKEND_AUTO 0

// The processor.
#define POLAR_BACKEND_CPU 1

// NVIDIA GPUs.
#define POLAR_BACKEND_CUDA 2

// `POLAR_LOG_INFO`.
#define POLAR_LOG_DEFAULT 0

// Something failed.
#define POLAR_LOG_ERROR 1

// Something is not as it should be, and work goes on.
#define POLAR_LOG_WARN 2

// Rare events: loads, creations.
#define POLAR_LOG_INFO 3

// Refusals that are part of normal work: a full queue, a stale id.
#define POLAR_LOG_DEBUG 4

// Nothing.
#define POLAR_LOG_OFF 5

// On a GPU, large matrix products are done by the kernel that NVIDIA's cuBLASLt proposes first: the same
// one each time, on the same kind of GPU with the same cuBLASLt. Without this flag its proposals and this
// library's own kernel are timed when a shape of product is first met, and the fastest is kept. That is
// faster at some shapes, but two processes may choose different kernels, and then their results may differ
// in the last bits. The CPU times nothing.
#define POLAR_CONTEXT_UNTIMED_PRODUCTS 1

// As the files have them.
#define POLAR_DTYPE_STORED 0

// IEEE binary32.
#define POLAR_DTYPE_F32 1

// IEEE binary16.
#define POLAR_DTYPE_F16 2

// bfloat16.
#define POLAR_DTYPE_BF16 3

// Signed bytes with one scale per row; made while loading.
#define POLAR_DTYPE_I8 4

// Refuse weights that hold NaN or infinity. Costs a pass over them.
#define POLAR_LOAD_CHECK_FINITE 1

// Take routers although they name another model. Shapes still must fit.
#define POLAR_LOAD_IGNORE_FINGERPRINT 2

// In a request: the engine's. In an engine: reference if there are MLP routers, else dense.
#define POLAR_MLP_DEFAULT 0

// Every neuron.
#define POLAR_MLP_DENSE 1

// The paper's rule: one list of neurons for all sequences of the step in this mode, so a request's
// result depends on its neighbours.
#define POLAR_MLP_REFERENCE 2

// Each sequence uses only its own neurons, whatever else is in the batch; on the CPU also the same bits
// alone and in any batch, on a GPU the same up to rounding.
#define POLAR_MLP_BATCH_INVARIANT 3

// The routers.
#define POLAR_SOURCE_ROUTER 0

// The true norm of each head's output. Saves nothing: an upper bound for quality measurements.
#define POLAR_SOURCE_ORACLE 1

// Random heads from `attn_seed`: a lower bound for quality measurements.
#define POLAR_SOURCE_RANDOM 2

// The model's end-of-sequence tokens do not end this request.
#define POLAR_REQUEST_IGNORE_EOS 1

// The host samples. Each step ends in a `POLAR_EVENT_LOGITS`; read them with
// `polar_engine_logits` and answer with `polar_engine_push_token`.
#define POLAR_REQUEST_HOST_SAMPLES 2

// Fill `polar_event.logprob`.
#define POLAR_REQUEST_LOGPROB 4

// `token` is part of the output.
#define POLAR_EVENT_TOKEN 1

// The request's last event; its id is stale now. Exactly one per accepted request.
#define POLAR_EVENT_FINISHED 2

// Pages ran out and the request went back into the queue. Nothing is lost.
#define POLAR_EVENT_PREEMPTED 4

// Logits wait for the host (`POLAR_REQUEST_HOST_SAMPLES`).
#define POLAR_EVENT_LOGITS 8

// It has not.
#define POLAR_FINISH_NONE 0

// A stop or end-of-sequence token. `token` is that token, without
// `POLAR_EVENT_TOKEN`, since it is not part of the output.
#define POLAR_FINISH_STOP 1

// `max_new_tokens` or the longest context.
#define POLAR_FINISH_LENGTH 2

// The host cancelled.
#define POLAR_FINISH_CANCELLED 3

// See the event's `status`.
#define POLAR_FINISH_ERROR 4

// Works.
#define POLAR_HEALTH_OK 0

// A bug was caught; only stats and free answer.
#define POLAR_HEALTH_DEAD 1

// The device is lost for this process.
#define POLAR_HEALTH_DEVICE_LOST 2

// Encode: do not add the tokens that start or end a text.
#define POLAR_ENCODE_NO_SPECIAL 1

// Decode: keep special tokens in the text.
#define POLAR_DECODE_KEEP_SPECIAL 1

// What is not computed keeps what it holds in `out` and `lse`: saves a small kernel where something
// else put the zeros there (`polar_op_head_selection_run` can) or nobody reads them.
#define POLAR_OP_LEAVE_REST 1

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Version of the library: major << 16 | minor << 8 | patch.
//
// Threads: any, at any time.
uint32_t polar_version(void);

// ABI of the library, to be compared with `POLAR_ABI_VERSION` at start.
//
// Threads: any, at any time.
uint32_t polar_abi_version(void);

// How the library was built, for bug reports: version, source, compiler, target, features.
//
// Threads: any, at any time. Memory: static, terminated; not to be freed.
const char *polar_build_info(void);

// Name of a status, `"POLAR_E_INVALID"` for instance; `"POLAR_UNKNOWN"` for one that this library
// does not know.
//
// Threads: any, at any time. Memory: static, terminated; not to be freed.
const char *polar_status_name(polar_status status);

// Fills `options` with the defaults: zeros and its size. `size` is
// `sizeof(polar_context_options)`.
//
// Threads: any, at any time.
void polar_context_options_init(polar_context_options *options, size_t size);

// Makes a context. `options` may be NULL for the defaults. Succeeds on machines without a GPU or a
// driver; what can be used there says `polar_device_get`.
//
// Threads: any. Ownership: `*out` is the caller's, to be freed with `polar_context_free`.
// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_NOMEM`, `POLAR_E_UNSUPPORTED` (a backend that
// this build lacks), `POLAR_E_NO_DRIVER`.
POLAR_MUST_USE
polar_status polar_context_create(const polar_context_options *options,
                                  polar_context **out,
                                  polar_error *err);

// Frees a context. Models and engines made from it live on. NULL does nothing.
//
// Threads: must not race with a call on this context; calls on models and engines may run.
void polar_context_free(polar_context *ctx);

// Counts devices, usable or not. The CPU is one; a context's devices do not change.
//
// Threads: any, at any time. Errors: `POLAR_E_INVALID`, `POLAR_E_NOMEM`.
POLAR_MUST_USE
polar_status polar_device_count(const polar_context *ctx,
                                uint32_t *out,
                                polar_error *err);

// Describes device `index`, counted from 0. The caller sets `out->struct_size`.
//
// Threads: any, at any time. Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_NOMEM`.
POLAR_MUST_USE
polar_status polar_device_get(const polar_context *ctx,
                              uint32_t index,
                              polar_device_info *out,
                              polar_error *err);

// Sends the context's log lines to `fn` instead of keeping them; NULL keeps them again. The former
// function is not running any more when this returns.
//
// Threads: any, at any time. Ownership: `user` stays the caller's and must live until replaced or
// until the last object made from the context is freed.
// Errors: `POLAR_E_INVALID`.
POLAR_MUST_USE
polar_status polar_log_set(polar_context *ctx,
                           polar_log_fn function,
                           void *user,
                           polar_error *err);

// Moves kept log lines into `buf`, oldest first, as terminated UTF-8: whole lines, each `level: text`
// with a newline. The way for hosts with a garbage collector. Call until `*len` is 0.
//
// `*len` is the length without terminator. `*dropped`, unless `dropped` is NULL, is how many lines
// were lost so far because the ring was full. If not even the first line fits, `POLAR_TRUNCATED`
// and `*len` is the length it needs.
//
// Threads: any, at any time. Errors: `POLAR_E_INVALID`.
POLAR_MUST_USE
polar_status polar_log_drain(polar_context *ctx,
                             char *buf,
                             size_t cap,
                             size_t *len,
                             uint64_t *dropped,
                             polar_error *err);

// Fills `options` with the defaults: zeros and its size. `size` is `sizeof(polar_load_options)`.
//
// Threads: any, at any time.
void polar_load_options_init(polar_load_options *options, size_t size);

// Loads a Hugging Face folder: `config.json` and its safetensors. `path` needs no terminator.
// `options` and `progress` may be NULL. The files are read, not mapped, and may go away afterwards.
// Needs at most 256 MiB of host memory beyond the weights.
//
// Threads: any; loads may run side by side. Ownership: `*out` is the caller's, to be freed with
// `polar_model_free`.
// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_IO`, `POLAR_E_FORMAT`, `POLAR_E_LIMIT`,
// `POLAR_E_MODEL`, `POLAR_E_UNSUPPORTED` (a family or a config field this version does not handle),
// `POLAR_E_CANCELLED`, `POLAR_E_NOMEM`, `POLAR_E_DEVICE_NOMEM`, `POLAR_E_NO_DRIVER`, `POLAR_E_DEVICE`.
POLAR_MUST_USE
polar_status polar_model_load(polar_context *ctx,
                              const char *path,
                              size_t path_len,
                              const polar_load_options *options,
                              polar_progress_fn progress,
                              void *user,
                              polar_model **out,
                              polar_error *err);

// Says what a model, its routers and an engine of these options would take on the device of `load`, and how
// much of it fits, before anything is loaded: from `config.json`, the headers of the files and the device.
// Without `routers` (`routers_len` 0) for a dense engine; `load` and `engine` may be NULL. What does not fit
// is no error but `fits` 0, so that a host can try other options. The caller sets `out->struct_size`.
//
// A GPU is opened for it, which takes memory of its own; `free_bytes` is what is left then. Loading and
// `polar_engine_create` check the same sums before they take anything.
//
// Threads: any. Errors: as `polar_model_load`, `polar_routers_load` and, of the options,
// `polar_engine_create`; not `POLAR_E_DEVICE_NOMEM`.
POLAR_MUST_USE
polar_status polar_model_estimate(const polar_context *ctx,
                                  const char *path,
                                  size_t path_len,
                                  const char *routers,
                                  size_t routers_len,
                                  const polar_load_options *load,
                                  const polar_engine_options *engine,
                                  polar_estimate *out,
                                  polar_error *err);

// Describes a model. The caller sets `out->struct_size`.
//
// Threads: any, at any time. Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`.
POLAR_MUST_USE
polar_status polar_model_get_info(const polar_model *model,
                                  polar_model_info *out,
                                  polar_error *err);

// Frees a model. Routers and engines made from it live on and keep the weights. NULL does nothing.
//
// Threads: must not race with a call on this model; calls on engines may run.
void polar_model_free(polar_model *model);

// Loads a router file made for `model`. `options` may be NULL.
//
// Threads: any. Ownership: `*out` is the caller's, to be freed with `polar_routers_free`.
// Errors: as `polar_model_load`; `POLAR_E_MODEL` if the routers were made for another model.
POLAR_MUST_USE
polar_status polar_routers_load(const polar_model *model,
                                const char *path,
                                size_t path_len,
                                const polar_load_options *options,
                                polar_routers **out,
                                polar_error *err);

// Frees routers. Engines made with them live on. NULL does nothing.
//
// Threads: must not race with a call on these routers.
void polar_routers_free(polar_routers *routers);

// Loads `tokenizer.json`; `path` is that file or the folder it is in, without need of a terminator.
//
// Threads: any. Ownership: `*out` is the caller's, to be freed with `polar_tokenizer_free`.
// Errors: `POLAR_E_INVALID`, `POLAR_E_IO`, `POLAR_E_FORMAT`, `POLAR_E_LIMIT`, `POLAR_E_NOMEM`,
// `POLAR_E_UNSUPPORTED` (a build without tokenizers).
POLAR_MUST_USE
polar_status polar_tokenizer_load(polar_context *ctx,
                                  const char *path,
                                  size_t path_len,
                                  polar_tokenizer **out,
                                  polar_error *err);

// Frees a tokenizer. NULL does nothing.
//
// Threads: must not race with a call on this tokenizer.
void polar_tokenizer_free(polar_tokenizer *tokenizer);

// Turns UTF-8 text into tokens, with the special tokens that start or end a text unless `flags` has
// `POLAR_ENCODE_NO_SPECIAL`. `*n` is how many there are; if `cap` is smaller, `POLAR_TRUNCATED` and
// nothing is written: `cap` 0 asks for the size.
//
// Threads: any, at any time. Errors: `POLAR_E_INVALID` (also text that is not UTF-8),
// `POLAR_E_NOMEM`, `POLAR_E_UNSUPPORTED`.
POLAR_MUST_USE
polar_status polar_tokenizer_encode(const polar_tokenizer *tokenizer,
                                    const char *text,
                                    size_t text_len,
                                    polar_text_flags flags,
                                    int32_t *tokens,
                                    size_t cap,
                                    size_t *n,
                                    polar_error *err);

// Turns tokens into terminated UTF-8 text, without special tokens unless `flags` has
// `POLAR_DECODE_KEEP_SPECIAL`. `*len` is the length without terminator; if `cap` is not larger,
// `POLAR_TRUNCATED` and no text is written: `cap` 0 asks for the size. Tokens that end inside a
// character leave a replacement character (U+FFFD) there; a token outside the vocabulary gives no text.
//
// Threads: any, at any time. Errors: `POLAR_E_INVALID` (also a negative token), `POLAR_E_NOMEM`,
// `POLAR_E_UNSUPPORTED`.
POLAR_MUST_USE
polar_status polar_tokenizer_decode(const polar_tokenizer *tokenizer,
                                    const int32_t *tokens,
                                    size_t n_tokens,
                                    polar_text_flags flags,
                                    char *text,
                                    size_t cap,
                                    size_t *len,
                                    polar_error *err);

// Fills `options` with the defaults: zeros and its size. `size` is `sizeof(polar_engine_options)`.
//
// Threads: any, at any time.
void polar_engine_options_init(polar_engine_options *options, size_t size);

// Makes an engine. `routers` may be NULL for a dense engine, `options` for the defaults. All memory
// a step needs is taken here.
//
// Threads: any. Ownership: `*out` is the caller's, to be freed with `polar_engine_free`; model and
// routers may be freed before it.
// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_MODEL` (routers of another model),
// `POLAR_E_UNSUPPORTED`, `POLAR_E_LIMIT`, `POLAR_E_NOMEM`, `POLAR_E_DEVICE_NOMEM`, `POLAR_E_DEVICE`.
POLAR_MUST_USE
polar_status polar_engine_create(const polar_model *model,
                                 const polar_routers *routers,
                                 const polar_engine_options *options,
                                 polar_engine **out,
                                 polar_error *err);

// Frees an engine with everything queued or running in it; waits for a step in flight on the
// device. NULL does nothing.
//
// Threads: must not race with a call on this engine.
void polar_engine_free(polar_engine *engine);

// Queues requests: all of them or, on any error, none. Their prompts and stop tokens are slices of
// `tokens`. `out_ids` gets one id per request. Refuses what can never run (`POLAR_E_LIMIT`,
// `POLAR_E_KV_FULL`) and a full queue (`POLAR_E_QUEUE_FULL`); everything accepted ends in exactly
// one event with `POLAR_EVENT_FINISHED`.
//
// Threads: any, at any time, also during a step; never waits for the device. Ownership: the arrays
// stay the caller's and are not kept.
// Errors: `POLAR_E_INVALID`, `POLAR_E_LIMIT`, `POLAR_E_KV_FULL`, `POLAR_E_QUEUE_FULL`,
// `POLAR_E_NOMEM`, `POLAR_E_PANIC` and `POLAR_E_DEVICE_LOST` of an engine that is no longer healthy.
POLAR_MUST_USE
polar_status polar_engine_submit(polar_engine *engine,
                                 const polar_request *requests,
                                 size_t n_requests,
                                 const int32_t *tokens,
                                 size_t n_tokens,
                                 polar_seq *out_ids,
                                 polar_error *err);

// Ends requests at the next step boundary; their FINISHED events say `POLAR_FINISH_CANCELLED`. Ids
// that are unknown or finished already are ignored, since that race is normal.
//
// Threads: any, at any time, also during a step; never waits for the device.
// Errors: `POLAR_E_INVALID`, `POLAR_E_LIMIT`.
POLAR_MUST_USE
polar_status polar_engine_cancel(polar_engine *engine,
                                 const polar_seq *ids,
                                 size_t n_ids,
                                 polar_error *err);

// Gives a request with `POLAR_REQUEST_HOST_SAMPLES` its next token, after a `POLAR_EVENT_LOGITS`. It
// takes part in the next step. The token counts as generated: the request ends by itself at a stop
// token or at `max_new_tokens`.
//
// Threads: any, at any time. Errors: `POLAR_E_NOT_FOUND`, `POLAR_E_INVALID` (it waits for no token,
// or the token is outside the vocabulary).
POLAR_MUST_USE
polar_status polar_engine_push_token(polar_engine *engine,
                                     polar_seq id,
                                     int32_t token,
                                     polar_error *err);

// Copies the logits that the last step left for request `id`: as many floats as the vocabulary has
// entries. `*n` is that number; if `cap` is smaller, `POLAR_TRUNCATED` and nothing is copied.
//
// Threads: like `polar_engine_step`. Errors: `POLAR_E_NOT_FOUND` (none wait for this id),
// `POLAR_E_BUSY`, `POLAR_E_INVALID`.
POLAR_MUST_USE
polar_status polar_engine_logits(polar_engine *engine,
                                 polar_seq id,
                                 float *out,
                                 size_t cap,
                                 size_t *n,
                                 polar_error *err);

// Reads the counters. The caller sets `out->struct_size`.
//
// Threads: any, at any time. Works on an engine that is dead or whose device is lost.
// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`.
POLAR_MUST_USE
polar_status polar_engine_stats(const polar_engine *engine,
                                polar_stats *out,
                                polar_error *err);

// Runs one step and writes its events: up to `max_batch` sequences go forward by a token or by a
// piece of their prompt. Waits up to `timeout_ns` (0 = not at all, UINT64_MAX = as long as it takes).
//
// `POLAR_OK`: a step ended. `POLAR_PENDING`: it still runs on the device; call again.
// `POLAR_IDLE`: nothing is queued or running, or all of it waits for `polar_engine_push_token`.
// `POLAR_TRUNCATED`: `events` or `logprobs` is full; nothing is lost, the rest comes with the next
// call and before new work. `events_cap` may be 0.
//
// `*n_events` and `*n_logprobs` are set also when a step fails. Alternatives of tokens
// (`polar_request.n_logprobs`) are in `logprobs`, one run per event. `logprobs` NULL with
// `logprobs_cap` 0 drops them, and then `n_logprobs` may be NULL; otherwise `logprobs_cap` is at
// least `POLAR_MAX_LOGPROBS`.
//
// Threads: one driver at a time, any thread; a second one gets `POLAR_E_BUSY`. Memory: allocates
// nothing.
// Errors: `POLAR_E_INVALID`, `POLAR_E_BUSY`, `POLAR_E_DEVICE` (the step did not happen),
// `POLAR_E_DEVICE_LOST`, `POLAR_E_PANIC`. Trouble of one request is an event, not an error.
POLAR_MUST_USE
polar_status polar_engine_step(polar_engine *engine,
                               uint64_t timeout_ns,
                               polar_event *events,
                               size_t events_cap,
                               size_t *n_events,
                               polar_logprob *logprobs,
                               size_t logprobs_cap,
                               size_t *n_logprobs,
                               polar_error *err);

// Starts a step and does not wait for the device: the first half of `polar_engine_step`, for event
// loops and for hosts that have other work meanwhile. Submitting between the halves is fine and
// joins the next step. The CPU backend starts a thread of the engine for it, on first use.
//
// Threads: like `polar_engine_step`. Errors: `POLAR_E_BUSY` (also if a step is in flight),
// `POLAR_E_INVALID`, `POLAR_E_DEVICE`, `POLAR_E_DEVICE_LOST`, `POLAR_E_PANIC`.
POLAR_MUST_USE polar_status polar_engine_begin(polar_engine *engine, polar_error *err);

// Waits for the step in flight and writes its events: the second half of `polar_engine_step`, with
// the same arguments and results. Without a step in flight it delivers events that wait, and else
// answers `POLAR_IDLE`.
//
// Threads: like `polar_engine_step`; another thread than the one that began may finish.
// Errors: like `polar_engine_step`.
POLAR_MUST_USE
polar_status polar_engine_finish(polar_engine *engine,
                                 uint64_t timeout_ns,
                                 polar_event *events,
                                 size_t events_cap,
                                 size_t *n_events,
                                 polar_logprob *logprobs,
                                 size_t logprobs_cap,
                                 size_t *n_logprobs,
                                 polar_error *err);

// Loads the kernels into the CUDA context that is current on this thread, whichever it is; hosts of the
// CUDA runtime (torch too) have one after their first call. The context is the host's: it is not
// changed, synchronised or kept alive.
//
// This and everything that starts with `polar_op_` needs no `polar_context`. After this call operators
// allocate nothing, load nothing and wait for nothing, so they may be captured into the host's graphs.
//
// Threads: any with a current context. Ownership: `*out` is the caller's, to be freed with
// `polar_op_library_free`.
// Errors: `POLAR_E_INVALID` (no current context), `POLAR_E_UNSUPPORTED` (a build without kernels, or none
// for this GPU), `POLAR_E_NO_DRIVER`, `POLAR_E_NOMEM`, `POLAR_E_DEVICE_NOMEM`, `POLAR_E_DEVICE`.
POLAR_MUST_USE
polar_status polar_op_library_create(polar_op_library **out,
                                     polar_error *err);

// Unloads the kernels. Before that the host waits for their work and destroys graphs that hold them;
// its context still exists. NULL does nothing.
//
// Threads: any, whatever context is current; must not race with a call on this library.
void polar_op_library_free(polar_op_library *library);

// Bytes of device memory that `polar_op_attention_plan` and `polar_op_attention_run` need as
// `op->workspace`. Depends on the sizes only; addresses are not looked at. One workspace serves all
// layers that keep the same number of heads, one after another.
//
// Threads: any, at any time. Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_LIMIT`,
// `POLAR_E_UNSUPPORTED` (no kernel for this shape).
POLAR_MUST_USE
polar_status polar_op_attention_workspace(const polar_op_library *library,
                                          const polar_op_attention *op,
                                          uint64_t *bytes,
                                          polar_error *err);

// Starts the kernel that shares the work of a decode step among the multiprocessors, from `seq_lens` and
// `keep`, into the workspace. Once per step and workspace, before its first `polar_op_attention_run`: the
// work does not depend on which heads won, nor on q, pages, output and `selected`, which are not looked at.
//
// Threads: any in the library's context; one call at a time per workspace. Asynchronous on `stream`
// (`CUstream` or `cudaStream_t`; NULL = the default stream).
// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_LIMIT`, `POLAR_E_UNSUPPORTED`, `POLAR_E_DEVICE`,
// `POLAR_E_DEVICE_LOST`.
POLAR_MUST_USE
polar_status polar_op_attention_plan(const polar_op_library *library,
                                     const polar_op_attention *op,
                                     void *stream,
                                     polar_error *err);

// Starts the attention of one layer. The sizes, `window` and the workspace are those of the plan.
//
// Threads: as `polar_op_attention_plan`. Errors: likewise.
POLAR_MUST_USE
polar_status polar_op_attention_run(const polar_op_library *library,
                                    const polar_op_attention *op,
                                    void *stream,
                                    polar_error *err);

// Bytes of device memory that `polar_op_head_selection_run` needs. Addresses are not looked at, except
// for whether `logits` is 0.
//
// Threads: as `polar_op_attention_workspace`. Errors: likewise.
POLAR_MUST_USE
polar_status polar_op_head_selection_workspace(const polar_op_library *library,
                                               const polar_op_head_selection *op,
                                               uint64_t *bytes,
                                               polar_error *err);

// Starts the router and its top-k: two kernels, one with `logits`.
//
// Threads: as `polar_op_attention_plan`. Errors: likewise.
POLAR_MUST_USE
polar_status polar_op_head_selection_run(const polar_op_library *library,
                                         const polar_op_head_selection *op,
                                         void *stream,
                                         polar_error *err);

// Bytes of device memory that `polar_op_neuron_selection_run` needs. Addresses are not looked at, except
// for whether `logits` is 0.
//
// Threads: as `polar_op_attention_workspace`. Errors: likewise.
POLAR_MUST_USE
polar_status polar_op_neuron_selection_workspace(const polar_op_library *library,
                                                 const polar_op_neuron_selection *op,
                                                 uint64_t *bytes,
                                                 polar_error *err);

// Starts the MLP router and its selection. It needs the layer's input only, so it may run on a stream
// beside the attention.
//
// Threads: as `polar_op_attention_plan`. Errors: likewise.
POLAR_MUST_USE
polar_status polar_op_neuron_selection_run(const polar_op_library *library,
                                           const polar_op_neuron_selection *op,
                                           void *stream,
                                           polar_error *err);

// Bytes of device memory that `polar_op_mlp_run` needs. Addresses are not looked at, except for whether
// `index` is 0.
//
// Threads: as `polar_op_attention_workspace`. Errors: likewise.
POLAR_MUST_USE
polar_status polar_op_mlp_workspace(const polar_op_library *library,
                                    const polar_op_mlp *op,
                                    uint64_t *bytes,
                                    polar_error *err);

// Starts the MLP: gathered up product, ReLU, gathered down product.
//
// Threads: as `polar_op_attention_plan`. Errors: likewise.
POLAR_MUST_USE
polar_status polar_op_mlp_run(const polar_op_library *library,
                              const polar_op_mlp *op,
                              void *stream,
                              polar_error *err);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* POLAR_SPARSITY_H */
