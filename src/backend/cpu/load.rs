//! From a checkpoint's roles to the matrices and vectors of this backend, in pieces.

use super::matrix::Mat;
use super::simd::Isa;
use super::sizes::{router_dtype, weight_dtype};
use crate::backend::{Progress, WeightOptions};
use crate::dtype::{DType, widen};
use crate::error::{Error, Result, Status, try_with_capacity};
use crate::model::{LayerRole, ModelSpec, Norm, Position, Role, Weights};
use crate::sparsity::router::{AttnUnit, RouterFile, RouterTensor};
use crate::sys::alloc::Buf;
use crate::sys::pool::Pool;
use crate::tensor::TensorInfo;

/// Most bytes held beside the weights while loading.
const PIECE: usize = 8 << 20;

/// Weight and bias of a norm.
pub(super) struct NormWeights {
    pub(super) weight: Buf<f32>,
    pub(super) bias: Option<Buf<f32>>,
}

/// A product's matrix and bias.
pub(super) struct Linear {
    pub(super) mat: Mat,
    pub(super) bias: Option<Buf<f32>>,
}

/// One decoder layer.
pub(super) struct Layer {
    pub(super) attn_norm: NormWeights,
    /// Rows of q, then k, then v.
    pub(super) qkv: Linear,
    pub(super) q_norm: Option<Buf<f32>>,
    pub(super) k_norm: Option<Buf<f32>>,
    pub(super) o: Linear,
    pub(super) mlp_norm: NormWeights,
    pub(super) gate: Option<Linear>,
    pub(super) up: Linear,
    /// Gated: `[hidden, ffn]`. ReLU: transposed, `[ffn, hidden]`, in panels.
    pub(super) down: Linear,
}

/// A model in memory.
pub struct CpuWeights {
    pub(super) spec: ModelSpec,
    pub(super) embed: Mat,
    pub(super) positions: Option<Mat>,
    pub(super) final_norm: NormWeights,
    /// `None`: the embedding.
    pub(super) head: Option<Mat>,
    pub(super) layers: Vec<Layer>,
    pub(super) bytes: u64,
    /// Activations that meet these matrices are bf16.
    pub(super) bf16: bool,
}

/// Routers of one layer.
#[derive(Default)]
pub(super) struct LayerRouters {
    pub(super) attn: Option<(AttnUnit, Linear)>,
    /// `[rank, hidden]` and `[ffn, rank]`.
    pub(super) mlp: Option<(Mat, Mat)>,
}

/// Routers in memory.
pub struct CpuRouters {
    pub(super) layers: Vec<LayerRouters>,
    pub(super) rank: usize,
}

/// Whether products with matrices of this type take bf16 activations.
pub(super) fn meets_bf16(isa: Isa, dtype: DType) -> bool {
    isa.bf16_products() && dtype == DType::BF16
}

/// Reads a model.
pub(super) fn upload(
    pool: &Pool,
    isa: Isa,
    src: &dyn Weights,
    options: WeightOptions,
    progress: Progress<'_>,
) -> Result<CpuWeights> {
    let spec = src.spec().clone();
    let (stored, dtype) = (spec.dtype, weight_dtype(&spec, options)?);
    let total = src.total_bytes();
    let mut l = Loader { pool, src, progress, total, done: 0, staging: Vec::new(), bytes: 0 };
    let (vocab, hidden) = (spec.vocab_size as usize, spec.hidden_size as usize);
    let embed = l.matrix(stored, &[(Role::Embed, vocab)], hidden)?;
    let positions = match spec.position {
        Position::Learned { offset } => {
            let rows = spec.max_positions as usize + offset as usize;
            Some(l.matrix(stored, &[(Role::PositionEmbed, rows)], hidden)?)
        }
        Position::Rope { .. } => None,
    };
    let mut layers = try_with_capacity(spec.num_layers as usize, "layers")?;
    for i in 0..spec.num_layers {
        layers.push(l.layer(&spec, dtype, isa, i)?);
    }
    let final_norm = l.norm(&spec, Role::FinalNormWeight, Role::FinalNormBias)?;
    let head = match (spec.tied_head, dtype == stored) {
        (true, true) => None,
        (true, false) => Some(l.matrix(dtype, &[(Role::Embed, vocab)], hidden)?),
        (false, _) => Some(l.matrix(dtype, &[(Role::Head, vocab)], hidden)?),
    };
    let bytes = l.bytes;
    let bf16 = meets_bf16(isa, dtype);
    Ok(CpuWeights { spec, embed, positions, final_norm, head, layers, bytes, bf16 })
}

struct Loader<'a> {
    pool: &'a Pool,
    src: &'a dyn Weights,
    progress: Progress<'a>,
    total: u64,
    done: u64,
    staging: Vec<u8>,
    bytes: u64,
}

