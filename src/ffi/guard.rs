//! The one frame around every entry point: refuses forked children and calls from callbacks,
//! catches panics, and turns an [`Error`] into a status, a `polar_error` and a log line.

use super::constants::polar_status;
use super::copy;
use super::types::polar_error;
use crate::engine;
use crate::error::{Error, Result, Status};
use crate::log::{Level, Log};
use crate::sys::fork;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::Once;

/// What a call has come to know about itself, for the case that it fails.
#[derive(Default)]
pub(super) struct Call<'a> {
    /// Where its error goes in full.
    pub(super) log: Option<&'a Log>,
    /// The engine a panic kills.
    pub(super) engine: Option<&'a engine::Engine>,
}

/// Runs one entry point.
pub(super) fn guard<'a>(
    err: *mut polar_error,
    body: impl FnOnce(&mut Call<'a>) -> Result<Status>,
) -> polar_status {
    if let Err(e) = copy::check_error_struct(err) {
        return e.status.0;
    }
    PANIC_PLACE.set(None);
    let mut call = Call::default();
    let mut e = match allowed().and_then(|()| caught(|| body(&mut call))) {
        Ok(status) => return status.0,
        Err(e) => e,
    };
    if e.status == Status::E_PANIC {
        // The engine catches panics of its own steps; their place is known only here.
        if let Some(place) = PANIC_PLACE.take() {
            e.message = format!("{} ({}:{}); please report it", e.message, place.file(), place.line).into();
        }
        if let Some(engine) = call.engine {
            engine.kill();
        }
    }
    if let Some(log) = call.log {
        log.write(level_of(e.status), format_args!("{e}"));
    }
    copy::write_error(err, &e);
    e.status.0
}

/// Runs the freeing of a handle: `free` functions have no status, so a refused one does nothing.
pub(super) fn guard_free(body: impl FnOnce()) {
    let _ = allowed().and_then(|()| {
        caught(|| {
            body();
            Ok(Status::OK)
        })
    });
}

/// Runs a callback of the host, during which calls into the library are refused.
pub(super) fn callback<R>(body: impl FnOnce() -> R) -> R {
    struct Reset(bool);
    impl Drop for Reset {
        fn drop(&mut self) {
            IN_CALLBACK.set(self.0);
        }
    }
    let _reset = Reset(IN_CALLBACK.replace(true));
    body()
}

thread_local! {
    // None of these has a destructor, so a thread of the host may end at any time.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
    static IN_GUARD: Cell<bool> = const { Cell::new(false) };
    static PANIC_PLACE: Cell<Option<Place>> = const { Cell::new(None) };
}

/// Where a panic began: the end of the file's path, in fixed room, since a panic must not allocate.
#[derive(Clone, Copy)]
struct Place {
    file: [u8; 64],
    len: usize,
    line: u32,
}

impl Place {
    fn new(path: &str, line: u32) -> Place {
        let mut place = Place { file: [0; 64], len: 0, line };
        let start = (0..=path.len()).find(|&i| path.len() - i <= 64 && path.is_char_boundary(i));
        let tail = &path.as_bytes()[start.unwrap_or(path.len())..];
        place.file[..tail.len()].copy_from_slice(tail);
        place.len = tail.len();
        place
    }

    fn file(&self) -> &str {
        std::str::from_utf8(&self.file[..self.len]).unwrap_or("?")
    }
}

fn allowed() -> Result<()> {
    if fork::forked() {
        return Err(Error::unsupported("this process is a forked child; only exec and _exit work here"));
    }
    if IN_CALLBACK.get() {
        return Err(Error::new(Status::E_BUSY, "called from a callback"));
    }
    Ok(())
}

/// The only `catch_unwind` of the ABI.
fn caught(body: impl FnOnce() -> Result<Status>) -> Result<Status> {
    install_hook();
    let outer = IN_GUARD.replace(true);
    let result = catch_unwind(AssertUnwindSafe(body));
    IN_GUARD.set(outer);
    result.unwrap_or_else(|payload| {
        let text = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "panic".to_owned());
        // Dropping it runs code of whoever panicked, which may panic again.
        std::mem::forget(payload);
        Err(Error::new(Status::E_PANIC, text))
    })
}

/// Keeps std from printing panics that the guard reports. Chained, so panics of a Rust host stay
/// its own.
fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            let ours = IN_GUARD.get() || std::thread::current().name().is_some_and(is_worker);
            if !ours {
                return previous(info);
            }
            PANIC_PLACE.set(info.location().map(|l| Place::new(l.file(), l.line())));
        }));
    });
}

/// Threads that the library itself starts.
fn is_worker(name: &str) -> bool {
    name.starts_with("polar-")
}

/// Refusals of normal work are no errors to whoever reads the log.
fn level_of(status: Status) -> Level {
    match status {
        Status::E_BUSY | Status::E_QUEUE_FULL | Status::E_NOT_FOUND | Status::E_CANCELLED => Level::Debug,
        _ => Level::Error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_with_its_place() {
        let mut err = copy::tests::new_error();
        assert_eq!(guard(&mut err, |_| panic!("seventeen")), Status::E_PANIC.0);
        let text = copy::tests::text(&err.message);
        assert!(text.contains("seventeen") && text.contains("guard.rs:"), "{text}");
    }

    #[test]
    fn long_paths_keep_their_end() {
        assert_eq!(Place::new("src/ffi/guard.rs", 1).file(), "src/ffi/guard.rs");
        let long = format!("{}/ü.rs", "ü".repeat(40));
        assert!(Place::new(&long, 1).file().ends_with("ü/ü.rs"));
    }

    #[test]
    fn calls_from_callbacks_are_refused() {
        assert_eq!(callback(|| guard(std::ptr::null_mut(), |_| Ok(Status::OK))), Status::E_BUSY.0);
        assert_eq!(guard(std::ptr::null_mut(), |_| Ok(Status::OK)), 0);
    }

    #[test]
    fn a_panicking_payload_does_not_escape() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("again");
            }
        }
        let status = guard(std::ptr::null_mut(), |_| std::panic::panic_any(Bomb));
        assert_eq!(status, Status::E_PANIC.0);
    }
}
