//! Random models and routers in memory, the same for the same seed.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "a test stops at errors")]

use polar_sparsity::dtype::{DType, bf16, f16};
use polar_sparsity::error::{Error, Result};
use polar_sparsity::format::{Limits, TensorSource};
use polar_sparsity::model::{Fingerprint, LayerRole, ModelSpec, Role, Weights};
use polar_sparsity::sparsity::RouterFile;
use polar_sparsity::tensor::{Shape, TensorInfo};

pub struct Synthetic {
    pub spec: ModelSpec,
    pub seed: u64,
    /// What to put in place of a weight, by role and row.
    pub poison: fn(Role, usize) -> Option<f32>,
}

impl Synthetic {
    pub fn new(spec: ModelSpec) -> Synthetic {
        Synthetic { spec, seed: 1, poison: |_, _| None }
    }
}

pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// In ±1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

fn fill(dtype: DType, seed: u64, mean: f32, spread: f32, dst: &mut [u8]) {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    rng.next();
    for e in dst.chunks_exact_mut(dtype.size()) {
        put(dtype, mean + spread * rng.unit(), e);
    }
}

fn put(dtype: DType, v: f32, e: &mut [u8]) {
    match dtype {
        DType::F32 => e.copy_from_slice(&v.to_le_bytes()),
        DType::F16 => e.copy_from_slice(&f16::from_f32(v).to_le_bytes()),
        _ => e.copy_from_slice(&bf16::from_f32(v).to_le_bytes()),
    }
}

impl Weights for Synthetic {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn info(&self, role: Role) -> Option<TensorInfo> {
        Some(TensorInfo { dtype: self.spec.dtype, shape: self.spec.shape(role)? })
    }

    fn read_rows(&self, role: Role, first: usize, count: usize, dst: &mut [u8]) -> Result<()> {
        let shape = self.spec.shape(role).unwrap();
        let dims = shape.dims();
        let (mean, spread, width) = match (role, dims.len()) {
            (Role::Embed | Role::PositionEmbed, _) => (0.0, 1.0, dims[1]),
            (_, 2) => (0.0, 1.7 / (dims[1] as f32).sqrt(), dims[1]),
            (Role::FinalNormWeight, _) => (1.0, 0.2, 1),
            (
                Role::Layer(
                    _,
                    LayerRole::AttnNormWeight
                    | LayerRole::MlpNormWeight
                    | LayerRole::QNorm
                    | LayerRole::KNorm,
                ),
                _,
            ) => (1.0, 0.2, 1),
            _ => (0.0, 0.2, 1),
        };
        let row = width * self.spec.dtype.size();
        assert_eq!(dst.len(), count * row);
        let name = fnv(format!("{role:?}").as_bytes());
        for (i, out) in dst.chunks_exact_mut(row).enumerate() {
            let seed = name ^ (self.seed << 40) ^ ((first + i) as u64 * 977);
            match (self.poison)(role, first + i) {
                Some(v) => {
                    out.chunks_exact_mut(self.spec.dtype.size()).for_each(|e| put(self.spec.dtype, v, e))
                }
                None => fill(self.spec.dtype, seed, mean, spread, out),
            }
        }
        Ok(())
    }

    fn total_bytes(&self) -> u64 {
        1 << 30
    }
}

/// Random routers: attention on every layer but the first, MLP where `rank` is given.
pub struct Routers {
    names: Vec<String>,
    infos: Vec<TensorInfo>,
    metadata: Vec<(&'static str, String)>,
}

pub fn routers(spec: &ModelSpec, per_head: bool, rank: Option<usize>, k: &[(u32, u32)]) -> RouterFile {
    let layers = spec.num_layers as usize;
    let d = spec.hidden_size as usize;
    let units = if per_head { spec.num_heads } else { spec.num_kv_heads } as usize;
    let mut r = Routers { names: vec![], infos: vec![], metadata: vec![] };
    let mut add = |name: String, shape| {
        r.names.push(name);
        r.infos.push(TensorInfo { dtype: spec.dtype, shape });
    };
    for l in 0..layers {
        if l > 0 {
            add(format!("layers.{l}.attention_router.weight"), Shape::d2(units, d));
            add(format!("layers.{l}.attention_router.bias"), Shape::d1(units));
        }
        if let Some(rank) = rank {
            add(format!("layers.{l}.mlp_router.down.weight"), Shape::d2(rank, d));
            add(format!("layers.{l}.mlp_router.up.weight"), Shape::d2(spec.ffn_size as usize, rank));
        }
    }
    let list = |v: String| format!("[{}]", vec![v; layers].join(","));
    let unit = if per_head { "head" } else { "kv_head" };
    r.metadata.push(("format", "polar-routers".into()));
    r.metadata.push(("version", "1".into()));
    r.metadata.push(("attention", format!(r#"{{"unit":"{unit}","density":{}}}"#, list("0.5".into()))));
    if rank.is_some() {
        let rows: Vec<String> = k.iter().map(|(b, k)| format!(r#""{b}":{}"#, list(k.to_string()))).collect();
        r.metadata.push(("mlp", format!(r#"{{"k":{{{}}}}}"#, rows.join(","))));
    }
    RouterFile::new(Box::new(r), &Limits::default(), spec, &Fingerprint::of_spec(spec), true).unwrap()
}

impl TensorSource for Routers {
    fn names(&self) -> &[String] {
        &self.names
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.names.iter().position(|n| n == name).map(|i| self.infos[i])
    }
    fn require(&self, name: &str) -> Result<TensorInfo> {
        self.info(name).ok_or_else(|| Error::format(name.to_owned()))
    }
    fn read(&self, name: &str, offset: u64, dst: &mut [u8]) -> Result<()> {
        let info = self.require(name)?;
        // Element by element, so that any piece of the tensor reads the same.
        let size = info.dtype.size() as u64;
        let name = fnv(name.as_bytes());
        for (i, e) in dst.chunks_exact_mut(size as usize).enumerate() {
            let mut rng = Rng((name ^ (offset / size + i as u64)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            rng.next();
            put(info.dtype, 0.1 * rng.unit(), e);
        }
        Ok(())
    }
    fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|m| m.0 == key).map(|m| m.1.as_str())
    }
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}
