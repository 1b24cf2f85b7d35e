//! Weight matrices in memory, and how rows of a file become rows of one.
//!
//! Invariant: a row has its elements, then zeros up to a multiple of 32. A matrix in panels holds
//! some columns of all rows, then the next columns of all rows: a thread that works on some columns
//! of many rows then reads memory in one stream.

use super::simd::{LANE_ORDER, PAD, Rows, bf16_bits};
use crate::dtype::{DType, f16, narrow_i8, scale_i8, widen};
use crate::error::Result;
use crate::sys::alloc::Buf;
use crate::sys::pool::Pool;
use crate::sys::split::Chunks;

/// Rounds up to what kernels read.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// Most columns of a panel.
const PANEL: usize = 256;

/// A matrix `[rows, columns]`.
pub(super) struct Mat {
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements from one row to the next, within a panel if there are several.
    pub(super) stride: usize,
    panels: usize,
    data: Buf<u8>,
    scales: Buf<f32>,
}

impl Mat {
    /// Zeros.
    pub(super) fn new(dtype: DType, rows: usize, columns: usize) -> Result<Mat> {
        Mat::cut(dtype, rows, columns, 1)
    }

    /// Zeros, in panels.
    pub(super) fn in_panels(dtype: DType, rows: usize, columns: usize) -> Result<Mat> {
        let units = padded(columns) / PAD;
        // As wide as allowed, all of one width.
        let width = (1..=PANEL / PAD).rev().find(|w| units.is_multiple_of(*w)).unwrap_or(1);
        Mat::cut(dtype, rows, columns, (units / width).max(1))
    }

    fn cut(dtype: DType, rows: usize, columns: usize, panels: usize) -> Result<Mat> {
        let stride = padded(columns) / panels;
        let bytes = rows.saturating_mul(padded(columns)).saturating_mul(dtype.size());
        let scales = if dtype == DType::I8 { rows } else { 0 };
        Ok(Mat {
            dtype,
            rows,
            columns,
            stride,
            panels,
            data: Buf::zeroed(bytes, "weights")?,
            scales: Buf::zeroed(scales, "weight scales")?,
        })
    }

