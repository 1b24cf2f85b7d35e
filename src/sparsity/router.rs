//! Router files, version 1: safetensors with routers as tensors and, in `__metadata__`, the model
//! they belong to, densities and `K_l(B)` tables. Invariant: an open [`RouterFile`] fits the model it
//! was opened for, in every shape, and its weights are finite. Not for training facts.

use super::metadata;
use crate::dtype::widen;
use crate::error::{Error, Result, try_vec};
use crate::format::limits::PIECE_BYTES;
use crate::format::{Limits, Shards, TensorSource, check_finite};
use crate::model::{Activation, Fingerprint, ModelSpec};
use crate::tensor::{Shape, TensorInfo};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

/// Rows of an attention router's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttnUnit {
    /// One per query head; a KV head's score is the maximum over its group.
    Head,
    /// One per KV head.
    KvHead,
}

/// Attention routers of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct AttnInfo {
    /// Per layer; `None` = no router, the layer is dense.
    pub layers: Vec<Option<AttnUnit>>,
    /// Default density per layer; layer 0 is 1.
    pub density: Vec<f32>,
}

/// MLP routers of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpInfo {
    /// Router rank per layer; `None` = no router, the layer is dense.
    pub ranks: Vec<Option<u32>>,
    /// Batch sizes of the table, ascending.
    pub batch_sizes: Vec<u32>,
    /// `[batch size][layer]`: neurons kept.
    pub table: Vec<Vec<u32>>,
}

impl MlpInfo {
    /// `K_l(B)` at the nearest tabled batch size that is at least `batch`; `None` above the table.
    pub fn k(&self, layer: usize, batch: u32) -> Option<u32> {
        let i = self.batch_sizes.partition_point(|&b| b < batch);
        self.table.get(i).map(|row| row[layer])
    }
}

/// What a router file says, as plain numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterInfo {
    /// Attention routers, if the file has any.
    pub attention: Option<AttnInfo>,
    /// MLP routers, if the file has any.
    pub mlp: Option<MlpInfo>,
}

/// A tensor of a router file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the file's own")]
pub enum RouterTensor {
    AttnWeight,
    AttnBias,
    MlpDown,
    MlpUp,
}

impl RouterTensor {
    /// Every kind.
    pub const ALL: [RouterTensor; 4] =
        [RouterTensor::AttnWeight, RouterTensor::AttnBias, RouterTensor::MlpDown, RouterTensor::MlpUp];

    /// The tensor's name in the file.
    pub fn name(self, layer: usize) -> String {
        let what = match self {
            RouterTensor::AttnWeight => "attention_router.weight",
            RouterTensor::AttnBias => "attention_router.bias",
            RouterTensor::MlpDown => "mlp_router.down.weight",
            RouterTensor::MlpUp => "mlp_router.up.weight",
        };
        format!("layers.{layer}.{what}")
    }
}

/// An open router file, checked against its model.
pub struct RouterFile {
    info: RouterInfo,
    source: Box<dyn TensorSource>,
}

impl RouterFile {
    /// Opens a router file for the model of `spec` and `fingerprint`. With `ignore_fingerprint` a
    /// file made for another model is accepted as long as every shape fits.
    pub fn open(
        path: &Path,
        limits: &Limits,
        spec: &ModelSpec,
        fingerprint: &Fingerprint,
        ignore_fingerprint: bool,
    ) -> Result<RouterFile> {
        let source = Box::new(Shards::open(path, limits)?);
        RouterFile::new(source, limits, spec, fingerprint, ignore_fingerprint)
    }

    /// The same, from tensors already opened.
    pub fn new(
        source: Box<dyn TensorSource>,
        limits: &Limits,
        spec: &ModelSpec,
        fingerprint: &Fingerprint,
        ignore_fingerprint: bool,
    ) -> Result<RouterFile> {
        metadata::check_version(&*source)?;
        if !ignore_fingerprint {
            metadata::check_base_model(&*source, limits, fingerprint)?;
        }
        let info = RouterInfo {
            attention: read_attention(&*source, limits, spec)?,
            mlp: read_mlp(&*source, limits, spec)?,
        };
        check_names(&*source, spec)?;
        let mut buffer = Vec::new();
        for name in source.names() {
            check_finite(&*source, name, &mut buffer)?;
        }
        Ok(RouterFile { info, source })
    }

    /// The plain numbers.
    pub fn info(&self) -> &RouterInfo {
        &self.info
    }

    /// Type and shape of a tensor; `None` when the layer has no such router.
    pub fn tensor(&self, layer: usize, tensor: RouterTensor) -> Option<TensorInfo> {
        self.source.info(&tensor.name(layer))
    }

    /// Reads `dst.len()` bytes of a tensor as stored, from byte `offset` on.
    pub fn read(&self, layer: usize, tensor: RouterTensor, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.source.read(&tensor.name(layer), offset, dst)
    }

    /// Reads a whole tensor as f32; `dst` has exactly its elements.
    pub fn read_f32(&self, layer: usize, tensor: RouterTensor, dst: &mut [f32]) -> Result<()> {
        let name = tensor.name(layer);
        let TensorInfo { dtype, shape } = self.source.require(&name)?;
        if shape.checked_len() != Some(dst.len()) {
            return Err(Error::invalid(format!(
                "tensor {name}: shape {shape} stored, {} elements asked for",
                dst.len()
            )));
        }
        let piece = dst.len().min(PIECE_BYTES / dtype.size());
        let mut bytes = try_vec(piece * dtype.size(), 0u8, "piece of a router")?;
        let mut offset = 0;
        for part in dst.chunks_mut(piece.max(1)) {
            let stored = bytes.split_at_mut(part.len() * dtype.size()).0;
            self.source.read(&name, offset, stored)?;
            widen(dtype, stored, part);
            offset += stored.len() as u64;
        }
        Ok(())
    }
}

