//! `bench-gpu`: kernel times on the first CUDA device, as one table and as JSON lines.
//!
//! Each figure is the median of graph replays over inputs rotated past the L2; TB/s counts the bytes
//! the kernel must read, once; the share is of the read-only stream measured in this process.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that prints a table")]

mod kernels;
mod prefill;
mod shapes;
mod steps;
mod timing;

use std::sync::Arc;

/// Arguments name parts (attention, products, mlp, small, prefill, steps, few-steps) and models; none
/// means every part.
fn main() {
    let bench = timing::Gpu::open();
    println!(
        "{} | read stream {:.2} TB/s | cuBLASLt {}",
        bench.name(),
        bench.ceiling,
        if bench.device.has_library() { "found" } else { "not found" }
    );
    let parts = ["attention", "products", "mlp", "small", "prefill", "steps", "few-steps"];
    let (which, models): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).filter(|a| a != "--bench").partition(|a| parts.contains(&a.as_str()));
    let wants = |name: &str| which.is_empty() || which.iter().any(|w| w == name);
    if wants("attention") {
        kernels::attention(&bench);
    }
    if wants("products") {
        kernels::products(&bench);
    }
    if wants("mlp") {
        kernels::selective_mlp(&bench);
    }
    if wants("small") {
        kernels::small(&bench);
    }
    if wants("prefill") {
        prefill::prefill(&bench);
    }
    let few = which.iter().any(|w| w == "few-steps");
    if few || wants("steps") {
        steps::steps(Arc::clone(&bench.device), bench.ceiling, &models, few);
    }
}
