//! The machine's read stream: what every figure of a memory-bound step is a share of.

use std::hint::black_box;
use std::time::Instant;

/// Bytes read once per try: far more than any cache.
const BYTES: usize = 1 << 30;

/// GB/s of the best of several passes over 1 GiB with `threads` threads, each its own part.
pub fn read_gbps(threads: u32) -> f64 {
    let data = vec![0x0101_0101_0101_0101u64; BYTES / 8];
    let part = data.len().div_ceil(threads as usize);
    let mut best = f64::MAX;
    for _ in 0..7 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for chunk in data.chunks(part) {
                scope.spawn(move || black_box(sum(chunk)));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    BYTES as f64 / best / 1e9
}

/// Eight independent sums, so that the adds never wait for each other.
fn sum(chunk: &[u64]) -> u64 {
    let mut sums = [0u64; 64];
    for block in chunk.as_chunks::<64>().0 {
        for (s, x) in sums.iter_mut().zip(block) {
            *s = s.wrapping_add(*x);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}
