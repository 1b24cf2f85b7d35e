//! What surrounds the kernels, with a driver of our own in the place of NVIDIA's (`tests/mock/cuda.cpp`):
//! which sentence each kind of machine gets, and a host that runs the operators in a context and on a
//! stream of its own. Programs run as children, since a process loads one driver only.
#![cfg(feature = "cuda")]

mod common;

use common::{Library, compiler, root, run, scratch};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Folder of the driver, built once.
fn driver() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| build_driver("driver", &[]))
}

fn build_driver(name: &str, flags: &[&str]) -> PathBuf {
    let folder = scratch(name);
    let mut command = Command::new(compiler("g++").expect("g++"));
    command.args(["-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-Wno-unknown-pragmas"]).args(flags);
    command.args(["cuda/host/kernels_host.cpp", "cuda/host/executor.cpp", "tests/mock/cuda.cpp"]);
    run(command.current_dir(root()).arg("-o").arg(folder.join("libcuda.so.1")));
    folder
}

/// A C program of the repository, built against the library.
fn program(library: &Library, file: &str) -> PathBuf {
    let out = library.folder.join("program");
    let mut command = Command::new(compiler("cc").expect("a C compiler"));
    command.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-I"]).arg(root().join("include"));
    command.arg("-I").arg(root().join("tests/c")).arg(root().join(file)).arg("-o").arg(&out);
    run(command.args(library.link_flags()).args(["-ldl", "-lm"]));
    out
}

/// Runs it with that driver and environment; its exit status and what it printed.
fn start(
    library: &Library,
    program: &Path,
    driver: &Path,
    environment: &[(&str, &str)],
) -> (Option<i32>, String) {
    let path = format!("{}:{}", driver.display(), library.folder.display());
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", path).envs(environment.iter().copied());
    let output = command.output().expect("runs");
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    (output.status.code(), text)
}

/// The C example, on the host executor: numbers, graph and all.
#[test]
fn a_host_runs_the_operators_in_its_own_context() {
    let library = Library::link(scratch("mock-operators"));
    let (status, text) = start(&library, &program(&library, "examples-c/operators.c"), driver(), &[]);
    if cfg!(polar_kernels) {
        assert!(status == Some(0) && text.contains("all agree"), "{status:?}\n{text}");
    } else {
        assert!(status == Some(77) && text.contains("this build has no kernels"), "{status:?}\n{text}");
    }
}
