//! A checkpoint on disk as [`Weights`]. Invariant: every weight of the spec is there, with a dtype we
//! read and the shape the config needs, and nothing else is that might change the result.
//! Not for laying weights out; backends do that.

use super::fingerprint::Fingerprint;
use super::roles::Names;
use super::{Family, LayerRole, ModelSpec, Role, Weights, config};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::json::Object;
use crate::format::{Limits, ModelDir, TensorSource, check_finite, open_model_dir};
use crate::tensor::TensorInfo;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;

/// How to load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Read all weights once and refuse NaN and infinity.
    pub check_finite: bool,
}

/// An open checkpoint. Holds files open, no weights.
pub struct Checkpoint {
    spec: ModelSpec,
    source: Box<dyn TensorSource>,
    tensors: HashMap<Role, Stored>,
    total_bytes: u64,
    fingerprint: Fingerprint,
}

struct Stored {
    name: String,
    info: TensorInfo,
}

/// Opens a Hugging Face folder.
pub fn load(dir: &Path, limits: &Limits) -> Result<Checkpoint> {
    load_with(dir, limits, LoadOptions::default())
}

/// Opens a Hugging Face folder, with options.
pub fn load_with(dir: &Path, limits: &Limits, options: LoadOptions) -> Result<Checkpoint> {
    let ModelDir { config, generation, tensors } = open_model_dir(dir, limits)?;
    Checkpoint::new(&config, generation.as_ref(), tensors, limits, options)
}

impl Checkpoint {
    /// Matches a config with tensors.
    pub fn new(
        config: &Object,
        generation: Option<&Object>,
        source: Box<dyn TensorSource>,
        limits: &Limits,
        options: LoadOptions,
    ) -> Result<Checkpoint> {
        // The config first: its complaints say more than a tensor's. The dtype is known afterwards.
        let mut spec = config::read(config, generation, DType::F32, limits)?;
        let prefix = find_prefix(spec.family, &*source);
        let names = Names::of(spec.family);
        let mut tensors = HashMap::new();
        let mut total_bytes = 0u64;
        for role in spec.roles() {
            let name = names.name(prefix, role);
            let info = check_tensor(&*source, &spec, role, &name)?;
            total_bytes += info.shape.checked_bytes(info.dtype).unwrap_or(0) as u64;
            tensors.insert(role, Stored { name, info });
        }
        refuse_strangers(&*source, &tensors, names, spec.tied_head)?;
        if let Some(q) = tensors.get(&Role::Layer(0, LayerRole::Q)) {
            spec.dtype = q.info.dtype;
        }
        let mut checkpoint =
            Checkpoint { spec, source, tensors, total_bytes, fingerprint: Fingerprint::default() };
        checkpoint.fingerprint = checkpoint.compute_fingerprint()?;
        if options.check_finite {
            checkpoint.check_finite()?;
        }
        Ok(checkpoint)
    }

    /// What identifies this model to router files.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The tensor's name in the files, for messages.
    pub fn name(&self, role: Role) -> Option<&str> {
        self.tensors.get(&role).map(|t| t.name.as_str())
    }

    /// Refuses NaN and infinity in any weight; reads every byte once.
    pub fn check_finite(&self) -> Result<()> {
        let mut buffer = Vec::new();
        for role in self.spec.roles() {
            if let Some(t) = self.tensors.get(&role) {
                check_finite(&*self.source, &t.name, &mut buffer)?;
            }
        }
        Ok(())
    }

    fn compute_fingerprint(&self) -> Result<Fingerprint> {
        let len = |role| {
            let bytes = self.info(role).and_then(|i| i.shape.checked_bytes(i.dtype));
            bytes.unwrap_or(0)
        };
        Fingerprint::compute(&self.spec, len, |role, dst| match self.tensors.get(&role) {
            Some(t) => self.source.read(&t.name, 0, dst),
            None => Ok(()),
        })
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl Weights for Checkpoint {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn info(&self, role: Role) -> Option<TensorInfo> {
        self.tensors.get(&role).map(|t| t.info)
    }

    fn read_rows(&self, role: Role, first: usize, count: usize, dst: &mut [u8]) -> Result<()> {
        let Some(Stored { name, info }) = self.tensors.get(&role) else {
            return Err(Error::model(format!("the model has no weight {role:?}")));
        };
        let (rows, columns) = match *info.shape.dims() {
            [n] => (n, 1),
            [rows, columns] => (rows, columns),
            _ => return Err(Error::model(format!("tensor {name}: shape {} is no matrix", info.shape))),
        };
        let row_bytes = columns * info.dtype.size();
        let fits = first.checked_add(count).is_some_and(|end| end <= rows);
        if !fits || count.checked_mul(row_bytes) != Some(dst.len()) {
            return Err(Error::invalid(format!(
                "tensor {name}: rows {first} and {count} more into {} bytes asked for, shape is {} of {}",
                dst.len(),
                info.shape,
                info.dtype.name()
            )));
        }
        self.source.read(name, first as u64 * row_bytes as u64, dst)
    }

    fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}

/// The prefix of this checkpoint's names; when none fits, the first, so that the missing embedding
/// is reported by its usual name.
fn find_prefix(family: Family, source: &dyn TensorSource) -> &'static str {
    let names = Names::of(family);
    let stored: HashSet<&str> = source.names().iter().map(String::as_str).collect();
    let found = names.prefixes.iter().find(|p| stored.contains(format!("{p}{}", names.embed()).as_str()));
    found.or(names.prefixes.first()).copied().unwrap_or("")
}

fn check_tensor(source: &dyn TensorSource, spec: &ModelSpec, role: Role, name: &str) -> Result<TensorInfo> {
    let Some(needed) = spec.shape(role) else {
        return Err(Error::model(format!("the model has no weight {role:?}")));
    };
    let info = source.require(name).map_err(|e| match source.names().iter().any(|n| n == name) {
        true => e,
        false => Error::model(format!("tensor {name} is missing, shape {needed} needed by config.json")),
    })?;
    if info.shape != needed {
        return Err(Error::model(format!(
            "tensor {name}: shape {} stored, {needed} needed by config.json",
            info.shape
        )));
    }
    Ok(info)
}

/// A tensor the spec does not know may be a bias, an adapter or a layer more: the config then lies,
/// or we misread it.
fn refuse_strangers(
    source: &dyn TensorSource,
    tensors: &HashMap<Role, Stored>,
    names: &Names,
    tied: bool,
) -> Result<()> {
    let known: HashSet<&str> = tensors.values().map(|t| t.name.as_str()).collect();
    let stranger = source.names().iter().find(|n| !known.contains(n.as_str()) && !names.is_unneeded(n, tied));
    match stranger {
        None => Ok(()),
        Some(name) => {
            let shape = source.info(name).map_or("of another dtype".to_owned(), |i| i.shape.to_string());
            Err(Error::model(format!("tensor {name}: {shape} stored, none needed by config.json")))
        }
    }
}
