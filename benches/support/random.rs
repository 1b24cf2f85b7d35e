//! Models of real shapes with random weights, made in memory: benchmarks need bytes and shapes, not
//! answers. Values are uniform with the variance of a trained model's, never zeros.

use half::bf16;
use polar_sparsity::Result;
use polar_sparsity::dtype::DType;
use polar_sparsity::model::{Activation, Family, ModelSpec, Norm, Position, Role, Weights};
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

/// The shapes we report.
pub fn spec(name: &str) -> ModelSpec {
    match name {
        "llama-3.2-1b" => {
            rope(Family::Llama, [128_256, 16, 2048, 32, 8, 64, 8192, 131_072], 500_000.0, false)
        }
        "qwen2.5-0.5b" => rope(Family::Qwen2, [151_936, 24, 896, 14, 2, 64, 4864, 32_768], 1_000_000.0, true),
        "opt-1.3b" => opt([50_272, 24, 2048, 32, 32, 64, 8192, 2048]),
        other => panic!("no shapes for {other}"),
    }
}

fn base(family: Family, n: [u32; 8]) -> ModelSpec {
    ModelSpec {
        family,
        vocab_size: n[0],
        num_layers: n[1],
        hidden_size: n[2],
        num_heads: n[3],
        num_kv_heads: n[4],
        head_dim: n[5],
        ffn_size: n[6],
        max_positions: n[7],
        norm: Norm::Rms,
        norm_eps: 1e-5,
        position: Position::Learned { offset: 2 },
        activation: Activation::SiluGated,
        window: None,
        qk_norm: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        tied_head: true,
        dtype: DType::BF16,
        bos_token: None,
        eos_tokens: Vec::new(),
    }
}

fn rope(family: Family, n: [u32; 8], theta: f32, qkv_bias: bool) -> ModelSpec {
    let half = n[5] / 2;
    let inv_freq = (0..half).map(|i| theta.powf(-(i as f32) / half as f32)).collect();
    ModelSpec { position: Position::Rope { inv_freq }, qkv_bias, ..base(family, n) }
}

fn opt(n: [u32; 8]) -> ModelSpec {
    ModelSpec {
        norm: Norm::Layer,
        activation: Activation::Relu,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        ..base(Family::Opt, n)
    }
}
