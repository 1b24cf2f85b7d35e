//! What `load` will take, before it does. A test compares the two for every family.

use super::matrix::padded;
use crate::backend::WeightOptions;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::{ModelSpec, Norm, Position};
use crate::sparsity::router::{RouterFile, RouterTensor};

/// Type of the layers' matrices and the head.
pub(super) fn weight_dtype(spec: &ModelSpec, options: WeightOptions) -> Result<DType> {
    let stored = spec.dtype;
    match options.dtype {
        None => Ok(stored),
        Some(d) if d == stored || d == DType::I8 => Ok(d),
        Some(d) => Err(Error::unsupported(format!(
            "weights stored as {} cannot be kept as {} on the CPU",
            stored.name(),
            d.name()
        ))),
    }
}

fn matrix(dtype: DType, rows: usize, columns: usize) -> u64 {
    let scales = if dtype == DType::I8 { 4 * rows } else { 0 };
    rows as u64 * padded(columns) as u64 * dtype.size() as u64 + scales as u64
}

/// A vector that may be missing, kept as f32.
fn vector(there: bool, n: usize) -> u64 {
    if there { 4 * n as u64 } else { 0 }
}

/// Bytes of a model.
pub(super) fn weight_bytes(spec: &ModelSpec, dtype: DType) -> u64 {
    let stored = spec.dtype;
    let (vocab, hidden) = (spec.vocab_size as usize, spec.hidden_size as usize);
    let (ffn, q, kv) = (spec.ffn_size as usize, spec.q_size(), spec.kv_size());
    let gated = spec.activation.gated();
    let norm = vector(true, hidden) + vector(spec.norm == Norm::Layer, hidden);
    let first = matrix(dtype, ffn, hidden) + vector(spec.mlp_bias, ffn);
    let down = if gated { matrix(dtype, hidden, ffn) } else { matrix(dtype, ffn, hidden) };
    let layer = 2 * norm
        + matrix(dtype, q + 2 * kv, hidden)
        + vector(spec.qkv_bias, q + 2 * kv)
        + 2 * vector(spec.qk_norm, spec.head_dim as usize)
        + matrix(dtype, hidden, q)
        + vector(spec.o_bias, hidden)
        + first * if gated { 2 } else { 1 }
        + down
        + vector(spec.mlp_bias, hidden);
    let positions = match spec.position {
        Position::Learned { offset } => matrix(stored, spec.max_positions as usize + offset as usize, hidden),
        Position::Rope { .. } => 0,
    };
    // A tied head of another type is a copy.
    let head = if spec.tied_head && dtype == stored { 0 } else { matrix(dtype, vocab, hidden) };
    matrix(stored, vocab, hidden) + positions + u64::from(spec.num_layers) * layer + norm + head
}

/// Type in which a router's matrix is kept. Attention routers: f32, since they choose among few
/// heads and near ties should fall as a reference would have them. MLP routers only rank thousands
/// of neurons, and reading them is most of what a selection costs: those stored in half precision
/// are kept in int8, which changes less than the trained fixture's score can show; those stored in
/// f32 stay exact.
pub(super) fn router_dtype(which: RouterTensor, stored: DType) -> DType {
    match (which, stored) {
        (RouterTensor::MlpDown | RouterTensor::MlpUp, DType::BF16 | DType::F16) => DType::I8,
        (RouterTensor::MlpDown | RouterTensor::MlpUp, _) => stored,
        (RouterTensor::AttnWeight | RouterTensor::AttnBias, _) => DType::F32,
    }
}

/// Bytes of routers.
pub(super) fn router_bytes(spec: &ModelSpec, file: &RouterFile) -> u64 {
    let mut sum = 0;
    for layer in 0..spec.num_layers as usize {
        for which in RouterTensor::ALL {
            let Some(info) = file.tensor(layer, which) else { continue };
            let dims = info.shape.dims();
            sum += match which {
                RouterTensor::AttnBias => vector(true, dims[0]),
                _ => matrix(router_dtype(which, info.dtype), dims[0], dims[1]),
            };
        }
    }
    sum
}
