//! Engines: submit, step, events.

use super::constants::polar_status;
use super::events::Arrays;
use super::guard::{guard, guard_free};
use super::handle;
use super::types::{
    polar_engine, polar_engine_options, polar_error, polar_event, polar_logprob, polar_model, polar_request,
    polar_routers, polar_seq, polar_stats,
};
use super::{convert, copy};
use crate::engine::{self, SeqId};
use crate::error::{Error, Status, try_vec};
use crate::log::Level;
use std::sync::Arc;

/// Fills `options` with the defaults: zeros and its size. `size` is `sizeof(polar_engine_options)`.
///
/// Threads: any, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_engine_options_init(options: *mut polar_engine_options, size: usize) {
    copy::init(options, size);
}

/// Makes an engine. `routers` may be NULL for a dense engine, `options` for the defaults. All memory
/// a step needs is taken here.
///
/// Threads: any. Ownership: `*out` is the caller's, to be freed with `polar_engine_free`; model and
/// routers may be freed before it.
/// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_MODEL` (routers of another model),
/// `POLAR_E_UNSUPPORTED`, `POLAR_E_LIMIT`, `POLAR_E_NOMEM`, `POLAR_E_DEVICE_NOMEM`, `POLAR_E_DEVICE`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_create(
    model: *const polar_model,
    routers: *const polar_routers,
    options: *const polar_engine_options,
    out: *mut *mut polar_engine,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let routers = call.routers(routers)?;
        let model = call.model(model)?;
        let out = copy::out(out, "out")?;
        let options = convert::engine_options(&copy::read(options)?)?;
        let engine = engine::Engine::new(&model.model, routers.map(|r| &r.routers), &options)?;
        let vocab_size = model.model.spec().vocab_size as usize;
        model
            .log
            .write(Level::Info, format_args!("made an engine, {} KV pages", engine.stats().kv_pages_total));
        out.write(handle::create(handle::Engine { engine, vocab_size, log: Arc::clone(&model.log) })?);
        Ok(Status::OK)
    })
}

/// Frees an engine with everything queued or running in it; waits for a step in flight on the
/// device. NULL does nothing.
///
/// Threads: must not race with a call on this engine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_engine_free(engine: *mut polar_engine) {
    guard_free(|| handle::free(engine));
}

/// Queues requests: all of them or, on any error, none. Their prompts and stop tokens are slices of
/// `tokens`. `out_ids` gets one id per request. Refuses what can never run (`POLAR_E_LIMIT`,
/// `POLAR_E_KV_FULL`) and a full queue (`POLAR_E_QUEUE_FULL`); everything accepted ends in exactly
/// one event with `POLAR_EVENT_FINISHED`.
///
/// Threads: any, at any time, also during a step; never waits for the device. Ownership: the arrays
/// stay the caller's and are not kept.
/// Errors: `POLAR_E_INVALID`, `POLAR_E_LIMIT`, `POLAR_E_KV_FULL`, `POLAR_E_QUEUE_FULL`,
/// `POLAR_E_NOMEM`, `POLAR_E_PANIC` and `POLAR_E_DEVICE_LOST` of an engine that is no longer healthy.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_submit(
    engine: *mut polar_engine,
    requests: *const polar_request,
    n_requests: usize,
    tokens: *const i32,
    n_tokens: usize,
    out_ids: *mut polar_seq,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let engine = &call.engine(engine)?.engine;
        let requests = convert::requests(copy::slice(requests, n_requests, "requests")?)?;
        if u32::try_from(n_tokens).is_err() {
            return Err(Error::limit(format!("n_tokens is {n_tokens}, at most {} are allowed", u32::MAX)));
        }
        let tokens = copy::slice(tokens, n_tokens, "tokens")?;
        let out_ids = copy::slice_mut(out_ids, n_requests, "out_ids")?;
        let mut ids = try_vec(requests.len(), SeqId::default(), "sequence ids")?;
        engine.submit(&requests, tokens, &mut ids)?;
        for (to, from) in out_ids.iter_mut().zip(ids) {
            *to = from.0;
        }
        Ok(Status::OK)
    })
}

/// Ends requests at the next step boundary; their FINISHED events say `POLAR_FINISH_CANCELLED`. Ids
/// that are unknown or finished already are ignored, since that race is normal.
///
/// Threads: any, at any time, also during a step; never waits for the device.
/// Errors: `POLAR_E_INVALID`, `POLAR_E_LIMIT`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_cancel(
    engine: *mut polar_engine,
    ids: *const polar_seq,
    n_ids: usize,
    err: *mut polar_error,
) -> polar_status {
    /// Ids per inner call, so that a cancel needs no memory.
    const CHUNK: usize = 64;
    guard(err, |call| {
        let engine = &call.engine(engine)?.engine;
        for chunk in copy::slice(ids, n_ids, "ids")?.chunks(CHUNK) {
            let mut copy = [SeqId::default(); CHUNK];
            for (to, &from) in copy.iter_mut().zip(chunk) {
                *to = SeqId(from);
            }
            engine.cancel(&copy[..chunk.len()])?;
        }
        Ok(Status::OK)
    })
}

