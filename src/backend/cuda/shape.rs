//! A model's sizes as the kernels want them. Head sizes between the built ones are filled up with
//! dimensions that are zero everywhere (weights, so q, k and v), neurons to a multiple of 8; neither
//! changes a result.

use super::device::Device;
use super::launch::{Kernels, MOST_HIDDEN};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::{ModelSpec, Position};

/// Head sizes with kernels for prompts and decoding.
const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// 16-bit type of weights, activations and cache.
    pub(super) dtype: DType,
    pub(super) layers: usize,
    pub(super) vocab: usize,
    pub(super) hidden: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    /// Of the model.
    pub(super) head_dim: usize,
    /// As stored here.
    pub(super) hd: usize,
    pub(super) ffn: usize,
    /// As stored here.
    pub(super) neurons: usize,
    pub(super) gated: bool,
    /// Rows of the position table, and what is added to a position to find its row.
    pub(super) learned_positions: Option<usize>,
    pub(super) position_offset: u32,
}

impl Shape {
    pub(super) fn new(spec: &ModelSpec, wanted: Option<DType>) -> Result<Shape> {
        let dtype = match (wanted, spec.dtype) {
            (None, DType::F32) => DType::BF16,
            (None, d) => d,
            (Some(d), stored) if d == stored && d != DType::F32 => d,
            (Some(d), _) => {
                return Err(Error::unsupported(format!("weights as {} on a CUDA device", d.name())));
            }
        };
        let head_dim = spec.head_dim as usize;
        let hd = HEAD_DIMS.into_iter().find(|&h| h >= head_dim).ok_or_else(|| {
            Error::unsupported(format!("head size {head_dim} on a CUDA device: at most 256 is built"))
        })?;
        if !spec.hidden_size.is_multiple_of(8) {
            return Err(Error::unsupported(format!(
                "hidden size {} on a CUDA device: a multiple of 8 is needed",
                spec.hidden_size
            )));
        }
        if spec.hidden_size > MOST_HIDDEN {
            return Err(Error::unsupported(format!(
                "hidden size {} on a CUDA device: at most {MOST_HIDDEN} is built",
                spec.hidden_size
            )));
        }
        Ok(Shape {
            dtype,
            layers: spec.num_layers as usize,
            vocab: spec.vocab_size as usize,
            hidden: spec.hidden_size as usize,
            heads: spec.num_heads as usize,
            kv_heads: spec.num_kv_heads as usize,
            head_dim,
            hd,
            ffn: spec.ffn_size as usize,
            neurons: (spec.ffn_size as usize).next_multiple_of(8),
            gated: spec.activation.gated(),
            learned_positions: match spec.position {
                Position::Learned { offset } => Some(spec.max_positions as usize + offset as usize),
                Position::Rope { .. } => None,
            },
            position_offset: match spec.position {
                Position::Learned { offset } => offset,
                Position::Rope { .. } => 0,
            },
        })
    }

    /// Kernels for this shape on a device.
    pub(super) fn kernels<D: Device>(&self, device: &D) -> Result<Kernels> {
        let group = (self.heads / self.kv_heads.max(1)) as u32;
        Kernels::for_device(self.dtype, self.hd as u32, group, device)
    }

    /// Width of q, k and v together.
    pub(super) fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.hd
    }

    /// Width of the attention output.
    pub(super) fn q(&self) -> usize {
        self.heads * self.hd
    }

    /// Width of the MLP's first product.
    pub(super) fn first(&self) -> usize {
        self.neurons * if self.gated { 2 } else { 1 }
    }

    /// Bytes of one page of one layer.
    pub(super) fn layer_page_bytes(&self) -> u64 {
        (self.kv_heads * 2 * 16 * self.hd * 2) as u64
    }
}
