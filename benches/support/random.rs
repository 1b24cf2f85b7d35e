//! Models of real shapes with random weights, made in memory: benchmarks need bytes and shapes, not
//! answers. Values are uniform with the variance of a trained model's, never zeros.

use half::bf16;
use polar_sparsity::Result;
use polar_sparsity::dtype::DType;
use polar_sparsity::model::{ModelSpec, Role, Weights};
use polar_sparsity::tensor::TensorInfo;

/// Random bf16 weights of a spec.
pub struct Random {
    spec: ModelSpec,
    total: u64,
}

impl Random {
    pub fn new(spec: ModelSpec) -> Random {
        let total = spec.roles().filter_map(|r| spec.shape(r)?.checked_bytes(DType::BF16)).sum::<usize>();
        Random { total: total as u64, spec }
    }
}

impl Weights for Random {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn info(&self, role: Role) -> Option<TensorInfo> {
        Some(TensorInfo { dtype: DType::BF16, shape: self.spec.shape(role)? })
    }

    fn read_rows(&self, role: Role, first: usize, _count: usize, dst: &mut [u8]) -> Result<()> {
        let mut state = (first as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ fxhash(role);
        for out in dst.as_chunks_mut::<2>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            *out = bf16::from_f32(unit * 0.07).to_le_bytes();
        }
        Ok(())
    }

    fn total_bytes(&self) -> u64 {
        self.total
    }
}

fn fxhash(role: Role) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut h = DefaultHasher::new();
    role.hash(&mut h);
    h.finish()
}
