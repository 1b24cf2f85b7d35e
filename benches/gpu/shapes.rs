//! The models whose steps are reported, and what the paper keeps of them.

use polar_sparsity::dtype::DType;
use polar_sparsity::model::{Activation, Family, ModelSpec, Norm, Position};
use polar_sparsity::sparsity::router::{AttnInfo, AttnUnit, MlpInfo, RouterInfo};

/// A model, its attention density, and the share of MLP neurons kept by batch size (ReLU only).
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) spec: ModelSpec,
    pub(crate) density: f32,
    neurons: &'static [(u32, f64)],
}

pub(crate) fn all() -> Vec<Model> {
    let opt_neurons = &[(1, 0.095), (8, 0.290), (32, 0.517), (64, 0.623)];
    vec![
        Model {
            name: "opt-6.7b",
            spec: opt([50_272, 32, 4096, 32, 32, 128, 16_384, 2048]),
            density: 0.5,
            neurons: opt_neurons,
        },
        Model {
            name: "llama-2-7b",
            spec: rope([32_000, 32, 4096, 32, 32, 128, 11_008, 4096], 1e4, false),
            density: 0.5,
            neurons: &[],
        },
        Model {
            name: "llama-3.1-8b",
            spec: rope([128_256, 32, 4096, 32, 8, 128, 14_336, 131_072], 5e5, false),
            density: 0.625,
            neurons: &[],
        },
        Model {
            name: "qwen2.5-7b",
            spec: rope([152_064, 28, 3584, 28, 4, 128, 18_944, 32_768], 1e6, true),
            density: 0.75,
            neurons: &[],
        },
        Model {
            name: "mistral-7b",
            spec: rope([32_768, 32, 4096, 32, 8, 128, 14_336, 32_768], 1e6, false),
            density: 0.5,
            neurons: &[],
        },
    ]
}

impl Model {
    /// What a router file for it would say.
    pub(crate) fn routers(&self) -> RouterInfo {
        let layers = self.spec.num_layers as usize;
        let attention = AttnInfo {
            layers: (0..layers).map(|l| (l > 0).then_some(AttnUnit::KvHead)).collect(),
            density: (0..layers).map(|l| if l == 0 { 1.0 } else { self.density }).collect(),
        };
        let mlp = (!self.neurons.is_empty()).then(|| MlpInfo {
            ranks: vec![Some(1024); layers],
            batch_sizes: self.neurons.iter().map(|n| n.0).collect(),
            table: self
                .neurons
                .iter()
                .map(|n| vec![(f64::from(self.spec.ffn_size) * n.1) as u32 / 128 * 128; layers])
                .collect(),
        });
        RouterInfo { attention: Some(attention), mlp }
    }

    /// Neurons kept at a batch size; all above the table.
    pub(crate) fn kept(&self, batch: u32) -> f64 {
        self.neurons.iter().find(|n| n.0 >= batch).map_or(1.0, |n| n.1)
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
        tied_head: false,
        dtype: DType::BF16,
        bos_token: None,
        eos_tokens: Vec::new(),
    }
}

fn rope(n: [u32; 8], theta: f32, qkv_bias: bool) -> ModelSpec {
    let half = n[5] / 2;
    let inv_freq = (0..half).map(|i| theta.powf(-(i as f32) / half as f32)).collect();
    ModelSpec { position: Position::Rope { inv_freq }, qkv_bias, ..base(Family::Llama, n) }
}

fn opt(n: [u32; 8]) -> ModelSpec {
    ModelSpec {
        norm: Norm::Layer,
        activation: Activation::Relu,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        tied_head: true,
        ..base(Family::Opt, n)
    }
}
