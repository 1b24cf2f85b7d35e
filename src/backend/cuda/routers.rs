//! Routers on the device: one allocation, sized before it is made, filled in pieces of a few MiB of host memory.

use super::device::{Device, start};
use super::memory::{Memory, Places, check_room};
use super::params::{FillParams, Ptr};
use super::shape::Shape;
use super::weights::{PIECE, Pair, narrow};
use crate::dtype::{DType, narrow_i8, scale_i8, widen};
use crate::error::{Error, Result, try_vec, try_with_capacity};
use crate::model::ModelSpec;
use crate::sparsity::router::{AttnUnit, RouterFile, RouterInfo, RouterTensor};
use std::sync::Arc;

/// Routers of one layer; null: none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LayerRouters {
    pub(super) attn: Pair,
    /// Rows of `attn`.
    pub(super) attn_rows: usize,
    /// `[rank, hidden]`, behind `attn`'s rows: whole numbers in the model's type, to be multiplied with a factor a row.
    pub(super) down: Ptr,
    pub(super) down_scales: Ptr,
    /// The same in a byte each as `cuda/wide_bytes.cuh` wants them, where the device has its kernels.
    pub(super) down_bytes: Ptr,
    /// `[neurons, rank]` in 8 bits as `cuda/router_bytes.cuh` wants them, and a scale a row.
    pub(super) up: Ptr,
    pub(super) up_scales: Ptr,
    pub(super) rank: usize,
}

impl LayerRouters {
    /// Rows of `attn` with zeros behind them, so that sums beside q, k and v stay 16-byte aligned.
    pub(super) fn attn_room(&self) -> usize {
        self.attn_rows.next_multiple_of(4)
    }

    /// Of `up`: pieces of [`PIECE_COLUMNS`].
    pub(super) fn up_pieces(&self) -> usize {
        self.rank.div_ceil(PIECE_COLUMNS)
    }
}

/// Routers on a device.
pub struct CudaRouters<D: Device> {
    pub(super) layers: Vec<LayerRouters>,
    bytes: u64,
    memory: Memory<D>,
}

/// Lays routers out from `at` on.
pub(super) fn router_places<D: Device>(
    device: &D,
    shape: &Shape,
    info: &RouterInfo,
    at: Ptr,
) -> Result<(Vec<LayerRouters>, u64)> {
    let mut p = Places::from(at);
    let mut layers = try_with_capacity(shape.layers, "router layers")?;
    for l in 0..shape.layers {
        let mut r = LayerRouters::default();
        let attention = info.attention.as_ref();
        if let Some(unit) = attention.and_then(|a| a.layers.get(l).copied().flatten()) {
            r.attn_rows = if unit == AttnUnit::Head { shape.heads } else { shape.kv_heads };
            r.attn.bias = p.take(r.attn_rows, 2);
        }
        if let Some(rank) = info.mlp.as_ref().and_then(|m| m.ranks.get(l).copied().flatten()) {
            r.rank = (rank as usize).next_multiple_of(8);
            r.up = p.take(shape.neurons.next_multiple_of(TILE) * r.up_pieces() * PIECE_COLUMNS, 1);
            r.up_scales = p.take(shape.neurons, 4);
            r.down_scales = p.take(r.rank, 4);
            if device.warpgroups() {
                r.down_bytes = p.take(r.rank.next_multiple_of(DOWN_TILE) * down_width(shape.hidden), 1);
            }
        }
        // One matrix, so that both products can be one.
        r.attn.weight = p.take((r.attn_room() + r.rank) * shape.hidden, 2);
        r.down = r.attn.weight.offset((2 * r.attn_room() * shape.hidden) as u64);
        layers.push(r);
    }
    Ok((layers, p.used() - at.0))
}

impl<D: Device> CudaRouters<D> {
    /// Room for the routers that `info` lists, zeros.
    fn empty(device: &Arc<D>, shape: &Shape, info: &RouterInfo) -> Result<CudaRouters<D>> {
        let bytes = router_places(&**device, shape, info, Ptr::NULL)?.1;
        check_room(&**device, "routers", bytes)?;
        let memory = Memory::zeroed(device, bytes)?;
        let layers = router_places(&**device, shape, info, memory.at)?.0;
        Ok(CudaRouters { layers, bytes, memory })
    }

