//! Link flags of the shared library and the text of `polar_build_info`. No network, no generator:
//! the header is made by a test and committed.

#[path = "build/cuda.rs"]
mod cuda;

use std::env;
use std::process::Command;

/// The ABI number, which `POLAR_ABI_VERSION` repeats; a test compares the two.
const SONAME: &str = "libpolar_sparsity.so.0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    link();
    cuda::kernels();
    println!("cargo:rustc-env=POLAR_SONAME={SONAME}");
    println!("cargo:rustc-env=POLAR_BUILD_INFO={}", build_info());
}

/// Unloading a library with thread-local destructors and worker threads crashes programs, hence
/// `nodelete`.
fn link() {
    if variable("CARGO_CFG_TARGET_OS") == "linux" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,{SONAME}");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}

fn build_info() -> String {
    let rustc = first_line(&variable("RUSTC"), &["--version"]).unwrap_or_else(|| "rustc ?".into());
    format!(
        "polar-sparsity {} ({}) {rustc}, {}, {}, features: {}",
        variable("CARGO_PKG_VERSION"),
        source(),
        variable("TARGET"),
        variable("PROFILE"),
        features(),
    )
}

/// The commit, in release builds only: elsewhere each commit would rebuild the crate.
fn source() -> String {
    if variable("PROFILE") != "release" {
        return "development".into();
    }
    let Some(head) = first_line("git", &["rev-parse", "--git-path", "logs/HEAD"]) else {
        return "no git".into();
    };
    println!("cargo:rerun-if-changed={head}");
    match first_line("git", &["rev-parse", "--short=12", "HEAD"]) {
        Some(id) => format!("git {id}"),
        None => "no git".into(),
    }
}

fn features() -> String {
    let mut names: Vec<String> = env::vars()
        .filter_map(|(key, _)| key.strip_prefix("CARGO_FEATURE_").map(str::to_lowercase))
        .filter(|name| name != "default")
        .collect();
    names.sort();
    if names.is_empty() { "none".into() } else { names.join(" ") }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_default()
}

fn first_line(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}
