//! Files from strangers: safetensors and JSON, with every limit in [`limits`]. What passes here has
//! sizes that add up; whether it is the right model is decided in `model`.

mod fields;
pub mod header;
pub mod index;
pub mod json;
pub mod limits;
mod scan;
mod shards;

pub use fields::Fields;
pub use limits::Limits;
pub use scan::check_finite;
pub use shards::Shards;

use crate::error::{Error, Result};
use crate::sys::file::{File, show};
use crate::tensor::TensorInfo;
use std::path::Path;

/// Named tensors that can be read piece by piece. Sizes and shapes were checked against the file
/// before one of these exists.
pub trait TensorSource: Send + Sync {
    /// Names, in file order.
    fn names(&self) -> &[String];

    /// Type and shape of a tensor; `None` when there is no such name or its dtype is not read.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// The same, with an error that names the tensor, and its dtype when that is the reason.
    fn require(&self, name: &str) -> Result<TensorInfo>;

    /// Reads `dst.len()` bytes of the tensor's data from byte `offset` on.
    fn read(&self, name: &str, offset: u64, dst: &mut [u8]) -> Result<()>;

    /// A metadata value of the file's `__metadata__`.
    fn metadata(&self, key: &str) -> Option<&str>;
}

/// An opened Hugging Face folder, not yet understood.
pub struct ModelDir {
    /// `config.json`.
    pub config: json::Object,
    /// `generation_config.json`, when there is one.
    pub generation: Option<json::Object>,
    /// The tensors.
    pub tensors: Box<dyn TensorSource>,
}

/// Opens a model folder: `config.json`, and `model.safetensors` or
/// `model.safetensors.index.json` with its shards.
pub fn open_model_dir(dir: &Path, limits: &Limits) -> Result<ModelDir> {
    let config = read_json(&dir.join("config.json"), limits)?;
    let generation = dir.join("generation_config.json");
    let generation = if exists(&generation) { Some(read_json(&generation, limits)?) } else { None };
    let (single, index) = (dir.join("model.safetensors"), dir.join("model.safetensors.index.json"));
    let tensors: Box<dyn TensorSource> = if exists(&single) {
        Box::new(Shards::open(&single, limits)?)
    } else if exists(&index) {
        Box::new(Shards::open_index(&index, limits)?)
    } else {
        // Pickled weights run code when they are read, so they never are.
        let pickle = dir.join("pytorch_model.bin");
        let hint = if exists(&pickle) { "; pytorch_model.bin is not read, convert it" } else { "" };
        return Err(Error::format(format!(
            "{}: neither model.safetensors nor model.safetensors.index.json{hint}",
            show(dir)
        )));
    };
    Ok(ModelDir { config, generation, tensors })
}

fn read_json(path: &Path, limits: &Limits) -> Result<json::Object> {
    let file = File::open(path)?;
    json::parse(file.name(), &file.read_all(limits.max_config_bytes)?, limits.max_json_depth)
}

/// Also true for a dangling link or a folder of that name: opening it then says what is wrong.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Where a file's bytes are.
#[derive(Debug)]
enum Bytes {
    File(File),
    Memory(Vec<u8>),
}

impl Bytes {
    fn name(&self) -> &str {
        match self {
            Bytes::File(file) => file.name(),
            Bytes::Memory(_) => "(memory)",
        }
    }

    fn len(&self) -> u64 {
        match self {
            Bytes::File(file) => file.len(),
            Bytes::Memory(bytes) => bytes.len() as u64,
        }
    }

    fn read_at(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        match self {
            Bytes::File(file) => file.read_at(offset, dst),
            Bytes::Memory(bytes) => {
                let part = usize::try_from(offset)
                    .ok()
                    .and_then(|start| bytes.get(start..start.checked_add(dst.len())?))
                    .ok_or_else(|| Error::format("(memory): read past the end"))?;
                dst.copy_from_slice(part);
                Ok(())
            }
        }
    }
}
