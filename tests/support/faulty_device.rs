//! A device that fails on purpose, around one that does not: the k-th allocation, the k-th call, or a
//! launch that asks for more than a block can have. It counts what is allocated.

use polar_sparsity::backend::cuda::device::{AnyDevice, Device, Product};
use polar_sparsity::backend::cuda::launch::Launch;
use polar_sparsity::backend::cuda::params::Ptr;
use polar_sparsity::{Error, Result, Status};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

const NEVER: u64 = u64::MAX;

/// Counts down to the call that fails.
pub struct Countdown(AtomicU64);

impl Countdown {
    fn new() -> Countdown {
        Countdown(AtomicU64::new(NEVER))
    }
    /// The call after `k` more fails, once.
    pub fn set(&self, k: u64) {
        self.0.store(k, Ordering::Relaxed);
    }
    /// Forgets a failure that has not happened; whether there was one.
    pub fn clear(&self) -> bool {
        self.0.swap(NEVER, Ordering::Relaxed) != NEVER
    }
    fn due(&self) -> bool {
        let step = |left| match left {
            NEVER => None,
            0 => Some(NEVER),
            n => Some(n - 1),
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step) == Ok(0)
    }
}

/// The device.
pub struct Faulty {
    inner: AnyDevice,
    /// Of allocations.
    pub alloc: Countdown,
    /// Of copies, launches, recordings and waits.
    pub call: Countdown,
    /// Of launches that then ask for too much shared memory.
    pub launch: Countdown,
    allocations: AtomicU64,
    frees: AtomicU64,
    calls: AtomicU64,
}

impl Faulty {
    pub fn new(inner: AnyDevice) -> Faulty {
        Faulty {
            inner,
            alloc: Countdown::new(),
            call: Countdown::new(),
            launch: Countdown::new(),
            allocations: AtomicU64::new(0),
            frees: AtomicU64::new(0),
            calls: AtomicU64::new(0),
        }
    }
    /// Allocations so far.
    pub fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }
    /// Allocations not given back.
    pub fn live(&self) -> u64 {
        self.allocations() - self.frees.load(Ordering::Relaxed)
    }
    /// Copies, launches, recordings and waits so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
    fn spoiled(&self, launch: &Launch) -> Launch {
        let too_much = Launch { shared: self.shared_per_block() + 1024, ..*launch };
        if self.launch.due() { too_much } else { *launch }
    }
    fn may_fail(&self, what: &str) -> Result<()> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.call.due() {
            return Err(Error::new(Status::E_DEVICE, format!("{what} fails on purpose")));
        }
        Ok(())
    }
}

macro_rules! may_fail {
    ($(fn $name:ident(&self $(, $arg:ident: $ty:ty)*) -> Result<$out:ty>;)*) => {
        $(fn $name(&self $(, $arg: $ty)*) -> Result<$out> {
            self.may_fail(stringify!($name))?;
            self.inner.$name($($arg),*)
        })*
    };
}

impl Device for Faulty {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn multiprocessors(&self) -> u32 {
        self.inner.multiprocessors()
    }
    fn shared_per_block(&self) -> u32 {
        self.inner.shared_per_block()
    }
    fn warpgroups(&self) -> bool {
        self.inner.warpgroups()
    }
    fn free_memory(&self) -> Result<u64> {
        self.inner.free_memory()
    }
    fn alloc(&self, bytes: u64) -> Result<Ptr> {
        if self.alloc.due() {
            return Err(Error::new(Status::E_DEVICE_NOMEM, format!("{bytes} bytes, refused on purpose")));
        }
        let at = self.inner.alloc(bytes)?;
        self.allocations.fetch_add(1, Ordering::Relaxed);
        Ok(at)
    }
    fn free(&self, at: Ptr) {
        self.frees.fetch_add(1, Ordering::Relaxed);
        self.inner.free(at);
    }
    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>> {
        if self.alloc.due() {
            return Err(Error::new(Status::E_DEVICE_NOMEM, format!("{bytes} bytes, refused on purpose")));
        }
        let at = self.inner.alloc_host(bytes)?;
        self.allocations.fetch_add(1, Ordering::Relaxed);
        Ok(at)
    }
    fn free_host(&self, at: NonNull<u8>) {
        self.frees.fetch_add(1, Ordering::Relaxed);
        self.inner.free_host(at);
    }
    fn unmark(&self, mark: u64) {
        self.inner.unmark(mark);
    }
    fn unrecord(&self) {
        self.inner.unrecord();
    }
    fn start(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        self.may_fail("start")?;
        self.inner.start(&self.spoiled(launch), params)
    }
    fn start_beside(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        self.may_fail("start_beside")?;
        self.inner.start_beside(&self.spoiled(launch), params)
    }
    fn recorded(&self, side_first: bool) -> Result<u64> {
        // As with the driver, a recording that cannot be ended well is over all the same.
        let program = self.inner.recorded(side_first)?;
        self.may_fail("recorded").inspect_err(|_| self.inner.forget(program))?;
        Ok(program)
    }
    fn forget(&self, program: u64) {
        self.inner.forget(program);
    }
    may_fail! {
        fn copy_in(&self, to: Ptr, from: &[u8]) -> Result<()>;
        fn copy_out(&self, to: &mut [u8], from: Ptr) -> Result<()>;
        fn zero(&self, at: Ptr, bytes: u64) -> Result<()>;
        fn send(&self, to: Ptr, from: &[u8]) -> Result<()>;
        fn fetch(&self, to: &mut [u8], from: Ptr) -> Result<()>;
        fn mark(&self, old: u64) -> Result<u64>;
        fn reached(&self, mark: u64) -> Result<()>;
        fn product(&self, of: &Product<'_>) -> Result<bool>;
        fn synchronize(&self) -> Result<()>;
        fn finished(&self, timeout_ns: u64) -> Result<bool>;
        fn fork(&self) -> Result<()>;
        fn join(&self) -> Result<()>;
        fn join_early(&self) -> Result<()>;
        fn record(&self) -> Result<bool>;
        fn replay(&self, program: u64) -> Result<()>;
    }
}
