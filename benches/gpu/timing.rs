//! A device, random memory on it, and the time of a list of launches.

use cudarc::driver::sys;
use polar_sparsity::backend::cuda::device::{self, Device, Product};
use polar_sparsity::backend::cuda::driver::Driver;
use polar_sparsity::backend::cuda::launch::{Kernels, Launch};
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;
use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

pub(crate) const T: DType = DType::BF16;

/// A product with a matrix stored `[n, k]`, by the vendor's library.
pub(crate) fn by_library(params: &LinearParams) -> Product<'_> {
    Product { params, transposed: false, dtype: T, own: None, beside: None }
}

/// Inputs rotate over this many bytes, several times any L2.
const ROTATION: u64 = 400 << 20;

/// A large product is repeated for so long before it is timed, and while it is: until the GPU has the clocks
/// that it can hold under its power limit.
const PRODUCT_WARM_UP_MS: f64 = 200.0;
const PRODUCT_MS: f64 = 100.0;

/// A GPU with its measured ceilings.
pub(crate) struct Gpu {
    pub(crate) device: Arc<Driver>,
    /// Read-only stream, TB/s.
    pub(crate) ceiling: f64,
    /// Large products, TFLOP/s; none without cuBLASLt.
    pub(crate) arithmetic: Option<f64>,
    /// Where records go, if anywhere.
    out: Option<RefCell<File>>,
}

/// A record's number, or null for one that could not be measured.
pub(crate) fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or("null".into(), |x| format!("{x:.digits$}"))
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
        let mut gpu = Gpu { device, ceiling: 0.0, arithmetic: None, out: None };
        let bytes = 8u64 << 30;
        let memory = gpu.random(bytes / 2, 1.0);
        let sink = gpu.room(16);
        let params = StreamParams { at: memory.at, sink: sink.at, count: bytes / 16 };
        let launch = gpu.kernels(128, 1).read_stream().unwrap();
        let us = gpu.time(1, |_| device::start(&*gpu.device, &launch, &params).unwrap());
        drop((memory, sink));
        gpu.ceiling = bytes as f64 / us / 1e6;
        gpu.arithmetic = [4096, 8192].into_iter().filter_map(|rows| gpu.large_product(rows)).reduce(f64::max);
        gpu
    }

    /// TFLOP/s of cuBLASLt's product of 16-bit numbers, sums in f32; none if it does not do it.
    fn large_product(&self, rows: u32) -> Option<f64> {
        const SIDE: u32 = 8192;
        const AT_ONCE: u32 = 16;
        let side = u64::from(SIDE);
        let w = self.random(side * side, 0.02);
        let x = self.random(u64::from(rows) * side, 1.0);
        let out = self.room(4 * u64::from(rows) * side);
        let params = LinearParams {
            x: x.at,
            w: w.at,
            out: out.at,
            rows,
            n: SIDE,
            k: SIDE,
            splits: 1,
            ..LinearParams::default()
        };
        let product = || self.device.product(&by_library(&params));
        // The first one chooses the library's kernel.
        if !product().unwrap() {
            return None;
        }
        let ms =
            || f64::from(self.device.time(|| (0..AT_ONCE).try_for_each(|_| product().map(drop))).unwrap());
        let mut warm = 0.0;
        while warm < PRODUCT_WARM_UP_MS {
            warm += ms();
        }
        let (mut products, mut took) = (0, 0.0);
        while took < PRODUCT_MS {
            took += ms();
            products += AT_ONCE;
        }
        let flops = 2.0 * f64::from(rows) * f64::from(SIDE) * f64::from(SIDE);
        Some(f64::from(products) * flops / took / 1e9)
    }

    /// Records go to `h200.jsonl` in `folder` (or as the GPU is called), anew or behind what is there.
    pub(crate) fn open_results(&mut self, folder: &Path, append: bool) -> std::io::Result<()> {
        let name = self.name().to_lowercase();
        let model = name.split_whitespace().find(|w| w.bytes().any(|b| b.is_ascii_digit())).unwrap_or("gpu");
        let path = folder.join(format!("{model}.jsonl"));
        let mut how = OpenOptions::new();
        how.create(true).write(true).append(append).truncate(!append);
        self.out = Some(RefCell::new(how.open(&path)?));
        println!("records go to {}", path.display());
        let says = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output().ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            Some(text.lines().next()?.trim().to_owned())
        };
        let driver = says("nvidia-smi", &["--query-gpu=driver_version", "--format=csv,noheader"]);
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        // The library says which commit it was built from.
        let commit = env!("POLAR_BUILD_INFO").split("git ").nth(1).and_then(|s| s.split(')').next());
        let commit = commit.unwrap_or("unknown");
        self.record(&format!(
            r#"{{"kind":"run","date":"{}","gpu":"{}","driver":"{}","commit":"{}","command":"bench-gpu {}"}}"#,
            says("date", &["-u", "+%F %H:%M"]).unwrap_or_default(),
            self.name(),
            driver.unwrap_or_default(),
            commit,
            arguments.join(" "),
        ));
        let copy = self.copy_stream();
        println!("copy {copy:.2} TB/s, read {:.2} TB/s", self.ceiling);
        self.record(&format!(
            r#"{{"kind":"ceiling","copy_tbps":{copy:.3},"read_tbps":{:.3},"mma_tflops":{}}}"#,
            self.ceiling,
            number(self.arithmetic, 1),
        ));
        Ok(())
    }

    /// Device-to-device copy, bytes read and written, TB/s.
    fn copy_stream(&self) -> f64 {
        let bytes = 4u64 << 30;
        let (from, to) = (self.room(bytes), self.room(bytes));
        let copy = || {
            self.device.time(|| {
                let stream = self.device.stream() as sys::CUstream;
                // SAFETY: both hold so many bytes, and are given back after the copy is over.
                let status = unsafe { sys::cuMemcpyDtoDAsync_v2(to.at.0, from.at.0, bytes as usize, stream) };
                assert_eq!(status, sys::CUresult::CUDA_SUCCESS);
                Ok(())
            })
        };
        let mut ms: Vec<f64> = (0..7).map(|_| f64::from(copy().unwrap())).collect();
        ms.sort_by(f64::total_cmp);
        2.0 * bytes as f64 / ms[ms.len() / 2] / 1e9
    }

    /// One record.
    pub(crate) fn record(&self, json: &str) {
        if let Some(out) = &self.out {
            writeln!(out.borrow_mut(), "{json}").unwrap();
        }
    }

    pub(crate) fn name(&self) -> String {
        self.device.name()
    }

    pub(crate) fn kernels(&self, head_dim: u32, group: u32) -> Kernels {
        Kernels::for_device(T, head_dim, group, &*self.device).unwrap()
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
        let program = self.device.recorded(false).unwrap();
        // A GPU that was idle takes a while to reach the clocks it has in service.
        let began = Instant::now();
        while began.elapsed().as_millis() < 20 {
            self.device.replay(program).unwrap();
            self.device.synchronize().unwrap();
        }
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
        self.record(&format!(
            r#"{{"kind":"kernel","kernel":"{kernel}",{json},"us":{us:.3},"bytes":{bytes:.0},"tbps":{tbps:.4},"read_tbps":{:.3}}}"#,
            self.ceiling
        ));
    }
}
