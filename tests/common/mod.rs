//! What the tests that run compilers share.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// An empty folder for one test.
pub(crate) fn scratch(name: &str) -> PathBuf {
    let thread = format!("{:?}", std::thread::current().id());
    let id: String = thread.chars().filter(char::is_ascii_digit).collect();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}-{id}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the target folder is writable");
    folder
}

/// A program on the PATH; `cc` and `c++` give way to CC and CXX.
pub(crate) fn compiler(name: &str) -> Option<PathBuf> {
    let chosen = match name {
        "cc" => env::var("CC").ok(),
        "c++" => env::var("CXX").ok(),
        _ => None,
    };
    let name = chosen.as_deref().unwrap_or(name);
    let paths = env::var_os("PATH")?;
    env::split_paths(&paths).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Runs a command that must succeed; what it printed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{errors}", output.status);
    text
}

/// The shared library under its development and its run-time name, for programs to link.
pub(crate) struct Library {
    /// Where both names are.
    pub(crate) folder: PathBuf,
}

impl Library {
    /// Makes the names in `folder`.
    pub(crate) fn link(folder: PathBuf) -> Library {
        let built = built_library();
        for name in ["libpolar_sparsity.so", "libpolar_sparsity.so.0"] {
            std::os::unix::fs::symlink(&built, folder.join(name)).expect("the folder is empty");
        }
        Library { folder }
    }

    /// The file behind the names.
    pub(crate) fn file(&self) -> PathBuf {
        built_library()
    }

    /// What a linker needs.
    pub(crate) fn link_flags(&self) -> Vec<std::ffi::OsString> {
        let mut search = std::ffi::OsString::from("-L");
        search.push(&self.folder);
        vec![search, "-lpolar_sparsity".into()]
    }
}

/// The shared library that cargo built with this test: it lies beside the test program.
pub(crate) fn built_library() -> PathBuf {
    let test = env::current_exe().expect("a test has a path");
    let file = test.with_file_name("libpolar_sparsity.so");
    assert!(file.is_file(), "{} is missing", file.display());
    file
}
