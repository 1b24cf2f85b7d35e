//! One or many safetensors files as one [`TensorSource`]. Invariant: every tensor is in exactly
//! one file, and every range was checked against its file's length when it was opened.

use super::header::{Header, Place};
use super::index;
use super::limits::Limits;
use super::{Bytes, TensorSource};
use crate::error::{Error, Result};
use crate::sys::file::{File, show};
use crate::tensor::TensorInfo;
use std::collections::HashMap;
use std::path::Path;

/// Safetensors files of one model.
#[derive(Debug)]
pub struct Shards {
    shards: Vec<Shard>,
    names: Vec<String>,
    /// Shard by tensor name.
    owner: HashMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    label: String,
    bytes: Bytes,
    header: Header,
}

impl Shards {
    /// A single file.
    pub fn open(path: &Path, limits: &Limits) -> Result<Shards> {
        Shards::join(vec![Shard::new(Bytes::File(File::open(path)?), limits)?], limits)
    }

    /// A file's bytes, already in memory.
    pub fn from_bytes(bytes: Vec<u8>, limits: &Limits) -> Result<Shards> {
        Shards::join(vec![Shard::new(Bytes::Memory(bytes), limits)?], limits)
    }

    /// The files of a shard index, all in the index's folder.
    pub fn open_index(index: &Path, limits: &Limits) -> Result<Shards> {
        let file = File::open(index)?;
        let map = index::parse(file.name(), &file.read_all(limits.max_index_bytes)?, limits)?;
        let mut shards = Vec::new();
        let mut total = 0u64;
        for name in map.files() {
            let file = File::open(&index.with_file_name(name))?;
            total = total.saturating_add(file.len());
            if total > limits.max_file_bytes {
                return Err(Error::limit(format!(
                    "{}: shards of {total} bytes and more, at most {} allowed",
                    show(index),
                    limits.max_file_bytes
                )));
            }
            shards.push(Shard::new(Bytes::File(file), limits)?);
        }
        for (tensor, shard) in map.tensors() {
            let found = shards.get(shard).is_some_and(|s| s.header.place(tensor).is_some());
            if !found {
                return Err(Error::format(format!(
                    "{}: tensor {tensor} is not in {}, where the index puts it",
                    file.name(),
                    map.files().get(shard).map_or("", String::as_str)
                )));
            }
        }
        Shards::join(shards, limits)
    }

    fn join(shards: Vec<Shard>, limits: &Limits) -> Result<Shards> {
        let mut names = Vec::new();
        let mut owner = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for name in shard.header.names() {
                if let Some(first) = owner.insert(name.clone(), i) {
                    let first = shards.get(first).map_or("", |s| s.label.as_str());
                    return Err(Error::format(format!(
                        "tensor {name} is stored twice, in {first} and in {}",
                        shard.label
                    )));
                }
                names.push(name.clone());
            }
            if names.len() > limits.max_tensors {
                return Err(Error::limit(format!(
                    "{}: {} tensors with the shards before it, at most {} allowed",
                    shard.label,
                    names.len(),
                    limits.max_tensors
                )));
            }
        }
        Ok(Shards { shards, names, owner })
    }

    fn find(&self, name: &str) -> Option<(&Shard, Place)> {
        let shard = self.shards.get(*self.owner.get(name)?)?;
        Some((shard, shard.header.place(name)?))
    }
}

impl Shard {
    fn new(bytes: Bytes, limits: &Limits) -> Result<Shard> {
        let label = bytes.name().to_owned();
        let header = Header::read(&label, bytes.len(), limits, |at, dst| bytes.read_at(at, dst))?;
        Ok(Shard { label, bytes, header })
    }
}

impl TensorSource for Shards {
    fn names(&self) -> &[String] {
        &self.names
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (_, place) = self.find(name)?;
        Some(TensorInfo { dtype: place.dtype?, shape: place.shape })
    }

    fn require(&self, name: &str) -> Result<TensorInfo> {
        let Some((shard, place)) = self.find(name) else {
            return Err(Error::model(format!("tensor {name} is missing")));
        };
        let Some(dtype) = place.dtype else {
            return Err(Error::model(format!(
                "tensor {name}: dtype {} stored in {}, F32, F16 or BF16 needed",
                place.stored_dtype, shard.label
            )));
        };
        Ok(TensorInfo { dtype, shape: place.shape })
    }

    fn read(&self, name: &str, offset: u64, dst: &mut [u8]) -> Result<()> {
        let Some((shard, place)) = self.find(name) else {
            return Err(Error::model(format!("tensor {name} is missing")));
        };
        let end = offset.checked_add(dst.len() as u64);
        if end.is_none_or(|end| end > place.len) {
            return Err(Error::invalid(format!(
                "tensor {name}: {} bytes from offset {offset} asked for, {} stored",
                dst.len(),
                place.len
            )));
        }
        shard.bytes.read_at(place.offset + offset, dst)
    }

    fn metadata(&self, key: &str) -> Option<&str> {
        self.shards.iter().find_map(|s| s.header.metadata(key))
    }
}
