//! Element types of weights and KV cache, and their conversions.

pub use half::{bf16, f16};

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// Signed bytes with one f32 scale per row; made at load, never read from a file.
    I8,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I8 => 1,
        }
    }

    /// The name used in messages and configs.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::I8 => "int8",
        }
    }
}

/// The scale of a row in int8, from its largest absolute value.
pub fn scale_i8(most: f32) -> f32 {
    most / 127.0
}

/// A row in int8 by its scale: nearest, ties to even, from -127 to 127. All zeros for scale 0.
pub fn narrow_i8(values: &[f32], scale: f32, out: &mut [u8]) {
    let by = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (o, v) in out.iter_mut().zip(values) {
        *o = (v * by).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
    }
}

/// Widens `src` (elements of `dtype`, little endian, any alignment) into `dst`.
/// `src` holds exactly `dst.len()` elements; `dtype` is one that files store.
pub fn widen(dtype: DType, src: &[u8], dst: &mut [f32]) {
    debug_assert_eq!(src.len(), dst.len() * dtype.size());
    match dtype {
        DType::F32 => {
            for (d, s) in dst.iter_mut().zip(src.as_chunks::<4>().0) {
                *d = f32::from_le_bytes(*s);
            }
        }
        DType::F16 => {
            for (d, s) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
                *d = f16::from_le_bytes(*s).to_f32();
            }
        }
        DType::BF16 => {
            for (d, s) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
                *d = bf16::from_le_bytes(*s).to_f32();
            }
        }
        DType::I8 => {
            for (d, s) in dst.iter_mut().zip(src) {
                *d = f32::from(*s as i8);
            }
        }
    }
}
