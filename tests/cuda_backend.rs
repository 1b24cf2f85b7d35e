//! The whole CUDA backend against transformers' logits and the CPU backend, its kernels run by the
//! host executor: every family, chunked prompts beside decoding rows, every sparse mode, recorded
//! steps. With the feature `cuda` and POLAR_TEST_GPU=1 the same cases run on the first GPU.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

#[cfg(feature = "cuda")]
#[path = "cuda_kernels/gpu.rs"]
mod gpu;
#[path = "support/host_device.rs"]
mod host_device;
mod rig;

use polar_sparsity::backend::cuda::Cuda;
use polar_sparsity::backend::cuda::device::{AnyDevice, Device};
use polar_sparsity::dtype::DType;
use polar_sparsity::format::{Limits as FileLimits, Shards, TensorSource};
use polar_sparsity::model::{Checkpoint, Weights, load};
use polar_sparsity::sparsity::{MlpMode, Options, RouterFile, SeqSetting, Source};
use rig::{DENSE, LIMITS, Rig, Setup};
use std::path::PathBuf;
use std::sync::Arc;

fn device() -> AnyDevice {
    #[cfg(feature = "cuda")]
    if let Some(device) = gpu::chosen() {
        return AnyDevice(device);
    }
    AnyDevice(Box::new(host_device::Host::new()))
}

fn cuda() -> Cuda<AnyDevice> {
    Cuda::new(Arc::new(device()), true)
}

struct Golden {
    name: String,
    dir: PathBuf,
    facts: serde_json::Value,
    arrays: Shards,
    model: Checkpoint,
}

impl Golden {
    fn open(name: &str) -> Golden {
        let dir = host_device::root().join("tests/data/golden").join(name);
        let facts = std::fs::read_to_string(dir.join("golden.json")).unwrap();
        Golden {
            name: name.into(),
            facts: serde_json::from_str(&facts).unwrap(),
            arrays: Shards::open(&dir.join("golden.safetensors"), &FileLimits::default()).unwrap(),
            model: load(&dir, &FileLimits::default()).unwrap(),
            dir,
        }
    }
    fn tokens(&self, prompt: usize, what: &str) -> Vec<u32> {
        let list = self.facts["prompts"][prompt][what].as_array().unwrap();
        list.iter().map(|v| v.as_u64().unwrap() as u32).collect()
    }
    fn floats(&self, name: &str) -> Vec<f32> {
        let info = self.arrays.info(name).unwrap();
        let mut bytes = vec![0; info.shape.checked_bytes(info.dtype).unwrap()];
        self.arrays.read(name, 0, &mut bytes).unwrap();
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
    fn routers(&self) -> RouterFile {
        let path = self.dir.join("routers.safetensors");
        let spec = self.model.spec();
        RouterFile::open(&path, &FileLimits::default(), spec, self.model.fingerprint(), false).unwrap()
    }
}

/// `||got - want|| / ||want||`.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (error / want.iter().map(|&w| square(w)).sum::<f64>()).sqrt()
}

/// Allowed distance from logits in f32: activations are rounded to 16 bits.
fn tolerance(dtype: DType) -> f64 {
    // Models stored in f32 have their weights rounded as well.
    match dtype {
        DType::F16 => 4e-3,
        DType::BF16 => 3e-2,
        _ => 5e-2,
    }
}

