//! The header of a safetensors file. The `safetensors` crate decides what a valid layout is; around
//! it stand the limits it does not have: header size, tensor count, names, rank, dimensions,
//! duplicate keys, metadata size. Invariant: every tensor of a [`Header`] lies inside the file, in
//! its own bytes, as many as shape and dtype need. Not for tensor data.

use super::json::{check_nesting, drive, malformed, one_line};
use super::limits::Limits;
use crate::dtype::DType;
use crate::error::{Error, Result, try_vec};
use crate::tensor::{MAX_RANK, Shape};
use safetensors::tensor::{Dtype, Metadata, TensorInfo as Entry};
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};
use std::collections::{HashMap, HashSet};
use std::fmt;

/// Bytes of the length field before the header.
const LENGTH_BYTES: u64 = 8;

/// Longest array worth parsing: one of [`MAX_RANK`] dimensions is wanted, a longer one named.
const MAX_ITEMS: usize = 64;

/// A checked header.
#[derive(Debug)]
pub struct Header {
    names: Vec<String>,
    layout: Metadata,
    data_start: u64,
}

/// Where and what a tensor is in its file.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Element type, when it is one we read.
    pub dtype: Option<DType>,
    /// Its name in the file.
    pub stored_dtype: Dtype,
    /// Shape.
    pub shape: Shape,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Header {
    /// Reads and checks the header of a file of `file_len` bytes; `read(offset, dst)` reads it.
    pub fn read(
        label: &str,
        file_len: u64,
        limits: &Limits,
        read: impl Fn(u64, &mut [u8]) -> Result<()>,
    ) -> Result<Header> {
        if file_len > limits.max_file_bytes {
            return Err(Error::limit(format!(
                "{label}: {file_len} bytes stored, at most {} allowed",
                limits.max_file_bytes
            )));
        }
        let Some(rest) = file_len.checked_sub(LENGTH_BYTES) else {
            return Err(Error::format(format!(
                "{label}: {file_len} bytes stored, a safetensors file has at least {LENGTH_BYTES}"
            )));
        };
        let mut length = [0; LENGTH_BYTES as usize];
        read(0, &mut length)?;
        let length = u64::from_le_bytes(length);
        if length > rest {
            return Err(Error::format(format!(
                "{label}: header of {length} bytes claimed, {rest} bytes stored after its length"
            )));
        }
        if length > limits.max_header_bytes {
            return Err(Error::limit(format!(
                "{label}: header of {length} bytes, at most {} allowed",
                limits.max_header_bytes
            )));
        }
        let length_usize = usize::try_from(length).map_err(|_| Error::no_memory("safetensors header"))?;
        let mut text = try_vec(length_usize, 0u8, "safetensors header")?;
        read(LENGTH_BYTES, &mut text)?;
        Header::parse(label, &text, LENGTH_BYTES + length, rest - length, limits)
    }

    /// Checks header text whose tensors' data are the `data_len` bytes from `data_start` on.
    fn parse(label: &str, text: &[u8], data_start: u64, data_len: u64, limits: &Limits) -> Result<Header> {
        if text.first() != Some(&b'{') {
            return Err(Error::format(format!("{label}: the header is not a JSON object")));
        }
        check_nesting(label, text, limits.max_json_depth, MAX_ITEMS)?;
        let mut found = Found::new(label, limits);
        if let Err(e) = drive(text, &mut found) {
            return Err(found.refused.take().unwrap_or_else(|| match &found.current {
                Some(name) => malformed(&format!("{label}: tensor {}", one_line(name)), &e),
                None => malformed(&format!("{label}: header"), &e),
            }));
        }
        let Found { mut tensors, metadata, .. } = found;
        // Writers may list tensors in any order; the layout is about offsets.
        tensors.sort_by_key(|(_, t)| t.data_offsets);
        check_layout(label, &tensors, data_len)?;
        let names = tensors.iter().map(|(name, _)| name.clone()).collect();
        let layout = Metadata::new(Some(metadata), tensors)
            .map_err(|e| Error::format(format!("{label}: {}", one_line(&e.to_string()))))?;
        Ok(Header { names, layout, data_start })
    }

    /// Tensor names, in file order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Where and what a tensor is.
    pub fn place(&self, name: &str) -> Option<Place> {
        let t = self.layout.info(name)?;
        let (start, end) = t.data_offsets;
        Some(Place {
            dtype: readable(t.dtype),
            stored_dtype: t.dtype,
            shape: Shape::new(&t.shape).ok()?,
            offset: self.data_start + start as u64,
            len: (end - start) as u64,
        })
    }

    /// A value of `__metadata__`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.layout.metadata().as_ref()?.get(key).map(String::as_str)
    }
}

