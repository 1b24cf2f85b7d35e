//! What this library is, and static text. These four never fail and work everywhere, in callbacks
//! and forked children too.

use super::constants::*;
use std::ffi::{CStr, c_char};

/// Version of the library: major << 16 | minor << 8 | patch.
///
/// Threads: any, at any time.
#[unsafe(no_mangle)]
pub extern "C" fn polar_version() -> u32 {
    (POLAR_VERSION_MAJOR << 16) | (POLAR_VERSION_MINOR << 8) | POLAR_VERSION_PATCH
}

/// ABI of the library, to be compared with `POLAR_ABI_VERSION` at start.
///
/// Threads: any, at any time.
#[unsafe(no_mangle)]
pub extern "C" fn polar_abi_version() -> u32 {
    POLAR_ABI_VERSION
}

/// How the library was built, for bug reports: version, source, compiler, target, features.
///
/// Threads: any, at any time. Memory: static, terminated; not to be freed.
#[unsafe(no_mangle)]
pub extern "C" fn polar_build_info() -> *const c_char {
    concat!(env!("POLAR_BUILD_INFO"), "\0").as_ptr().cast()
}

/// Name of a status, `"POLAR_E_INVALID"` for instance; `"POLAR_UNKNOWN"` for one that this library
/// does not know.
///
/// Threads: any, at any time. Memory: static, terminated; not to be freed.
#[unsafe(no_mangle)]
pub extern "C" fn polar_status_name(status: polar_status) -> *const c_char {
    name(status).as_ptr()
}

macro_rules! names {
    ($($constant:ident)*) => {
        fn name(status: polar_status) -> &'static CStr {
            match status {
                $($constant => {
                    const NAME: &[u8] = concat!(stringify!($constant), "\0").as_bytes();
                    CStr::from_bytes_until_nul(NAME).unwrap_or_default()
                })*
                _ => c"POLAR_UNKNOWN",
            }
        }
    };
}

names! {
    POLAR_OK POLAR_PENDING POLAR_IDLE POLAR_TRUNCATED
    POLAR_E_INVALID POLAR_E_ABI POLAR_E_NOT_FOUND POLAR_E_BUSY POLAR_E_UNSUPPORTED POLAR_E_CANCELLED
    POLAR_E_NOMEM POLAR_E_DEVICE_NOMEM POLAR_E_KV_FULL POLAR_E_QUEUE_FULL
    POLAR_E_IO POLAR_E_FORMAT POLAR_E_LIMIT POLAR_E_MODEL
    POLAR_E_NO_DRIVER POLAR_E_DEVICE POLAR_E_DEVICE_LOST POLAR_E_PANIC
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn every_status_has_its_name() {
        for &status in Status::ALL {
            assert_eq!(name(status.0).to_str(), Ok(&*format!("POLAR_{}", status.name())));
        }
        assert_eq!(name(7), c"POLAR_UNKNOWN");
        assert_eq!(name(-1), c"POLAR_UNKNOWN");
    }

    #[test]
    fn the_version_is_the_packages() {
        let text = format!("{POLAR_VERSION_MAJOR}.{POLAR_VERSION_MINOR}.{POLAR_VERSION_PATCH}");
        assert_eq!(text, env!("CARGO_PKG_VERSION"));
        assert!(env!("POLAR_BUILD_INFO").contains(&text));
    }

    #[test]
    fn the_soname_is_the_abi() {
        assert_eq!(env!("POLAR_SONAME"), format!("libpolar_sparsity.so.{POLAR_ABI_VERSION}"));
    }
}
