//! What `make install` leaves works from outside the tree: C and C++, shared and static, through
//! pkg-config, through CMake, and after the whole prefix has moved.

#![allow(clippy::print_stderr, reason = "says what was skipped and why")]

mod common;

use common::{built_library, compiler, root, run, scratch};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Installs into a prefix and then moves it, since packagers do.
fn install(name: &str, libdir: &str) -> PathBuf {
    let folder = scratch(name);
    let first = folder.join("first");
    let mut command = Command::new(root().join("tools/install.sh"));
    command.arg(built_library().parent().expect("a file is in a folder"));
    command.env("PREFIX", &first).env("LIBDIR", first.join(libdir)).env_remove("DESTDIR");
    run(&mut command);
    let prefix = folder.join("moved");
    fs::rename(&first, &prefix).expect("same file system");
    prefix
}

/// The example that needs no tokenizer, copied out of the tree, and a C++ program.
fn write_programs(folder: &Path) {
    fs::copy(root().join("examples-c/batch.c"), folder.join("program.c")).expect("readable");
    let cpp = r#"#include <polar_sparsity.hpp>
#include <cstdio>
int main(int argc, char** argv) {
  const polar::context context;
  const polar::model model(context, argv[argc - 1]);
  polar::engine engine(model);
  polar::batch batch;
  batch.add({1, 2, 3}, 4).flags = POLAR_REQUEST_IGNORE_EOS;
  engine.submit(batch);
  int tokens = 0;
  while (engine.step([&](const polar_event& e) { tokens += (e.flags & POLAR_EVENT_TOKEN) != 0; })) {
  }
  std::printf("request 0: %d tokens\n", tokens);
  return tokens == 4 ? 0 : 1;
}
"#;
    fs::write(folder.join("program.cpp"), cpp).expect("writable");
}

fn run_program(program: &Path, library: Option<&Path>) {
    let mut command = Command::new(program);
    command.arg(root().join("tests/data/golden/opt_f32")).env_remove("LD_LIBRARY_PATH");
    if let Some(folder) = library {
        command.env("LD_LIBRARY_PATH", folder);
    }
    let text = run(&mut command);
    assert!(text.contains("request 0: "), "{text}");
}

fn pkg_config(pc: &Path, arguments: &[&str]) -> Vec<String> {
    let mut command = Command::new("pkg-config");
    command.env("PKG_CONFIG_PATH", pc).args(arguments).arg("polar_sparsity");
    run(&mut command).split_whitespace().map(str::to_owned).collect()
}

fn compile(program: &str, flags: &[String], libraries: &[String], folder: &Path) -> PathBuf {
    let out = folder.join(format!("{program}.out"));
    let (name, standard) = if program.ends_with("cpp") { ("c++", "-std=c++17") } else { ("cc", "-std=c99") };
    let mut command = Command::new(compiler(name).expect("a compiler"));
    command.args([standard, "-Wall", "-Wextra", "-Werror"]).args(flags).arg(folder.join(program));
    run(command.arg("-o").arg(&out).args(libraries));
    out
}

#[test]
fn files_are_where_they_belong() {
    let prefix = install("install-files", "lib/a-triplet");
    let lib = prefix.join("lib/a-triplet");
    let version = env!("CARGO_PKG_VERSION");
    for file in [
        prefix.join("include/polar_sparsity.h"),
        prefix.join("include/polar_sparsity.hpp"),
        lib.join(format!("libpolar_sparsity.so.{version}")),
        lib.join("libpolar_sparsity.so.0"),
        lib.join("libpolar_sparsity.so"),
        lib.join("libpolar_sparsity.a"),
        lib.join("pkgconfig/polar_sparsity.pc"),
        lib.join("cmake/polar_sparsity/polar_sparsity-config.cmake"),
        lib.join("cmake/polar_sparsity/polar_sparsity-config-version.cmake"),
    ] {
        assert!(file.is_file(), "{} is missing", file.display());
    }
    for text in ["pkgconfig/polar_sparsity.pc", "cmake/polar_sparsity/polar_sparsity-config.cmake"] {
        let text = fs::read_to_string(lib.join(text)).expect("there");
        assert!(!text.contains('@') && !text.contains("install-files"), "{text}");
    }
}

#[test]
fn programs_build_through_pkg_config() {
    if compiler("pkg-config").is_none() {
        eprintln!("skipped: no pkg-config on the PATH");
        return;
    }
    let prefix = install("install-pc", "lib/a-triplet");
    let lib = prefix.join("lib/a-triplet");
    let pc = lib.join("pkgconfig");
    assert_eq!(pkg_config(&pc, &["--modversion"]), [env!("CARGO_PKG_VERSION")]);
    write_programs(&prefix);
    for program in ["program.c", "program.cpp"] {
        let out = compile(program, &pkg_config(&pc, &["--cflags"]), &pkg_config(&pc, &["--libs"]), &prefix);
        run_program(&out, Some(&lib));
    }
}

/// With the archive alone, and what the README says it needs.
#[test]
fn programs_build_statically() {
    let prefix = install("install-static", "lib");
    write_programs(&prefix);
    let readme = fs::read_to_string(root().join("README.md")).expect("there");
    let needs = "-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc";
    assert!(readme.contains(needs));
    let mut libraries = vec![prefix.join("lib/libpolar_sparsity.a").to_string_lossy().into_owned()];
    libraries.extend(needs.split(' ').map(str::to_owned));
    let flags = [format!("-I{}", prefix.join("include").display())];
    for program in ["program.c", "program.cpp"] {
        run_program(&compile(program, &flags, &libraries, &prefix), None);
    }
}

#[test]
fn programs_build_with_cmake() {
    if compiler("cmake").is_none() {
        eprintln!("skipped: no cmake on the PATH");
        return;
    }
    let prefix = install("install-cmake", "lib");
    write_programs(&prefix);
    let lists = "cmake_minimum_required(VERSION 3.16)
project(outside C CXX)
set(CMAKE_CXX_STANDARD 17)
find_package(polar_sparsity 0.1 REQUIRED)
find_package(polar_sparsity 0.2 QUIET)
if(polar_sparsity_FOUND)
  message(FATAL_ERROR \"another minor version was accepted\")
endif()
add_executable(shared_c program.c)
target_link_libraries(shared_c polar::polar_sparsity)
add_executable(static_cpp program.cpp)
target_link_libraries(static_cpp polar::polar_static)
";
    fs::write(prefix.join("CMakeLists.txt"), lists).expect("writable");
    let build = prefix.join("build");
    let mut configure = Command::new("cmake");
    configure
        .arg("-S")
        .arg(&prefix)
        .arg("-B")
        .arg(&build)
        .arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display()));
    run(&mut configure);
    run(Command::new("cmake").arg("--build").arg(&build));
    run_program(&build.join("shared_c"), None); // CMake sets the run path
    run_program(&build.join("static_cpp"), None);
}
