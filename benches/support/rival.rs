//! Other engines beside us: the same shapes, dtype and threads, in turn, in one run of the benchmark.
//! `tools/rivals` has what fetches and builds them.

use super::rig::{Rig, Shape};
use super::specs;
use polar_sparsity::backend::WeightOptions;
use polar_sparsity::sparsity::MlpMode;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Models that all sides run. llama.cpp knows no OPT.
pub const MODELS: &str = "llama-3.2-1b,qwen2.5-0.5b";

/// Another engine.
pub enum Rival {
    /// Its program llama-bench (llama-batched-bench lies beside it), and the folder of its models.
    LlamaCpp { bench: PathBuf, gguf: PathBuf },
    /// A Python that has torch.
    Torch { python: PathBuf },
}

impl Rival {
    fn name(&self) -> &'static str {
        match self {
            Rival::LlamaCpp { .. } => "llama.cpp",
            Rival::Torch { .. } => "torch",
        }
    }

    /// Tokens per second of decode at `batch`, 0 meaning a prefill of 512.
    fn tokens_s(&self, model: &str, threads: u32, batch: usize) -> f64 {
        match self {
            Rival::LlamaCpp { bench, gguf } => {
                llama_cpp(bench, &gguf.join(format!("{model}-bf16.gguf")), threads, batch)
            }
            Rival::Torch { python } => {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/rivals/torch_cpu.py");
                let text = run(Command::new(python).arg(script).args([
                    model,
                    &threads.to_string(),
                    &batch.to_string(),
                ]));
                serde_json::from_str::<Value>(&text).expect("JSON")["tokens_s"].as_f64().expect("tokens_s")
            }
        }
    }
}

/// Tokens per second of all, one line per rival and kind of work.
pub fn compare(model: &str, rivals: &[Rival], threads: u32, quick: bool) -> Vec<Value> {
    let rig = Rig::new(specs::named(model), threads, 0.1, WeightOptions::default()).expect("a model");
    let rounds = if quick { 1 } else { 3 };
    let mut lines = Vec::new();
    for (name, batch) in [("decode batch 1", 1), ("decode batch 8", 8), ("prefill 512", 0)] {
        let mut ours = Vec::new();
        let mut theirs = vec![Vec::new(); rivals.len()];
        for _ in 0..rounds {
            for (times, rival) in theirs.iter_mut().zip(rivals) {
                times.push(rival.tokens_s(model, threads, batch));
            }
            ours.push(if batch == 0 { our_prefill(&rig) } else { our_decode(&rig, batch) });
        }
        let a = median(&mut ours);
        for (times, rival) in theirs.iter_mut().zip(rivals) {
            let b = median(times);
            lines.push(json!({
                "kind": "rival", "rival": rival.name(), "case": format!("{model} bf16 {name}"),
                "threads": threads, "ours_tokens_s": a, "rival_tokens_s": b, "ratio": a / b,
            }));
        }
    }
    lines
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// 32 tokens from a context of 32 on, as the rival's own benchmarks do.
fn our_decode(rig: &Rig, batch: usize) -> f64 {
    let shape = Shape { batch, context: 48, attn_density: 1.0, mlp: MlpMode::Dense };
    let mut cache = rig.cache(batch, shape.context, batch).expect("a cache");
    let step = rig.decode(shape).expect("a step");
    rig.run(&mut cache, &step).expect("a step");
    let seconds: f64 = (0..32).map(|_| rig.run(&mut cache, &step).expect("a step")).sum();
    (32 * batch) as f64 / seconds
}

fn our_prefill(rig: &Rig) -> f64 {
    let mut cache = rig.cache(1, 512, 512).expect("a cache");
    let step = rig.prefill(512).expect("a step");
    rig.run(&mut cache, &step).expect("a step");
    let seconds: f64 = (0..2).map(|_| rig.run(&mut cache, &step).expect("a step")).sum();
    1024.0 / seconds
}

fn llama_cpp(bench: &Path, model: &Path, threads: u32, batch: usize) -> f64 {
    let threads = threads.to_string();
    let model = model.to_str().expect("a path in UTF-8");
    if batch <= 1 {
        let (p, n) = if batch == 0 { ("512", "0") } else { ("0", "32") };
        let text = run(Command::new(bench)
            .args(["-m", model, "-t", &threads, "-p", p, "-n", n, "-r", "2", "-o", "json"]));
        let rows: Value = serde_json::from_str(&text).expect("JSON from llama-bench");
        return rows[0]["avg_ts"].as_f64().expect("avg_ts");
    }
    let batched: PathBuf = bench.with_file_name("llama-batched-bench");
    let b = batch.to_string();
    let text = run(Command::new(batched).args([
        "-m",
        model,
        "-t",
        &threads,
        "-c",
        "1024",
        "-npp",
        "32",
        "-ntg",
        "32",
        "-npl",
        &b,
        "--output-format",
        "jsonl",
    ]));
    let row = text.lines().rev().find(|l| l.starts_with('{')).expect("a line of JSON");
    serde_json::from_str::<Value>(row).expect("JSON")["speed_tg"].as_f64().expect("speed_tg")
}

fn run(command: &mut Command) -> String {
    let out = command.output().expect("the rival starts");
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}
