//! A device, random memory on it, and the time of a list of launches.

use polar_sparsity::backend::cuda::device::{self, Device};
use polar_sparsity::backend::cuda::driver::Driver;
use polar_sparsity::backend::cuda::launch::{Kernels, Launch};
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;
use std::sync::Arc;

pub(crate) const T: DType = DType::BF16;
/// Inputs rotate over this many bytes, several times any L2.
const ROTATION: u64 = 400 << 20;

/// A GPU with its measured ceiling.
pub(crate) struct Gpu {
    pub(crate) device: Arc<Driver>,
    /// Read-only stream, TB/s.
    pub(crate) ceiling: f64,
}

/// Memory that is given back.
pub(crate) struct Memory<'a> {
    pub(crate) at: Ptr,
    device: &'a Driver,
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        self.device.free(self.at);
    }
}

impl Gpu {
    pub(crate) fn open() -> Gpu {
        let device = match Driver::open(0) {
            Ok(device) => Arc::new(device),
            Err(error) => {
                println!("{error}");
                std::process::exit(1);
            }
        };
        let mut gpu = Gpu { device, ceiling: 0.0 };
        let bytes = 8u64 << 30;
        let memory = gpu.random(bytes / 2, 1.0);
        let sink = gpu.room(16);
        let params = StreamParams { at: memory.at, sink: sink.at, count: bytes / 16 };
        let launch = gpu.kernels(128, 1).read_stream().unwrap();
        let us = gpu.time(1, |_| device::start(&*gpu.device, &launch, &params).unwrap());
        drop((memory, sink));
        gpu.ceiling = bytes as f64 / us / 1e6;
        println!(r#"{{"kind":"ceiling","read_tbps":{:.3}}}"#, gpu.ceiling);
        gpu
    }

    pub(crate) fn name(&self) -> String {
        self.device.name()
    }

    pub(crate) fn kernels(&self, head_dim: u32, group: u32) -> Kernels {
        Kernels::new(T, head_dim, group, self.device.multiprocessors(), self.device.shared_per_block())
            .unwrap()
    }

    /// Zeroed memory.
    pub(crate) fn room(&self, bytes: u64) -> Memory<'_> {
        let at = self.device.alloc(bytes).unwrap();
        self.device.zero(at, bytes).unwrap();
        Memory { at, device: &self.device }
    }

    /// `count` random 16-bit numbers.
    pub(crate) fn random(&self, count: u64, scale: f32) -> Memory<'_> {
        let memory = Memory { at: self.device.alloc(2 * count).unwrap(), device: &self.device };
        let launch = self.kernels(128, 1).fill(T).unwrap();
        let params = FillParams { at: memory.at, count, seed: count, scale, offset: 0.0 };
        device::start(&*self.device, &launch, &params).unwrap();
        memory
    }

    pub(crate) fn words(&self, v: &[u32]) -> Memory<'_> {
        let memory = self.room(4 * v.len() as u64);
        let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.device.copy_in(memory.at, &bytes).unwrap();
        self.device.synchronize().unwrap();
        memory
    }

    /// Copies of inputs of `bytes` each to rotate over.
    pub(crate) fn copies(&self, bytes: u64) -> u64 {
        ROTATION.div_ceil(bytes).clamp(1, 24)
    }

    /// Median microseconds of `launch(i)`, i counting over rotating inputs.
    pub(crate) fn time(&self, copies: u64, launch: impl Fn(u64)) -> f64 {
        let n = copies.max(if copies == 1 { 4 } else { 20 });
        self.device.record().unwrap();
        for i in 0..n {
            launch(i % copies);
        }
        let program = self.device.recorded().unwrap();
        self.device.replay(program).unwrap();
        self.device.synchronize().unwrap();
        let mut times: Vec<f64> = (0..15)
            .map(|_| f64::from(self.device.time(|| self.device.replay(program)).unwrap()) * 1e3 / n as f64)
            .collect();
        self.device.forget(program);
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    pub(crate) fn start<P: Params>(&self, launch: &Launch, params: &P) {
        device::start(&*self.device, launch, params).unwrap();
    }

    /// One line of the table, and its JSON twin.
    pub(crate) fn report(&self, kernel: &str, case: &str, json: &str, us: f64, bytes: f64) {
        let tbps = bytes / us / 1e6;
        println!(
            "{kernel:<18} {case:<46} {us:>9.2} us {tbps:>6.3} TB/s {:>4.0} %",
            100.0 * tbps / self.ceiling
        );
        println!(
            r#"{{"kind":"kernel","kernel":"{kernel}",{json},"us":{us:.3},"bytes":{bytes:.0},"tbps":{tbps:.4},"read_tbps":{:.3}}}"#,
            self.ceiling
        );
    }
}
