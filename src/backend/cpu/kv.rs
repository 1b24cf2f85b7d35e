//! KV pages: `[layer][page][kv head][K, V]`, the inside of a piece as `simd/attend.rs` wants it.
//!
//! Invariant: writing slot 0 of a page zeroes the rest of the piece, so what an earlier owner left
//! there is never read, not even to be multiplied with 0.

use super::simd::{KvPiece, bf16_bits};
use crate::backend::PAGE_TOKENS;
use crate::dtype::{DType, f16};
use crate::error::{Error, Result};
use crate::model::ModelSpec;
use crate::sys::alloc::{Buf, Pod};

/// Sizes of pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct KvShape {
    pub(super) dtype: DType,
    pub(super) layers: usize,
    pub(super) heads: usize,
    /// Head dimensions, padded to 16.
    pub(super) dims: usize,
}

impl KvShape {
    pub(super) fn new(spec: &ModelSpec) -> KvShape {
        KvShape {
            dtype: spec.dtype,
            layers: spec.num_layers as usize,
            heads: spec.num_kv_heads as usize,
            dims: (spec.head_dim as usize).next_multiple_of(16),
        }
    }

    /// Elements of one (page, head) piece.
    pub(super) fn piece(&self) -> usize {
        2 * PAGE_TOKENS * self.dims
    }

    /// Bytes of one piece.
    pub(super) fn piece_bytes(&self) -> usize {
        self.piece() * self.dtype.size()
    }

    /// Bytes of one page over all layers.
    pub(super) fn page_bytes(&self) -> u64 {
        self.layers as u64 * self.heads as u64 * self.piece_bytes() as u64
    }
}

/// All pages.
pub struct CpuKv {
    pub(super) shape: KvShape,
    pub(super) pages: usize,
    data: Buf<u8>,
}

impl CpuKv {
    pub(super) fn new(shape: KvShape, pages: usize) -> Result<CpuKv> {
        let bytes = shape.page_bytes().checked_mul(pages as u64).and_then(|b| usize::try_from(b).ok());
        let bytes = bytes.ok_or(Error::no_memory("KV pages"))?;
        Ok(CpuKv { shape, pages, data: Buf::zeroed(bytes, "KV pages")? })
    }

    /// Puts small numbers everywhere, for measurements without a prompt: memory that nobody wrote is
    /// one shared page of zeros, and would be read from the cache.
    pub fn fill(&mut self) {
        // The same bits are a small normal number in each half of an f32, and in f16 and bf16.
        for (i, x) in self.data.view_mut::<u16>().iter_mut().enumerate() {
            *x = 0x3c00 | (i % 251) as u16;
        }
    }

    /// Bytes of one layer.
    fn layer_bytes(&self) -> usize {
        self.pages * self.shape.heads * self.shape.piece_bytes()
    }

    /// One layer's pieces, `[page][head][piece]`.
    pub(super) fn layer(&self, layer: usize) -> KvLayer<'_> {
        let n = self.layer_bytes() / self.shape.dtype.size();
        let at = layer * n;
        let data = match self.shape.dtype {
            DType::F32 => KvPiece::F32(&self.data.view()[at..at + n]),
            DType::F16 => KvPiece::F16(&self.data.view()[at..at + n]),
            _ => KvPiece::Bf16(&self.data.view()[at..at + n]),
        };
        KvLayer { data, shape: self.shape }
    }

    /// One layer's elements, to write.
    pub(super) fn layer_mut<E: Pod>(&mut self, layer: usize) -> &mut [E] {
        let n = self.layer_bytes() / size_of::<E>();
        &mut self.data.view_mut()[layer * n..(layer + 1) * n]
    }

    #[cfg(test)]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }
}

/// One layer's pages.
#[derive(Clone, Copy)]
pub(super) struct KvLayer<'a> {
    data: KvPiece<'a>,
    shape: KvShape,
}

impl<'a> KvLayer<'a> {
    pub(super) fn piece(&self, page: u32, head: usize) -> KvPiece<'a> {
        let n = self.shape.piece();
        let at = (page as usize * self.shape.heads + head) * n;
        match self.data {
            KvPiece::F32(d) => KvPiece::F32(&d[at..at + n]),
            KvPiece::F16(d) => KvPiece::F16(&d[at..at + n]),
            KvPiece::Bf16(d) => KvPiece::Bf16(&d[at..at + n]),
        }
    }
}

/// Stores one token's K and V (head dimensions many) into slot `slot` of an f32 piece.
pub(super) fn write_f32(piece: &mut [f32], dims: usize, slot: usize, k: &[f32], v: &[f32]) {
    write_lanes(piece, dims, slot, k, v, |x| x);
}

/// The same for a piece of binary16 bits.
pub(super) fn write_f16(piece: &mut [u16], dims: usize, slot: usize, k: &[f32], v: &[f32]) {
    write_lanes(piece, dims, slot, k, v, |x| f16::from_f32(x).to_bits());
}

/// The same for a piece of bfloat16 bits: K in pairs of dimensions, V in pairs of tokens.
pub(super) fn write_bf16(piece: &mut [u16], dims: usize, slot: usize, k: &[f32], v: &[f32]) {
    clear_new(piece, slot);
    let (ks, vs) = piece.split_at_mut(PAGE_TOKENS * dims);
    for (d, &x) in k.iter().enumerate() {
        ks[(d / 2 * PAGE_TOKENS + slot) * 2 + d % 2] = bf16_bits(x);
    }
    for (d, &x) in v.iter().enumerate() {
        vs[(slot / 2 * dims + d) * 2 + slot % 2] = bf16_bits(x);
    }
}

fn write_lanes<E: Pod>(
    piece: &mut [E],
    dims: usize,
    slot: usize,
    k: &[f32],
    v: &[f32],
    f: impl Fn(f32) -> E,
) {
    clear_new(piece, slot);
    let (ks, vs) = piece.split_at_mut(PAGE_TOKENS * dims);
    for (d, &x) in k.iter().enumerate() {
        ks[d * PAGE_TOKENS + slot] = f(x);
    }
    for (to, &x) in vs[slot * dims..].iter_mut().zip(v) {
        *to = f(x);
    }
}

fn clear_new<E: Pod>(piece: &mut [E], slot: usize) {
    if slot == 0 {
        piece.fill(E::default());
    }
}
