//! The machine's read stream: what every figure of a memory-bound step is a share of. It is read as
//! the library reads weights: huge pages, the widest vectors, several streams per thread.

use polar_sparsity::sys::alloc::Buf;
use std::hint::black_box;
use std::time::Instant;

/// Bytes read once per try: far more than any cache.
const BYTES: usize = 1 << 30;

/// The memory that is read.
pub struct Ceiling(Buf<u64>);

impl Ceiling {
    pub fn new() -> Ceiling {
        let mut data = Buf::<u64>::zeroed(BYTES / 8, "ceiling").expect("1 GiB");
        data.fill(0x0101_0101_0101_0101);
        Ceiling(data)
    }

    /// GB/s of the best of several passes with `threads` threads, each its own part, as one stream
    /// and as eight. Measured anew beside each figure: other guests of a machine come and go.
    pub fn read_gbps(&self, threads: u32) -> f64 {
        let part = self.0.len().div_ceil(threads as usize);
        let mut best = f64::MAX;
        for pass in 0..6 {
            let start = Instant::now();
            std::thread::scope(|scope| {
                for chunk in self.0.chunks(part) {
                    let streams = if pass % 2 == 0 { 1 } else { 8 };
                    scope.spawn(move || black_box(sum(chunk, streams)));
                }
            });
            best = best.min(start.elapsed().as_secs_f64());
        }
        BYTES as f64 / best / 1e9
    }
}

fn sum(chunk: &[u64], streams: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature is there.
            return unsafe { sum_avx512(chunk, streams) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature is there.
            return unsafe { sum_avx2(chunk, streams) };
        }
    }
    add(chunk, streams)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(chunk: &[u64], streams: usize) -> u64 {
    add(chunk, streams)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(chunk: &[u64], streams: usize) -> u64 {
    add(chunk, streams)
}

/// 64 independent sums, so that the adds never wait for each other.
#[inline(always)]
fn add(chunk: &[u64], streams: usize) -> u64 {
    let mut sums = [0u64; 64];
    let length = chunk.len() / streams / 64 * 64;
    for at in (0..length).step_by(64) {
        for stream in 0..streams {
            for (s, x) in sums.iter_mut().zip(&chunk[stream * length + at..][..64]) {
                *s = s.wrapping_add(*x);
            }
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}
