//! What identifies a model to files made for it: its config numbers and hashes of a few tensors.
//! Guards against mistakes, not against forgery.

use super::{LayerRole, ModelSpec, Role};
use crate::error::Result;

/// Bytes of each tensor that are hashed.
const HASHED_BYTES: usize = 4096;

/// Config numbers and tensor hashes of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    /// `model_type` of the config.
    pub model_type: String,
    /// Numbers by their names in router files.
    pub numbers: Vec<(&'static str, u32)>,
    /// FNV-1a hash of the first bytes of a tensor, by the tensor's role.
    pub tensors: Vec<(String, u64)>,
}

impl Fingerprint {
    /// Of a model whose tensors `read(role, dst)` reads from their start, as stored;
    /// `len` gives their bytes.
    pub(super) fn compute(
        spec: &ModelSpec,
        len: impl Fn(Role) -> usize,
        read: impl Fn(Role, &mut [u8]) -> Result<()>,
    ) -> Result<Fingerprint> {
        let mut buffer = [0u8; HASHED_BYTES];
        let mut tensors = Vec::new();
        for (name, role) in hashed_roles(spec) {
            let part = buffer.split_at_mut(len(role).min(HASHED_BYTES)).0;
            read(role, part)?;
            tensors.push((name, fnv1a(part)));
        }
        Ok(Fingerprint { tensors, ..Fingerprint::of_spec(spec) })
    }

    /// The part that needs no weights.
    pub fn of_spec(spec: &ModelSpec) -> Fingerprint {
        Fingerprint {
            model_type: spec.family.model_type().to_owned(),
            numbers: vec![
                ("num_layers", spec.num_layers),
                ("hidden_size", spec.hidden_size),
                ("num_heads", spec.num_heads),
                ("num_kv_heads", spec.num_kv_heads),
                ("head_dim", spec.head_dim),
                ("ffn_size", spec.ffn_size),
                ("vocab_size", spec.vocab_size),
            ],
            tensors: Vec::new(),
        }
    }
}

/// The embedding and the query projections of the first, middle and last layer.
fn hashed_roles(spec: &ModelSpec) -> Vec<(String, Role)> {
    let mut roles = vec![("embed_tokens".to_owned(), Role::Embed)];
    for layer in [0, spec.num_layers / 2, spec.num_layers - 1] {
        let entry = (format!("layers.{layer}.q_proj"), Role::Layer(layer, LayerRole::Q));
        if !roles.contains(&entry) {
            roles.push(entry);
        }
    }
    roles
}

/// FNV-1a, 64 bits.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_fnv_vectors() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
