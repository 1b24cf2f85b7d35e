//! Every kernel on every instruction set of this machine.

use super::*;

/// Gigabytes of weights and gigaflops per second of processor time, by rows. Not a test: run it
/// with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
#[allow(clippy::print_stderr, reason = "a measurement")]
fn speed_of_dots() {
    let used = || -> f64 {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
    };
    let isa = Isa::best();
    for k in [2048usize, 4096] {
        let n = (128 << 20) / 2 / k;
        let mut w = crate::sys::alloc::Buf::<u16>::zeroed(n * k, "test").unwrap();
        // Written, or all of it would be one shared page of zeros.
        w.fill(0x3f80);
        for rows in [1usize, 2, 4, 6, 8, 12, 16, 32, 64, 96] {
            let x = crate::sys::alloc::Buf::<u16>::zeroed(rows * k, "test").unwrap();
            let block = 64;
            let mut out = vec![0.0; rows * block];
            let mut best = f64::INFINITY;
            for _ in 0..5 {
                // The clock ticks every few milliseconds: start at a tick.
                let mut t = used();
                let first = t;
                while t == first {
                    t = used();
                }
                for o in (0..n).step_by(block) {
                    dots(
                        isa,
                        (Acts::Bf16(&x), k),
                        Pick::Range(0, rows),
                        (Rows::Bf16(&w), k),
                        Pick::Range(o, block),
                        k,
                        &mut out,
                        block,
                    );
                }
                best = best.min(used() - t);
            }
            let bytes = (n * k * 2) as f64;
            eprintln!(
                "k {k} rows {rows}: {:.1} GB/s {:.0} GFLOP/s",
                bytes / best / 1e9,
                bytes * rows as f64 / best / 1e9
            );
        }
    }
}
