//! Structs of the ABI into the library's own types, checked, and back.

use super::constants::*;
use super::copy::{put_text, zeroed};
use super::types::{
    polar_context_options, polar_device_info, polar_engine_options, polar_estimate, polar_load_options,
    polar_model_info, polar_request, polar_stats,
};
use crate::dtype::DType;
use crate::engine::{
    BackendChoice, ContextOptions, DeviceInfo, EngineOptions, Estimate, Health, LoadOptions, Model, Request,
    Stats,
};
use crate::error::{Error, Result, try_with_capacity};
use crate::format::limits::Limits;
use crate::log::Level;
use crate::sample::Params;
use crate::sparsity::{MlpMode, Options, Source};

/// KV pages have this many tokens.
const PAGE_TOKENS: u32 = 16;
/// Most threads of a pool: more is a mistake, not a machine.
const MAX_THREADS: u32 = 1024;
/// Largest log, KiB.
const MAX_RING_KIB: u32 = 1 << 16;
const DEFAULT_RING_KIB: u32 = 64;

pub(super) fn context_options(o: &polar_context_options) -> Result<ContextOptions> {
    at_most("threads", o.threads, MAX_THREADS)?;
    flags("polar_context_options.flags", o.flags, POLAR_CONTEXT_UNTIMED_PRODUCTS)?;
    let defaults = Limits::default();
    Ok(ContextOptions {
        backend: match o.backend {
            POLAR_BACKEND_AUTO => BackendChoice::Auto,
            POLAR_BACKEND_CPU => BackendChoice::Cpu,
            POLAR_BACKEND_CUDA => BackendChoice::Cuda,
            other => return Err(unknown("backend", other)),
        },
        threads: o.threads,
        isa: None,
        untimed_products: o.flags & POLAR_CONTEXT_UNTIMED_PRODUCTS != 0,
        limits: Limits {
            max_file_bytes: or(o.max_file_bytes, defaults.max_file_bytes),
            max_header_bytes: or(o.max_header_bytes, defaults.max_header_bytes),
            ..defaults
        },
    })
}

/// What is logged and how much of it is kept, in bytes.
pub(super) fn log_options(o: &polar_context_options) -> Result<(Option<Level>, usize)> {
    at_most("log_ring_kib", o.log_ring_kib, MAX_RING_KIB)?;
    let level = match o.log_level {
        POLAR_LOG_ERROR => Some(Level::Error),
        POLAR_LOG_WARN => Some(Level::Warn),
        POLAR_LOG_DEFAULT | POLAR_LOG_INFO => Some(Level::Info),
        POLAR_LOG_DEBUG => Some(Level::Debug),
        POLAR_LOG_OFF => None,
        other => return Err(unknown("log_level", other)),
    };
    let kib = if o.log_ring_kib == 0 { DEFAULT_RING_KIB } else { o.log_ring_kib };
    Ok((level, kib as usize * 1024))
}

pub(super) fn load_options(o: &polar_load_options) -> Result<LoadOptions> {
    flags("polar_load_options.flags", o.flags, POLAR_LOAD_CHECK_FINITE | POLAR_LOAD_IGNORE_FINGERPRINT)?;
    Ok(LoadOptions {
        device: o.device,
        weight_dtype: match o.weight_dtype {
            POLAR_DTYPE_STORED => None,
            POLAR_DTYPE_I8 => Some(DType::I8),
            POLAR_DTYPE_F32 | POLAR_DTYPE_F16 | POLAR_DTYPE_BF16 => {
                return Err(Error::unsupported("weight_dtype other than as stored and int8"));
            }
            other => return Err(unknown("weight_dtype", other)),
        },
        check_finite: o.flags & POLAR_LOAD_CHECK_FINITE != 0,
        ignore_fingerprint: o.flags & POLAR_LOAD_IGNORE_FINGERPRINT != 0,
    })
}

