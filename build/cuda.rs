//! Compiles `cuda/kernels.cu` into one fatbin when the feature `cuda` is on and an nvcc is found:
//! `$CUDA_HOME/bin`, `PATH`, or the compiler that `tools/cuda_toolchain.sh` put under `target/`.
//! Without one the crate builds all the same and says that it has no kernels.
//!
//! `POLAR_CUDA_ARCHS` (such as `90a`) limits the targets while developing.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const ARCHS: &str = "80 90a 100 120";
/// Kernels that must not spill registers: the ones a step spends its time in.
const HOT: &[&str] = &[
    "attention_decode_",
    "attention_prefill_",
    "linear_skinny_",
    "linear_up_",
    "linear_down_",
    "mlp_down_",
    "router_scores_",
    "select_neurons",
];
/// Of those, the ones that no model family of this version launches.
const COLD: &[&str] = &["_256"];

/// Sets the cfg `polar_kernels` and the variable `POLAR_FATBIN` for the crate.
pub(crate) fn kernels() {
    println!("cargo::rustc-check-cfg=cfg(polar_kernels)");
    println!("cargo::rerun-if-changed=build/cuda.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    for name in ["CUDA_HOME", "POLAR_CUDA_ARCHS", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let Some(nvcc) = nvcc() else {
        println!(
            "cargo::warning=no nvcc: building without CUDA kernels (tools/cuda_toolchain.sh fetches one)"
        );
        return;
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels.fatbin");
    let archs = env::var("POLAR_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-t", "2", "-O3", "-std=c++17", "-Xptxas", "-v", "-o"]).arg(&out);
    for arch in archs.split_whitespace() {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if archs == ARCHS {
        command.arg("-gencode=arch=compute_80,code=compute_80");
    }
    let output =
        command.arg("cuda/kernels.cu").output().unwrap_or_else(|e| panic!("{}: {e}", nvcc.display()));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nvcc could not compile the kernels:\n{log}");
    report(&log);
    println!("cargo::rustc-cfg=polar_kernels");
    println!("cargo::rustc-env=POLAR_FATBIN={}", out.display());
    println!("cargo::rustc-env=POLAR_FATBIN_ARCHS={archs}{}", if archs == ARCHS { " ptx80" } else { "" });
}

/// Fails on spills in hot kernels; a full table of registers goes to the build's output.
fn report(log: &str) {
    let mut kernel = "";
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().unwrap_or(rest);
        } else if line.contains("spill stores") {
            let spills = !line.contains(" 0 bytes spill stores") || !line.contains(" 0 bytes spill loads");
            let hot = HOT.iter().any(|h| kernel.contains(h)) && !COLD.iter().any(|c| kernel.ends_with(c));
            assert!(!(spills && hot), "kernel {kernel} spills registers: {}", line.trim());
        } else if line.contains("Used ") {
            println!("{kernel}: {}", line.trim());
        }
    }
}

fn nvcc() -> Option<PathBuf> {
    let works = |path: &Path| Command::new(path).arg("--version").output().is_ok_and(|o| o.status.success());
    let home = env::var_os("CUDA_HOME").map(|h| PathBuf::from(h).join("bin/nvcc"));
    if let Some(path) = home.filter(|p| works(p)) {
        return Some(path);
    }
    let fetched = PathBuf::from("target/cuda-toolchain/venv/lib");
    let mut candidates = vec![PathBuf::from("nvcc")];
    for python in std::fs::read_dir(fetched).into_iter().flatten().flatten() {
        candidates.push(python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    }
    candidates.into_iter().find(|p| works(p))
}
