//! Builds and runs `tests/c/*.c` against the shared library: each a program of its own, as a host
//! would be. With AddressSanitizer too, which also finds what leaks.

mod common;

use common::{Library, compiler, root, run, scratch};
use std::path::{Path, PathBuf};
use std::process::Command;

fn build(library: &Library, test: &str, flags: &[&str]) -> PathBuf {
    let program = library.folder.join(format!("{test}{}", flags.concat().replace('=', "-")));
    let mut command = Command::new(compiler("cc").expect("a C compiler"));
    command.args(["-std=gnu11", "-g", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror"]).args(flags);
    command.arg("-I").arg(root().join("include")).arg(root().join(format!("tests/c/{test}.c")));
    command.arg("-o").arg(&program).args(library.link_flags()).args(["-ldl", "-lm"]);
    run(&mut command);
    program
}

fn golden() -> PathBuf {
    root().join("tests/data/golden")
}

fn execute(library: &Library, program: &Path, data: &Path) {
    let mut command = Command::new(program);
    command.arg(data).env("LD_LIBRARY_PATH", &library.folder);
    command.env("POLAR_TEST_LIBRARY", library.file());
    run(&mut command);
}

fn test(name: &str) {
    let library = Library::link(scratch(name));
    execute(&library, &build(&library, name, &[]), &golden());
}

#[test]
fn null() {
    test("null");
}

#[test]
fn sizes() {
    test("sizes");
}

#[test]
fn order() {
    test("order");
}

#[test]
fn events() {
    test("events");
}

#[test]
fn threads() {
    test("threads");
}

#[test]
fn log() {
    test("log");
}

#[test]
fn lifecycle() {
    test("lifecycle");
}

#[cfg(feature = "text")]
#[test]
fn tokenizer() {
    let library = Library::link(scratch("tokenizer"));
    execute(&library, &build(&library, "tokenizer", &[]), &root().join("fixtures/opt-tiny"));
}

/// Leaks show as a failing exit status of the sanitizer.
#[test]
fn nothing_leaks() {
    let library = Library::link(scratch("leaks"));
    let flags = ["-fsanitize=address"];
    for name in ["order", "events", "log"] {
        let program = build(&library, name, &flags);
        let mut command = Command::new(&program);
        command.arg(golden()).env("LD_LIBRARY_PATH", &library.folder).env("NO_USE_AFTER_FREE", "1");
        run(&mut command);
    }
}
