//! The examples compile without a warning and do what they say.

mod common;

use common::{Library, compiler, root, run, scratch};
use std::path::{Path, PathBuf};
use std::process::Command;

fn build(library: &Library, file: &str) -> PathBuf {
    let program = library.folder.join(file.split('.').next().unwrap_or(file));
    let (name, standard) = if file.ends_with("cpp") { ("c++", "-std=c++17") } else { ("cc", "-std=c99") };
    let mut command = Command::new(compiler(name).expect("a compiler"));
    command.args([standard, "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]);
    command.args(["-pthread", "-I"]).arg(root().join("include")).arg(root().join("examples-c").join(file));
    run(command.arg("-o").arg(&program).args(library.link_flags()).args(["-ldl", "-lm"]));
    program
}

fn start(library: &Library, program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", &library.folder).current_dir(root());
    command
}

fn model() -> PathBuf {
    root().join("tests/data/golden/llama31_f32")
}

#[test]
fn batch() {
    let library = Library::link(scratch("batch"));
    let program = build(&library, "batch.c");
    let text = run(start(&library, &program).arg(model()));
    for i in 0..4 {
        assert_eq!(text.matches(&format!("request {i}: finished")).count(), 1, "{text}");
    }
    assert!(text.contains("likeliest"), "{text}");
}

#[test]
fn asynchronous() {
    let library = Library::link(scratch("async"));
    let program = build(&library, "async.c");
    let text = run(start(&library, &program).arg(model()));
    assert!(text.contains("5 requests finished"), "{text}");
    assert!(text.contains("info: loaded "), "{text}");
}

/// Where there is a GPU it must agree; elsewhere it says in a line why there is nothing to show.
#[test]
fn operators() {
    let library = Library::link(scratch("operators"));
    let program = build(&library, "operators.c");
    let output = start(&library, &program).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    match output.status.code() {
        Some(0) => assert!(text.contains("all agree"), "{text}"),
        Some(77) => {
            assert!(text.starts_with("operators: ") && text.matches('\n').count() == 1, "{text}");
        }
        other => panic!("{other:?}\n{text}{}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// Needs the tokenizer and the trained models.
#[cfg(feature = "text")]
mod with_text {
    use super::*;
    use std::io::Write;
    use std::process::Stdio;

    #[test]
    fn generate() {
        let library = Library::link(scratch("generate"));
        let program = build(&library, "generate.c");
        let text = run(start(&library, &program).args(["--max-new", "8", "--context", "24"]));
        assert_eq!(text.matches("cancelled after 4 tokens").count(), 2, "{text}");
        assert_eq!(text.matches("  polar ").count(), 2, "{text}");
        assert_eq!(text.matches("After the same text: ").count(), 2, "{text}");
        let one = run(start(&library, &program).args(["--model", "fixtures/opt-tiny", "--prompt", "The"]));
        assert!(one.contains("computed 100 % of heads"), "{one}");
        let wrong = start(&library, &program).args(["--model", "/nowhere"]).output().expect("runs");
        assert!(String::from_utf8_lossy(&wrong.stderr).contains("POLAR_E_IO"));
        assert_eq!(wrong.status.code(), Some(1));
    }

    #[test]
    fn server() {
        let library = Library::link(scratch("server"));
        let program = build(&library, "server.cpp");
        let mut child = start(&library, &program)
            .args(["fixtures/llama-tiny", "fixtures/llama-tiny/routers.safetensors"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("runs");
        let lines: String = (0..20).map(|i| format!("This is line {i}\n")).collect();
        child.stdin.take().expect("piped").write_all(lines.as_bytes()).expect("reads");
        let output = child.wait_with_output().expect("ends");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success());
        assert_eq!(text.matches(" % of heads)").count(), 20, "{text}");
    }
}

/// The others are compiled, without the tokenizer they need to run.
#[test]
fn all_compile() {
    let library = Library::link(scratch("compile"));
    for file in ["generate.c", "batch.c", "async.c", "server.cpp"] {
        build(&library, file);
    }
}
