//! The whole CUDA backend against transformers' logits and the CPU backend, its kernels run by the
//! host executor: every family, chunked prompts beside decoding rows, every sparse mode, recorded
//! steps. With the feature `cuda` and POLAR_TEST_GPU=1 the same cases run on the first GPU.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

#[cfg(feature = "cuda")]
#[path = "cuda_kernels/gpu.rs"]
mod gpu;
#[path = "support/halved.rs"]
mod halved;
#[path = "support/host_device.rs"]
mod host_device;
mod rig;

use polar_sparsity::backend::cuda::Cuda;
use polar_sparsity::backend::cuda::device::{AnyDevice, Device};
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::line::{Beside, Worker};
use polar_sparsity::backend::cuda::tuning::Tuning;
use polar_sparsity::backend::{Backend, Limits};
use polar_sparsity::dtype::DType;
use polar_sparsity::format::{Limits as FileLimits, Shards, TensorSource};
use polar_sparsity::model::{Checkpoint, Weights, load};
use polar_sparsity::sample::{self, Params};
use polar_sparsity::sparsity::{MlpMode, Options, RouterFile, SeqSetting, Source};
use rig::{DENSE, LIMITS, Rig, Setup, distance};
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
    /// What chooses neurons in 16 bits: stored in more, the CPU backend would keep it so, and near ties fall otherwise.
    fn routers(&self) -> RouterFile {
        let limits = FileLimits::default();
        let file = halved::Halved(Shards::open(&self.dir.join("routers.safetensors"), &limits).unwrap());
        RouterFile::new(Box::new(file), &limits, self.model.spec(), self.model.fingerprint(), false).unwrap()
    }
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

/// Above 64 sequences the router's product is turned round: the heads are those of small batches.
#[test]
fn sparse_attention_of_many_sequences() {
    for (name, library) in [("llama31_f32", false), ("opt_f32", true)] {
        let g = Golden::open(name);
        let file = g.routers();
        let limits = Limits { max_batch: 70, max_rows: 256, pages: 80, max_context: 64 };
        let setup = Setup { routers: Some(&file), limits, ..Setup::default() };
        let make = || {
            let mut device = host_device::Host::new();
            device.library = library;
            Rig::on(Cuda::new(Arc::new(AnyDevice(Box::new(device))), true), &g.model, &setup)
        };
        let (mut few, mut many) = (make(), make());
        let lengths: Vec<usize> = (0..66).map(|i| 2 + i % 3).collect();
        for rig in [&mut few, &mut many] {
            for (i, n) in lengths.iter().enumerate() {
                let setting = SeqSetting { attn_density: Some(0.5), mlp: MlpMode::Dense };
                let mut tokens = g.tokens(i % 3, "tokens");
                tokens.extend(g.tokens(i % 3, "forced"));
                rig.add(&tokens[i % 4..i % 4 + n + 1], setting);
            }
            let prompts: Vec<_> = lengths.iter().enumerate().map(|(i, &n)| (i, n, false)).collect();
            rig.run(&prompts);
        }
        let all: Vec<_> = (0..lengths.len()).map(|i| (i, 1, true)).collect();
        let together = many.run(&all);
        for (part, got) in all.chunks(22).zip(together.chunks(22)) {
            let alone = few.run(part);
            let first = part[0].0;
            assert_eq!(few.report.counts, many.report.counts[first..first + part.len()]);
            for (i, (a, b)) in alone.iter().zip(got).enumerate() {
                let d = distance(b, a);
                assert!(d <= 1e-2, "{name}, library {library}, sequence {}: {d:.2e}", first + i);
            }
        }
    }
}

#[test]
fn attention_of_equal_lengths_by_each_kind_of_worker() {
    let g = Golden::open("llama31_f32");
    let file = g.routers();
    let limits = Limits { max_batch: 4, max_rows: 8, pages: 32, max_context: 256 };
    let setup = Setup { routers: Some(&file), limits, ..Setup::default() };
    let setting = SeqSetting { attn_density: Some(0.5), mlp: MlpMode::Dense };
    let lengths = [199, 207];
    let kinds = [
        (true, true, (Worker::Large, 4, 13)),
        (false, false, (Worker::Small, 11, 0)),
        (false, true, (Worker::Cluster { blocks: 4, most: 4 }, 4, 13)),
    ];
    let steps = kinds.map(|(large, clusters, expected)| {
        let mut host = host_device::Host::new();
        host.multiprocessors = 16;
        let tuning = Tuning { large, clusters, ..Tuning::default() };
        let mut kernels = Kernels::for_device(DType::BF16, 64, 4, &host).unwrap();
        kernels.tuning = tuning;
        // All heads, as layer 0 has them.
        let line = kernels.line(lengths.iter().map(|&n: &usize| (2, n.div_ceil(16) as u32)), Beside::Nothing);
        assert_eq!((line.worker, line.workers, line.pages), expected);
        let mut rig =
            Rig::on(Cuda::new(Arc::new(AnyDevice(Box::new(host))), true).tuned(tuning), &g.model, &setup);
        for (id, n) in lengths.into_iter().enumerate() {
            rig.add(&g.tokens(2, "tokens").into_iter().cycle().take(n + 3).collect::<Vec<_>>(), setting);
            rig.seqs[id].done = n;
        }
        rig.backend.fill_random(&rig.weights, &mut rig.kv).unwrap();
        [0, 1].map(|_| (rig.run(&[(0, 1, true), (1, 1, true)]), rig.report.counts.clone()))
    });
    for other in &steps[1..] {
        for (large, other) in steps[0].iter().zip(other) {
            assert_eq!(large.1, other.1);
            for (a, b) in large.0.iter().zip(&other.0) {
                let d = distance(b, a);
                assert!(d <= 1e-2, "{d:.2e}");
            }
        }
    }
}

