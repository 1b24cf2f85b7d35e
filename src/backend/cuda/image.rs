//! The compiled kernels within the library, and their entry points once a device has loaded them.

use super::launch::NAMES;
use super::probe::check;
use crate::error::{Error, Result, try_with_capacity};
use cudarc::driver::sys;
use std::ffi::{CString, c_int};
use std::ptr::null_mut;

/// The kernels, if this build has any.
#[cfg(polar_kernels)]
pub(super) static FATBIN: Option<&[u8]> = Some(include_bytes!(env!("POLAR_FATBIN")));
/// The kernels, if this build has any.
#[cfg(not(polar_kernels))]
pub(super) static FATBIN: Option<&[u8]> = None;

/// Every kernel of [`NAMES`], each allowed all the shared memory a block can have.
///
/// # Safety
/// `module` is loaded in the current context.
pub(super) unsafe fn functions(module: sys::CUmodule, shared_per_block: u32) -> Result<Vec<sys::CUfunction>> {
    use sys::CUfunction_attribute as F;
    let mut functions = try_with_capacity(NAMES.len(), "kernels")?;
    for name in NAMES {
        let text = CString::new(*name).map_err(|_| Error::invalid("kernel name"))?;
        let mut function = null_mut();
        // SAFETY: out-parameter is local; the function is the module's.
        unsafe {
            check(
                format_args!("kernel {name}"),
                sys::cuModuleGetFunction(&mut function, module, text.as_ptr()),
            )?;
            for (attribute, value) in [
                (F::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_per_block as c_int),
                (F::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
            ] {
                check(
                    format_args!("kernel {name}: shared memory"),
                    sys::cuFuncSetAttribute(function, attribute, value),
                )?;
            }
        }
        functions.push(function);
    }
    Ok(functions)
}
