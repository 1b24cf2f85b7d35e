//! Operators on a host's own CUDA context and streams: one type, whether this build can have them or
//! not.

pub use crate::backend::cuda::ops::{
    Attention, HeadSelection, Launcher, Mlp, NeuronSelection, Ops, Workspace,
};
pub use crate::backend::cuda::params::Ptr as DevicePtr;

#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::context::HostContext;
#[cfg(not(feature = "cuda"))]
use crate::error::Error;
use crate::error::Result;
use std::ffi::c_void;

/// The kernels in the CUDA context of a host.
pub struct OpLibrary {
    #[cfg(feature = "cuda")]
    host: HostContext,
    #[cfg(not(feature = "cuda"))]
    none: std::convert::Infallible,
}

#[cfg(feature = "cuda")]
impl OpLibrary {
    /// Loads the kernels into the calling thread's current context.
    pub fn of_thread() -> Result<OpLibrary> {
        Ok(OpLibrary { host: HostContext::of_thread()? })
    }

    /// What can be asked without a stream.
    pub fn ops(&self) -> &Ops {
        self.host.ops()
    }

    /// Runs an operator on a stream of the context, which must be the calling thread's current one.
    pub fn on(&self, stream: *mut c_void, run: impl FnOnce(&Ops, &dyn Launcher) -> Result<()>) -> Result<()> {
        run(self.host.ops(), &self.host.stream(stream)?)
    }
}

#[cfg(not(feature = "cuda"))]
impl OpLibrary {
    /// An error: this build has no CUDA backend.
    pub fn of_thread() -> Result<OpLibrary> {
        Err(Error::unsupported("this build has no CUDA backend"))
    }

    /// Never called: there is no such object.
    pub fn ops(&self) -> &Ops {
        match self.none {}
    }

    /// Never called: there is no such object.
    pub fn on(&self, _: *mut c_void, _: impl FnOnce(&Ops, &dyn Launcher) -> Result<()>) -> Result<()> {
        match self.none {}
    }
}
