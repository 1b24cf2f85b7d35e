//! The committed header is what cbindgen makes of `src/ffi`, and it compiles everywhere.
//! `make header` (POLAR_WRITE_HEADER=1) writes it.

mod common;

use common::{compiler, root, run, scratch};
use std::fs;
use std::process::Command;

fn generate() -> String {
    let config = cbindgen::Config::from_root_or_default(root());
    let bindings = cbindgen::Builder::new()
        .with_src(root().join("src/ffi/mod.rs"))
        .with_config(config)
        .generate()
        .expect("cbindgen understands src/ffi");
    let mut text = Vec::new();
    bindings.write(&mut text);
    String::from_utf8(text).expect("UTF-8")
}

#[test]
fn the_committed_header_is_the_generated_one() {
    let path = root().join("include/polar_sparsity.h");
    let generated = generate();
    if std::env::var_os("POLAR_WRITE_HEADER").is_some() {
        fs::write(&path, &generated).expect("writable");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == generated, "include/polar_sparsity.h is stale: run `make header`");
}

/// Every function says who may call it when.
#[test]
fn every_function_states_its_thread_rule() {
    let header = generate();
    let mut comment = String::new();
    let mut functions = 0;
    for line in header.lines() {
        if let Some(text) = line.strip_prefix("//") {
            comment.push_str(text);
        } else if line.is_empty() {
            comment.clear();
        } else if line.contains(" polar_") && line.contains('(') && !line.starts_with([' ', '#', 't', '}']) {
            functions += 1;
            assert!(comment.contains("Threads:"), "no thread rule: {line}");
        }
    }
    assert!(functions >= 30, "only {functions} functions were found");
}

const STRICT: [&str; 7] =
    ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wshadow", "-Wconversion", "-fsyntax-only"];

fn compiles(source: &str, extension: &str, compilers: &[&str], standards: &[&str], extra: &[&str]) {
    let folder = scratch("header");
    let file = folder.join(format!("use.{extension}"));
    fs::write(&file, source).expect("writable");
    for name in compilers {
        let Some(program) = compiler(name) else { continue };
        for standard in standards {
            let mut command = Command::new(&program);
            command.arg(format!("-std={standard}")).args(STRICT).args(extra);
            command.arg("-I").arg(root().join("include")).arg(&file);
            run(&mut command);
        }
    }
}

#[test]
fn the_header_compiles_alone_and_twice_in_every_standard() {
    let c = "#include \"polar_sparsity.h\"\n#include \"polar_sparsity.h\"\n\
             polar_error e = POLAR_ERROR_INIT;\nint x = POLAR_IS_ERROR(POLAR_E_PANIC) && POLAR_ABI_VERSION == 0;\n";
    let prototypes = ["-Wstrict-prototypes", "-Wmissing-field-initializers"];
    compiles(c, "c", &["cc", "gcc", "clang"], &["c99", "c11", "c17", "c2x"], &prototypes);
    compiles(c, "cpp", &["c++", "g++", "clang++"], &["c++11", "c++17", "c++20"], &[]);
}

#[test]
fn the_wrapper_compiles_alone_and_twice() {
    let text = "#include \"polar_sparsity.hpp\"\n#include \"polar_sparsity.hpp\"\nint main() {}\n";
    compiles(text, "cpp", &["c++", "g++", "clang++"], &["c++17", "c++20"], &[]);
}