pub(super) fn engine_options(o: &polar_engine_options) -> Result<EngineOptions> {
    flags("polar_engine_options.flags", o.flags, 0)?;
    if o.page_tokens != 0 && o.page_tokens != PAGE_TOKENS {
        return Err(Error::unsupported(format!(
            "page_tokens is {}, supported is {PAGE_TOKENS}",
            o.page_tokens
        )));
    }
    Ok(EngineOptions {
        max_batch: o.max_batch,
        max_queue: o.max_queue,
        step_tokens: o.step_tokens,
        max_context: o.max_context,
        kv_bytes: o.kv_bytes,
        sparsity: Options {
            attn_density: within("attn_density", o.attn_density, 0.0, 1.0)?,
            mlp_density: within("mlp_density", o.mlp_density, 0.0, 1.0)?,
            mlp_dense_above: within("mlp_dense_above", o.mlp_dense_above, 0.0, 1.0)?,
            mlp_mode: mlp_mode(o.mlp_mode)?,
            source: match o.attn_source {
                POLAR_SOURCE_ROUTER => Source::Router,
                POLAR_SOURCE_ORACLE => Source::Oracle,
                POLAR_SOURCE_RANDOM => Source::Random { seed: o.attn_seed },
                other => return Err(unknown("attn_source", other)),
            },
        },
    })
}

/// All requests of a batch, or the first thing wrong with one of them.
pub(super) fn requests(batch: &[polar_request]) -> Result<Vec<Request>> {
    if batch.len() > POLAR_MAX_SUBMIT as usize {
        return Err(Error::limit(format!(
            "n_requests is {}, at most {POLAR_MAX_SUBMIT} are allowed",
            batch.len()
        )));
    }
    let mut out = try_with_capacity(batch.len(), "requests")?;
    for (i, r) in batch.iter().enumerate() {
        out.push(
            request(r).map_err(|e| Error { message: format!("request {i}: {}", e.message).into(), ..e })?,
        );
    }
    Ok(out)
}

fn request(r: &polar_request) -> Result<Request> {
    const FLAGS: u32 = POLAR_REQUEST_IGNORE_EOS | POLAR_REQUEST_HOST_SAMPLES | POLAR_REQUEST_LOGPROB;
    flags("flags", r.flags, FLAGS)?;
    zero("reserved", &r.reserved)?;
    at_most("n_logprobs", r.n_logprobs, POLAR_MAX_LOGPROBS)?;
    let one_if_zero = |x: f32| if x == 0.0 { 1.0 } else { x };
    Ok(Request {
        user_tag: r.user_tag,
        first_token: r.first_token,
        n_tokens: r.n_tokens,
        first_stop: r.first_stop,
        n_stop: r.n_stop,
        max_new_tokens: r.max_new_tokens,
        priority: r.priority,
        ignore_eos: r.flags & POLAR_REQUEST_IGNORE_EOS != 0,
        host_samples: r.flags & POLAR_REQUEST_HOST_SAMPLES != 0,
        params: Params {
            temperature: within("temperature", r.temperature, 0.0, f32::MAX)?,
            top_k: r.top_k,
            top_p: one_if_zero(within("top_p", r.top_p, 0.0, 1.0)?),
            min_p: within("min_p", r.min_p, 0.0, 1.0)?,
            repetition_penalty: one_if_zero(within(
                "repetition_penalty",
                r.repetition_penalty,
                0.0,
                f32::MAX,
            )?),
            presence_penalty: within("presence_penalty", r.presence_penalty, f32::MIN, f32::MAX)?,
            frequency_penalty: within("frequency_penalty", r.frequency_penalty, f32::MIN, f32::MAX)?,
            seed: r.random_seed,
            n_logprobs: r.n_logprobs,
            logprob: r.flags & POLAR_REQUEST_LOGPROB != 0,
        },
        attn_density: within("attn_density", r.attn_density, 0.0, 1.0)?,
        mlp_mode: mlp_mode(r.mlp_mode)?,
    })
}

fn mlp_mode(mode: u32) -> Result<Option<MlpMode>> {
    match mode {
        POLAR_MLP_DEFAULT => Ok(None),
        POLAR_MLP_DENSE => Ok(Some(MlpMode::Dense)),
        POLAR_MLP_REFERENCE => Ok(Some(MlpMode::Reference)),
        POLAR_MLP_BATCH_INVARIANT => Ok(Some(MlpMode::Invariant)),
        other => Err(unknown("mlp_mode", other)),
    }
}

