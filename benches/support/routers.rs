//! Random routers in memory, in the router file format: what a selection costs does not depend on
//! what it selects.

use polar_sparsity::dtype::DType;
use polar_sparsity::error::{Error, Result};
use polar_sparsity::format::{Limits, TensorSource};
use polar_sparsity::model::{Activation, Fingerprint, ModelSpec};
use polar_sparsity::sparsity::RouterFile;
use polar_sparsity::tensor::{Shape, TensorInfo};
use std::collections::HashMap;

/// Rank of MLP routers, as the paper trains them.
const RANK: usize = 1024;

struct Memory {
    names: Vec<String>,
    infos: HashMap<String, TensorInfo>,
    metadata: HashMap<&'static str, String>,
}

/// Routers for `spec`: attention in f32, and for ReLU models MLP routers in bf16 with
/// `mlp_share` of the neurons for batch sizes up to 64.
pub fn random(spec: &ModelSpec, mlp_share: f64) -> Result<RouterFile> {
    let (hidden, layers) = (spec.hidden_size as usize, spec.num_layers);
    let (units, ffn) = (spec.num_kv_heads as usize, spec.ffn_size as usize);
    let mlp = spec.activation == Activation::Relu;
    let mut infos = HashMap::new();
    let mut add = |name: String, dtype, shape| infos.insert(name, TensorInfo { dtype, shape });
    for l in 0..layers {
        if l > 0 {
            add(format!("layers.{l}.attention_router.weight"), DType::F32, Shape::d2(units, hidden));
            add(format!("layers.{l}.attention_router.bias"), DType::F32, Shape::d1(units));
        }
        if mlp {
            add(format!("layers.{l}.mlp_router.down.weight"), DType::BF16, Shape::d2(RANK, hidden));
            add(format!("layers.{l}.mlp_router.up.weight"), DType::BF16, Shape::d2(ffn, RANK));
        }
    }
    let mut names: Vec<String> = infos.keys().cloned().collect();
    names.sort();
    let density: Vec<f64> = (0..layers).map(|l| if l == 0 { 1.0 } else { 0.5 }).collect();
    let mut metadata = HashMap::from([
        ("format", "polar-routers".to_owned()),
        ("version", "1".to_owned()),
        ("base_model", r#"{"model_type":"bench","tensors":{}}"#.to_owned()),
        ("attention", serde_json::json!({"unit": "kv_head", "density": density}).to_string()),
    ]);
    if mlp {
        let k = vec![(ffn as f64 * mlp_share) as u32; layers as usize];
        metadata.insert("mlp", serde_json::json!({"k": {"64": k}}).to_string());
    }
    let fingerprint = Fingerprint { model_type: "bench".into(), numbers: Vec::new(), tensors: Vec::new() };
    RouterFile::new(Box::new(Memory { names, infos, metadata }), &Limits::default(), spec, &fingerprint, true)
}

impl TensorSource for Memory {
    fn names(&self) -> &[String] {
        &self.names
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.infos.get(name).copied()
    }

    fn require(&self, name: &str) -> Result<TensorInfo> {
        self.info(name).ok_or_else(|| Error::invalid(format!("no tensor {name}")))
    }

    fn read(&self, name: &str, offset: u64, dst: &mut [u8]) -> Result<()> {
        let info = self.require(name)?;
        let mut state = name.len() as u64 * 77 + offset + 1;
        for out in dst.chunks_mut(info.dtype.size()) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let x = ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.05;
            match out.len() {
                4 => out.copy_from_slice(&x.to_le_bytes()),
                2 => out.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
                _ => {}
            }
        }
        Ok(())
    }

    fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }
}
