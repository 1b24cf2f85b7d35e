//! Models and routers.

use super::constants::polar_status;
use super::guard::{callback, guard, guard_free};
use super::handle;
use super::types::{
    polar_context, polar_engine_options, polar_error, polar_estimate, polar_load_options, polar_model,
    polar_model_info, polar_routers,
};
use super::{convert, copy};
use crate::engine;
use crate::error::Status;
use crate::log::Level;
use crate::sys::clock;
use std::ffi::{c_char, c_void};
use std::sync::Arc;

/// Hears how far a load has come, in bytes. Returns 0 to go on, anything else to cancel. Runs on the
/// thread that loads; must not throw, and must not call the library: calls that try get
/// `POLAR_E_BUSY`.
pub type polar_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, done: u64, total: u64) -> i32>;

/// Fills `options` with the defaults: zeros and its size. `size` is `sizeof(polar_load_options)`.
///
/// Threads: any, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_load_options_init(options: *mut polar_load_options, size: usize) {
    copy::init(options, size);
}

/// Loads a Hugging Face folder: `config.json` and its safetensors. `path` needs no terminator.
/// `options` and `progress` may be NULL. The files are read, not mapped, and may go away afterwards.
/// Needs at most 256 MiB of host memory beyond the weights.
///
/// Threads: any; loads may run side by side. Ownership: `*out` is the caller's, to be freed with
/// `polar_model_free`.
/// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_IO`, `POLAR_E_FORMAT`, `POLAR_E_LIMIT`,
/// `POLAR_E_MODEL`, `POLAR_E_UNSUPPORTED` (a family or a config field this version does not handle),
/// `POLAR_E_CANCELLED`, `POLAR_E_NOMEM`, `POLAR_E_DEVICE_NOMEM`, `POLAR_E_NO_DRIVER`, `POLAR_E_DEVICE`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_model_load(
    ctx: *mut polar_context,
    path: *const c_char,
    path_len: usize,
    options: *const polar_load_options,
    progress: polar_progress_fn,
    user: *mut c_void,
    out: *mut *mut polar_model,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let ctx = call.context(ctx)?;
        let out = copy::out(out, "out")?;
        let path = copy::path(path, path_len)?;
        let options = convert::load_options(&copy::read(options)?)?;
        let start = clock::now_ns();
        let model = engine::Model::load(&ctx.context, path, &options, &mut |done, total| match progress {
            // SAFETY: the host's function, called as its type says.
            Some(progress) => callback(|| unsafe { progress(user, done, total) }),
            None => 0,
        })?;
        ctx.log.write(
            Level::Info,
            format_args!(
                "loaded {} ({}, {} layers, {} MiB) in {} ms on {}",
                path.display(),
                model.spec().family.model_type(),
                model.spec().num_layers,
                model.weight_bytes() >> 20,
                (clock::now_ns() - start) / 1_000_000,
                model.device_name(),
            ),
        );
        out.write(handle::create(handle::Model { model, log: Arc::clone(&ctx.log) })?);
        Ok(Status::OK)
    })
}

/// Says what a model, its routers and an engine of these options would take on the device of `load`, and how
/// much of it fits, before anything is loaded: from `config.json`, the headers of the files and the device.
/// Without `routers` (`routers_len` 0) for a dense engine; `load` and `engine` may be NULL. What does not fit
/// is no error but `fits` 0, so that a host can try other options. The caller sets `out->struct_size`.
///
/// A GPU is opened for it, which takes memory of its own; `free_bytes` is what is left then. Loading and
/// `polar_engine_create` check the same sums before they take anything.
///
/// Threads: any. Errors: as `polar_model_load`, `polar_routers_load` and, of the options,
/// `polar_engine_create`; not `POLAR_E_DEVICE_NOMEM`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_model_estimate(
    ctx: *const polar_context,
    path: *const c_char,
    path_len: usize,
    routers: *const c_char,
    routers_len: usize,
    load: *const polar_load_options,
    engine: *const polar_engine_options,
    out: *mut polar_estimate,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let ctx = call.context(ctx)?;
        let path = copy::path(path, path_len)?;
        let routers = if routers_len == 0 { None } else { Some(copy::path(routers, routers_len)?) };
        let load = convert::load_options(&copy::read(load)?)?;
        let options = convert::engine_options(&copy::read(engine)?)?;
        copy::check_out(out)?;
        let estimate = engine::Model::estimate(&ctx.context, path, routers, &load, &options)?;
        copy::write(out, &convert::estimate(&estimate))?;
        Ok(Status::OK)
    })
}

/// Describes a model. The caller sets `out->struct_size`.
///
/// Threads: any, at any time. Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_model_get_info(
    model: *const polar_model,
    out: *mut polar_model_info,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        copy::write(out, &convert::model_info(&call.model(model)?.model))?;
        Ok(Status::OK)
    })
}

/// Frees a model. Routers and engines made from it live on and keep the weights. NULL does nothing.
///
/// Threads: must not race with a call on this model; calls on engines may run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_model_free(model: *mut polar_model) {
    guard_free(|| handle::free(model));
}

/// Loads a router file made for `model`. `options` may be NULL.
///
/// Threads: any. Ownership: `*out` is the caller's, to be freed with `polar_routers_free`.
/// Errors: as `polar_model_load`; `POLAR_E_MODEL` if the routers were made for another model.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_routers_load(
    model: *const polar_model,
    path: *const c_char,
    path_len: usize,
    options: *const polar_load_options,
    out: *mut *mut polar_routers,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let model = call.model(model)?;
        let out = copy::out(out, "out")?;
        let path = copy::path(path, path_len)?;
        let options = convert::load_options(&copy::read(options)?)?;
        let routers = engine::Routers::load(&model.model, path, &options)?;
        let info = routers.info();
        model.log.write(
            Level::Info,
            format_args!(
                "loaded routers {} (attention: {}, mlp: {})",
                path.display(),
                info.attention.is_some(),
                info.mlp.is_some()
            ),
        );
        out.write(handle::create(handle::Routers { routers, log: Arc::clone(&model.log) })?);
        Ok(Status::OK)
    })
}

/// Frees routers. Engines made with them live on. NULL does nothing.
///
/// Threads: must not race with a call on these routers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_routers_free(routers: *mut polar_routers) {
    guard_free(|| handle::free(routers));
}