impl Loader<'_> {
    fn layer(&mut self, spec: &ModelSpec, dtype: DType, isa: Isa, i: u32) -> Result<Layer> {
        let at = |role| Role::Layer(i, role);
        let (hidden, ffn) = (spec.hidden_size as usize, spec.ffn_size as usize);
        let (q, kv) = (spec.q_size(), spec.kv_size());
        let head_dim = spec.head_dim as usize;
        let head_norm = |l: &mut Self, role| {
            if spec.qk_norm { l.vector(&[(at(role), head_dim)]).map(Some) } else { Ok(None) }
        };
        let gated = spec.activation.gated();
        let mlp_bias = |l: &mut Self, role, n| l.bias(spec.mlp_bias, &[(at(role), n)]);
        Ok(Layer {
            attn_norm: self.norm(spec, at(LayerRole::AttnNormWeight), at(LayerRole::AttnNormBias))?,
            qkv: Linear {
                mat: self.matrix(
                    dtype,
                    &[(at(LayerRole::Q), q), (at(LayerRole::K), kv), (at(LayerRole::V), kv)],
                    hidden,
                )?,
                bias: self.bias(
                    spec.qkv_bias,
                    &[(at(LayerRole::QBias), q), (at(LayerRole::KBias), kv), (at(LayerRole::VBias), kv)],
                )?,
            },
            q_norm: head_norm(self, LayerRole::QNorm)?,
            k_norm: head_norm(self, LayerRole::KNorm)?,
            o: Linear {
                mat: self.matrix(dtype, &[(at(LayerRole::O), hidden)], q)?,
                bias: self.bias(spec.o_bias, &[(at(LayerRole::OBias), hidden)])?,
            },
            mlp_norm: self.norm(spec, at(LayerRole::MlpNormWeight), at(LayerRole::MlpNormBias))?,
            gate: match gated {
                true => Some(Linear {
                    mat: self.matrix(dtype, &[(at(LayerRole::Gate), ffn)], hidden)?,
                    bias: mlp_bias(self, LayerRole::GateBias, ffn)?,
                }),
                false => None,
            },
            up: Linear {
                mat: self.matrix(dtype, &[(at(LayerRole::Up), ffn)], hidden)?,
                bias: mlp_bias(self, LayerRole::UpBias, ffn)?,
            },
            down: Linear {
                mat: match gated {
                    true => self.matrix(dtype, &[(at(LayerRole::Down), hidden)], ffn)?,
                    false => {
                        let pairs = meets_bf16(isa, dtype);
                        self.transposed(dtype, at(LayerRole::Down), ffn, hidden, pairs)?
                    }
                },
                bias: mlp_bias(self, LayerRole::DownBias, hidden)?,
            },
        })
    }

    fn norm(&mut self, spec: &ModelSpec, weight: Role, bias: Role) -> Result<NormWeights> {
        let n = spec.hidden_size as usize;
        let weight = self.vector(&[(weight, n)])?;
        Ok(NormWeights { weight, bias: self.bias(spec.norm == Norm::Layer, &[(bias, n)])? })
    }

    fn info(&self, role: Role) -> Result<TensorInfo> {
        self.src.info(role).ok_or_else(|| Error::model(format!("weight {role:?} is missing")))
    }

    /// Rows of several roles under each other.
    fn matrix(&mut self, dtype: DType, parts: &[(Role, usize)], columns: usize) -> Result<Mat> {
        let mut mat = Mat::new(dtype, parts.iter().map(|p| p.1).sum(), columns)?;
        let mut first = 0;
        for &(role, rows) in parts {
            let stored = self.info(role)?.dtype;
            let row = columns * stored.size();
            let step = (PIECE / row.max(1)).max(1);
            for at in (0..rows).step_by(step) {
                let n = step.min(rows - at);
                if let Some(dst) = mat.direct(stored, first + at, n) {
                    self.src.read_rows(role, at, n, dst)?;
                } else {
                    let staging = self.read(role, at, n, n * row)?;
                    mat.fill(self.pool, first + at, stored, &staging);
                    self.staging = staging;
                }
                self.advance(n * row)?;
            }
            first += rows;
        }
        self.bytes += mat.bytes();
        Ok(mat)
    }

    /// The matrix `[rows, columns]` whose transpose is stored, in panels.
    fn transposed(
        &mut self,
        dtype: DType,
        role: Role,
        rows: usize,
        columns: usize,
        pairs: bool,
    ) -> Result<Mat> {
        let mut mat = Mat::in_panels(dtype, rows, columns)?;
        let stored = self.info(role)?.dtype;
        let line = rows * stored.size();
        let step = (PIECE / line.max(1) / 32).max(1) * 32;
        for measure in [true, false] {
            if measure && dtype != DType::I8 {
                continue;
            }
            for at in (0..columns).step_by(step) {
                let n = step.min(columns - at);
                let staging = self.read(role, at, n, n * line)?;
                if measure {
                    mat.measure_transposed(self.pool, stored, &staging);
                } else {
                    mat.fill_transposed(self.pool, at, stored, &staging, pairs);
                    self.advance(n * line)?;
                }
                self.staging = staging;
            }
        }
        self.bytes += mat.bytes();
        Ok(mat)
    }

    fn bias(&mut self, present: bool, parts: &[(Role, usize)]) -> Result<Option<Buf<f32>>> {
        if present { self.vector(parts).map(Some) } else { Ok(None) }
    }

    /// Vectors behind each other, as f32.
    fn vector(&mut self, parts: &[(Role, usize)]) -> Result<Buf<f32>> {
        let mut out = Buf::zeroed(parts.iter().map(|p| p.1).sum(), "weight vector")?;
        let mut first = 0;
        for &(role, n) in parts {
            let stored = self.info(role)?.dtype;
            let staging = self.read(role, 0, n, n * stored.size())?;
            widen(stored, &staging, &mut out[first..first + n]);
            self.staging = staging;
            self.advance(n * stored.size())?;
            first += n;
        }
        self.bytes += out.bytes() as u64;
        Ok(out)
    }

    /// Lends the staging buffer, filled; give it back to `self.staging`.
    fn read(&mut self, role: Role, first: usize, count: usize, bytes: usize) -> Result<Vec<u8>> {
        let mut staging = std::mem::take(&mut self.staging);
        if staging.capacity() < bytes {
            staging = try_with_capacity(bytes.max(64 << 10), "loading buffer")?;
        }
        staging.resize(bytes, 0);
        self.src.read_rows(role, first, count, &mut staging)?;
        Ok(staging)
    }

    fn advance(&mut self, bytes: usize) -> Result<()> {
        self.done = (self.done + bytes as u64).min(self.total);
        match (self.progress)(self.done, self.total) {
            0 => Ok(()),
            _ => Err(Error::new(Status::E_CANCELLED, "loading was cancelled by the progress callback")),
        }
    }
}