pub(super) fn device_info(d: &DeviceInfo) -> polar_device_info {
    let mut out = polar_device_info {
        ordinal: d.ordinal,
        backend: match d.backend {
            BackendChoice::Auto => POLAR_BACKEND_AUTO,
            BackendChoice::Cpu => POLAR_BACKEND_CPU,
            BackendChoice::Cuda => POLAR_BACKEND_CUDA,
        },
        compute_capability: d.compute_capability,
        memory_total: d.memory_total,
        memory_free: d.memory_free,
        usable: u32::from(d.usable),
        ..zeroed()
    };
    put_text(&mut out.name, &d.name);
    put_text(&mut out.uuid, &d.uuid);
    out
}

pub(super) fn model_info(m: &Model) -> polar_model_info {
    let spec = m.spec();
    let token = |t: u32| i32::try_from(t).unwrap_or(-1);
    let mut out = polar_model_info {
        vocab_size: spec.vocab_size,
        num_layers: spec.num_layers,
        num_heads: spec.num_heads,
        num_kv_heads: spec.num_kv_heads,
        head_dim: spec.head_dim,
        hidden_size: spec.hidden_size,
        ffn_size: spec.ffn_size,
        max_positions: spec.max_positions,
        dtype: match spec.dtype {
            DType::F32 => POLAR_DTYPE_F32,
            DType::F16 => POLAR_DTYPE_F16,
            DType::BF16 => POLAR_DTYPE_BF16,
            DType::I8 => POLAR_DTYPE_I8,
        },
        bos_token: spec.bos_token.map_or(-1, token),
        n_eos: u32::try_from(spec.eos_tokens.len()).unwrap_or(u32::MAX),
        eos_tokens: [-1; 8],
        weight_bytes: m.weight_bytes(),
        ..zeroed()
    };
    for (to, &from) in out.eos_tokens.iter_mut().zip(&spec.eos_tokens) {
        *to = token(from);
    }
    put_text(&mut out.family, spec.family.model_type());
    put_text(&mut out.device_name, m.device_name());
    out
}

pub(super) fn estimate(e: &Estimate) -> polar_estimate {
    polar_estimate {
        struct_size: 0,
        fits: u32::from(e.fits()),
        max_batch: e.max_batch,
        max_context: e.max_context,
        weight_bytes: e.footprint.weights,
        router_bytes: e.footprint.routers,
        scratch_bytes: e.footprint.scratch,
        page_bytes: e.footprint.page,
        token_bytes: e.footprint.page / u64::from(PAGE_TOKENS),
        kv_pages: e.pages,
        needed_bytes: e.needed,
        free_bytes: e.free,
        max_kv_pages: e.max_pages,
        max_contexts: e.max_contexts(),
    }
}

pub(super) fn stats(s: &Stats, log_lines_dropped: u64) -> polar_stats {
    polar_stats {
        struct_size: 0,
        health: match s.health {
            Health::Ok => POLAR_HEALTH_OK,
            Health::Dead => POLAR_HEALTH_DEAD,
            Health::DeviceLost => POLAR_HEALTH_DEVICE_LOST,
        },
        steps: s.steps,
        tokens_in: s.tokens_in,
        tokens_out: s.tokens_out,
        requests_accepted: s.requests_accepted,
        requests_finished: s.requests_finished,
        admission_refusals: s.admission_refusals,
        preemptions: s.preemptions,
        waiting: s.waiting,
        running: s.running,
        kv_pages_total: s.kv_pages_total,
        kv_pages_free: s.kv_pages_free,
        attn_units_run: s.counts.attn_run,
        attn_units_total: s.counts.attn_total,
        mlp_units_run: s.counts.mlp_run,
        mlp_units_total: s.counts.mlp_total,
        kv_bytes_read: s.kv_bytes_read,
        kv_bytes_dense: s.kv_bytes_dense,
        nan_scores: s.nan_scores,
        step_ns_last: s.step_ns_last,
        step_ns_max: s.step_ns_max,
        step_ns_total: s.step_ns_total,
        log_lines_dropped,
    }
}

fn or(value: u64, default: u64) -> u64 {
    if value == 0 { default } else { value }
}

pub(super) fn flags(name: &str, value: u32, known: u32) -> Result<()> {
    match value & !known {
        0 => Ok(()),
        unknown => Err(Error::invalid(format!("{name} has unknown bits {unknown:#x}"))),
    }
}

pub(super) fn zero(name: &str, words: &[u32]) -> Result<()> {
    if words.iter().all(|&w| w == 0) { Ok(()) } else { Err(Error::invalid(format!("{name} is not zero"))) }
}

