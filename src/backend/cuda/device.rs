//! What the stages need of a device: memory, copies and launches on one stream, in order, with at most one
//! chain of launches beside it.

use super::launch::Launch;
use super::params::{LinearParams, Params, Ptr};
use crate::dtype::DType;
use crate::error::Result;
use std::ptr::NonNull;

/// A product for a vendor's library.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// As our own kernel takes it, but for the parts.
    pub params: &'a LinearParams,
    /// The matrix is stored `[k, n]`.
    pub transposed: bool,
    /// Of both factors.
    pub dtype: DType,
    /// Our kernel for it, which may turn out faster.
    pub own: Option<&'a Launch>,
    /// A kernel and its parameters that run beside the product, between a fork and a join: how fast both are depends on
    /// the room that the product leaves.
    pub beside: Option<(&'a Launch, &'a [u8])>,
}

/// A device with one stream. Calls take effect in the order they are made, but for the side work between
/// [`Device::fork`] and [`Device::join`].
pub trait Device: Send + Sync + 'static {
    /// Model name, for reports.
    fn name(&self) -> String;
    /// Multiprocessors.
    fn multiprocessors(&self) -> u32;
    /// Shared memory one block may use, bytes.
    fn shared_per_block(&self) -> u32;
    /// Whether it runs the kernels of compute capability 9.0 (`cuda/linear_wide.cu`), and clusters of blocks.
    fn warpgroups(&self) -> bool;
    /// Free device memory, bytes.
    fn free_memory(&self) -> Result<u64>;

    /// Memory, at least 256-byte aligned.
    fn alloc(&self, bytes: u64) -> Result<Ptr>;
    /// Gives memory back. Only addresses `alloc` gave.
    fn free(&self, at: Ptr);
    /// Host to device; `from` may change once this returns.
    fn copy_in(&self, to: Ptr, from: &[u8]) -> Result<()>;
    /// Device to host; waits.
    fn copy_out(&self, to: &mut [u8], from: Ptr) -> Result<()>;
    /// Host memory that `send` and `fetch` may use while the host goes on, at least 16-byte aligned.
    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>>;
    /// Gives it back, once no copy is under way. Only addresses `alloc_host` gave.
    fn free_host(&self, at: NonNull<u8>);
    /// Starts a copy to the device from memory `alloc_host` gave, which must stay and not change until
    /// a mark set later is reached.
    fn send(&self, to: Ptr, from: &[u8]) -> Result<()>;
    /// Starts a copy from the device to memory `alloc_host` gave, to be read once the device has finished.
    fn fetch(&self, to: &mut [u8], from: Ptr) -> Result<()>;
    /// Sets a mark behind everything started so far; `old`: a mark to use again, 0: a new one.
    fn mark(&self, old: u64) -> Result<u64>;
    /// Waits until everything before the mark is done.
    fn reached(&self, mark: u64) -> Result<()>;
    /// Drops a mark.
    fn unmark(&self, mark: u64);
    /// Fills with zero bytes.
    fn zero(&self, at: Ptr, bytes: u64) -> Result<()>;
    /// Starts a kernel. `params` are the bytes of its parameter struct.
    fn start(&self, launch: &Launch, params: &[u8]) -> Result<()>;
    /// From here on side work may run, after everything started so far. While another thread has side work
    /// on this device, this thread's runs in line instead.
    fn fork(&self) -> Result<()>;
    /// Starts a kernel of the side work: after the side's earlier ones, beside everything that `start` is
    /// given between fork and join. Without a fork, in line.
    fn start_beside(&self, launch: &Launch, params: &[u8]) -> Result<()>;
    /// What is started from here on waits for the side work, and its first kernel for everything before it.
    /// Without side work, nothing happens.
    fn join(&self) -> Result<()>;
    /// The same, but the first kernel may be started before the side's last one and the one ahead of it end, for which it
    /// waits by itself.
    fn join_early(&self) -> Result<()>;
    /// Starts a product by a vendor's library, sums in one part, and what goes beside it. False: it starts nothing, use our
    /// own kernel.
    fn product(&self, of: &Product<'_>) -> Result<bool>;
    /// Waits for everything started.
    fn synchronize(&self) -> Result<()>;

    /// Waits up to `timeout_ns` for everything started; true when it is done.
    fn finished(&self, timeout_ns: u64) -> Result<bool>;

    /// Starts recording launches instead of running them; false: cannot.
    fn record(&self) -> Result<bool>;
    /// Ends recording, and a fork that is still open; `side_first`: where blocks of both wait for room, the side
    /// work's go first. The recorded launches as a program of this device,
    /// ready to run.
    fn recorded(&self, side_first: bool) -> Result<u64>;
    /// Ends a recording, if one is open, with its fork, and drops it.
    fn unrecord(&self);
    /// Runs a recorded program.
    fn replay(&self, program: u64) -> Result<()>;
    /// Drops a recorded program.
    fn forget(&self, program: u64);
}