/// Reads routers, as [`router_dtype`] keeps them.
pub(super) fn upload_routers(pool: &Pool, spec: &ModelSpec, file: &RouterFile) -> Result<CpuRouters> {
    let n = spec.num_layers as usize;
    let hidden = spec.hidden_size as usize;
    let mut routers = CpuRouters { layers: try_with_capacity(n, "routers")?, rank: 0 };
    for l in 0..n {
        let mut layer = LayerRouters::default();
        let unit = file.info().attention.as_ref().and_then(|a| a.layers.get(l).copied().flatten());
        if let Some(unit) = unit {
            let rows = match unit {
                AttnUnit::Head => spec.num_heads,
                AttnUnit::KvHead => spec.num_kv_heads,
            } as usize;
            let mat = router_matrix(pool, file, l, RouterTensor::AttnWeight, rows, hidden)?;
            let mut bias = Buf::zeroed(rows, "router bias")?;
            let info = router_info(file, l, RouterTensor::AttnBias)?;
            let mut bytes = crate::error::try_vec(rows * info.dtype.size(), 0u8, "router bias")?;
            file.read(l, RouterTensor::AttnBias, 0, &mut bytes)?;
            widen(info.dtype, &bytes, &mut bias);
            layer.attn = Some((unit, Linear { mat, bias: Some(bias) }));
        }
        let rank = file.info().mlp.as_ref().and_then(|m| m.ranks.get(l).copied().flatten());
        if let Some(rank) = rank {
            let rank = rank as usize;
            routers.rank = routers.rank.max(rank);
            layer.mlp = Some((
                router_matrix(pool, file, l, RouterTensor::MlpDown, rank, hidden)?,
                router_matrix(pool, file, l, RouterTensor::MlpUp, spec.ffn_size as usize, rank)?,
            ));
        }
        routers.layers.push(layer);
    }
    Ok(routers)
}

fn router_info(file: &RouterFile, layer: usize, which: RouterTensor) -> Result<TensorInfo> {
    file.tensor(layer, which)
        .ok_or_else(|| Error::model(format!("router tensor {which:?} of layer {layer} is missing")))
}

fn router_matrix(
    pool: &Pool,
    file: &RouterFile,
    layer: usize,
    which: RouterTensor,
    rows: usize,
    columns: usize,
) -> Result<Mat> {
    let info = router_info(file, layer, which)?;
    if info.shape.dims() != [rows, columns] {
        return Err(Error::model(format!(
            "router tensor {which:?} of layer {layer}: shape {} stored, [{rows}, {columns}] needed",
            info.shape
        )));
    }
    let mut mat = Mat::new(router_dtype(which, info.dtype), rows, columns)?;
    let row = columns * info.dtype.size();
    let step = (PIECE / row.max(1)).max(1);
    let mut staging = crate::error::try_vec(step.min(rows) * row, 0u8, "loading buffer")?;
    for at in (0..rows).step_by(step) {
        let n = step.min(rows - at);
        file.read(layer, which, (at * row) as u64, &mut staging[..n * row])?;
        mat.fill(pool, at, info.dtype, &staging[..n * row]);
    }
    Ok(mat)
}