impl fmt::Debug for RouterFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterFile").field("info", &self.info).finish_non_exhaustive()
    }
}

fn read_attention(source: &dyn TensorSource, limits: &Limits, spec: &ModelSpec) -> Result<Option<AttnInfo>> {
    let layers = spec.num_layers as usize;
    let stored = present(source, layers, RouterTensor::AttnWeight);
    let biases = present(source, layers, RouterTensor::AttnBias);
    let metadata = metadata::attention(source, limits, layers)?;
    let Some((unit, density)) = metadata else {
        return match stored.iter().position(|s| *s) {
            None => Ok(None),
            Some(l) => Err(Error::format(format!(
                "router file: {} is there, metadata \"attention\" is missing",
                RouterTensor::AttnWeight.name(l)
            ))),
        };
    };
    let rows = match unit {
        AttnUnit::Head => spec.num_heads,
        AttnUnit::KvHead => spec.num_kv_heads,
    } as usize;
    for (layer, _) in stored.iter().enumerate().filter(|(_, s)| **s) {
        need_shape(source, layer, RouterTensor::AttnWeight, Shape::d2(rows, spec.hidden_size as usize))?;
        need_shape(source, layer, RouterTensor::AttnBias, Shape::d1(rows))?;
    }
    if let Some(layer) = (0..layers).find(|&l| !stored[l] && biases[l]) {
        let (bias, weight) = (RouterTensor::AttnBias.name(layer), RouterTensor::AttnWeight.name(layer));
        return Err(Error::model(format!("router file: {bias} is there, {weight} is missing")));
    }
    if !stored.contains(&true) {
        return Err(Error::model("router file: metadata \"attention\" is there, no attention router is"));
    }
    Ok(Some(AttnInfo { layers: stored.iter().map(|s| s.then_some(unit)).collect(), density }))
}

fn read_mlp(source: &dyn TensorSource, limits: &Limits, spec: &ModelSpec) -> Result<Option<MlpInfo>> {
    let layers = spec.num_layers as usize;
    let down = present(source, layers, RouterTensor::MlpDown);
    let up = present(source, layers, RouterTensor::MlpUp);
    let table = metadata::mlp(source, limits, layers, spec.ffn_size)?;
    let first = (0..layers).find(|&l| down[l] || up[l]);
    let ((batch_sizes, table), first) = match (table, first) {
        (None, None) => return Ok(None),
        (Some(table), Some(first)) => (table, first),
        (None, Some(l)) => {
            let name = if down[l] { RouterTensor::MlpDown } else { RouterTensor::MlpUp }.name(l);
            return Err(Error::format(format!("router file: {name} is there, metadata \"mlp\" is missing")));
        }
        (Some(_), None) => {
            return Err(Error::model("router file: metadata \"mlp\" is there, no MLP router is"));
        }
    };
    if spec.activation == Activation::SiluGated {
        let name = RouterTensor::MlpDown.name(first);
        return Err(Error::model(format!(
            "router file: {name} is for a ReLU model, the model's MLP is SiLU"
        )));
    }
    let (hidden, ffn) = (spec.hidden_size as usize, spec.ffn_size as usize);
    let mut ranks = Vec::new();
    for layer in 0..layers {
        if !down[layer] && !up[layer] {
            ranks.push(None);
            continue;
        }
        let name = RouterTensor::MlpDown.name(layer);
        let shape = source.require(&name)?.shape;
        let rank = match *shape.dims() {
            [rank, columns] if columns == hidden && rank > 0 => rank,
            _ => {
                return Err(Error::model(format!(
                    "tensor {name}: shape {shape} stored, [rank, {hidden}] needed by the model"
                )));
            }
        };
        if rank > limits.max_router_rank as usize {
            let max = limits.max_router_rank;
            return Err(Error::limit(format!("tensor {name}: rank {rank} stored, at most {max} allowed")));
        }
        need_shape(source, layer, RouterTensor::MlpUp, Shape::d2(ffn, rank))?;
        ranks.push(Some(rank as u32));
    }
    Ok(Some(MlpInfo { ranks, batch_sizes, table }))
}

/// Which layers have the tensor.
fn present(source: &dyn TensorSource, layers: usize, tensor: RouterTensor) -> Vec<bool> {
    let names: HashSet<&str> = source.names().iter().map(String::as_str).collect();
    (0..layers).map(|l| names.contains(tensor.name(l).as_str())).collect()
}

fn need_shape(source: &dyn TensorSource, layer: usize, tensor: RouterTensor, needed: Shape) -> Result<()> {
    let name = tensor.name(layer);
    let stored = source.require(&name)?.shape;
    if stored == needed {
        return Ok(());
    }
    Err(Error::model(format!("tensor {name}: shape {stored} stored, {needed} needed by the model")))
}

/// Refuses tensors that are no router of this model's layers.
fn check_names(source: &dyn TensorSource, spec: &ModelSpec) -> Result<()> {
    let layers = spec.num_layers as usize;
    let known: HashSet<String> =
        (0..layers).flat_map(|l| RouterTensor::ALL.into_iter().map(move |t| t.name(l))).collect();
    match source.names().iter().find(|n| !known.contains(*n)) {
        None => Ok(()),
        Some(name) => {
            Err(Error::model(format!("tensor {name} is no router of a model with {layers} layers")))
        }
    }
}
