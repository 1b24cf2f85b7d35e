//! Where the repository's files are.

use std::path::{Path, PathBuf};

/// The repository: where this program was built or, on another machine, the current folder.
pub fn root() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    if built.is_dir() { built.to_owned() } else { PathBuf::from(".") }
}
