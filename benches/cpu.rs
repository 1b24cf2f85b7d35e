//! The CPU benchmark: `make bench`. Writes one JSON object a line to `benches/results/cpu.jsonl` and
//! prints the same as a table.
//!
//! Options (after `--`): `--threads N`, `--models a,b` (`none`: rivals only), `--batches 1,8,32`,
//! `--contexts 512,2048,8192`, `--rival PATH` (llama-bench and llama-batched-bench beside it, see
//! `tools/rivals/llama_cpp.sh`), `--gguf DIR`, `--torch PYTHON` (see `tools/rivals/torch.sh`),
//! `--rival-models a,b`, `--out FILE`, `--quick` (a tenth of the time, for trying).

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that prints a table")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a benchmark stops at the first surprise")]
#![allow(unreachable_pub, reason = "a program: its modules have no other users")]

#[path = "support/ceiling.rs"]
mod ceiling;
#[path = "support/host.rs"]
mod host;
#[path = "support/random.rs"]
mod random;
#[path = "support/rig.rs"]
mod rig;
#[path = "support/rival.rs"]
mod rival;
#[path = "support/routers.rs"]
mod routers;
#[path = "../tests/rig/specs.rs"]
mod specs;

use polar_sparsity::backend::{Backend, WeightOptions};
use polar_sparsity::dtype::DType;
use polar_sparsity::sparsity::MlpMode;
use rig::{Cache, Rig, Shape};
use serde_json::{Value, json};
use std::io::Write;

/// Share of the neurons that the OPT case keeps at batch 1: what the paper's tables keep there.
const MLP_SHARE: f64 = 0.1;
const DENSITIES: [f32; 3] = [1.0, 0.625, 0.5];

#[global_allocator]
static ALLOCATOR: host::Counting = host::Counting;

struct Bench {
    out: std::fs::File,
    threads: u32,
    quick: bool,
    batches: Vec<usize>,
    contexts: Vec<usize>,
    memory: ceiling::Ceiling,
    /// GB/s of the read stream, measured just before the present case.
    ceiling: f64,
}

impl Bench {
    fn emit(&mut self, line: Value) {
        writeln!(self.out, "{line}").unwrap();
        let fields: Vec<String> = line
            .as_object()
            .unwrap()
            .iter()
            .map(|(k, v)| match v.as_f64() {
                Some(x) if v.is_f64() => format!("{k} {x:.3}"),
                _ => format!("{k} {}", v.as_str().map_or_else(|| v.to_string(), str::to_owned)),
            })
            .collect();
        println!("{}", fields.join("  "));
    }

    fn measure_ceiling(&mut self) {
        self.ceiling = self.memory.read_gbps(self.threads);
    }

