//! `bench-gpu`: kernel times on the first CUDA device, as one table and as JSON lines.
//!
//! Each figure is the median of graph replays over inputs rotated past the L2; TB/s counts the bytes
//! the kernel must read, once; the share is of the read-only stream measured in this process.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that prints a table")]

mod kernels;
mod timing;

fn main() {
    let bench = timing::Gpu::open();
    println!("{} | read stream {:.2} TB/s", bench.name(), bench.ceiling);
    let which: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
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
        kernels::prefill(&bench);
    }
}