    /// Its rows, for kernels; of a matrix in one panel.
    pub(super) fn view(&self) -> Rows<'_> {
        self.panel(0)
    }

    /// The rows of the panel that holds `column`.
    pub(super) fn panel(&self, column: usize) -> Rows<'_> {
        let size = self.rows * self.stride;
        let of = column / self.stride.max(1) * size..(column / self.stride.max(1) + 1) * size;
        match self.dtype {
            DType::F32 => Rows::F32(&self.data.view()[of]),
            DType::F16 => Rows::F16(&self.data.view()[of]),
            DType::BF16 => Rows::Bf16(&self.data.view()[of]),
            DType::I8 => Rows::I8(&self.data.view()[of], &self.scales),
        }
    }

    /// Its elements as they lie in memory.
    pub(super) fn raw(&self) -> &[u8] {
        &self.data
    }

    /// Bytes it takes.
    pub(super) fn bytes(&self) -> u64 {
        (self.data.bytes() + self.scales.bytes()) as u64
    }

    /// Bytes of one row.
    pub(super) fn row_bytes(&self) -> usize {
        self.stride * self.dtype.size()
    }

    /// The memory of `count` rows from `first` on, if files of `dtype` can be read straight into it.
    pub(super) fn direct(&mut self, dtype: DType, first: usize, count: usize) -> Option<&mut [u8]> {
        if self.dtype != dtype
            || self.panels > 1
            || self.stride != self.columns
            || cfg!(target_endian = "big")
        {
            return None;
        }
        let row = self.row_bytes();
        Some(&mut self.data[first * row..(first + count) * row])
    }

    /// Converts rows as stored into rows from `first` on.
    pub(super) fn fill(&mut self, pool: &Pool, first: usize, dtype: DType, src: &[u8]) {
        let (to, columns, size) = (self.dtype, self.columns, dtype.size());
        let row = self.row_bytes();
        let count = src.len() / (columns * size).max(1);
        let data = &mut self.data[first * row..(first + count) * row];
        let source = |i: usize| &src[i * columns * size..(i + 1) * columns * size];
        if to == DType::I8 {
            let scales = &mut self.scales[first..first + count];
            pool.each((Chunks::new(data, row), Chunks::new(scales, 1)), |(data, scale), i| {
                let mut most = 0.0f32;
                chunks(dtype, source(i), |_, v| v.iter().for_each(|v| most = most.max(v.abs())));
                scale[0] = scale_i8(most);
                chunks(dtype, source(i), |c, v| narrow_i8(v, scale[0], &mut data[c..]));
            });
        } else {
            pool.each(Chunks::new(data, row), |data, i| {
                if dtype == to {
                    data[..columns * size].copy_from_slice(source(i));
                } else {
                    chunks(dtype, source(i), |c, v| narrow(to, v, &mut data[c * to.size()..]));
                }
            });
        }
    }

    /// Raises each row's scale to hold column values of the transposed matrix `src`
    /// (`[some columns][rows]` as stored). Call with all of them before [`Mat::fill_transposed`].
    pub(super) fn measure_transposed(&mut self, pool: &Pool, dtype: DType, src: &[u8]) {
        let (rows, size) = (self.rows, dtype.size());
        pool.each(Chunks::new(&mut self.scales, 256), |scales, i| {
            for line in src.chunks_exact(rows * size) {
                chunks(dtype, &line[i * 256 * size..][..scales.len() * size], |c, v| {
                    for (s, v) in scales[c..].iter_mut().zip(v) {
                        *s = s.max(scale_i8(v.abs()));
                    }
                });
            }
        });
    }

    /// Converts columns `first..` of this matrix from rows of the transposed one. `lane_order`: put
    /// columns where products of bf16 pairs want them. `first` is a multiple of 32.
    pub(super) fn fill_transposed(
        &mut self,
        pool: &Pool,
        first: usize,
        dtype: DType,
        src: &[u8],
        lane_order: bool,
    ) {
        const TILE: usize = 32;
        let (rows, size, to) = (self.rows, dtype.size(), self.dtype);
        let (row, stride) = (self.row_bytes(), self.stride);
        let scales = &self.scales;
        let lines = src.len() / (rows * size).max(1);
        for (p, data) in self.data.chunks_exact_mut(rows * row).enumerate() {
            let columns = (p * stride).max(first)..((p + 1) * stride).min(first + lines);
            pool.each(Chunks::new(data, row * TILE), |data, i| {
                let n = data.len() / row;
                let mut values = [0.0f32; TILE];
                for c in columns.clone() {
                    let line = &src[(c - first) * rows * size..][..rows * size];
                    widen(dtype, &line[i * TILE * size..][..n * size], &mut values[..n]);
                    let c = if lane_order { c / 32 * 32 + LANE_ORDER[c % 32] } else { c } - p * stride;
                    for (r, v) in values[..n].iter().enumerate() {
                        let at = &mut data[r * row + c * to.size()..];
                        match to {
                            DType::I8 => narrow_i8(&[*v], scales[i * TILE + r], at),
                            _ => narrow(to, &[*v], at),
                        }
                    }
                }
            });
        }
    }

    /// Widens one row.
    pub(super) fn row(&self, index: usize, out: &mut [f32]) {
        let row = self.row_bytes();
        widen(
            self.dtype,
            &self.data[index * row..][..self.columns * self.dtype.size()],
            &mut out[..self.columns],
        );
        if self.dtype == DType::I8 {
            out[..self.columns].iter_mut().for_each(|v| *v *= self.scales[index]);
        }
    }

    /// Overwrites rows.
    #[cfg(test)]
    pub(super) fn set_rows(&mut self, rows: &[usize], value: f32) {
        let row = self.row_bytes();
        let values = vec![value; self.stride];
        for panel in self.data.chunks_exact_mut(self.rows * row) {
            for r in rows {
                narrow(self.dtype, &values, &mut panel[r * row..(r + 1) * row]);
            }
        }
    }
}

/// Widens `src` piece by piece; `f` gets the first element's index and the values.
fn chunks(dtype: DType, src: &[u8], mut f: impl FnMut(usize, &[f32])) {
    const N: usize = 64;
    let mut values = [0.0f32; N];
    for (i, piece) in src.chunks(N * dtype.size()).enumerate() {
        let n = piece.len() / dtype.size();
        widen(dtype, piece, &mut values[..n]);
        f(i * N, &values[..n]);
    }
}

fn narrow(to: DType, values: &[f32], out: &mut [u8]) {
    match to {
        DType::F32 => put(values, out, |v| v.to_ne_bytes()),
        DType::F16 => put(values, out, |v| f16::from_f32(v).to_bits().to_ne_bytes()),
        DType::BF16 => put(values, out, |v| bf16_bits(v).to_ne_bytes()),
        DType::I8 => narrow_i8(values, 1.0, out),
    }
}

fn put<const N: usize>(values: &[f32], out: &mut [u8], f: impl Fn(f32) -> [u8; N]) {
    for (o, &v) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *o = f(v);
    }
}
