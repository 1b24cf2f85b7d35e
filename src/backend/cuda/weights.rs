//! Weights on the device: one allocation, sized before it is made, filled in pieces of a few MiB of host memory.

use super::device::{Device, start};
use super::launch::Kernels;
use super::memory::{Memory, Places, check_room};
use super::params::{Ptr, TransposeParams};
use super::shape::Shape;
use crate::backend::Progress;
use crate::dtype::{DType, bf16, f16, widen};
use crate::error::{Error, Result, Status, try_vec, try_with_capacity};
use crate::model::{LayerRole, ModelSpec, Norm, Role, Weights};
use std::sync::Arc;

/// Host memory for one piece, bytes.
pub(super) const PIECE: usize = 16 << 20;

/// Weight and bias; a null bias is none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pair {
    pub(super) weight: Ptr,
    pub(super) bias: Ptr,
}

/// One decoder layer. Matrices are `[out, in]`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layer {
    pub(super) attn_norm: Pair,
    pub(super) qkv: Pair,
    pub(super) q_norm: Ptr,
    pub(super) k_norm: Ptr,
    pub(super) o: Pair,
    pub(super) mlp_norm: Pair,
    /// Gated: gate, then up.
    pub(super) first: Ptr,
    pub(super) gate_bias: Ptr,
    pub(super) up_bias: Ptr,
    /// ReLU: `[in, out]`, so that skipped neurons are whole rows.
    pub(super) down: Pair,
}

/// Everything but the layers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shared {
    pub(super) embed: Ptr,
    pub(super) positions: Ptr,
    pub(super) final_norm: Pair,
    pub(super) head: Ptr,
}

/// A model on a device.
pub struct CudaWeights<D: Device> {
    pub(super) spec: ModelSpec,
    pub(super) shape: Shape,
    pub(super) kernels: Kernels,
    pub(super) shared: Shared,
    pub(super) layers: Vec<Layer>,
    pub(super) bytes: u64,
    _memory: Memory<D>,
}

/// Lays a model out from `at` on.
fn places(spec: &ModelSpec, shape: &Shape, at: Ptr) -> Result<(Shared, Vec<Layer>, u64)> {
    let mut p = Places::from(at);
    let mut take = |on: bool, count: usize| if on { p.take(count, 2) } else { Ptr::NULL };
    let (d, hd) = (shape.hidden, shape.hd);
    let centred = spec.norm == Norm::Layer;
    let mut shared = Shared {
        embed: take(true, shape.vocab * d),
        positions: take(shape.learned_positions.is_some(), shape.learned_positions.unwrap_or(0) * d),
        final_norm: Pair { weight: take(true, d), bias: take(centred, d) },
        head: Ptr::NULL,
    };
    shared.head = if spec.tied_head { shared.embed } else { take(true, shape.vocab * d) };
    let mut layers = try_with_capacity(shape.layers, "layers")?;
    for _ in 0..shape.layers {
        layers.push(Layer {
            attn_norm: Pair { weight: take(true, d), bias: take(centred, d) },
            qkv: Pair { weight: take(true, shape.qkv() * d), bias: take(spec.qkv_bias, shape.qkv()) },
            q_norm: take(spec.qk_norm, hd),
            k_norm: take(spec.qk_norm, hd),
            o: Pair { weight: take(true, shape.q() * d), bias: take(spec.o_bias, d) },
            mlp_norm: Pair { weight: take(true, d), bias: take(centred, d) },
            first: take(true, shape.first() * d),
            gate_bias: take(spec.mlp_bias && shape.gated, shape.neurons),
            up_bias: take(spec.mlp_bias, shape.neurons),
            down: Pair { weight: take(true, shape.neurons * d), bias: take(spec.mlp_bias, d) },
        });
    }
    let bytes = p.used() - at.0;
    Ok((shared, layers, bytes))
}

/// Device memory that a piece takes while its rows are turned into columns.
fn staging_bytes(shape: &Shape) -> u64 {
    let longest = shape.ffn.max(shape.heads * shape.head_dim).max(shape.hidden);
    PIECE.max(4 * longest) as u64
}

