//! Looks through stored tensors for NaN and infinity.

use super::TensorSource;
use super::limits::PIECE_BYTES;
use crate::dtype::DType;
use crate::error::{Error, Result, try_vec};

/// Refuses a tensor that holds NaN or infinity. Reads at most [`PIECE_BYTES`] at a time.
pub fn check_finite(source: &dyn TensorSource, name: &str, buffer: &mut Vec<u8>) -> Result<()> {
    let info = source.require(name)?;
    let len = info.shape.checked_bytes(info.dtype).ok_or_else(|| Error::format("tensor size overflows"))?;
    let piece = len.min(PIECE_BYTES);
    if buffer.len() < piece {
        *buffer = try_vec(piece, 0u8, "piece of a tensor")?;
    }
    let (mut done, mut found) = (0usize, 0u64);
    while done < len {
        let n = piece.min(len - done);
        let Some(part) = buffer.get_mut(..n) else { break };
        source.read(name, done as u64, part)?;
        found += non_finite(info.dtype, part);
        done += n;
    }
    if found > 0 {
        return Err(Error::model(format!("tensor {name}: {found} values are NaN or infinite, 0 allowed")));
    }
    Ok(())
}

/// Elements whose exponent bits are all set.
fn non_finite(dtype: DType, bytes: &[u8]) -> u64 {
    let halves = |mask: u16| {
        let (pairs, _) = bytes.as_chunks::<2>();
        pairs.iter().filter(|b| u16::from_le_bytes(**b) & mask == mask).count() as u64
    };
    match dtype {
        DType::F32 => {
            let (words, _) = bytes.as_chunks::<4>();
            words.iter().filter(|b| u32::from_le_bytes(**b) & 0x7f80_0000 == 0x7f80_0000).count() as u64
        }
        DType::F16 => halves(0x7c00),
        DType::BF16 => halves(0x7f80),
        DType::I8 => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{bf16, f16};

    #[test]
    fn counts_match_the_float_types() {
        let values = [0.0, 1.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 65504.0, 1e-40];
        let single: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let half: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let brain: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(non_finite(DType::F32, &single), 3);
        assert_eq!(non_finite(DType::F16, &half), 3);
        assert_eq!(non_finite(DType::BF16, &brain), 3);
    }
}
