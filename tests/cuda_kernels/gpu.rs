//! The first GPU instead of the host executor, when POLAR_TEST_GPU is set. One device for all cases,
//! whose memory lives until the process ends.

use polar_sparsity::Result;
use polar_sparsity::backend::cuda::device::{Device, Product};
use polar_sparsity::backend::cuda::driver::Driver;
use polar_sparsity::backend::cuda::launch::Launch;
use polar_sparsity::backend::cuda::params::Ptr;
use std::ptr::NonNull;
use std::sync::OnceLock;

struct Shared(&'static Driver);

pub fn chosen() -> Option<Box<dyn Device>> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    std::env::var_os("POLAR_TEST_GPU")?;
    Some(Box::new(Shared(DRIVER.get_or_init(|| Driver::open(0).expect("a GPU")))))
}

impl Device for Shared {
    fn name(&self) -> String {
        self.0.name()
    }
    fn multiprocessors(&self) -> u32 {
        self.0.multiprocessors()
    }
    fn shared_per_block(&self) -> u32 {
        self.0.shared_per_block()
    }
    fn warpgroups(&self) -> bool {
        self.0.warpgroups()
    }
    fn free_memory(&self) -> Result<u64> {
        self.0.free_memory()
    }
    fn alloc(&self, bytes: u64) -> Result<Ptr> {
        self.0.alloc(bytes)
    }
    fn free(&self, at: Ptr) {
        self.0.free(at);
    }
    fn copy_in(&self, to: Ptr, from: &[u8]) -> Result<()> {
        self.0.copy_in(to, from)
    }
    fn copy_out(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        self.0.copy_out(to, from)
    }
    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.0.alloc_host(bytes)
    }
    fn free_host(&self, at: NonNull<u8>) {
        self.0.free_host(at);
    }
    fn send(&self, to: Ptr, from: &[u8]) -> Result<()> {
        self.0.send(to, from)
    }
    fn fetch(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        self.0.fetch(to, from)
    }
    fn mark(&self, old: u64) -> Result<u64> {
        self.0.mark(old)
    }
    fn reached(&self, mark: u64) -> Result<()> {
        self.0.reached(mark)
    }
    fn unmark(&self, mark: u64) {
        self.0.unmark(mark);
    }
    fn zero(&self, at: Ptr, bytes: u64) -> Result<()> {
        self.0.zero(at, bytes)
    }
    fn start(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        self.0.start(launch, params)
    }
    fn fork(&self) -> Result<()> {
        self.0.fork()
    }
    fn start_beside(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        self.0.start_beside(launch, params)
    }
    fn join_early(&self) -> Result<()> {
        self.0.join_early()
    }
    fn join(&self) -> Result<()> {
        self.0.join()
    }
    fn product(&self, of: &Product<'_>) -> Result<bool> {
        self.0.product(of)
    }
    fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }
    fn finished(&self, timeout_ns: u64) -> Result<bool> {
        self.0.finished(timeout_ns)
    }
    fn record(&self) -> Result<bool> {
        self.0.record()
    }
    fn recorded(&self, side_first: bool) -> Result<u64> {
        self.0.recorded(side_first)
    }
    fn unrecord(&self) {
        self.0.unrecord();
    }
    fn replay(&self, program: u64) -> Result<()> {
        self.0.replay(program)
    }
    fn forget(&self, program: u64) {
        self.0.forget(program);
    }
}