/// Bytes a model takes on a device.
pub(super) fn bytes(spec: &ModelSpec, shape: &Shape) -> Result<u64> {
    Ok(places(spec, shape, Ptr::NULL)?.2)
}

impl<D: Device> CudaWeights<D> {
    fn empty(device: &Arc<D>, spec: &ModelSpec, dtype: Option<DType>) -> Result<CudaWeights<D>> {
        let shape = Shape::new(spec, dtype)?;
        let kernels = shape.kernels(&**device)?;
        let bytes = bytes(spec, &shape)?;
        check_room(&**device, "weights", bytes + staging_bytes(&shape))?;
        let memory = Memory::zeroed(device, bytes)?;
        let (shared, layers, _) = places(spec, &shape, memory.at)?;
        Ok(CudaWeights { spec: spec.clone(), shape, kernels, shared, layers, bytes, _memory: memory })
    }

    /// Reads a model.
    pub(super) fn upload(
        device: &Arc<D>,
        src: &dyn Weights,
        dtype: Option<DType>,
        progress: Progress<'_>,
    ) -> Result<CudaWeights<D>> {
        let w = CudaWeights::empty(device, src.spec(), dtype)?;
        let staging = Memory::zeroed(device, staging_bytes(&w.shape))?;
        let mut f = Filler {
            device: &**device,
            shape: &w.shape,
            total: src.total_bytes(),
            done: 0,
            progress,
            raw: Vec::new(),
            ready: Vec::new(),
            read: &|role, first, count, dst| src.read_rows(role, first, count, dst),
            stored: &|role| {
                src.info(role)
                    .map(|i| i.dtype)
                    .ok_or_else(|| Error::model(format!("weight {role:?} is missing")))
            },
        };
        let (s, d) = (&w.shape, w.shape.hidden);
        let plain = |rows, columns| Map { rows: Axis::Plain(rows), columns: Axis::Plain(columns) };
        f.fill(Role::Embed, w.shared.embed, &plain(s.vocab, d), d)?;
        if let Some(rows) = s.learned_positions {
            f.fill(Role::PositionEmbed, w.shared.positions, &plain(rows, d), d)?;
        }
        f.pair(w.shared.final_norm, Role::FinalNormWeight, Role::FinalNormBias)?;
        if !w.spec.tied_head {
            f.fill(Role::Head, w.shared.head, &plain(s.vocab, d), d)?;
        }
        for (i, layer) in w.layers.iter().enumerate() {
            let role = |r| Role::Layer(i as u32, r);
            f.pair(layer.attn_norm, role(LayerRole::AttnNormWeight), role(LayerRole::AttnNormBias))?;
            let mut first = 0;
            for (matrix, bias, heads) in [
                (LayerRole::Q, LayerRole::QBias, s.heads),
                (LayerRole::K, LayerRole::KBias, s.kv_heads),
                (LayerRole::V, LayerRole::VBias, s.kv_heads),
            ] {
                let rows = Map { rows: Axis::Heads(heads), columns: Axis::Plain(d) };
                f.fill(role(matrix), layer.qkv.weight.offset((2 * first * d) as u64), &rows, d)?;
                if w.spec.qkv_bias {
                    let one = Map { rows: Axis::Heads(heads), columns: Axis::Plain(1) };
                    f.fill(role(bias), layer.qkv.bias.offset(2 * first as u64), &one, 1)?;
                }
                first += heads * s.hd;
            }
            if w.spec.qk_norm {
                let one = Map { rows: Axis::Heads(1), columns: Axis::Plain(1) };
                f.fill(role(LayerRole::QNorm), layer.q_norm, &one, 1)?;
                f.fill(role(LayerRole::KNorm), layer.k_norm, &one, 1)?;
            }
            let o = Map { rows: Axis::Plain(d), columns: Axis::Heads(s.heads) };
            f.fill(role(LayerRole::O), layer.o.weight, &o, s.q())?;
            f.vector(layer.o.bias, role(LayerRole::OBias), d)?;
            f.pair(layer.mlp_norm, role(LayerRole::MlpNormWeight), role(LayerRole::MlpNormBias))?;
            let mut at = layer.first;
            if s.gated {
                f.fill(role(LayerRole::Gate), at, &plain(s.ffn, d), d)?;
                f.vector(layer.gate_bias, role(LayerRole::GateBias), s.ffn)?;
                at = at.offset((2 * s.neurons * d) as u64);
            }
            f.fill(role(LayerRole::Up), at, &plain(s.ffn, d), d)?;
            f.vector(layer.up_bias, role(LayerRole::UpBias), s.ffn)?;
            if s.gated {
                f.fill(role(LayerRole::Down), layer.down.weight, &plain(d, s.ffn), s.neurons)?;
            } else {
                f.transposed(role(LayerRole::Down), layer.down.weight, d, s.ffn, staging.at, &w.kernels)?;
            }
            f.vector(layer.down.bias, role(LayerRole::DownBias), d)?;
        }
        device.synchronize()?;
        Ok(w)
    }

