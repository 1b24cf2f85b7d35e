//! Contexts and devices.

use super::constants::polar_status;
use super::guard::{guard, guard_free};
use super::handle;
use super::types::{polar_context, polar_context_options, polar_device_info, polar_error};
use super::{convert, copy};
use crate::engine;
use crate::error::{Error, Status};
use crate::log::{Level, Log};
use crate::sys::fork;
use std::sync::Arc;

/// Fills `options` with the defaults: zeros and its size. `size` is
/// `sizeof(polar_context_options)`.
///
/// Threads: any, at any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_context_options_init(options: *mut polar_context_options, size: usize) {
    copy::init(options, size);
}

/// Makes a context. `options` may be NULL for the defaults. Succeeds on machines without a GPU or a
/// driver; what can be used there says `polar_device_get`.
///
/// Threads: any. Ownership: `*out` is the caller's, to be freed with `polar_context_free`.
/// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_NOMEM`, `POLAR_E_UNSUPPORTED` (a backend that
/// this build lacks), `POLAR_E_NO_DRIVER`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_context_create(
    options: *const polar_context_options,
    out: *mut *mut polar_context,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |_| {
        let out = copy::out(out, "out")?;
        let options = copy::read(options)?;
        let (level, ring_bytes) = convert::log_options(&options)?;
        let options = convert::context_options(&options)?;
        fork::watch()?;
        let log = Arc::new(Log::new(level, ring_bytes)?);
        let context = engine::Context::new(&options)?;
        log.write(Level::Info, format_args!("{}", env!("POLAR_BUILD_INFO")));
        out.write(handle::create(handle::Context { context, log })?);
        Ok(Status::OK)
    })
}

/// Frees a context. Models and engines made from it live on. NULL does nothing.
///
/// Threads: must not race with a call on this context; calls on models and engines may run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_context_free(ctx: *mut polar_context) {
    guard_free(|| handle::free(ctx));
}

/// Counts devices, usable or not. The CPU is one; a context's devices do not change.
///
/// Threads: any, at any time. Errors: `POLAR_E_INVALID`, `POLAR_E_NOMEM`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_device_count(
    ctx: *const polar_context,
    out: *mut u32,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let devices = call.context(ctx)?.context.devices()?;
        copy::out(out, "out")?.write(devices.len() as u32);
        Ok(Status::OK)
    })
}

/// Describes device `index`, counted from 0. The caller sets `out->struct_size`.
///
/// Threads: any, at any time. Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_NOMEM`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_device_get(
    ctx: *const polar_context,
    index: u32,
    out: *mut polar_device_info,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let devices = call.context(ctx)?.context.devices()?;
        let device = devices.get(index as usize).ok_or_else(|| {
            Error::invalid(format!("index is {index}, there are {} devices", devices.len()))
        })?;
        copy::write(out, &convert::device_info(device))?;
        Ok(Status::OK)
    })
}
