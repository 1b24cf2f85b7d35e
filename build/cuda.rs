//! Compiles `cuda/kernels.cu` into one fatbin when the feature `cuda` is on and an nvcc is found:
//! `$CUDA_HOME/bin`, `PATH`, or the compiler that `tools/cuda_toolchain.sh` put under `target/`.
//! Without one the crate builds all the same and says that it has no kernels.
//!
//! Registers, static shared memory and spills of every kernel go to `kernels.txt` beside it; spills in hot
//! kernels fail the build.
//!
//! `POLAR_CUDA_ARCHS` (such as `90a`) limits the targets while developing.

use std::collections::BTreeMap;
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
    "linear_wide_",
    "linear_activated_",
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
    let serialized = log.lines().find(|line| line.contains("instructions are serialized"));
    assert!(
        serialized.is_none(),
        "a product waits for each of its instructions: {}",
        serialized.unwrap_or("")
    );
    let table = figures(&log);
    write_table(&table, &out.with_file_name("kernels.txt"));
    fail_on_spills(&table);
    println!("cargo::rustc-cfg=polar_kernels");
    println!("cargo::rustc-env=POLAR_FATBIN={}", out.display());
    println!("cargo::rustc-env=POLAR_FATBIN_ARCHS={archs}{}", if archs == ARCHS { " ptx80" } else { "" });
}

/// What ptxas says of one kernel on one target.
#[derive(Clone, Copy, Default)]
struct Figures {
    registers: u32,
    /// Static; what a launch adds is in `src/backend/cuda/launch.rs`.
    shared: u32,
    /// Bytes stored and loaded.
    spills: u32,
}

/// Kernel, then target (`sm_90a`).
type Table<'a> = BTreeMap<&'a str, BTreeMap<&'a str, Figures>>;

/// Reads the output of `ptxas -v`: after a kernel's name a line of its spills and one of the rest.
fn figures(log: &str) -> Table<'_> {
    let mut table = Table::new();
    let (mut kernel, mut target) = ("", "");
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut quoted = rest.split('\'');
            (kernel, target) = (quoted.next().unwrap_or(""), quoted.nth(1).unwrap_or(""));
        } else if line.contains(" spill stores") || line.contains(": Used ") {
            let figures = table.entry(kernel).or_default().entry(target).or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            // A number stands before `registers,`, `bytes smem,` and `bytes spill stores,`.
            for i in 1..words.len() {
                let number = |at: usize| words[at].parse().unwrap_or(0);
                match words[i].trim_end_matches(',') {
                    "registers" => figures.registers = number(i - 1),
                    "smem" => figures.shared = number(i - 2),
                    "spill" => figures.spills += number(i - 2),
                    _ => {}
                }
            }
        }
    }
    table
}

/// One line a kernel; `make` prints it.
fn write_table(table: &Table<'_>, path: &Path) {
    let mut targets: Vec<&str> = table.values().flat_map(|t| t.keys().copied()).collect();
    // By length first: sm_100 is newer than sm_80.
    targets.sort_unstable_by_key(|t| (t.trim_end_matches('a').len(), *t));
    targets.dedup();
    let mut text = format!("{:<40}", "registers/static shared/spilled bytes");
    for target in &targets {
        text += &format!("{target:>14}");
    }
    for (kernel, of) in table {
        text += &format!("\n{kernel:<40}");
        for target in &targets {
            let cell = of.get(target).map(|f| format!("{}/{}/{}", f.registers, f.shared, f.spills));
            text += &format!("{:>14}", cell.unwrap_or_default());
        }
    }
    std::fs::write(path, text + "\n").unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

fn fail_on_spills(table: &Table<'_>) {
    assert!(!table.is_empty(), "no figures in the output of ptxas -v");
    for (kernel, of) in table {
        let hot = HOT.iter().any(|h| kernel.contains(h)) && !COLD.iter().any(|c| kernel.ends_with(c));
        for (target, f) in of {
            assert!(f.registers > 0, "no registers of kernel {kernel} on {target} in the output of ptxas -v");
            assert!(!hot || f.spills == 0, "kernel {kernel} spills {} bytes on {target}", f.spills);
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
