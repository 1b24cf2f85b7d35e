//! `bench-gpu`: kernels and whole decode steps on the first CUDA device, as one table and as JSON lines.
//!
//! Each figure is the median of graph replays over inputs rotated past the L2; TB/s counts the bytes
//! the kernel must read, once; the share is of the read-only stream measured in this process. Whole steps stand
//! beside what their bytes allow and what the roofline does, with large products measured here too.
//!
//! Arguments: names of parts and of models (none: all), `--results FOLDER` for the records,
//! `--append` to add them to what is there. `few-steps` are the steps that DESIGN's table names, `only:8x2048,64x2048`
//! those of a batch and context.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that prints a table")]
#![allow(unreachable_pub, reason = "shares a module with a program whose items are public")]

mod floor;
mod kernels;
mod layer;
mod models;
mod prefill;
mod sampling;
#[path = "../../tests/rig/specs.rs"]
mod specs;
mod steps;
mod timing;

use std::path::PathBuf;
use std::time::Instant;
use timing::Gpu;

type Part = (&'static str, fn(&Gpu));

/// Parts of the run, in order.
const PARTS: &[Part] = &[
    ("attention", kernels::attention),
    ("layer", layer::layer),
    ("products", kernels::products),
    ("mlp", kernels::selective_mlp),
    ("small", kernels::small),
    ("sampling", sampling::sampling),
    ("prefill", prefill::prefill),
];

fn main() {
    let (mut parts, mut models, mut results, mut append) = (vec![], vec![], None, false);
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    while let Some(a) = arguments.next() {
        let is_part = PARTS.iter().any(|p| p.0 == a) || a == "steps" || a == "few-steps";
        match a.as_str() {
            "--results" => results = arguments.next().map(PathBuf::from),
            "--append" => append = true,
            _ if steps::TUNINGS.contains(&a.as_str()) || a.starts_with(steps::ONLY) => {} // steps reads them
            _ if is_part => parts.push(a),
            _ if models::all().any(|m| m.name == a) => models.push(a),
            other => {
                println!("{other}: neither a part nor a model of this benchmark");
                std::process::exit(2);
            }
        }
    }
    let start = Instant::now();
    let mut gpu = Gpu::open();
    if let Some(folder) = &results {
        gpu.open_results(folder, append).unwrap();
    }
    println!(
        "{} | read stream {:.2} TB/s | cuBLASLt {} | {}",
        gpu.name(),
        gpu.ceiling,
        if gpu.device.has_library() { "found" } else { "not found" },
        gpu.arithmetic
            .map_or("no large product, so no roofline".into(), |t| format!("products {t:.0} TFLOP/s")),
    );
    let wants = |name: &str| parts.is_empty() || parts.iter().any(|p| p == name);
    let took = |what: &str| println!("-- {what}: {:.0} s so far", start.elapsed().as_secs_f64());
    for (name, run) in PARTS.iter().filter(|p| wants(p.0)) {
        run(&gpu);
        took(name);
    }
    let few = parts.iter().any(|p| p == "few-steps");
    if few || wants("steps") {
        steps::steps(&gpu, &models, few);
        took("steps");
    }
}
