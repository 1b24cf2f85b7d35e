//! The models whose steps are reported, and what the paper keeps of them.

use crate::specs;
use polar_sparsity::model::ModelSpec;
use polar_sparsity::sparsity::router::{AttnInfo, AttnUnit, MlpInfo, RouterInfo};

/// Rank of the MLP routers.
pub(crate) const RANK: u32 = 1024;

/// A model, its attention density, and the share of MLP neurons kept by batch size (ReLU only).
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) spec: ModelSpec,
    pub(crate) density: f32,
    neurons: &'static [(u32, f64)],
}

pub(crate) fn all() -> impl Iterator<Item = Model> {
    const OPT_NEURONS: &[(u32, f64)] = &[(1, 0.095), (8, 0.290), (32, 0.517), (64, 0.623)];
    let listed: [(_, _, &[_]); 5] = [
        ("opt-6.7b", 0.5, OPT_NEURONS),
        ("llama-2-7b", 0.5, &[]),
        ("llama-3.1-8b", 0.625, &[]),
        ("qwen2.5-7b", 0.75, &[]),
        ("mistral-7b", 0.5, &[]),
    ];
    listed.into_iter().map(|(name, density, neurons)| Model {
        name,
        spec: specs::named(name),
        density,
        neurons,
    })
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
            ranks: vec![Some(RANK); layers],
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