/// Prompts whole and in chunks beside decoding rows, then decode steps, against transformers.
fn dense(name: &str) {
    let g = Golden::open(name);
    let vocab = g.model.spec().vocab_size as usize;
    let mut rig = Rig::on(cuda(), &g.model, &Setup::default());
    let limit = tolerance(g.model.spec().dtype);
    let mut worst = 0.0f64;
    let mut lengths = vec![];
    for p in 0..3 {
        let mut tokens = g.tokens(p, "tokens");
        lengths.push((tokens.len(), g.tokens(p, "forced").len()));
        tokens.extend(g.tokens(p, "forced"));
        rig.add(&tokens, DENSE);
    }
    let mut check = |got: &[f32], want: &[f32], what: &str| {
        let d = distance(got, want);
        worst = worst.max(d);
        assert!(d <= limit, "{name} {what}: {d:.2e}, allowed {limit:.0e}");
    };
    let last = |p: usize| {
        let all = g.floats(&format!("p{p}.prefill_logits_f32"));
        all[all.len() - vocab..].to_vec()
    };
    let step = |p: usize, s: usize| {
        let all = g.floats(&format!("p{p}.decode_logits_f32"));
        all[s * vocab..(s + 1) * vocab].to_vec()
    };
    // Prompt 0 whole; then it decodes while prompts 1 and 2 come in chunks.
    let got = rig.run(&[(0, lengths[0].0, false)]);
    check(&got[0], &last(0), "prompt 0");
    let (a, b) = (lengths[1].0 / 2, lengths[2].0 / 3);
    let got = rig.run(&[(0, 1, true), (1, a, false), (2, b, false)]);
    check(&got[0], &step(0, 0), "decode 0");
    let got = rig.run(&[(0, 1, true), (2, lengths[2].0 - b, false), (1, lengths[1].0 - a, false)]);
    check(&got[0], &step(0, 1), "decode 1");
    check(&got[1], &last(2), "prompt 2");
    check(&got[2], &last(1), "prompt 1");
    let steps = lengths.iter().map(|l| l.1).min().unwrap();
    // The third and later of these are replays of a recorded step.
    for s in 0..steps.saturating_sub(2).min(4) {
        let got = rig.run(&[(0, 1, true), (1, 1, true), (2, 1, true)]);
        check(&got[0], &step(0, s + 2), "batch, 0");
        check(&got[1], &step(1, s), "batch, 1");
        check(&got[2], &step(2, s), "batch, 2");
        let best = |v: &[f32]| (0..v.len()).fold(0, |b, i| if v[i] > v[b] { i } else { b });
        for (row, got) in got.iter().enumerate() {
            assert_eq!(rig.report.sampled[row].token as usize, best(got), "greedy token");
        }
    }
    eprintln!("{name}: {worst:.2e} of {limit:.0e}");
}

#[test]
fn llama_group_one() {
    dense("llama2_f32");
}

#[test]
fn llama_bf16_padded_heads() {
    dense("llama31_bf16");
}

#[test]
fn llama_tied_head_size_twelve() {
    dense("llama32_tied_f32");
}

#[test]
fn llama_biases_and_odd_head_size() {
    dense("llama_bias_f32");
    dense("llama_headdim_f32");
}

#[test]
fn llama_f16_head_size_128() {
    dense("llama_f16");
}

#[test]
fn mistral_window() {
    dense("mistral_window_f32");
}

#[test]
fn opt_learned_positions() {
    dense("opt_f16");
    dense("opt_bf16");
}

#[test]
fn qwen2_biases() {
    dense("qwen2_bf16");
}

#[test]
fn qwen3_head_norms() {
    dense("qwen3_bf16");
    dense("qwen3_f32");
}

/// Sparse steps against the CPU backend. Selections may differ where scores nearly tie, since the
/// router's input is rounded to 16 bits here (these routers' margins go down to 4e-4): so most rows
/// must be near the CPU's sparse ones, and all together far nearer to those than to dense ones.
fn sparse(name: &str, density: f32, modes: [MlpMode; 3], source: Source) {
    let g = Golden::open(name);
    let file = g.routers();
    let options = Options { mlp_dense_above: 1.0, source, ..Options::default() };
    let setup = Setup { routers: Some(&file), options, ..Setup::default() };
    let mut gpu = Rig::on(cuda(), &g.model, &setup);
    let mut cpu = Rig::new(&g.model, &setup);
    let mut whole = Rig::new(&g.model, &setup);
    let mut rounds = 0;
    for (p, &mlp) in modes.iter().enumerate() {
        let mut tokens = g.tokens(p, "tokens");
        let n = tokens.len();
        tokens.extend(g.tokens(p, "forced"));
        let setting = SeqSetting { attn_density: Some(density), mlp };
        for id in [gpu.add(&tokens, setting), cpu.add(&tokens, setting)] {
            assert_eq!(id, p);
        }
        whole.add(&tokens, DENSE);
        gpu.run(&[(p, n, false)]);
        cpu.run(&[(p, n, false)]);
        whole.run(&[(p, n, false)]);
        rounds = if p == 0 { tokens.len() - n } else { rounds.min(tokens.len() - n) };
    }
    let (mut near, mut far, mut to_sparse, mut to_dense) = (0, 0, 0.0, 0.0);
    let neurons = modes.iter().any(|m| *m != MlpMode::Dense);
    for _ in 0..rounds.min(6) {
        let work = [(0, 1, true), (1, 1, true), (2, 1, true)];
        let (a, b, c) = (gpu.run(&work), cpu.run(&work), whole.run(&work));
        for i in 0..3 {
            let d = distance(&a[i], &b[i]);
            to_sparse += d;
            to_dense += distance(&a[i], &c[i]);
            if d <= if neurons { 0.1 } else { 3e-2 } { near += 1 } else { far += 1 }
        }
        assert_eq!(gpu.report.counts, cpu.report.counts);
        assert!(gpu.report.kv_bytes_read <= gpu.report.kv_bytes_dense);
        if density < 1.0 {
            assert!(gpu.report.kv_bytes_read < gpu.report.kv_bytes_dense);
        }
    }
    eprintln!("distance to sparse {to_sparse:.3}, to dense {to_dense:.3}");
    assert!(to_sparse * 3.0 < to_dense, "{name} {modes:?}: {to_sparse} {to_dense}");
    eprintln!("{name} {density} {modes:?}: {near} rows agree, {far} chose differently");
    assert!(near > 0 && far * 3 <= near, "{name} {modes:?}: {near} rows agree, {far} differ");
}