fn at_most(name: &str, value: u32, most: u32) -> Result<()> {
    if value <= most { Ok(()) } else { Err(Error::invalid(format!("{name} is {value}, at most {most}"))) }
}

/// Refuses NaN, infinities and what is out of range.
fn within(name: &str, value: f32, low: f32, high: f32) -> Result<f32> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    let range = match (low == f32::MIN, high == f32::MAX) {
        (true, _) => "allowed are finite numbers".to_owned(),
        (_, true) => format!("allowed is {low} and above"),
        _ => format!("allowed is {low} to {high}"),
    };
    Err(Error::invalid(format!("{name} is {value}, {range}")))
}

fn unknown(name: &str, value: u32) -> Error {
    Error::invalid(format!("{name} is {value}, which means nothing"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn plain() -> polar_request {
        // SAFETY: any bit pattern is valid.
        let zero: polar_request = unsafe { std::mem::zeroed() };
        polar_request { n_tokens: 1, max_new_tokens: 1, ..zero }
    }

    #[test]
    fn zeros_mean_greedy_and_off() {
        let r = request(&plain()).expect("valid");
        assert_eq!((r.params.temperature, r.params.top_p, r.params.repetition_penalty), (0.0, 1.0, 1.0));
        assert_eq!((r.mlp_mode, r.ignore_eos, r.host_samples), (None, false, false));
    }

    #[test]
    fn every_field_is_checked_and_named() {
        type Spoil = fn(&mut polar_request);
        let cases: [(&str, Spoil); 14] = [
            ("flags", |r| r.flags = 8),
            ("reserved", |r| r.reserved[10] = 1),
            ("n_logprobs", |r| r.n_logprobs = 21),
            ("mlp_mode", |r| r.mlp_mode = 4),
            ("temperature", |r| r.temperature = -1.0),
            ("temperature", |r| r.temperature = f32::NAN),
            ("temperature", |r| r.temperature = f32::INFINITY),
            ("top_p", |r| r.top_p = 1.5),
            ("min_p", |r| r.min_p = f32::NAN),
            ("repetition_penalty", |r| r.repetition_penalty = -1.0),
            ("presence_penalty", |r| r.presence_penalty = f32::NEG_INFINITY),
            ("frequency_penalty", |r| r.frequency_penalty = f32::NAN),
            ("attn_density", |r| r.attn_density = 1.01),
            ("attn_density", |r| r.attn_density = -0.01),
        ];
        for (field, spoil) in cases {
            let mut bad = plain();
            spoil(&mut bad);
            let e = requests(&[plain(), bad]).expect_err(field);
            assert_eq!(e.status, Status::E_INVALID);
            assert!(e.message.starts_with("request 1: ") && e.message.contains(field), "{}", e.message);
        }
    }

    #[test]
    fn options_are_checked() {
        let context = polar_context_options { backend: 3, ..zeroed() };
        assert!(context_options(&context).is_err());
        for (flags, untimed) in [(0, false), (POLAR_CONTEXT_UNTIMED_PRODUCTS, true)] {
            let context = polar_context_options { flags, ..zeroed() };
            assert_eq!(context_options(&context).expect("valid").untimed_products, untimed);
        }
        let context = polar_context_options { flags: 2, ..zeroed() };
        assert!(context_options(&context).is_err_and(|e| e.message.contains("polar_context_options.flags")));
        assert!(context_options(&polar_context_options { threads: 1 << 20, ..zeroed() }).is_err());
        assert!(log_options(&polar_context_options { log_level: 6, ..zeroed() }).is_err());
        assert!(load_options(&polar_load_options { flags: 4, ..zeroed() }).is_err());
        assert!(load_options(&polar_load_options { weight_dtype: 5, ..zeroed() }).is_err());
        for bad in [
            polar_engine_options { page_tokens: 17, ..zeroed() },
            polar_engine_options { flags: 1, ..zeroed() },
            polar_engine_options { mlp_density: f32::NAN, ..zeroed() },
            polar_engine_options { mlp_dense_above: 2.0, ..zeroed() },
            polar_engine_options { attn_source: 3, ..zeroed() },
        ] {
            assert!(engine_options(&bad).is_err());
        }
        assert!(engine_options(&zeroed()).is_ok());
    }
}