/// GPUs before and after compute capability 9.0 have other products.
#[test]
fn a_gpu_without_warpgroups_computes_the_same() {
    let g = Golden::open("opt_f32");
    let file = g.routers();
    let options = Options { mlp_dense_above: 1.0, ..Options::default() };
    let setup = Setup { routers: Some(&file), options, ..Setup::default() };
    let make = |warpgroups| {
        let mut device = host_device::Host::new();
        device.warpgroups = warpgroups;
        Rig::on(Cuda::new(Arc::new(AnyDevice(Box::new(device))), true), &g.model, &setup)
    };
    let (mut with, mut without) = (make(true), make(false));
    let settings = [DENSE, SeqSetting { attn_density: Some(0.5), mlp: MlpMode::Reference }];
    for setting in settings {
        for p in 0..2 {
            let mut tokens = g.tokens(p, "tokens");
            let n = tokens.len();
            tokens.extend(g.tokens(p, "forced"));
            for rig in [&mut with, &mut without] {
                let id = rig.add(&tokens, setting);
                rig.run(&[(id, n, false)]);
            }
        }
    }
    for pair in [[0, 1], [2, 3]] {
        let step = pair.map(|id| (id, 1, true));
        for _ in 0..3 {
            let (a, b) = (with.run(&step), without.run(&step));
            assert_eq!(with.report.counts, without.report.counts);
            for (a, b) in a.iter().zip(&b) {
                let d = distance(b, a);
                assert!(d <= 1e-2, "{pair:?}: {d:.2e}");
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

/// Sparse steps with the side work run at other times: whoever reads before the join, or shares a buffer
/// between the two, gets other bits. Three of the steps are replays of a recorded one.
#[test]
fn side_work_may_run_at_any_time_before_the_join() {
    let g = Golden::open("opt_f32");
    let file = g.routers();
    let options = Options { mlp_dense_above: 1.0, ..Options::default() };
    let setup = Setup { routers: Some(&file), options, ..Setup::default() };
    let run = |seed: u32, tuning: Tuning| {
        let host = host_device::Host::new();
        host.seed.store(seed, std::sync::atomic::Ordering::Relaxed);
        let cuda = Cuda::new(Arc::new(AnyDevice(Box::new(host))), true).tuned(tuning);
        let mut rig = Rig::on(cuda, &g.model, &setup);
        for p in 0..3 {
            let mut tokens = g.tokens(p, "tokens");
            let n = tokens.len();
            tokens.extend(g.tokens(p, "forced"));
            rig.add(&tokens, SeqSetting { attn_density: Some(0.5), mlp: MlpMode::Reference });
            rig.run(&[(p, n, false)]);
        }
        let step = |rig: &mut Rig<_>| rig.run(&[(0, 1, true), (1, 1, true), (2, 1, true)]);
        (0..4).map(|_| step(&mut rig)).collect::<Vec<_>>()
    };
    let first = run(0, Tuning::default());
    for seed in 1..3 {
        assert!(run(seed, Tuning::default()) == first, "seed {seed}");
    }
    let serial = Tuning { beside: false, ..Tuning::default() };
    assert!(run(0, serial) == first, "all in one stream");
    for made in [false, true] {
        let apart = Tuning { activated: false, made, ..Tuning::default() };
        assert!(run(1, apart) == run(2, apart), "activation by {}", if made { "down" } else { "itself" });
    }
}

/// A step that fails after the fork leaves neither side work nor a recording behind.
#[test]
fn a_step_that_fails_half_way_leaves_nothing_open() {
    let g = Golden::open("opt_f32");
    let file = g.routers();
    let options = Options { mlp_dense_above: 1.0, ..Options::default() };
    let setup = Setup { routers: Some(&file), options, ..Setup::default() };
    let mut tokens = g.tokens(0, "tokens");
    let n = tokens.len();
    tokens.extend(g.tokens(0, "forced"));
    let run = |failing: &[usize]| {
        let mut rig = Rig::on(cuda(), &g.model, &setup);
        rig.add(&tokens, SeqSetting { attn_density: Some(1.0), mlp: MlpMode::Reference });
        let mut out = vec![rig.run(&[(0, n, false)])];
        for step in 0..4 {
            rig.fill(&[(0, 1, true)]);
            if failing.contains(&step) {
                let routers = rig.routers.take();
                assert!(rig.try_go().is_err(), "neurons without routers");
                rig.routers = routers;
            }
            rig.go();
            let mut logits = vec![0.0; g.model.spec().vocab_size as usize];
            rig.backend.read_logits(&mut rig.scratch, 0, &mut logits).unwrap();
            out.push(vec![logits]);
        }
        out
    };
    // Step 0 runs as it comes, step 1 is recorded, step 2 a replay (which does not ask for routers).
    let whole = run(&[]);
    assert!(run(&[0]) == whole, "after a failure while running");
    assert!(run(&[1]) == whole, "after a failure while recording");
}

/// Every kind of request in one batch, tokens fed back, parameters changing between replays of a
/// recorded step: what comes back must be what the shared sampler makes of the logits.
#[test]
fn a_mixed_batch_is_sampled_as_on_the_host() {
    let g = Golden::open("llama31_bf16");
    let vocab = g.model.spec().vocab_size as usize;
    let mut rig = Rig::on(cuda(), &g.model, &Setup::default());
    let warm = Params { temperature: 1.3, ..Params::GREEDY };
    let penalised = Params {
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.2,
        n_logprobs: 3,
        ..Params::GREEDY
    };
    let all = [
        Params::GREEDY,
        warm,
        Params { top_k: 9, n_logprobs: 20, ..warm },
        Params { top_p: 0.8, seed: 7, ..warm },
        penalised,
        Params { top_k: 30, top_p: 0.9, min_p: 0.01, temperature: 0.7, ..penalised },
    ];
    for (i, &params) in all.iter().enumerate() {
        let id = rig.add(&g.tokens(i % 3, "tokens"), DENSE);
        rig.seqs[id].params = params;
    }
    let mut scratch = sample::Scratch::new(vocab).unwrap();
    let mut check = |rig: &mut Rig<Cuda<AnyDevice>>, work: &[(usize, usize, bool)]| {
        let logits = rig.run(work);
        for (row, (&(id, ..), logits)) in work.iter().zip(&logits).enumerate() {
            let seq = &mut rig.seqs[id];
            let mut top = vec![];
            let params = Params { logprob: true, ..seq.params };
            let put = |t, l| top.push((t, l));
            let want =
                sample::sample(logits, &seq.tokens[..seq.done], seq.prompt, &params, &mut scratch, put);
            let (want, got) = (want.unwrap(), rig.report.sampled[row]);
            assert_eq!((got.token, got.broken), (want.token, false), "{params:?}");
            assert!((got.logprob - want.logprob).abs() < 1e-4, "{got:?} {want:?}");
            let listed = &rig.report.top[got.first_top as usize..][..got.n_top as usize];
            assert_eq!(listed.len(), top.len());
            for (a, b) in listed.iter().zip(&top) {
                assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-4, "{a:?} {b:?}");
            }
            seq.tokens.push(got.token);
        }
    };
    for id in 0..all.len() {
        let n = rig.seqs[id].tokens.len();
        check(&mut rig, &[(id, n, false)]);
    }
    let work: Vec<_> = (0..all.len()).map(|id| (id, 1, true)).collect();
    for round in 0..6 {
        // From the third round on the step is a replay; then each row has another's parameters.
        for id in 0..all.len() {
            rig.seqs[id].params = all[if round < 4 { id } else { (id + round) % all.len() }];
        }
        check(&mut rig, &work);
    }
    // Some leave, and one that never was penalised is.
    for params in [penalised, warm] {
        rig.seqs[1].params = params;
        check(&mut rig, &[(5, 1, true), (1, 1, true)]);
    }
}

#[test]
fn loading_can_be_stopped() {
    use polar_sparsity::backend::WeightOptions;
    let (g, cuda) = (Golden::open("llama31_bf16"), cuda());
    let stopped = cuda.upload(&g.model, WeightOptions::default(), &mut |_, _| 1);
    assert_eq!(stopped.err().unwrap().status, polar_sparsity::Status::E_CANCELLED);
    assert!(cuda.device().multiprocessors() > 0);
    assert_eq!(LIMITS.max_batch, 16);
}
