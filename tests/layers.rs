//! The shape of the source: who imports whom, where `unsafe` may be, how long files are, and what
//! no library does. Works on the text, needs no parser.

use std::fs;
use std::path::{Path, PathBuf};

/// Longest file; more is two things in one.
const MAX_LINES: usize = 600;

/// What each module may take from the crate beside itself and `error`.
const IMPORTS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("dtype", &[]),
    ("tensor", &["dtype"]),
    ("log", &[]),
    ("sys", &[]),
    ("format", &["dtype", "sys", "tensor"]),
    ("model", &["dtype", "format", "sys", "tensor"]),
    ("sparsity", &["dtype", "format", "model", "sys", "tensor"]),
    ("kv", &[]),
    // How many pages a context takes is arithmetic; the page pool itself it does not see.
    ("sched", &["kv"]),
    ("sample", &[]),
    ("text", &["format", "sys"]),
    ("backend", &["dtype", "kv", "model", "sample", "sparsity", "sys", "tensor"]),
    (
        "engine",
        &["backend", "dtype", "format", "kv", "log", "model", "sample", "sched", "sparsity", "sys", "tensor"],
    ),
    ("ffi", &["dtype", "engine", "format", "log", "sample", "sparsity", "sys", "text"]),
];

/// Crates that only one module sees.
const CRATES: &[(&str, &[&str])] = &[
    ("cudarc", &["backend/cuda"]),
    ("libc", &["sys"]),
    ("safetensors", &["format"]),
    ("serde", &["format"]),
    ("serde_json", &["format"]),
    ("tokenizers", &["text"]),
];

/// Where `unsafe` may be.
const UNSAFE: &[&str] = &["ffi", "sys", "backend/cuda", "backend/cpu/simd"];

/// What an embedded library leaves to its host.
const BANNED: &[&str] = &[
    "println!",
    "eprintln!",
    "print!(",
    "eprint!(",
    "dbg!",
    "env::var",
    "process::exit",
    "process::abort",
    "libc::signal",
    "libc::sigaction",
    "libc::atexit",
];

struct Source {
    /// Relative to `src`.
    path: String,
    /// Lines of code, without comments and without tests at the end of the file.
    code: Vec<(usize, String)>,
    lines: usize,
    has_header: bool,
}

fn sources() -> Vec<Source> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&src, &mut files);
    files.sort();
    files.iter().map(|file| read(&src, file)).collect()
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("readable") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            walk(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

fn read(src: &Path, file: &Path) -> Source {
    let text = fs::read_to_string(file).expect("UTF-8");
    let mut code = Vec::new();
    let is_test = file.ends_with("tests.rs");
    for (number, line) in text.lines().enumerate() {
        if is_test || line == "#[cfg(test)]" {
            break; // the tests of a file come last
        }
        let line = line.split("//").next().unwrap_or("");
        code.push((number + 1, line.to_owned()));
    }
    Source {
        path: file.strip_prefix(src).expect("below src").to_string_lossy().into_owned(),
        code,
        lines: text.lines().count(),
        has_header: text.starts_with("//!"),
    }
}

impl Source {
    fn module(&self) -> &str {
        self.path.split('/').next().unwrap_or("").trim_end_matches(".rs")
    }

    fn is_below(&self, folders: &[&str]) -> bool {
        folders.iter().any(|f| self.path.starts_with(&format!("{f}/")) || self.path == format!("{f}.rs"))
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `word` stands in `line` as a word, with `after` behind it.
fn has_word(line: &str, word: &str, after: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let rest = &line[at + word.len()..];
        !line[..at].ends_with(|c| is_word(c) || c == ':')
            && !rest.starts_with(is_word)
            && rest.starts_with(after)
    })
}

fn report(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn modules_import_one_way() {
    let mut problems = Vec::new();
    for source in sources().iter().filter(|s| s.module() != "lib") {
        let module = source.module();
        let Some((_, allowed)) = IMPORTS.iter().find(|(name, _)| *name == module) else {
            problems.push(format!("{}: module {module} is not in the table", source.path));
            continue;
        };
        for (number, line) in &source.code {
            for (at, _) in line.match_indices("crate::") {
                let rest = &line[at + "crate::".len()..];
                let name: String = rest.chars().take_while(|&c| is_word(c)).collect();
                if rest.starts_with('{') {
                    problems.push(format!("{}:{number}: grouped import from the crate root", source.path));
                } else if name.starts_with(char::is_uppercase) || name == "error" || name == module {
                    // `crate::Result` and the like are re-exports of `error`.
                } else if !allowed.contains(&&*name) {
                    problems.push(format!("{}:{number}: {module} may not import {name}", source.path));
                }
            }
        }
    }
    report(problems);
}

#[test]
fn the_two_backends_do_not_know_each_other() {
    let mut problems = Vec::new();
    for source in sources() {
        for (own, other) in [("backend/cpu", "backend::cuda"), ("backend/cuda", "backend::cpu")] {
            for (number, line) in &source.code {
                if source.is_below(&[own]) && line.contains(other) {
                    problems.push(format!("{}:{number}: {other}", source.path));
                }
            }
        }
    }
    report(problems);
}

#[test]
fn each_outside_crate_has_its_place() {
    let mut problems = Vec::new();
    for source in sources() {
        for (name, folders) in CRATES {
            for (number, line) in &source.code {
                if has_word(line, name, "::") && !source.is_below(folders) {
                    problems.push(format!("{}:{number}: {name} belongs into {folders:?}", source.path));
                }
            }
        }
    }
    report(problems);
}

#[test]
fn unsafe_is_in_few_places() {
    let mut problems = Vec::new();
    for source in sources().iter().filter(|s| !s.is_below(UNSAFE)) {
        for (number, line) in &source.code {
            if has_word(line, "unsafe", "") {
                problems.push(format!("{}:{number}: unsafe", source.path));
            }
        }
    }
    report(problems);
}

#[test]
fn the_library_leaves_the_process_alone() {
    let mut problems = Vec::new();
    for source in sources() {
        for (number, line) in &source.code {
            for banned in BANNED.iter().filter(|b| line.contains(**b)) {
                problems.push(format!("{}:{number}: {banned}", source.path));
            }
        }
    }
    report(problems);
}

#[test]
fn files_are_short_and_say_what_they_are() {
    let mut problems = Vec::new();
    for source in sources() {
        if source.lines > MAX_LINES {
            problems.push(format!("{}: {} lines, at most {MAX_LINES}", source.path, source.lines));
        }
        if !source.has_header {
            problems.push(format!("{}: no //! header", source.path));
        }
    }
    report(problems);
}
