//! Stages of the CPU backend on models larger than any cache, against this machine's read stream.
//!
//! `cargo bench --bench kernels [filter]`. Times are the least of several runs: other work on the
//! machine only ever makes them longer. Compare within one run.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints, and stops at errors")]

#[path = "../tests/rig/mod.rs"]
mod rig;

use polar_sparsity::backend::cpu::Isa;
use polar_sparsity::backend::{Backend, Limits, Live, WeightOptions};
use polar_sparsity::dtype::DType;
use polar_sparsity::model::ModelSpec;
use polar_sparsity::sparsity::{MlpMode, Options, SeqSetting};
use rig::specs::{llama, opt};
use rig::synthetic::{Synthetic, routers};
use rig::{DENSE, Rig, Setup};
use std::hint::black_box;
use std::time::{Duration, Instant};

fn least(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    (0..runs)
        .map(|_| {
            let t = Instant::now();
            f();
            t.elapsed()
        })
        .min()
        .unwrap_or(Duration::MAX)
        .as_secs_f64()
}

/// The same in processor time of this thread, where the system tells it: what a busy machine takes
/// away does not count.
fn least_cpu(runs: usize, mut f: impl FnMut()) -> f64 {
    let used = || -> Option<f64> {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    };
    f();
    let mut best = f64::INFINITY;
    for _ in 0..runs {
        let (wall, cpu) = (Instant::now(), used());
        f();
        let wall = wall.elapsed().as_secs_f64();
        best = best.min(match (cpu, used()) {
            (Some(a), Some(b)) if b > a => (b - a) / 1e9,
            _ => wall,
        });
    }
    best
}

/// GB/s of a plain sum over 512 MB.
fn read_stream(threads: usize) -> f64 {
    let data = vec![1u64; 64 << 20];
    let t = least(5, || {
        std::thread::scope(|s| {
            for part in data.chunks(data.len() / threads) {
                s.spawn(move || {
                    let mut sums = [0u64; 32];
                    for c in part.chunks_exact(32) {
                        for i in 0..32 {
                            sums[i] = sums[i].wrapping_add(c[i]);
                        }
                    }
                    black_box(sums);
                });
            }
        });
    });
    (data.len() * 8) as f64 / t / 1e9
}

fn limits(context: usize, batch: usize) -> Limits {
    Limits { max_batch: batch, max_rows: 512, pages: batch * context.div_ceil(16), max_context: context }
}

/// Bytes of layer weights one decode step reads.
fn layer_bytes(s: &ModelSpec, element: usize) -> usize {
    let (d, f) = (s.hidden_size as usize, s.ffn_size as usize);
    let mlp = if s.activation.gated() { 3 } else { 2 } * d * f;
    s.num_layers as usize * (d * (2 * s.q_size() + 2 * s.kv_size()) + mlp) * element
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let run = |name: &str, f: &dyn Fn()| {
        if name.contains(&filter) {
            f();
        }
    };
    let threads = std::thread::available_parallelism().unwrap().get();
    let stream = read_stream(threads);
    println!("{threads} threads, read stream {stream:.1} GB/s, one thread {:.1}", read_stream(1));
    let decode = |name: &str, dtype, kept: Option<DType>, batch: usize| {
        let mut spec = llama(dtype, 4, 2048, (32, 8), 64, 8192);
        spec.tied_head = true;
        let options = WeightOptions { dtype: kept };
        let setup = Setup { threads, weights: options, limits: limits(64, 32), ..Setup::default() };
        let mut rig = Rig::new(&Synthetic::new(spec.clone()), &setup);
        let work: Vec<_> = (0..batch).map(|_| (rig.add(&[1; 64], DENSE), 1, true)).collect();
        rig.fill(&work);
        let t = least(9, || rig.go());
        let bytes = layer_bytes(&spec, kept.unwrap_or(dtype).size()) as f64;
        println!(
            "{name}: {:.2} ms, {:.1} GB/s of weights, {:.0} % of the stream",
            t * 1e3,
            bytes / t / 1e9,
            bytes / t / 1e7 / stream
        );
    };
    run("decode-bf16", &|| {
        for batch in [1, 2, 4, 8, 16, 32] {
            decode(&format!("decode bf16 batch {batch}"), DType::BF16, None, batch);
        }
    });
    run("decode-types", &|| {
        decode("decode f16 batch 1", DType::F16, None, 1);
        decode("decode f32 batch 1", DType::F32, None, 1);
        decode("decode i8 batch 1", DType::BF16, Some(DType::I8), 1);
        decode("decode i8 batch 8", DType::BF16, Some(DType::I8), 8);
    });
    run("prefill", &|| {
        for (name, dtype) in [("bf16", DType::BF16), ("f32", DType::F32), ("f16", DType::F16)] {
            for (what, spec) in
                [("llama", llama(dtype, 2, 2048, (32, 8), 64, 8192)), ("opt", opt(dtype, 2, 32, 64, 8192))]
            {
                for threads in [1, threads] {
                    let setup = Setup { threads, limits: limits(1024, 2), ..Setup::default() };
                    let mut rig = Rig::new(&Synthetic::new(spec.clone()), &setup);
                    let id = rig.add(&[1; 512], DENSE);
                    rig.fill(&[(id, 512, false)]);
                    let go = || rig.go();
                    let t = if threads == 1 { least_cpu(3, go) } else { least(3, go) };
                    let flop = 2.0 * 512.0 * layer_bytes(&spec, 1) as f64;
                    println!(
                        "prefill 512 {what} {name} {threads} threads: {:.0} ms, {:.0} GFLOP/s",
                        t * 1e3,
                        flop / t / 1e9
                    );
                }
            }
        }
    });
    run("attention", &|| attention(threads, stream));
    run("polar", &|| polar(threads));
    run("one-thread", &|| {
        for batch in [1, 4, 6, 8, 16, 32, 64] {
            let spec = llama(DType::BF16, 2, 2048, (32, 8), 64, 8192);
            let setup = Setup { threads: 1, limits: limits(64, 64), ..Setup::default() };
            let mut rig = Rig::new(&Synthetic::new(spec.clone()), &setup);
            let work: Vec<_> = (0..batch).map(|_| (rig.add(&[1; 64], DENSE), 1, true)).collect();
            rig.fill(&work);
            let t = least_cpu(9, || rig.go());
            let bytes = layer_bytes(&spec, 2) as f64;
            let (gb, gf) = (bytes / t / 1e9, bytes * batch as f64 / t / 1e9);
            println!("one thread, bf16 batch {batch}: {:.2} ms, {gb:.1} GB/s, {gf:.0} GFLOP/s", t * 1e3);
        }
    });
    run("isa", &|| {
        for isa in Isa::all() {
            let spec = llama(DType::BF16, 2, 2048, (32, 8), 64, 8192);
            let setup = Setup { isa, threads, limits: limits(1024, 2), ..Setup::default() };
            let mut rig = Rig::new(&Synthetic::new(spec.clone()), &setup);
            let id = rig.add(&[1; 512], DENSE);
            rig.fill(&[(id, 1, true)]);
            let one = least(3, || rig.go());
            rig.seqs[id].done = 0;
            rig.fill(&[(id, 128, false)]);
            let many = least(2, || rig.go());
            println!("{}: decode {:.1} ms, prefill 128 {:.1} ms", isa.name(), one * 1e3, many * 1e3);
        }
    });
}

