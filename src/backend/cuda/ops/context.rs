//! The CUDA context of a host: the kernels loaded into whichever context is current on its thread, and
//! launches on its streams. The context is never changed, pushed only to unload, and not kept alive.

use super::{Launcher, Ops};
use crate::backend::cuda::launch::Launch;
use crate::backend::cuda::module::{Module, has_warpgroups, missing_kernels};
use crate::backend::cuda::probe::{check, count, with_driver};
use crate::error::{Error, Result, Status};
use cudarc::driver::sys::{self, CUdevice_attribute as A};
use std::ffi::c_void;
use std::ptr::null_mut;

/// See the module.
pub struct HostContext {
    context: sys::CUcontext,
    module: Module,
    ops: Ops,
}

// SAFETY: driver handles may be used from any thread in whose context they are, which every use checks.
unsafe impl Send for HostContext {}
// SAFETY: as above; nothing here changes after creation.
unsafe impl Sync for HostContext {}

/// The calling thread's context; null: none.
fn current() -> Result<sys::CUcontext> {
    let mut context = null_mut();
    // SAFETY: a query into a local variable.
    check("current CUDA context", unsafe { sys::cuCtxGetCurrent(&mut context) })?;
    Ok(context)
}

impl HostContext {
    /// Loads the kernels into the calling thread's current context.
    pub fn of_thread() -> Result<HostContext> {
        if count()? == 0 {
            return Err(Error::new(Status::E_NO_DRIVER, "CUDA: the driver finds no GPU"));
        }
        with_driver(HostContext::load)
    }

    fn load() -> Result<HostContext> {
        let context = current()?;
        if context.is_null() {
            return Err(Error::invalid(
                "no CUDA context is current on this thread: set one, or call the CUDA runtime first",
            ));
        }
        let (mut device, mut name) = (0, [0 as std::ffi::c_char; 128]);
        // SAFETY: a context is current; queries into local variables of the right sizes.
        let name = unsafe {
            check("device of the CUDA context", sys::cuCtxGetDevice(&mut device))?;
            check("CUDA device name", sys::cuDeviceGetName(name.as_mut_ptr(), 127, device))?;
            std::ffi::CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: as above.
            check("CUDA device attribute", unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) })
                .map(|()| value as u32)
        };
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if let Some(why) = missing_kernels(10 * major + minor) {
            return Err(Error::unsupported(format!("{name}: {why}")));
        }
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_per_block = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let ops = Ops::new(multiprocessors, shared_per_block, has_warpgroups(10 * major + minor))?;
        let module = Module::load(&name, shared_per_block, major >= 9)?;
        Ok(HostContext { context, module, ops })
    }

    /// The operators.
    pub fn ops(&self) -> &Ops {
        &self.ops
    }

    /// A stream of this context; 0 is its default stream. An error in any other context.
    pub fn stream(&self, stream: *mut c_void) -> Result<HostStream<'_>> {
        if current()? != self.context {
            return Err(Error::invalid(
                "the CUDA context that is current on this thread is not the one the kernels were loaded in",
            ));
        }
        Ok(HostStream { host: self, stream: stream.cast() })
    }
}

impl Drop for HostContext {
    fn drop(&mut self) {
        // SAFETY: the host promises that the context is alive and that nothing of ours runs in it; a
        // context the driver no longer knows is refused by the push, and took the module with it.
        unsafe {
            let mut popped = null_mut();
            if check("CUDA context", sys::cuCtxPushCurrent_v2(self.context)).is_ok() {
                self.module.unload();
                let _ = sys::cuCtxPopCurrent_v2(&mut popped);
            }
        }
    }
}

/// See [`HostContext::stream`].
pub struct HostStream<'a> {
    host: &'a HostContext,
    stream: sys::CUstream,
}

impl Launcher for HostStream<'_> {
    fn start(&self, launch: &Launch, params: &[u8], early: bool) -> Result<()> {
        // SAFETY: the context was seen to be current; the host answers for the stream and its pointers.
        unsafe { self.host.module.launch(launch, params, self.stream, early) }
    }
}
