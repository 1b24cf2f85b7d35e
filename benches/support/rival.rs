//! llama.cpp beside us: the same shapes, dtype and threads, in turn, in one run of the benchmark.
//! `tools/rivals/llama_cpp.sh` builds its programs, `tools/rivals/make_gguf.py` makes its models.

use super::rig::{Rig, Shape};
use super::shapes;
use polar_sparsity::backend::WeightOptions;
use polar_sparsity::sparsity::MlpMode;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A model both sides run. llama.cpp knows no OPT.
pub struct Case {
    pub model: &'static str,
}

pub fn cases() -> Vec<Case> {
    vec![Case { model: "llama-3.2-1b" }, Case { model: "qwen2.5-0.5b" }]
}

/// Tokens per second of both, one line per kind of work.
pub fn compare(case: &Case, bench: &str, gguf: &str, threads: u32, quick: bool) -> Vec<Value> {
    let model = Path::new(gguf).join(format!("{}-bf16.gguf", case.model));
    if !model.exists() {
        return vec![
            json!({"kind": "rival", "rival": "llama.cpp", "case": case.model, "missing": "make its gguf first"}),
        ];
    }
    let rig = Rig::new(shapes::spec(case.model), threads, 0.1, WeightOptions::default()).expect("a model");
    let rounds = if quick { 1 } else { 3 };
    let mut lines = Vec::new();
    for (name, batch) in [("decode batch 1", 1), ("decode batch 8", 8), ("prefill 512", 0)] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            theirs.push(rival(bench, &model, threads, batch));
            ours.push(if batch == 0 { our_prefill(&rig) } else { our_decode(&rig, batch) });
        }
        ours.sort_by(f64::total_cmp);
        theirs.sort_by(f64::total_cmp);
        let (a, b) = (ours[rounds / 2], theirs[rounds / 2]);
        lines.push(json!({
            "kind": "rival", "rival": "llama.cpp", "case": format!("{} bf16 {name}", case.model),
            "threads": threads, "ours_tokens_s": a, "rival_tokens_s": b, "ratio": a / b,
        }));
    }
    lines
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

fn rival(bench: &str, model: &Path, threads: u32, batch: usize) -> f64 {
    let threads = threads.to_string();
    let model = model.to_str().expect("a path in UTF-8");
    if batch <= 1 {
        let (p, n) = if batch == 0 { ("512", "0") } else { ("0", "32") };
        let text = run(Command::new(bench)
            .args(["-m", model, "-t", &threads, "-p", p, "-n", n, "-r", "2", "-o", "json"]));
        let rows: Value = serde_json::from_str(&text).expect("JSON from llama-bench");
        return rows[0]["avg_ts"].as_f64().expect("avg_ts");
    }
    let batched: PathBuf = Path::new(bench).with_file_name("llama-batched-bench");
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