/// Starts a kernel with its parameters.
pub fn start<D: Device + ?Sized, P: Params>(device: &D, launch: &Launch, params: &P) -> Result<()> {
    device.start(launch, bytes_of(params))
}

/// Starts a kernel of the side work with its parameters.
pub fn start_beside<D: Device + ?Sized, P: Params>(device: &D, launch: &Launch, params: &P) -> Result<()> {
    device.start_beside(launch, bytes_of(params))
}

/// What a kernel is started with.
pub fn bytes_of<P: Params>(params: &P) -> &[u8] {
    // SAFETY: `Params` are plain repr(C) structs; their bytes are read only.
    unsafe { std::slice::from_raw_parts((&raw const *params).cast::<u8>(), size_of::<P>()) }
}

/// Any device behind one type.
pub struct AnyDevice(pub Box<dyn Device>);

macro_rules! forward {
    ($($(#[$doc:meta])* fn $name:ident(&self $(, $arg:ident: $ty:ty)*) $(-> $out:ty)?;)*) => {
        impl Device for AnyDevice {
            $(fn $name(&self $(, $arg: $ty)*) $(-> $out)? { self.0.$name($($arg),*) })*
        }
    };
}

forward! {
    fn name(&self) -> String;
    fn multiprocessors(&self) -> u32;
    fn shared_per_block(&self) -> u32;
    fn warpgroups(&self) -> bool;
    fn free_memory(&self) -> Result<u64>;
    fn alloc(&self, bytes: u64) -> Result<Ptr>;
    fn free(&self, at: Ptr);
    fn copy_in(&self, to: Ptr, from: &[u8]) -> Result<()>;
    fn copy_out(&self, to: &mut [u8], from: Ptr) -> Result<()>;
    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>>;
    fn free_host(&self, at: NonNull<u8>);
    fn send(&self, to: Ptr, from: &[u8]) -> Result<()>;
    fn fetch(&self, to: &mut [u8], from: Ptr) -> Result<()>;
    fn mark(&self, old: u64) -> Result<u64>;
    fn reached(&self, mark: u64) -> Result<()>;
    fn unmark(&self, mark: u64);
    fn zero(&self, at: Ptr, bytes: u64) -> Result<()>;
    fn start(&self, launch: &Launch, params: &[u8]) -> Result<()>;
    fn fork(&self) -> Result<()>;
    fn start_beside(&self, launch: &Launch, params: &[u8]) -> Result<()>;
    fn join(&self) -> Result<()>;
    fn join_early(&self) -> Result<()>;
    fn product(&self, of: &Product<'_>) -> Result<bool>;
    fn synchronize(&self) -> Result<()>;
    fn finished(&self, timeout_ns: u64) -> Result<bool>;
    fn record(&self) -> Result<bool>;
    fn recorded(&self, side_first: bool) -> Result<u64>;
    fn unrecord(&self);
    fn replay(&self, program: u64) -> Result<()>;
    fn forget(&self, program: u64);
}