    /// Random weights, made on the device: for benchmarks of real shapes.
    pub fn random(device: &Arc<D>, spec: &ModelSpec) -> Result<CudaWeights<D>> {
        let w = CudaWeights::empty(device, spec, None)?;
        let launch = w.kernels.fill(w.shape.dtype)?;
        let fill = |at, count, scale, offset| super::params::FillParams { at, count, seed: 1, scale, offset };
        start(&**device, &launch, &fill(w._memory.at, w.bytes / 2, 0.035, 0.0))?;
        let norms = w.layers.iter().flat_map(|l| [l.attn_norm.weight, l.mlp_norm.weight]);
        for norm in norms.chain([w.shared.final_norm.weight]) {
            start(&**device, &launch, &fill(norm, w.shape.hidden as u64, 0.1, 1.0))?;
        }
        device.synchronize()?;
        Ok(w)
    }
}

/// How rows or columns of a stored matrix lie on the device.
#[derive(Clone, Copy)]
enum Axis {
    Plain(usize),
    /// That many heads, filled up to the built size: the halves keep their distance for the rotation.
    Heads(usize),
}

impl Axis {
    fn stored(self, s: &Shape) -> usize {
        match self {
            Axis::Plain(n) => n,
            Axis::Heads(n) => n * s.head_dim,
        }
    }

    /// Runs (first stored, first here, length) that lie together on both sides.
    fn runs(self, s: &Shape) -> Vec<(usize, usize, usize)> {
        let half = s.head_dim / 2;
        match self {
            Axis::Heads(n) if s.hd != s.head_dim => (0..n)
                .flat_map(|h| {
                    let (from, to) = (h * s.head_dim, h * s.hd);
                    [(from, to, half), (from + half, to + s.hd / 2, s.head_dim - half)]
                })
                .collect(),
            _ => vec![(0, 0, self.stored(s))],
        }
    }
}

struct Map {
    rows: Axis,
    columns: Axis,
}

type Read<'a> = &'a dyn Fn(Role, usize, usize, &mut [u8]) -> Result<()>;

struct Filler<'a, D: Device> {
    device: &'a D,
    shape: &'a Shape,
    total: u64,
    done: u64,
    progress: Progress<'a>,
    raw: Vec<u8>,
    ready: Vec<u8>,
    read: Read<'a>,
    stored: &'a dyn Fn(Role) -> Result<DType>,
}

