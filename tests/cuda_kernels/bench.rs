//! Memory and numbers for the cases.

#[cfg(feature = "cuda")]
use crate::gpu;
use crate::host_device::{Host, Late};
use half::{bf16, f16};
use polar_sparsity::backend::cuda::device::{self, Device};
use polar_sparsity::backend::cuda::launch::Launch;
use polar_sparsity::backend::cuda::ops::Launcher;
use polar_sparsity::backend::cuda::params::{Params, Ptr};
use polar_sparsity::dtype::DType;
use std::cell::Cell;
use std::sync::atomic::Ordering;

/// A fixed stream of random numbers (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
    /// Roughly normal.
    pub fn normal(&mut self) -> f64 {
        (0..6).map(|_| self.bits() as f64 / u64::MAX as f64 - 0.5).sum::<f64>() * 1.414
    }
    /// `n` numbers times `scale`, rounded to `dtype`.
    pub fn vector(&mut self, n: usize, scale: f64, dtype: DType) -> Vec<f64> {
        (0..n).map(|_| rounded(self.normal() * scale, dtype)).collect()
    }
    pub fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut v: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            v.swap(i, self.below(i + 1));
        }
        v
    }
    /// `n` of `stored` rows in order, both ends among them.
    pub fn picked(&mut self, stored: usize, n: usize) -> Vec<usize> {
        let mut list = self.shuffled(stored)[..n].to_vec();
        list.sort_unstable();
        list[0] = 0;
        list[n - 1] = stored - 1;
        list
    }
}

/// As `ActivateParams::kind` says.
pub fn activation(kind: u32, gate: f64, up: f64) -> f64 {
    match kind {
        0 => up.max(0.0),
        1 => gate / (1.0 + (-gate).exp()) * up,
        2 => gate.max(0.0) * up,
        _ => up,
    }
}

pub fn rounded(v: f64, dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => bf16::from_f64(v).to_f64(),
        DType::F16 => f16::from_f64(v).to_f64(),
        _ => f64::from(v as f32),
    }
}

pub fn bytes16(v: &[f64], dtype: DType) -> Vec<u8> {
    v.iter()
        .flat_map(|&x| match dtype {
            DType::BF16 => bf16::from_f64(x).to_le_bytes(),
            _ => f16::from_f64(x).to_le_bytes(),
        })
        .collect()
}

/// A device whose memory lives as long as the case.
pub struct Bench {
    pub device: Box<dyn Device>,
    /// See [`Host::late`]; means nothing on a GPU.
    pub late: Late,
}

/// Operators launch on the device's one stream.
impl Launcher for Bench {
    fn start(&self, launch: &Launch, params: &[u8], _: bool) -> polar_sparsity::Result<()> {
        self.device.start(launch, params)
    }
}

thread_local! {
    static RACES: Cell<bool> = Cell::new(std::env::var_os("POLAR_TEST_RACES").is_some());
}

/// Runs a case on the executor with the race detector, which fails at the first race of a kernel.
pub fn with_races(case: fn()) {
    let before = RACES.replace(true);
    case();
    RACES.set(before);
}

impl Bench {
    pub fn new(seed: u32) -> Bench {
        #[cfg(feature = "cuda")]
        if !RACES.get()
            && let Some(device) = gpu::chosen()
        {
            return Bench { device, late: Late::default() };
        }
        let device = Host::new();
        device.seed.store(seed, Ordering::Relaxed);
        device.races.store(RACES.get(), Ordering::Relaxed);
        let late = Late::clone(&device.late);
        Bench { device: Box::new(device), late }
    }
    /// Memory full of NaN.
    pub fn room(&self, bytes: usize) -> Ptr {
        let at = self.device.alloc(bytes as u64).unwrap();
        self.device.copy_in(at, &vec![0xff; bytes]).unwrap();
        at
    }
    pub fn raw(&self, bytes: &[u8]) -> Ptr {
        let at = self.room(bytes.len());
        self.device.copy_in(at, bytes).unwrap();
        at
    }
    pub fn half(&self, v: &[f64], dtype: DType) -> Ptr {
        self.raw(&bytes16(v, dtype))
    }
    pub fn floats(&self, v: &[f64]) -> Ptr {
        self.raw(&v.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect::<Vec<_>>())
    }
    pub fn words(&self, v: &[u32]) -> Ptr {
        self.raw(&v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
    }
    pub fn start<P: Params>(&self, launch: &Launch, params: &P) {
        device::start(&*self.device, launch, params).unwrap();
    }
    pub fn bytes(&self, at: Ptr, n: usize) -> Vec<u8> {
        let mut out = vec![0; n];
        self.device.copy_out(&mut out, at).unwrap();
        out
    }
    pub fn read_half(&self, at: Ptr, n: usize, dtype: DType) -> Vec<f64> {
        let bytes = self.bytes(at, 2 * n);
        bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| {
                if dtype == DType::BF16 {
                    bf16::from_le_bytes(b).to_f64()
                } else {
                    f16::from_le_bytes(b).to_f64()
                }
            })
            .collect()
    }
    pub fn read_floats(&self, at: Ptr, n: usize) -> Vec<f64> {
        self.bytes(at, 4 * n).as_chunks::<4>().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect()
    }
    pub fn read_words(&self, at: Ptr, n: usize) -> Vec<u32> {
        self.bytes(at, 4 * n).as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
    }
}

/// `||a - b|| / ||b||` within `limit`; NaN never passes.
#[track_caller]
pub fn close(a: &[f64], b: &[f64], limit: f64, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let (mut error, mut size) = (0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        error += (x - y) * (x - y);
        size += y * y;
    }
    let relative = (error / f64::max(size, 1e-300)).sqrt();
    assert!(relative <= limit, "{what}: error {relative:.2e}, allowed {limit:.0e}");
}
