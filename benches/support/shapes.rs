//! The models whose speed is reported, as plain numbers.

use polar_sparsity::dtype::DType;
use polar_sparsity::model::{Activation, Family, ModelSpec, Norm, Position};

/// A model's numbers by its name.
pub fn spec(name: &str) -> ModelSpec {
    use Family::{Llama, Mistral, Qwen2};
    match name {
        "llama-3.2-1b" => tied(rope(Llama, [128_256, 16, 2048, 32, 8, 64, 8192, 131_072], 5e5)),
        "qwen2.5-0.5b" => tied(rope(Qwen2, [151_936, 24, 896, 14, 2, 64, 4864, 32_768], 1e6)),
        "opt-1.3b" => opt([50_272, 24, 2048, 32, 32, 64, 8192, 2048]),
        "opt-6.7b" => opt([50_272, 32, 4096, 32, 32, 128, 16_384, 2048]),
        "llama-2-7b" => rope(Llama, [32_000, 32, 4096, 32, 32, 128, 11_008, 4096], 1e4),
        "llama-3.1-8b" => rope(Llama, [128_256, 32, 4096, 32, 8, 128, 14_336, 131_072], 5e5),
        "qwen2.5-7b" => rope(Qwen2, [152_064, 28, 3584, 28, 4, 128, 18_944, 32_768], 1e6),
        "mistral-7b" => rope(Mistral, [32_768, 32, 4096, 32, 8, 128, 14_336, 32_768], 1e6),
        other => panic!("no shapes for {other}"),
    }
}

/// `n`: vocabulary, layers, hidden, heads, KV heads, head size, MLP, positions.
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
        tied_head: false,
        dtype: DType::BF16,
        bos_token: None,
        eos_tokens: Vec::new(),
    }
}

fn rope(family: Family, n: [u32; 8], theta: f32) -> ModelSpec {
    let half = n[5] / 2;
    let inv_freq = (0..half).map(|i| theta.powf(-(i as f32) / half as f32)).collect();
    let qkv_bias = family == Family::Qwen2;
    ModelSpec { position: Position::Rope { inv_freq }, qkv_bias, ..base(family, n) }
}

fn tied(spec: ModelSpec) -> ModelSpec {
    ModelSpec { tied_head: true, ..spec }
}

fn opt(n: [u32; 8]) -> ModelSpec {
    tied(ModelSpec {
        norm: Norm::Layer,
        activation: Activation::Relu,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        ..base(Family::Opt, n)
    })
}