/// Gives a request with `POLAR_REQUEST_HOST_SAMPLES` its next token, after a `POLAR_EVENT_LOGITS`. It
/// takes part in the next step. The token counts as generated: the request ends by itself at a stop
/// token or at `max_new_tokens`.
///
/// Threads: any, at any time. Errors: `POLAR_E_NOT_FOUND`, `POLAR_E_INVALID` (it waits for no token,
/// or the token is outside the vocabulary).
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_push_token(
    engine: *mut polar_engine,
    id: polar_seq,
    token: i32,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        call.engine(engine)?.engine.push_token(SeqId(id), token)?;
        Ok(Status::OK)
    })
}

/// Copies the logits that the last step left for request `id`: as many floats as the vocabulary has
/// entries. `*n` is that number; if `cap` is smaller, `POLAR_TRUNCATED` and nothing is copied.
///
/// Threads: like `polar_engine_step`. Errors: `POLAR_E_NOT_FOUND` (none wait for this id),
/// `POLAR_E_BUSY`, `POLAR_E_INVALID`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_logits(
    engine: *mut polar_engine,
    id: polar_seq,
    out: *mut f32,
    cap: usize,
    n: *mut usize,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let engine = call.engine(engine)?;
        let n = copy::out(n, "n")?;
        let out = copy::slice_mut(out, cap, "out")?;
        let Some(out) = out.get_mut(..engine.vocab_size) else {
            n.write(engine.vocab_size);
            return Ok(Status::TRUNCATED);
        };
        n.write(engine.engine.logits(SeqId(id), out)?);
        Ok(Status::OK)
    })
}

/// Reads the counters. The caller sets `out->struct_size`.
///
/// Threads: any, at any time. Works on an engine that is dead or whose device is lost.
/// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_stats(
    engine: *const polar_engine,
    out: *mut polar_stats,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let engine = call.engine(engine)?;
        copy::write(out, &convert::stats(&engine.engine.stats(), engine.log.dropped()))?;
        Ok(Status::OK)
    })
}

/// Runs one step and writes its events: up to `max_batch` sequences go forward by a token or by a
/// piece of their prompt. Waits up to `timeout_ns` (0 = not at all, UINT64_MAX = as long as it takes).
///
/// `POLAR_OK`: a step ended. `POLAR_PENDING`: it still runs on the device; call again.
/// `POLAR_IDLE`: nothing is queued or running, or all of it waits for `polar_engine_push_token`.
/// `POLAR_TRUNCATED`: `events` or `logprobs` is full; nothing is lost, the rest comes with the next
/// call and before new work. `events_cap` may be 0.
///
/// `*n_events` and `*n_logprobs` are set also when a step fails. Alternatives of tokens
/// (`polar_request.n_logprobs`) are in `logprobs`, one run per event. `logprobs` NULL with
/// `logprobs_cap` 0 drops them, and then `n_logprobs` may be NULL; otherwise `logprobs_cap` is at
/// least `POLAR_MAX_LOGPROBS`.
///
/// Threads: one driver at a time, any thread; a second one gets `POLAR_E_BUSY`. Memory: allocates
/// nothing.
/// Errors: `POLAR_E_INVALID`, `POLAR_E_BUSY`, `POLAR_E_DEVICE` (the step did not happen),
/// `POLAR_E_DEVICE_LOST`, `POLAR_E_PANIC`. Trouble of one request is an event, not an error.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_step(
    engine: *mut polar_engine,
    timeout_ns: u64,
    events: *mut polar_event,
    events_cap: usize,
    n_events: *mut usize,
    logprobs: *mut polar_logprob,
    logprobs_cap: usize,
    n_logprobs: *mut usize,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let engine = &call.engine(engine)?.engine;
        let mut sink = Arrays::new(events, events_cap, n_events, logprobs, logprobs_cap, n_logprobs)?;
        engine.step(timeout_ns, &mut sink).map(|delivered| delivered.status)
    })
}

/// Starts a step and does not wait for the device: the first half of `polar_engine_step`, for event
/// loops and for hosts that have other work meanwhile. Submitting between the halves is fine and
/// joins the next step. The CPU backend starts a thread of the engine for it, on first use.
///
/// Threads: like `polar_engine_step`. Errors: `POLAR_E_BUSY` (also if a step is in flight),
/// `POLAR_E_INVALID`, `POLAR_E_DEVICE`, `POLAR_E_DEVICE_LOST`, `POLAR_E_PANIC`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_begin(
    engine: *mut polar_engine,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        call.engine(engine)?.engine.begin()?;
        Ok(Status::OK)
    })
}

/// Waits for the step in flight and writes its events: the second half of `polar_engine_step`, with
/// the same arguments and results. Without a step in flight it delivers events that wait, and else
/// answers `POLAR_IDLE`.
///
/// Threads: like `polar_engine_step`; another thread than the one that began may finish.
/// Errors: like `polar_engine_step`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_engine_finish(
    engine: *mut polar_engine,
    timeout_ns: u64,
    events: *mut polar_event,
    events_cap: usize,
    n_events: *mut usize,
    logprobs: *mut polar_logprob,
    logprobs_cap: usize,
    n_logprobs: *mut usize,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let engine = &call.engine(engine)?.engine;
        let mut sink = Arrays::new(events, events_cap, n_events, logprobs, logprobs_cap, n_logprobs)?;
        engine.finish(timeout_ns, &mut sink).map(|delivered| delivered.status)
    })
}
