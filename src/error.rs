//! The one error type of the crate: a status for programs, a sentence for people.
//!
//! A sentence names the object and the two values that disagree, on one line, e.g.
//! `tensor model.norm.weight: shape [64] stored, [128] needed by config.json`.

use std::borrow::Cow;
use std::fmt;

/// Outcome class of a call: 0 success, 1–99 not an error, 100 and up an error. The numbers are
/// the ABI's `POLAR_*` constants.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub i32);

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Status = Status($value);)*

            /// Every status this version knows.
            pub const ALL: &'static [Status] = &[$(Status::$name),*];

            /// The constant's name without its `POLAR_` prefix, or `"UNKNOWN"`.
            pub fn name(self) -> &'static str {
                match self.0 { $($value => stringify!($name),)* _ => "UNKNOWN" }
            }

            /// What the status means, in a few words.
            pub fn meaning(self) -> &'static str {
                match self.0 { $($value => $text,)* _ => "unknown status" }
            }
        }
    };
}

statuses! {
    /// Success.
    OK = 0, "success";
    /// The step still runs; nothing finished before the timeout.
    PENDING = 1, "nothing finished before the timeout";
    /// Nothing is queued or running.
    IDLE = 2, "nothing is queued or running";
    /// More events wait than the caller's array holds.
    TRUNCATED = 3, "more events wait; call again";
    /// NULL, out of range, or a combination that makes no sense.
    E_INVALID = 100, "invalid argument";
    /// Header and library do not match.
    E_ABI = 101, "header and library do not match";
    /// Stale or unknown sequence id.
    E_NOT_FOUND = 102, "unknown or stale id";
    /// Another thread is inside step, or a step is already in flight.
    E_BUSY = 103, "another thread is inside step";
    /// This build, device or model family cannot do it.
    E_UNSUPPORTED = 104, "not supported by this build or device";
    /// The caller cancelled.
    E_CANCELLED = 105, "cancelled";
    /// Host memory ran out.
    E_NOMEM = 200, "out of host memory";
    /// Device memory ran out.
    E_DEVICE_NOMEM = 201, "out of device memory";
    /// The sequence alone needs more KV pages than exist.
    E_KV_FULL = 202, "the KV cache is too small for this sequence";
    /// The queue is full; retry later.
    E_QUEUE_FULL = 203, "the queue is full";
    /// The operating system refused a read.
    E_IO = 300, "input/output error";
    /// Malformed file.
    E_FORMAT = 301, "malformed file";
    /// Well formed, but above a set limit.
    E_LIMIT = 302, "above a set limit";
    /// Valid file, wrong model or shapes.
    E_MODEL = 303, "the file does not fit the model";
    /// No usable driver for the device.
    E_NO_DRIVER = 400, "no driver";
    /// A device call failed; the device is still usable.
    E_DEVICE = 401, "device error";
    /// The device is lost for this process; restart it.
    E_DEVICE_LOST = 402, "the device is lost; restart the process";
    /// A bug in the library; the engine is dead.
    E_PANIC = 900, "bug in the library";
}

impl Status {
    /// Whether this is an error (100 and up).
    pub fn is_error(self) -> bool {
        self.0 >= 100
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name(), self.0)
    }
}

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What class of failure.
    pub status: Status,
    /// `errno` when the operating system refused, else 0.
    pub os_code: i32,
    /// The driver's code when a device refused, else 0.
    pub device_code: i32,
    /// One line, impersonal.
    pub message: Cow<'static, str>,
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of class `status` with a message.
    pub fn new(status: Status, message: impl Into<Cow<'static, str>>) -> Error {
        Error { status, os_code: 0, device_code: 0, message: message.into() }
    }

    /// A bad argument.
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Status::E_INVALID, message)
    }

    /// A malformed file.
    pub fn format(message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Status::E_FORMAT, message)
    }

    /// Something well formed but above a limit.
    pub fn limit(message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Status::E_LIMIT, message)
    }

    /// A valid file that does not fit the model.
    pub fn model(message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Status::E_MODEL, message)
    }

    /// Something this build, device or family cannot do.
    pub fn unsupported(message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Status::E_UNSUPPORTED, message)
    }

    /// Host memory ran out. Allocates nothing.
    pub fn no_memory(what: &'static str) -> Error {
        Error::new(Status::E_NOMEM, Cow::Borrowed(what))
    }

    /// A refused system call: `what` names the object.
    pub fn os(what: impl fmt::Display, error: &std::io::Error) -> Error {
        Error {
            status: Status::E_IO,
            os_code: error.raw_os_error().unwrap_or(0),
            device_code: 0,
            message: format!("{what}: {error}").into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.meaning(), self.message)
    }
}

impl std::error::Error for Error {}

/// A `Vec` of `len` copies of `value` whose allocation may fail without ending the process.
pub fn try_vec<T: Clone>(len: usize, value: T, what: &'static str) -> Result<Vec<T>> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).map_err(|_| Error::no_memory(what))?;
    v.resize(len, value);
    Ok(v)
}

/// An empty `Vec` with room for `capacity` elements, whose allocation may fail.
pub fn try_with_capacity<T>(capacity: usize, what: &'static str) -> Result<Vec<T>> {
    let mut v = Vec::new();
    v.try_reserve_exact(capacity).map_err(|_| Error::no_memory(what))?;
    Ok(v)
}
