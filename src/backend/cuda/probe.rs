//! Whether this process can use NVIDIA GPUs, which ones there are, and if not, why: in a sentence.

use super::module::{FATBIN, missing_kernels};
use crate::error::{Error, Result, Status};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::c_int;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Oldest CUDA version a driver must speak: the one the kernels were compiled with.
const CUDA_NEEDED: c_int = 13000;

/// Why no CUDA device can be used in this process, or how many there are.
pub fn count() -> Result<u32> {
    if FATBIN.is_none() {
        return Err(Error::unsupported("CUDA: this build has no kernels"));
    }
    with_driver(|| {
        // SAFETY: looks for the library; loads nothing that could fail later.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::new(
                Status::E_NO_DRIVER,
                "CUDA: no NVIDIA driver library (libcuda) was found",
            ));
        }
        let (mut version, mut n) = (0, 0);
        // SAFETY: plain queries into local variables.
        unsafe {
            match sys::cuInit(0) {
                CUresult::CUDA_ERROR_NO_DEVICE => {
                    return Err(Error::new(Status::E_NO_DRIVER, "CUDA: the driver finds no GPU"));
                }
                started => check("CUDA: the driver does not start", started)
                    .map_err(|e| Error { status: Status::E_NO_DRIVER, ..e })?,
            }
            check("CUDA: driver version", sys::cuDriverGetVersion(&mut version))?;
            check("CUDA: devices", sys::cuDeviceGetCount(&mut n))?;
        }
        if version < CUDA_NEEDED {
            return Err(Error::new(
                Status::E_NO_DRIVER,
                format!(
                    "CUDA: the driver speaks CUDA {}.{}, {}.{} is needed",
                    version / 1000,
                    version % 1000 / 10,
                    CUDA_NEEDED / 1000,
                    CUDA_NEEDED % 1000 / 10
                ),
            ));
        }
        Ok(n as u32)
    })
}

/// Runs what calls the driver. Its functions are looked up when they are called; a missing one panics.
pub(super) fn with_driver<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        let why = "CUDA: the driver library lacks a function that CUDA 13.0 has";
        Err(Error::new(Status::E_NO_DRIVER, why))
    })
}

/// A device the driver lists.
#[derive(Clone, Debug)]
pub struct Found {
    /// Model name.
    pub name: String,
    /// `10 * major + minor`.
    pub compute_capability: u32,
    /// Bytes of memory.
    pub memory_total: u64,
    /// Identifier, as `nvidia-smi -L` prints it.
    pub uuid: String,
    /// Why it cannot be used, if it cannot.
    pub unusable: Option<String>,
}

/// What the driver says of device `ordinal`, without opening it.
pub fn describe(ordinal: u32) -> Result<Found> {
    if ordinal >= count()? {
        return Err(Error::invalid(format!("CUDA device {ordinal}: the driver lists fewer")));
    }
    use sys::CUdevice_attribute as A;
    let (mut device, mut total, mut name) = (0, 0, [0 as std::ffi::c_char; 128]);
    // SAFETY: `count` has initialised the driver; queries into local variables of the right sizes.
    unsafe {
        check("CUDA device", sys::cuDeviceGet(&mut device, ordinal as c_int))?;
        check("CUDA device name", sys::cuDeviceGetName(name.as_mut_ptr(), 127, device))?;
        check("CUDA device memory", sys::cuDeviceTotalMem_v2(&mut total, device))?;
        let mut uuid: sys::CUuuid = std::mem::zeroed();
        check("CUDA device identifier", sys::cuDeviceGetUuid_v2(&mut uuid, device))?;
        let attribute = |which| {
            let mut value = 0;
            check("CUDA device attribute", sys::cuDeviceGetAttribute(&mut value, which, device))
                .map(|()| value)
        };
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let hex: String = uuid.bytes.iter().map(|b| format!("{:02x}", *b as u8)).collect();
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        Ok(Found {
            name: std::ffi::CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
            compute_capability: (10 * major + minor) as u32,
            memory_total: total as u64,
            uuid: format!("GPU-{}", parts.join("-")),
            unusable: missing_kernels((10 * major + minor) as u32),
        })
    }
}

pub(super) fn check(what: impl Display, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let code = result as i32;
    let status = match code {
        2 => Status::E_DEVICE_NOMEM,
        100 | 101 => Status::E_NO_DRIVER,
        // Errors that stay until the process ends.
        214 | 700 | 702 | 708..=720 | 999 => Status::E_DEVICE_LOST,
        _ => Status::E_DEVICE,
    };
    let mut text: *const std::ffi::c_char = std::ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or null for an unknown code.
    let name = unsafe {
        let _ = sys::cuGetErrorName(result, &mut text);
        if text.is_null() { "unknown".into() } else { std::ffi::CStr::from_ptr(text).to_string_lossy() }
    };
    let mut error = Error::new(status, format!("{what}: {name} ({code})"));
    error.device_code = code;
    Err(error)
}
