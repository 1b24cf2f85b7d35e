//! From a Hugging Face folder to plain numbers ([`ModelSpec`]) and tensors by role
//! ([`Checkpoint`]). Knows config fields and tensor names; knows no backend and no policy.

mod checkpoint;
pub mod config;
mod fingerprint;
mod roles;
mod rope;
mod spec;

pub use checkpoint::{Checkpoint, LoadOptions, load, load_with};
pub use fingerprint::{Fingerprint, fnv1a};
pub use roles::LAYER_ROLES;
pub use spec::{Activation, Family, ModelSpec, Norm, Position};

use crate::error::Result;
use crate::tensor::TensorInfo;

/// What a weight is for, independent of how a family names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Token embedding `[vocab, hidden]`.
    Embed,
    /// Learned positions `[max_positions + offset, hidden]`.
    PositionEmbed,
    /// Weight of the norm before the head `[hidden]`.
    FinalNormWeight,
    /// Its bias.
    FinalNormBias,
    /// Output head `[vocab, hidden]`; absent when tied.
    Head,
    /// A weight of layer `.0`.
    Layer(u32, LayerRole),
}

/// Weights of one layer. Matrices are `[out, in]`, rows contiguous, as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the field's own")]
pub enum LayerRole {
    AttnNormWeight,
    AttnNormBias,
    Q,
    QBias,
    K,
    KBias,
    V,
    VBias,
    QNorm,
    KNorm,
    O,
    OBias,
    MlpNormWeight,
    MlpNormBias,
    Gate,
    GateBias,
    Up,
    UpBias,
    Down,
    DownBias,
}

/// Weights by role, read piece by piece so that loading needs little memory beside them.
/// Everything was checked (present, dtype, shape, size) before one of these exists.
pub trait Weights: Send + Sync {
    /// The model they belong to.
    fn spec(&self) -> &ModelSpec;

    /// Type and shape; `None` when the model has no such weight.
    fn info(&self, role: Role) -> Option<TensorInfo>;

    /// Reads rows `first..first + count` of a matrix (or elements of a vector) as stored into
    /// `dst`, which holds exactly that many bytes.
    fn read_rows(&self, role: Role, first: usize, count: usize, dst: &mut [u8]) -> Result<()>;

    /// Bytes of all weights as stored.
    fn total_bytes(&self) -> u64;
}
