//! The floors that `bench-gpu` prints beside whole steps: the sums behind them, which need no GPU.

#[path = "../benches/gpu/floor.rs"]
mod floor;
#[path = "rig/specs.rs"]
mod specs;

use floor::{Floor, Selective, terms};

/// Of no GPU; the ridge is at 200 flops per byte.
const READ: f64 = 4.0;
const ARITHMETIC: f64 = 800.0;

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * b.abs(), "{a} and {b}");
}

#[test]
fn terms_are_the_whole_model_but_its_embedding() {
    // LLaMA-3.1-8B has 8,030,261,248 parameters, 65 norms of 4096 among them.
    let llama = specs::named("llama-3.1-8b");
    let weights = 2.0 * 8_030_261_248.0;
    let t = terms(&llama, 1, (weights, 1e9), None);
    close(t[6].bytes, 2.0 * 65.0 * 4096.0);
    close(t.iter().map(|t| t.bytes).sum(), weights - 2.0 * 128_256.0 * 4096.0 + 1e9);
    // Four query heads share a KV head, so each number of the cache is multiplied and added four times.
    close(t[5].flops, 4e9);

    // OPT-6.7B: the head is the embedding. The sparse step lacks neurons and has routers.
    let opt = specs::named("opt-6.7b");
    let sum = |mlp| terms(&opt, 8, (13.3e9, 2e9), mlp).iter().map(|t| t.bytes).sum::<f64>();
    close(sum(None), 15.3e9);
    let mlp = 32.0 * 2.0 * 4096.0 * 16_384.0 * 2.0;
    let routers = 32.0 * 1024.0 * (4096.0 + 16_384.0) * 2.0;
    close(sum(Some(Selective { kept: 0.29, rank: 1024 })), 15.3e9 - 0.71 * mlp + routers);
}

#[test]
fn a_small_batch_is_bound_by_bytes_alone() {
    for (name, mlp) in [("llama-3.1-8b", None), ("opt-6.7b", Some(Selective { kept: 0.5, rank: 1024 }))] {
        let t = terms(&specs::named(name), 128, (16.1e9, 5e9), mlp);
        let floor = Floor::new(&t, READ, Some(ARITHMETIC));
        assert_eq!(floor.roof, Some(floor.bytes));
        close(floor.bytes, t.iter().map(|t| t.bytes).sum::<f64>() / 4e9);
    }
}

#[test]
fn a_large_batch_is_bound_by_the_arithmetic_of_its_products() {
    let t = terms(&specs::named("llama-3.1-8b"), 256, (16.1e9, 5e9), None);
    let floor = Floor::new(&t, READ, Some(ARITHMETIC));
    // 256 flops per byte of a matrix; attention and the norms still read.
    let matrices: f64 = t[..5].iter().map(|t| t.bytes).sum();
    close(floor.roof.unwrap(), (matrices * 256.0 / 200.0 + t[5].bytes + t[6].bytes) / 4e9);
    // Without a measured rate there is no roofline; the bytes' floor is the same.
    let bytes = Floor::new(&t, READ, None);
    assert!(bytes.roof.is_none());
    assert_eq!(bytes.bytes, floor.bytes);
}
