//! Notices that the process forked. A child has none of the parent's threads and no usable CUDA
//! context, so the C functions refuse there instead of hanging.

use crate::error::{Error, Result};
use once_cell::sync::OnceCell;
use std::sync::atomic::{AtomicBool, Ordering};

static FORKED: AtomicBool = AtomicBool::new(false);
static WATCHING: OnceCell<()> = OnceCell::new();

extern "C" fn in_child() {
    FORKED.store(true, Ordering::Relaxed);
}

/// Starts watching, once per process. The library is linked with `-z nodelete`, so the handler
/// outlives `dlclose`.
pub fn watch() -> Result<()> {
    WATCHING
        .get_or_try_init(|| {
            // SAFETY: the handler only stores to an atomic, which is allowed in a forked child.
            match unsafe { libc::pthread_atfork(None, None, Some(in_child)) } {
                0 => Ok(()),
                code => Err(Error::os("pthread_atfork", &std::io::Error::from_raw_os_error(code))),
            }
        })
        .copied()
}

/// Whether this process is a forked child of one that watched.
pub fn forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}
