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

/// A driver and, in the same file, a cuBLASLt.
fn driver_with_library() -> PathBuf {
    let folder = build_driver("library", &["tests/mock/cublaslt.cpp"]);
    std::os::unix::fs::symlink("libcuda.so.1", folder.join("libcublasLt.so")).expect("the folder is new");
    folder
}

fn build_driver(name: &str, flags: &[&str]) -> PathBuf {
    let folder = scratch(name);
    let mut command = Command::new(compiler("g++").expect("g++"));
    command.args(["-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-Wno-unknown-pragmas"]).args(flags);
    command.args(["kernels_host", "executor", "memory", "races"].map(|file| format!("cuda/host/{file}.cpp")));
    command.arg("tests/mock/cuda.cpp");
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

/// It with that driver and environment.
fn command(library: &Library, program: &Path, driver: &Path, environment: &[(&str, &str)]) -> Command {
    let path = format!("{}:{}", driver.display(), library.folder.display());
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", path).envs(environment.iter().copied());
    command
}

/// Its exit status and what it printed.
fn start(mut command: Command) -> (Option<i32>, String) {
    let output = command.output().expect("runs");
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    (output.status.code(), text)
}

/// The C example, on the host executor: numbers, graph and all.
#[test]
fn a_host_runs_the_operators_in_its_own_context() {
    let library = Library::link(scratch("mock-operators"));
    let program = program(&library, "examples-c/operators.c");
    let (status, text) = start(command(&library, &program, driver(), &[]));
    if cfg!(polar_kernels) {
        assert!(status == Some(0) && text.contains("all agree"), "{status:?}\n{text}");
    } else {
        assert!(status == Some(77) && text.contains("this build has no kernels"), "{status:?}\n{text}");
    }
}

/// Timing finds the faster of two proposals; a context that wants none takes the first for all products.
#[test]
fn a_context_decides_whether_products_are_timed() {
    let library = Library::link(scratch("mock-products"));
    let (program, driver) = (program(&library, "tests/c/products.c"), driver_with_library());
    // Too little memory to empty a cache with: there is none, and it would only take time.
    let memory = [("MOCK_MEMORY", "100000000")];
    let generate = |flag: &[&str]| {
        let mut command = command(&library, &program, &driver, &memory);
        command.arg(root().join("tests/data/golden")).args(flag);
        start(command).1
    };
    let (timed, untimed) = (generate(&[]), generate(&["untimed"]));
    if !cfg!(polar_kernels) {
        assert!(timed.contains("this build has no kernels"), "{timed}");
        return;
    }
    let parse = |text: &str| {
        let (tokens, counts) = text.trim_end().split_once('\n').unwrap_or_else(|| panic!("{text}"));
        let mut runs = counts.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<u32>().ok());
        let runs = runs.next().zip(runs.next()).unwrap_or_else(|| panic!("{text}"));
        (tokens.split_whitespace().map(str::to_owned).collect::<Vec<_>>(), runs)
    };
    let ((tokens, (first, second)), (same, (every, none))) = (parse(&timed), parse(&untimed));
    assert_eq!((tokens.len(), &tokens), (6, &same));
    assert!(second > first && first > 0, "{timed}");
    assert!(every > 0 && none == 0, "{untimed}");
}

/// Work on the second stream, in recorded steps too: the MLP router's chain of one sequence, and of many the attention
/// router's product beside QKV's, which is the library's, and timed with it. All three layers choose neurons, all but the
/// first one heads.
#[test]
fn recorded_steps_join_what_runs_beside_them() {
    let library = Library::link(scratch("mock-beside"));
    let (program, driver) = (program(&library, "tests/c/beside.c"), driver_with_library());
    let settings = [("MOCK_MEMORY", "100000000"), ("MOCK_EDGES", "1")];
    for (requests, wanted) in [("1", "5 tokens\n3 early edges"), ("70", "350 tokens\n5 early edges")] {
        let mut command = command(&library, &program, &driver, &settings);
        command.arg(root().join("tests/data/golden")).arg(requests);
        let (status, text) = start(command);
        if !cfg!(polar_kernels) {
            assert!(text.contains("this build has no kernels"), "{text}");
            return;
        }
        assert!(status == Some(0) && text.contains(wanted), "{status:?} {text}");
    }
}

/// What `devices` prints of the GPUs, and of a context that wants nothing else.
fn devices(
    library: &Library,
    program: &Path,
    driver: &Path,
    environment: &[(&str, &str)],
) -> (String, String) {
    let (status, text) = start(command(library, program, driver, environment));
    assert_eq!(status, Some(0), "{text}");
    let (cpu, gpu) = text.trim_end().split_once('\n').expect("two lines");
    assert!(cpu.starts_with("cpu usable "), "{text}");
    let mut command = command(library, program, driver, environment);
    (gpu.to_owned(), run(command.arg("cuda")).trim_end().to_owned())
}

/// Each kind of machine gets its own sentence; the processor works on all of them.
#[test]
fn a_machine_without_a_usable_gpu_is_told_why() {
    let library = Library::link(scratch("mock-devices"));
    let program = program(&library, "tests/c/devices.c");
    let no_driver = library.folder.clone();
    if !cfg!(polar_kernels) {
        let (gpu, only) = devices(&library, &program, driver(), &[]);
        assert_eq!(gpu, "cuda unusable CUDA: this build has no kernels");
        assert_eq!(only, "POLAR_E_UNSUPPORTED: CUDA: this build has no kernels");
        return;
    }
    let incomplete = build_driver("incomplete", &["-DWITHOUT_VERSION"]);
    let old = [("MOCK_VERSION", "12040")];
    let sentence = |driver: &Path, environment: &[(&str, &str)], what: &str, status: &str| {
        let (gpu, only) = devices(&library, &program, driver, environment);
        assert_eq!(gpu, format!("cuda unusable {what}"));
        assert_eq!(only, format!("{status}: {what}"));
    };
    let none = "CUDA: no NVIDIA driver library (libcuda) was found";
    if !Path::new("/usr/lib/x86_64-linux-gnu/libcuda.so.1").exists() {
        sentence(&no_driver, &[], none, "POLAR_E_NO_DRIVER");
    }
    sentence(driver(), &[("MOCK_DEVICES", "0")], "CUDA: the driver finds no GPU", "POLAR_E_NO_DRIVER");
    sentence(driver(), &old, "CUDA: the driver speaks CUDA 12.4, 13.0 is needed", "POLAR_E_NO_DRIVER");
    sentence(
        &incomplete,
        &[],
        "CUDA: the driver library lacks a function that CUDA 13.0 has",
        "POLAR_E_NO_DRIVER",
    );
    sentence(
        driver(),
        &[("MOCK_FAIL", "cuInit 1 999")],
        "CUDA: the driver does not start: CUDA_ERROR_UNKNOWN (999)",
        "POLAR_E_NO_DRIVER",
    );
    // A GPU that is there and cannot be used is listed; the context opens.
    let (gpu, only) = devices(&library, &program, driver(), &[("MOCK_CAPABILITY", "75")]);
    assert_eq!(gpu, "cuda unusable Mock GPU: compute capability 7.5, 8.0 is needed");
    assert_eq!(gpu, only);
    let (gpu, _) = devices(&library, &program, driver(), &[]);
    assert_eq!(gpu, "cuda usable Mock GPU");
}