#[test]
fn sparse_attention_follows_the_cpu() {
    sparse("llama31_f32", 0.5, [MlpMode::Dense; 3], Source::Router);
    sparse("qwen2_f32", 0.5, [MlpMode::Dense; 3], Source::Router);
    sparse("opt_f32", 0.5, [MlpMode::Dense; 3], Source::Router);
}

/// The router's sums come from a product of their own where the projection is the library's or takes
/// more rows than the skinny products; either way the decoding rows keep the same heads.
#[test]
fn sparse_attention_beside_prompts_of_any_length() {
    for (name, library) in [("llama31_f32", false), ("llama31_f32", true), ("qwen2_f32", true)] {
        let g = Golden::open(name);
        let file = g.routers();
        let options = Options { source: Source::Router, ..Options::default() };
        let setup = Setup { routers: Some(&file), options, ..Setup::default() };
        let make = |library| {
            let mut device = host_device::Host::new();
            device.library = library;
            Rig::on(Cuda::new(Arc::new(AnyDevice(Box::new(device))), true), &g.model, &setup)
        };
        let (mut alone, mut beside) = (make(false), make(library));
        for p in 0..3 {
            let mut tokens = g.tokens(p, "tokens");
            let n = tokens.len();
            tokens.extend(g.tokens(p, "forced"));
            let setting = SeqSetting { attn_density: Some(0.5), mlp: MlpMode::Dense };
            alone.add(&tokens, setting);
            beside.add(&tokens, setting);
            if p < 2 {
                alone.run(&[(p, n, false)]);
                beside.run(&[(p, n, false)]);
            }
        }
        // 3, 42 and 47 rows; then 90 of a prompt that starts again.
        let mut again = g.tokens(2, "tokens");
        again.extend(g.tokens(2, "forced"));
        let id = beside.add(&again, DENSE);
        for (p, chunk) in [(2, 1), (2, 40), (2, 45), (id, 90)] {
            let a = alone.run(&[(0, 1, true), (1, 1, true)]);
            let b = beside.run(&[(0, 1, true), (1, 1, true), (p, chunk, false)]);
            assert_eq!(alone.report.counts[..2], beside.report.counts[..2]);
            for i in 0..2 {
                let d = distance(&b[i], &a[i]);
                assert!(d <= 1e-2, "{name}, library {library}, {chunk} rows beside: {d:.2e}");
            }
        }
    }
}

#[test]
fn random_attention_follows_the_cpu() {
    sparse("llama31_f32", 0.5, [MlpMode::Dense; 3], Source::Random { seed: 5 });
}

#[test]
fn sparse_mlp_follows_the_cpu() {
    use MlpMode::{Dense, Invariant, Reference};
    sparse("opt_f32", 1.0, [Reference; 3], Source::Router);
    sparse("opt_f32", 0.5, [Reference, Dense, Invariant], Source::Router);
    sparse("opt_f32", 1.0, [Invariant; 3], Source::Router);
}

#[test]
fn loading_can_be_stopped() {
    use polar_sparsity::backend::{Backend, WeightOptions};
    let (g, cuda) = (Golden::open("llama31_bf16"), cuda());
    let stopped = cuda.upload(&g.model, WeightOptions::default(), &mut |_, _| 1);
    assert_eq!(stopped.err().unwrap().status, polar_sparsity::Status::E_CANCELLED);
    assert!(cuda.device().multiprocessors() > 0);
    assert_eq!(LIMITS.max_batch, 16);
}
