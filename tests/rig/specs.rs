//! Models as plain numbers, without a config: those of tests and, by their names, those whose speed is
//! reported.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part")]
#![allow(clippy::panic, reason = "a benchmark stops at a name it does not know")]

use polar_sparsity::dtype::DType;
use polar_sparsity::model::{Activation, Family, ModelSpec, Norm, Position};

/// Vocabulary, layers, hidden, heads, KV heads, head size, MLP, positions.
type Numbers = [u32; 8];

/// A bf16 model's numbers by its name.
pub fn named(name: &str) -> ModelSpec {
    use Family::{Llama, Mistral, Qwen2};
    let rotary = |family, n, theta| rotary(family, DType::BF16, n, theta);
    match name {
        "llama-3.2-1b" => tied(rotary(Llama, [128_256, 16, 2048, 32, 8, 64, 8192, 131_072], 5e5)),
        "qwen2.5-0.5b" => tied(rotary(Qwen2, [151_936, 24, 896, 14, 2, 64, 4864, 32_768], 1e6)),
        "opt-1.3b" => learned(DType::BF16, [50_272, 24, 2048, 32, 32, 64, 8192, 2048]),
        "opt-6.7b" => learned(DType::BF16, [50_272, 32, 4096, 32, 32, 128, 16_384, 2048]),
        "llama-2-7b" => rotary(Llama, [32_000, 32, 4096, 32, 32, 128, 11_008, 4096], 1e4),
        "llama-3.1-8b" => rotary(Llama, [128_256, 32, 4096, 32, 8, 128, 14_336, 131_072], 5e5),
        "qwen2.5-7b" => rotary(Qwen2, [152_064, 28, 3584, 28, 4, 128, 18_944, 32_768], 1e6),
        "mistral-7b" => rotary(Mistral, [32_768, 32, 4096, 32, 8, 128, 14_336, 32_768], 1e6),
        other => panic!("no shapes for {other}"),
    }
}

/// A small LLaMA-like model.
pub fn llama(
    dtype: DType,
    layers: u32,
    hidden: u32,
    heads: (u32, u32),
    head_dim: u32,
    ffn: u32,
) -> ModelSpec {
    let n = [256, layers, hidden, heads.0, heads.1, head_dim, ffn, 1 << 16];
    rotary(Family::Llama, dtype, n, 1e4)
}

/// A small OPT-like model.
pub fn opt(dtype: DType, layers: u32, heads: u32, head_dim: u32, ffn: u32) -> ModelSpec {
    learned(dtype, [256, layers, heads * head_dim, heads, heads, head_dim, ffn, 1 << 13])
}

/// Rotated positions, RMS norm, a gate, as LLaMA and those after it.
fn rotary(family: Family, dtype: DType, n: Numbers, theta: f32) -> ModelSpec {
    let half = n[5] / 2;
    let inv_freq = (0..half).map(|i| theta.powf(-(i as f32) / half as f32)).collect();
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
        position: Position::Rope { inv_freq },
        activation: Activation::SiluGated,
        window: None,
        qk_norm: false,
        qkv_bias: family == Family::Qwen2,
        o_bias: false,
        mlp_bias: false,
        tied_head: false,
        dtype,
        bos_token: None,
        eos_tokens: vec![],
    }
}

/// Learned positions, layer norm, ReLU, biases, a tied head, as OPT.
fn learned(dtype: DType, n: Numbers) -> ModelSpec {
    tied(ModelSpec {
        norm: Norm::Layer,
        position: Position::Learned { offset: 2 },
        activation: Activation::Relu,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        ..rotary(Family::Opt, dtype, n, 1.0)
    })
}

fn tied(spec: ModelSpec) -> ModelSpec {
    ModelSpec { tied_head: true, ..spec }
}
