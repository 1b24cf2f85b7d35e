//! The log of a context: pushed to a callback, or pulled.

use super::constants::{
    POLAR_LOG_DEBUG, POLAR_LOG_ERROR, POLAR_LOG_INFO, POLAR_LOG_WARN, polar_log_level, polar_status,
};
use super::copy;
use super::guard::{callback, guard};
use super::types::{polar_context, polar_error};
use crate::error::Status;
use crate::log::{Drained, Level, Sink};
use std::ffi::{c_char, c_void};

/// Gets one line of the log: its level and `len` bytes of UTF-8, valid only during the
/// call and not terminated. Runs on any thread, with a lock held: it must be quick, must not throw,
/// and must not call the library; calls that try get `POLAR_E_BUSY`.
pub type polar_log_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, level: polar_log_level, text: *const c_char, len: usize)>;

/// What a host hands to `polar_log_set`.
struct Push {
    function: unsafe extern "C" fn(*mut c_void, u32, *const c_char, usize),
    user: *mut c_void,
}

// SAFETY: the host promises that its function may run on any thread with this pointer.
unsafe impl Send for Push {}

impl Push {
    fn line(&self, level: Level, text: &str) {
        let level = match level {
            Level::Error => POLAR_LOG_ERROR,
            Level::Warn => POLAR_LOG_WARN,
            Level::Info => POLAR_LOG_INFO,
            Level::Debug => POLAR_LOG_DEBUG,
        };
        // SAFETY: the host's function, called as its type says.
        callback(|| unsafe { (self.function)(self.user, level, text.as_ptr().cast(), text.len()) });
    }
}

/// Sends the context's log lines to `fn` instead of keeping them; NULL keeps them again. The former
/// function is not running any more when this returns.
///
/// Threads: any, at any time. Ownership: `user` stays the caller's and must live until replaced or
/// until the last object made from the context is freed.
/// Errors: `POLAR_E_INVALID`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_log_set(
    ctx: *mut polar_context,
    function: polar_log_fn,
    user: *mut c_void,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let log = &call.context(ctx)?.log;
        log.set_sink(function.map(|function| {
            let push = Push { function, user };
            let sink: Sink = Box::new(move |level, text| push.line(level, text));
            sink
        }));
        Ok(Status::OK)
    })
}

/// Moves kept log lines into `buf`, oldest first, as terminated UTF-8: whole lines, each `level: text`
/// with a newline. The way for hosts with a garbage collector. Call until `*len` is 0.
///
/// `*len` is the length without terminator. `*dropped`, unless `dropped` is NULL, is how many lines
/// were lost so far because the ring was full. If not even the first line fits, `POLAR_TRUNCATED`
/// and `*len` is the length it needs.
///
/// Threads: any, at any time. Errors: `POLAR_E_INVALID`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_log_drain(
    ctx: *mut polar_context,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
    dropped: *mut u64,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |call| {
        let log = &call.context(ctx)?.log;
        let buf = copy::slice_mut(buf.cast::<u8>(), cap, "buf")?;
        let len = copy::out(len, "len")?;
        let dropped = if dropped.is_null() { None } else { Some(copy::out(dropped, "dropped")?) };
        let drained = match buf.split_last_mut() {
            Some((_terminator, room)) => log.drain(room),
            None => log.drain(&mut []),
        };
        if let Some(dropped) = dropped {
            dropped.write(log.dropped());
        }
        let (n, status) = match drained {
            Drained::Bytes(n) => (n, Status::OK),
            Drained::Needs(n) => (n, Status::TRUNCATED),
        };
        len.write(n);
        let end = if status == Status::OK { n } else { 0 };
        if let Some(terminator) = buf.get_mut(end) {
            *terminator = 0;
        }
        Ok(status)
    })
}