    /// Random routers, made on the device: for benchmarks.
    pub fn random(device: &Arc<D>, spec: &ModelSpec, info: &RouterInfo) -> Result<CudaRouters<D>> {
        let shape = Shape::new(spec, None)?;
        let routers = CudaRouters::empty(device, &shape, info)?;
        let kernels = shape.kernels(&**device)?;
        let fill =
            FillParams { at: routers.memory.at, count: routers.bytes / 2, seed: 2, scale: 0.03, offset: 0.0 };
        start(&**device, &kernels.fill(shape.dtype)?, &fill)?;
        Ok(routers)
    }

    pub(super) fn upload(device: &Arc<D>, spec: &ModelSpec, file: &RouterFile) -> Result<CudaRouters<D>> {
        let shape = Shape::new(spec, None)?;
        let routers = CudaRouters::empty(device, &shape, file.info())?;
        for (l, r) in routers.layers.iter().enumerate() {
            let put = |which, at| router_tensor(&**device, shape.dtype, file, l, which, at);
            if r.attn_rows > 0 {
                put(RouterTensor::AttnWeight, r.attn.weight)?;
                put(RouterTensor::AttnBias, r.attn.bias)?;
            }
            if r.rank > 0 {
                down_in_bytes(&**device, shape.dtype, file, l, r)?;
                up_in_bytes(&**device, file, l, r)?;
            }
        }
        device.synchronize()?;
        Ok(routers)
    }
}

/// Neurons of a tile of the second matrix's bytes, and columns of its pieces.
const TILE: usize = 16;
pub(super) const PIECE_COLUMNS: usize = 64;
/// Rows of a tile of the first one's, and columns of its steps.
const DOWN_TILE: usize = 128;
const DOWN_STEP: usize = 64;

/// Where `cuda/router_bytes.cuh` wants a number of a tile.
fn up_place(row: usize, column: usize) -> usize {
    let (piece, eight, four) = (column / PIECE_COLUMNS, column / 8 % 2, column / 4 % 2);
    let (lane, high) = (row % 8 * 4 + column / 16 % 4, row / 8 % 2);
    ((2 * piece + eight) * 32 + lane) * 16 + 8 * four + 4 * high + column % 4
}

/// Columns of the first matrix's bytes, with the zeros that fill up its last step.
fn down_width(hidden: usize) -> usize {
    hidden.next_multiple_of(DOWN_STEP)
}

/// Where `cuda/wide_bytes.cuh` wants a number of a tile.
fn down_place(row: usize, column: usize) -> usize {
    let (warp, half, lane) = (row % DOWN_TILE / 16, row / 8 % 2, row % 8 * 4 + column % 8 / 2);
    let (step, sixteen, eight) = (column / DOWN_STEP, column / 16 % 4, column / 8 % 2);
    (((step * 8 + warp) * 2 + half) * 32 + lane) * 16 + 4 * sixteen + 2 * eight + column % 2
}

/// Rows of an MLP router's matrix in 8 bits, so many at a time: `f` gets the first, the columns, their bytes, and their
/// scales as they lie on the device.
///
/// 8 bits choose the neurons that the stored type chooses, but for near ties (see
/// `mlp_routers_in_int8_choose_the_same_neurons`), and reading these matrices is most of what the choice costs.
fn each_in_bytes(
    file: &RouterFile,
    layer: usize,
    which: RouterTensor,
    whole: usize,
    mut f: impl FnMut(usize, usize, &[u8], &[u8]) -> Result<()>,
) -> Result<()> {
    each_piece(file, layer, which, whole, |first, dtype, columns, raw| {
        let line = columns * dtype.size();
        let n = raw.len() / line;
        let mut values = try_vec(columns, 0.0f32, "loading buffer")?;
        let mut bytes = try_vec(n * columns, 0u8, "loading buffer")?;
        let mut scales = try_vec(4 * n, 0u8, "loading buffer")?;
        let rows = raw.chunks_exact(line).zip(bytes.chunks_exact_mut(columns));
        for ((stored, narrow), to) in rows.zip(scales.chunks_exact_mut(4)) {
            widen(dtype, stored, &mut values);
            let scale = scale_i8(values.iter().fold(0.0, |most: f32, v| most.max(v.abs())));
            narrow_i8(&values, scale, narrow);
            to.copy_from_slice(&scale.to_le_bytes());
        }
        f(first, columns, &bytes, &scales)
    })
}