    fn reps(&self, seconds: f64) -> usize {
        let budget = if self.quick { 0.2 } else { 0.8 };
        ((budget / seconds.max(1e-6)) as usize).clamp(3, 25)
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned();
    let threads = option("--threads").map_or(0, |t| t.parse().unwrap());
    let threads =
        if threads == 0 { std::thread::available_parallelism().unwrap().get() as u32 } else { threads };
    let models = option("--models").unwrap_or_else(|| "llama-3.2-1b,qwen2.5-0.5b,opt-1.3b".into());
    let path = option("--out").unwrap_or_else(|| "benches/results/cpu.jsonl".into());
    std::fs::create_dir_all(std::path::Path::new(&path).parent().unwrap()).unwrap();
    let quick = args.iter().any(|a| a == "--quick");
    let numbers = |name: &str, default: &str| -> Vec<usize> {
        option(name).unwrap_or_else(|| default.into()).split(',').map(|n| n.parse().unwrap()).collect()
    };
    let mut bench = Bench {
        out: std::fs::File::create(&path).unwrap(),
        threads,
        quick,
        batches: numbers("--batches", "1,8,32"),
        contexts: numbers("--contexts", "512,2048,8192"),
        memory: ceiling::Ceiling::new(),
        ceiling: 0.0,
    };
    bench.measure_ceiling();
    let line =
        json!({"kind": "ceiling", "read_gbps": bench.ceiling, "threads": threads, "processor": processor()});
    bench.emit(line);
    bench.emit(host::measure(64));
    for name in models.split(',').filter(|&name| name != "none") {
        model(&mut bench, name);
    }
    let rival_models = option("--rival-models").unwrap_or_else(|| rival::MODELS.into());
    let mut rivals = Vec::new();
    if let Some(bench) = option("--rival") {
        let gguf = option("--gguf").unwrap_or_else(|| "target/rivals/gguf".into());
        rivals.push(rival::Rival::LlamaCpp { bench: bench.into(), gguf: gguf.into() });
    }
    if let Some(python) = option("--torch") {
        rivals.push(rival::Rival::Torch { python: python.into() });
    }
    for name in rival_models.split(',').filter(|_| !rivals.is_empty()) {
        for line in rival::compare(name, &rivals, threads, quick) {
            bench.emit(line);
        }
    }
    let again = json!({"kind": "ceiling", "read_gbps": bench.memory.read_gbps(threads), "threads": threads, "when": "end"});
    bench.emit(again);
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown");
    name.trim_start_matches([' ', '\t', ':']).to_owned()
}

fn model(bench: &mut Bench, name: &str) {
    let spec = specs::named(name);
    let rig = Rig::new(spec, bench.threads, MLP_SHARE, WeightOptions::default()).unwrap();
    prefill(bench, name, &rig);
    if name == "opt-1.3b" {
        mlp(bench, name, &rig);
    }
    for context in bench.contexts.clone() {
        for batch in bench.batches.clone() {
            let fits = rig.kv_bytes(batch, context) < rig.cpu.free_memory().unwrap() * 8 / 10;
            if fits && context <= rig.spec().max_positions as usize {
                decode(bench, name, &rig, batch, context);
            }
        }
    }
    drop(rig);
    let int8 = WeightOptions { dtype: Some(DType::I8) };
    let rig = Rig::new(specs::named(name), bench.threads, MLP_SHARE, int8).unwrap();
    for batch in [1, 8] {
        let mut cache = rig.cache(batch, 512, batch).unwrap();
        bench.measure_ceiling();
        let shape = Shape { batch, context: 512, attn_density: 1.0, mlp: MlpMode::Dense };
        let ms = medians(bench, &rig, &mut cache, &[shape])[0];
        emit_step(bench, name, "int8", &rig, &cache, shape, ms, 1.0);
    }
}

/// Median milliseconds of each shape, measured in turn so that a drift of the machine hits all.
fn medians(bench: &Bench, rig: &Rig, cache: &mut Cache, shapes: &[Shape]) -> Vec<f64> {
    let steps: Vec<_> = shapes.iter().map(|&s| rig.decode(s).unwrap()).collect();
    let first = rig.run(cache, &steps[0]).unwrap();
    let mut times = vec![Vec::new(); steps.len()];
    for _ in 0..bench.reps(first) {
        for (i, step) in steps.iter().enumerate() {
            times[i].push(rig.run(cache, step).unwrap() * 1e3);
        }
    }
    times.iter_mut().map(|t| median(t)).collect()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[allow(clippy::too_many_arguments, reason = "the fields of one line")]
fn emit_step(
    bench: &mut Bench,
    name: &str,
    dtype: &str,
    rig: &Rig,
    cache: &Cache,
    s: Shape,
    ms: f64,
    mlp_density: f64,
) {
    let bytes = rig.bytes(cache);
    let gbps = bytes as f64 / ms / 1e6;
    bench.emit(json!({
        "kind": "step", "model": name, "dtype": dtype, "batch": s.batch, "context": s.context,
        "density": s.attn_density, "mlp_density": mlp_density, "step_ms": ms, "bytes": bytes, "gbps": gbps,
        "ceiling_gbps": bench.ceiling, "share": gbps / bench.ceiling,
    }));
}

fn decode(bench: &mut Bench, name: &str, rig: &Rig, batch: usize, context: usize) {
    let mut cache = rig.cache(batch, context, batch).unwrap();
    bench.measure_ceiling();
    let shapes = DENSITIES.map(|attn_density| Shape { batch, context, attn_density, mlp: MlpMode::Dense });
    let ms = medians(bench, rig, &mut cache, &shapes);
    let mut bytes = Vec::new();
    for (shape, ms) in shapes.iter().zip(&ms) {
        rig.run(&mut cache, &rig.decode(*shape).unwrap()).unwrap();
        bytes.push(rig.bytes(&cache) as f64);
        emit_step(bench, name, "bf16", rig, &cache, *shape, *ms, 1.0);
    }
    for i in 1..shapes.len() {
        ratio(bench, name, shapes[i], ms[0] / ms[i], bytes[0] / bytes[i], "attention");
    }
    if context == 2048 {
        profile(bench, name, rig, &mut cache, shapes[0]);
    }
    if context >= 2048 {
        attention(bench, name, rig, &mut cache, shapes[0], shapes[2]);
    }
}

fn ratio(bench: &mut Bench, name: &str, s: Shape, speedup: f64, byte_ratio: f64, site: &str) {
    bench.emit(json!({
        "kind": "ratio", "model": name, "batch": s.batch, "context": s.context, "density": s.attn_density,
        "site": site, "speedup": speedup, "byte_ratio": byte_ratio, "share": speedup / byte_ratio,
    }));
}

/// Where a dense step's time goes.
fn profile(bench: &mut Bench, name: &str, rig: &Rig, cache: &mut Cache, shape: Shape) {
    let step = rig.decode(shape).unwrap();
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..5 {
        for (all, ms) in times.iter_mut().zip(rig.stages(cache, &step).unwrap()) {
            all.push(ms);
        }
    }
    let [project, attend, mlp, logits] = times.map(|mut t| median(&mut t));
    bench.emit(json!({
        "kind": "profile", "model": name, "batch": shape.batch, "context": shape.context,
        "project_ms": project, "attend_ms": attend, "mlp_ms": mlp, "logits_ms": logits,
    }));
}

/// Attention alone: the stage at this context less the stage at one page of context, which is its
/// output projection and what else does not grow.
fn attention(bench: &mut Bench, name: &str, rig: &Rig, cache: &mut Cache, dense: Shape, sparse: Shape) {
    let short = Shape { context: 16, ..dense };
    let steps = [dense, sparse, short].map(|s| rig.decode(s).unwrap());
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..15 {
        for (i, step) in steps.iter().enumerate() {
            times[i].push(rig.attend(cache, step, i == 1).unwrap() * 1e3);
        }
    }
    let [d, s, fixed] = times.map(|mut t| median(&mut t));
    bench.emit(json!({
        "kind": "attention", "model": name, "batch": dense.batch, "context": dense.context, "density": sparse.attn_density,
        "dense_ms": d - fixed, "sparse_ms": s - fixed, "ratio": (s - fixed) / (d - fixed),
    }));
}

/// OPT with a tenth of its neurons at batch 1.
fn mlp(bench: &mut Bench, name: &str, rig: &Rig) {
    let mut cache = rig.cache(1, 512, 1).unwrap();
    bench.measure_ceiling();
    let dense = Shape { batch: 1, context: 512, attn_density: 1.0, mlp: MlpMode::Dense };
    let sparse = Shape { mlp: MlpMode::Reference, ..dense };
    let ms = medians(bench, rig, &mut cache, &[dense, sparse]);
    let mut bytes = [0.0; 2];
    for (i, shape) in [dense, sparse].into_iter().enumerate() {
        rig.run(&mut cache, &rig.decode(shape).unwrap()).unwrap();
        bytes[i] = rig.bytes(&cache) as f64;
        let share = if i == 0 { 1.0 } else { MLP_SHARE };
        emit_step(bench, name, "bf16", rig, &cache, shape, ms[i], share);
    }
    ratio(bench, name, sparse, ms[0] / ms[1], bytes[0] / bytes[1], "mlp");
}

fn prefill(bench: &mut Bench, name: &str, rig: &Rig) {
    for tokens in [128, 512] {
        let mut cache = rig.cache(1, tokens, tokens).unwrap();
        let step = rig.prefill(tokens).unwrap();
        rig.run(&mut cache, &step).unwrap();
        let mut times: Vec<f64> =
            (0..if bench.quick { 1 } else { 2 }).map(|_| rig.run(&mut cache, &step).unwrap()).collect();
        let seconds = median(&mut times);
        bench.emit(json!({
            "kind": "prefill", "model": name, "tokens": tokens, "tokens_s": tokens as f64 / seconds,
            "gflops": flops(rig.spec(), tokens) / seconds / 1e9,
        }));
    }
}

/// Multiply-adds of a prefill, twice: matrices of the layers for every token, causal attention, the
/// head for the last token.
fn flops(spec: &polar_sparsity::model::ModelSpec, tokens: usize) -> f64 {
    let (d, q, kv) = (f64::from(spec.hidden_size), spec.q_size() as f64, spec.kv_size() as f64);
    let mlp = if spec.activation.gated() { 3.0 } else { 2.0 };
    let n = tokens as f64;
    let layer = 2.0 * n * (d * q * 2.0 + d * kv * 2.0 + mlp * d * f64::from(spec.ffn_size)) + 2.0 * n * n * q;
    layer * f64::from(spec.num_layers) + 2.0 * d * f64::from(spec.vocab_size)
}
