//! MLP routers as if they were stored in bf16: both backends then keep them in the same 8 bits.

use polar_sparsity::dtype::{DType, bf16};
use polar_sparsity::error::Result;
use polar_sparsity::format::{Shards, TensorSource};
use polar_sparsity::tensor::TensorInfo;

/// A file whose matrices of MLP routers, stored in f32, are rounded.
pub struct Halved(pub Shards);

fn is_rounded(name: &str) -> bool {
    name.contains(".mlp_router.")
}

impl TensorSource for Halved {
    fn names(&self) -> &[String] {
        self.0.names()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        let info = self.0.info(name)?;
        Some(if is_rounded(name) { TensorInfo { dtype: DType::BF16, ..info } } else { info })
    }
    fn require(&self, name: &str) -> Result<TensorInfo> {
        self.0.require(name)?;
        Ok(self.info(name).unwrap())
    }
    fn read(&self, name: &str, offset: u64, dst: &mut [u8]) -> Result<()> {
        if !is_rounded(name) {
            return self.0.read(name, offset, dst);
        }
        let mut stored = vec![0; 2 * dst.len()];
        self.0.read(name, 2 * offset, &mut stored)?;
        for (to, v) in dst.as_chunks_mut::<2>().0.iter_mut().zip(stored.as_chunks::<4>().0) {
            *to = bf16::from_f32(f32::from_le_bytes(*v)).to_le_bytes();
        }
        Ok(())
    }
    fn metadata(&self, key: &str) -> Option<&str> {
        self.0.metadata(key)
    }
}