/// The attention stage alone, dense and at half the heads.
fn attention(threads: usize, stream: f64) {
    for (name, heads, dim) in
        [("MHA 32x128", (32, 32), 128), ("GQA 32/8x128", (32, 8), 128), ("GQA 32/8x64", (32, 8), 64)]
    {
        for (batch, context) in [(1, 4096), (8, 2048), (4, 8192)] {
            // A narrow model: only the attention matters here.
            let mut spec = llama(DType::BF16, 2, 256, heads, dim, 256);
            spec.max_positions = 1 << 14;
            let file = routers(&spec, false, None, &[]);
            let setup =
                Setup { threads, routers: Some(&file), limits: limits(context, batch), ..Setup::default() };
            let mut rig = Rig::new(&Synthetic::new(spec), &setup);
            let tokens = vec![1; context];
            let mut time = [0.0; 2];
            let mut bytes = 0;
            for (i, density) in [1.0, 0.5].into_iter().enumerate() {
                let setting = SeqSetting { attn_density: Some(density), mlp: MlpMode::Dense };
                rig.seqs.clear();
                rig.free = (0..(batch * context / 16) as u32).rev().collect();
                let work: Vec<_> = (0..batch).map(|_| (rig.add(&tokens, setting), 1, true)).collect();
                for &(id, ..) in &work {
                    rig.seqs[id].done = context - 1;
                }
                rig.fill(&work);
                rig.go();
                bytes = rig.report.kv_bytes_dense / 2;
                let live = if i == 0 { Live::All } else { Live::Selected };
                time[i] = least(9, || {
                    rig.backend
                        .attend(&rig.weights, &mut rig.kv, &mut rig.scratch, &rig.step, 1, live)
                        .unwrap();
                });
            }
            println!(
                "attention {name} batch {batch} context {context}: {:.2} ms, {:.1} GB/s, {:.0} % of the stream; half the heads {:.2} of that",
                time[0] * 1e3,
                bytes as f64 / time[0] / 1e9,
                bytes as f64 / time[0] / 1e7 / stream,
                time[1] / time[0]
            );
        }
    }
}

/// Whole steps of an OPT-like model, dense and with 10 % of the neurons.
fn polar(threads: usize) {
    let spec = opt(DType::BF16, 2, 32, 128, 16384);
    let k = 16384 / 10;
    let file = routers(&spec, false, Some(1024), &[(1, k), (8, k)]);
    let setup = Setup {
        threads,
        routers: Some(&file),
        limits: limits(2048, 8),
        options: Options { attn_density: 1.0, ..Options::default() },
        ..Setup::default()
    };
    let mut rig = Rig::new(&Synthetic::new(spec), &setup);
    for batch in [1, 8] {
        let mut time = [0.0; 3];
        for (i, mlp) in [MlpMode::Dense, MlpMode::Reference, MlpMode::Invariant].into_iter().enumerate() {
            rig.seqs.clear();
            rig.free = (0..(8 * 2048 / 16) as u32).rev().collect();
            let setting = SeqSetting { attn_density: None, mlp };
            let work: Vec<_> = (0..batch).map(|i| (rig.add(&[i as u32 + 1; 64], setting), 1, true)).collect();
            rig.fill(&work);
            time[i] = least(9, || rig.go());
        }
        println!(
            "polar OPT d=4096 batch {batch}: dense {:.2} ms, 10 % shared {:.2} ms ({:.2}x), 10 % own {:.2} ms ({:.2}x)",
            time[0] * 1e3,
            time[1] * 1e3,
            time[0] / time[1],
            time[2] * 1e3,
            time[0] / time[2]
        );
    }
}