impl<D: Device> Filler<'_, D> {
    /// A matrix (or vector, one column) to `at`, rows `width` elements apart.
    fn fill(&mut self, role: Role, at: Ptr, map: &Map, width: usize) -> Result<()> {
        let dtype = (self.stored)(role)?;
        let columns = map.columns.stored(self.shape);
        let pieces = map.columns.runs(self.shape);
        for (from, to, count) in map.rows.runs(self.shape) {
            let step = (PIECE / (4 * width.max(columns))).max(1);
            for first in (0..count).step_by(step) {
                let n = step.min(count - first);
                self.rows(role, dtype, from + first, n, columns)?;
                let target = at.offset((2 * (to + first) * width) as u64);
                if columns == width && pieces.len() == 1 {
                    self.device.copy_in(target, &self.ready[..2 * n * columns])?;
                } else {
                    let mut wide = try_vec(2 * n * width, 0u8, "loading buffer")?;
                    for row in 0..n {
                        for &(c, to, len) in &pieces {
                            let source = &self.ready[2 * (row * columns + c)..][..2 * len];
                            wide[2 * (row * width + to)..][..2 * len].copy_from_slice(source);
                        }
                    }
                    self.device.copy_in(target, &wide)?;
                }
            }
        }
        Ok(())
    }

    /// `[rows, columns]` as stored to `[columns, rows]` here.
    fn transposed(
        &mut self,
        role: Role,
        at: Ptr,
        rows: usize,
        columns: usize,
        staging: Ptr,
        kernels: &Kernels,
    ) -> Result<()> {
        let dtype = (self.stored)(role)?;
        let step = (PIECE / (4 * columns)).max(1);
        for first in (0..rows).step_by(step) {
            let n = step.min(rows - first);
            self.rows(role, dtype, first, n, columns)?;
            self.device.copy_in(staging, &self.ready[..2 * n * columns])?;
            let params = TransposeParams {
                input: staging,
                out: at,
                in_rows: n as u32,
                columns: columns as u32,
                out_columns: rows as u32,
                first: first as u32,
            };
            start(self.device, &kernels.transpose(n as u32, columns as u32), &params)?;
        }
        Ok(())
    }

    fn pair(&mut self, to: Pair, weight: Role, bias: Role) -> Result<()> {
        self.vector(to.weight, weight, self.shape.hidden)?;
        self.vector(to.bias, bias, self.shape.hidden)
    }

    fn vector(&mut self, at: Ptr, role: Role, n: usize) -> Result<()> {
        if at == Ptr::NULL {
            return Ok(());
        }
        self.fill(role, at, &Map { rows: Axis::Plain(n), columns: Axis::Plain(1) }, 1)
    }

    /// Reads rows into `ready`, in the device's type.
    fn rows(&mut self, role: Role, dtype: DType, first: usize, n: usize, columns: usize) -> Result<()> {
        let bytes = n * columns * dtype.size();
        resize(&mut self.raw, bytes)?;
        (self.read)(role, first, n, &mut self.raw[..bytes])?;
        if dtype == self.shape.dtype {
            std::mem::swap(&mut self.raw, &mut self.ready);
        } else {
            resize(&mut self.ready, 2 * n * columns)?;
            narrow(dtype, &self.raw[..bytes], self.shape.dtype, &mut self.ready[..2 * n * columns]);
        }
        self.done = (self.done + bytes as u64).min(self.total);
        match (self.progress)(self.done, self.total) {
            0 => Ok(()),
            _ => Err(Error::new(Status::E_CANCELLED, "loading was cancelled")),
        }
    }
}

fn resize(v: &mut Vec<u8>, bytes: usize) -> Result<()> {
    if v.len() < bytes {
        *v = try_vec(bytes, 0, "loading buffer")?;
    }
    Ok(())
}

/// Elements of one stored type as another, 16-bit one.
pub(super) fn narrow(from: DType, src: &[u8], to: DType, dst: &mut [u8]) {
    let size = from.size();
    let mut wide = [0f32; 256];
    for (s, d) in src.chunks(256 * size).zip(dst.chunks_mut(512)) {
        let wide = &mut wide[..s.len() / size];
        widen(from, s, wide);
        for (v, out) in wide.iter().zip(d.as_chunks_mut::<2>().0) {
            *out = if to == DType::F16 {
                f16::from_f32(*v).to_le_bytes()
            } else {
                bf16::from_f32(*v).to_le_bytes()
            };
        }
    }
}