/// The dtypes we read.
fn readable(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// The crate checks the same, but says neither which tensors nor which numbers disagree.
fn check_layout(label: &str, tensors: &[(String, Entry)], data_len: u64) -> Result<()> {
    let mut expected = 0;
    for (name, t) in tensors {
        let (start, end) = t.data_offsets;
        if start != expected {
            let fault = if start < expected { "overlaps the tensor before it" } else { "leaves a hole" };
            return Err(Error::format(format!(
                "{label}: tensor {name} {fault}: it starts at byte {start}, the one before ends at {expected}"
            )));
        }
        let bits = t.shape.iter().try_fold(t.dtype.bitsize(), |n, &d| n.checked_mul(d));
        let stored = end.checked_sub(start);
        match bits {
            None => {
                return Err(Error::format(format!(
                    "{label}: tensor {name}: the size of shape {:?} overflows, {} bytes stored",
                    t.shape,
                    stored.unwrap_or(0)
                )));
            }
            Some(bits) if !bits.is_multiple_of(8) || stored != Some(bits / 8) => {
                return Err(Error::format(format!(
                    "{label}: tensor {name}: bytes {start} to {end} stored, {} bytes needed by shape {:?} of {}",
                    bits.div_ceil(8),
                    t.shape,
                    t.dtype
                )));
            }
            Some(_) => expected = end,
        }
    }
    if expected as u64 != data_len {
        return Err(Error::format(format!(
            "{label}: {data_len} bytes of tensor data stored, {expected} needed by the header"
        )));
    }
    Ok(())
}

/// What was read of a header so far, and the limits it must keep.
struct Found<'a> {
    label: &'a str,
    limits: &'a Limits,
    tensors: Vec<(String, Entry)>,
    names: HashSet<String>,
    metadata: HashMap<String, String>,
    has_metadata: bool,
    /// The tensor being read, for the parser's own complaints.
    current: Option<String>,
    /// Our own complaint; the parser's errors carry text only.
    refused: Option<Error>,
}

impl<'a> Found<'a> {
    fn new(label: &'a str, limits: &'a Limits) -> Found<'a> {
        Found {
            label,
            limits,
            tensors: Vec::new(),
            names: HashSet::new(),
            metadata: HashMap::new(),
            has_metadata: false,
            current: None,
            refused: None,
        }
    }

    fn refuse<E: de::Error>(&mut self, error: Error) -> E {
        self.refused = Some(error);
        E::custom("refused")
    }

    fn check_name(&self, name: &str) -> Result<()> {
        let (label, limits) = (self.label, self.limits);
        let shown = one_line(name);
        if name.len() > limits.max_name_bytes {
            return Err(Error::limit(format!(
                "{label}: tensor name {shown} of {} bytes, at most {} allowed",
                name.len(),
                limits.max_name_bytes
            )));
        }
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err(Error::format(format!(
                "{label}: tensor name \"{shown}\" is empty or has control characters"
            )));
        }
        if self.names.contains(name) {
            return Err(Error::format(format!("{label}: tensor {shown} is listed twice")));
        }
        if self.tensors.len() >= limits.max_tensors {
            return Err(Error::limit(format!(
                "{label}: tensor {shown} is one too many, at most {} allowed",
                limits.max_tensors
            )));
        }
        Ok(())
    }

    fn check_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        let label = self.label;
        if shape.len() > MAX_RANK {
            return Err(Error::limit(format!(
                "{label}: tensor {name}: rank {} stored, at most {MAX_RANK} allowed",
                shape.len()
            )));
        }
        match shape.iter().find(|&&d| d as u64 > self.limits.max_dim) {
            Some(d) => Err(Error::limit(format!(
                "{label}: tensor {name}: dimension {d} stored, at most {} allowed",
                self.limits.max_dim
            ))),
            None => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for &mut Found<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Found<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a safetensors header")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if self.has_metadata {
                    let twice = Error::format(format!("{}: __metadata__ is listed twice", self.label));
                    return Err(self.refuse(twice));
                }
                self.has_metadata = true;
                map.next_value_seed(Texts(self))?;
                continue;
            }
            self.check_name(&name).map_err(|e| self.refuse(e))?;
            self.current = Some(name.clone());
            let entry: Entry = map.next_value()?;
            self.check_shape(&name, &entry.shape).map_err(|e| self.refuse(e))?;
            self.current = None;
            self.names.insert(name.clone());
            self.tensors.push((name, entry));
        }
        Ok(())
    }
}

/// Reads `__metadata__`: strings by name.
struct Texts<'s, 'a>(&'s mut Found<'a>);

impl<'de> DeserializeSeed<'de> for Texts<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Texts<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("strings by name in __metadata__")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let Texts(found) = self;
        let (label, limits) = (found.label, found.limits);
        let mut bytes = 0usize;
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            bytes = bytes.saturating_add(key.len()).saturating_add(value.len());
            if bytes > limits.max_metadata_bytes {
                let max = limits.max_metadata_bytes;
                return Err(found.refuse(Error::limit(format!("{label}: __metadata__ above {max} bytes"))));
            }
            if found.metadata.len() >= limits.max_metadata_entries {
                let max = limits.max_metadata_entries;
                return Err(found.refuse(Error::limit(format!("{label}: __metadata__ above {max} entries"))));
            }
            if found.metadata.contains_key(&key) {
                let shown = one_line(&key);
                return Err(found.refuse(Error::format(format!("{label}: __metadata__ has {shown} twice"))));
            }
            found.metadata.insert(key, value);
        }
        Ok(())
    }
}