/// Rows of bytes in tiles of `rows` rows and `size` bytes, each number where `place` says within its tile, zeros elsewhere.
fn in_tiles(
    bytes: &[u8],
    columns: usize,
    (rows, size): (usize, usize),
    place: fn(usize, usize) -> usize,
) -> Result<Vec<u8>> {
    let mut tiles = try_vec((bytes.len() / columns).div_ceil(rows) * size, 0u8, "loading buffer")?;
    for (row, values) in bytes.chunks_exact(columns).enumerate() {
        let tile = &mut tiles[row / rows * size..][..size];
        for (column, v) in values.iter().enumerate() {
            tile[place(row, column)] = *v;
        }
    }
    Ok(tiles)
}

fn up_in_bytes<D: Device>(device: &D, file: &RouterFile, layer: usize, r: &LayerRouters) -> Result<()> {
    let tile = TILE * r.up_pieces() * PIECE_COLUMNS;
    each_in_bytes(file, layer, RouterTensor::MlpUp, TILE, |first, columns, bytes, scales| {
        let tiles = in_tiles(bytes, columns, (TILE, tile), up_place)?;
        device.copy_in(r.up.offset((first / TILE * tile) as u64), &tiles)?;
        device.copy_in(r.up_scales.offset(4 * first as u64), scales)
    })
}

/// Also as the model's type, for products that take no bytes: of the same numbers, so that no neuron depends on the product.
fn down_in_bytes<D: Device>(
    device: &D,
    to: DType,
    file: &RouterFile,
    layer: usize,
    r: &LayerRouters,
) -> Result<()> {
    each_in_bytes(file, layer, RouterTensor::MlpDown, DOWN_TILE, |first, columns, bytes, scales| {
        let mut numbers = try_vec(4 * bytes.len(), 0u8, "loading buffer")?;
        for (to, v) in numbers.chunks_exact_mut(4).zip(bytes) {
            to.copy_from_slice(&f32::from(*v as i8).to_le_bytes());
        }
        let mut ready = try_vec(2 * bytes.len(), 0u8, "loading buffer")?;
        narrow(DType::F32, &numbers, to, &mut ready);
        device.copy_in(r.down.offset((2 * first * columns) as u64), &ready)?;
        device.copy_in(r.down_scales.offset(4 * first as u64), scales)?;
        if r.down_bytes == Ptr::NULL {
            return Ok(());
        }
        let tile = DOWN_TILE * down_width(columns);
        let tiles = in_tiles(bytes, columns, (DOWN_TILE, tile), down_place)?;
        device.copy_in(r.down_bytes.offset((first / DOWN_TILE * tile) as u64), &tiles)
    })
}

/// A tensor in the model's 16-bit type.
fn router_tensor<D: Device>(
    device: &D,
    to: DType,
    file: &RouterFile,
    layer: usize,
    which: RouterTensor,
    at: Ptr,
) -> Result<()> {
    each_piece(file, layer, which, 1, |first, dtype, columns, raw| {
        let mut ready = try_vec(2 * (raw.len() / dtype.size()), 0u8, "loading buffer")?;
        narrow(dtype, raw, to, &mut ready);
        device.copy_in(at.offset((2 * first * columns) as u64), &ready)
    })
}

/// Reads a tensor some rows at a time, a multiple of `whole` until the last ones: `f` gets the first row, the stored type, the columns and the bytes.
fn each_piece(
    file: &RouterFile,
    layer: usize,
    which: RouterTensor,
    whole: usize,
    mut f: impl FnMut(usize, DType, usize, &[u8]) -> Result<()>,
) -> Result<()> {
    let info = file
        .tensor(layer, which)
        .ok_or_else(|| Error::model(format!("router tensor {which:?} of layer {layer} is missing")))?;
    let dims = info.shape.dims();
    let (rows, columns) = (dims[0], dims.get(1).copied().unwrap_or(1));
    let line = columns * info.dtype.size();
    let step = (PIECE / (4 * columns).max(1)).max(1).next_multiple_of(whole);
    for first in (0..rows).step_by(step) {
        let mut raw = try_vec(step.min(rows - first) * line, 0u8, "loading buffer")?;
        file.read(layer, which, (first * line) as u64, &mut raw)?;
        f(first, info.dtype, columns, &raw)?;
    }
    Ok(())
}
