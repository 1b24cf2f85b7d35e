//! Weighted sums of weight rows: the down projection of a ReLU MLP, stored `[neuron][column]`, so
//! that a neuron left out is a row never read.
//!
//! Lanes run along the columns; each column of each row has one accumulator, in memory between
//! calls, and neurons are added in ascending order. Leaving out neurons whose weight is 0 changes
//! no bit. With products of bf16 pairs the pairs are always (2p, 2p + 1), a missing one counts as
//! 0, and columns are stored in [`LANE_ORDER`] so that interleaving two rows gives natural order.

use super::vec::{LANES, Simd};
use super::{Acts, Isa, Kernel, PAD, Pick, Rows};
use crate::sys::split::Block;

/// Where column `c` of each 32 is stored for products of bf16 pairs: interleaving two rows within
/// 128 bits then puts columns 0..16 into the lower result and 16..32 into the upper one.
pub(crate) const LANE_ORDER: [usize; 32] = {
    let mut order = [0; 32];
    let mut c = 0;
    while c < 32 {
        let half = c / 16;
        let lane = c % 16;
        order[c] = lane / 4 * 8 + half * 4 + lane % 4;
        c += 1;
    }
    order
};

/// `y[r] += Σ z[rows.at(r)][n] · w[n]` over the neurons `n` of `neurons` (ascending), for the
/// columns of `y`, whose first row is row 0 of `rows` numbering: `y.row(rows.at(r))`.
/// Column counts are multiples of [`PAD`].
pub(crate) fn outer(
    isa: Isa,
    (z, stride_z): (Acts<'_>, usize),
    rows: Pick<'_>,
    (w, stride_w): (Rows<'_>, usize),
    neurons: Pick<'_>,
    y: &mut Block<'_, f32>,
) {
    if rows.len() == 0 || neurons.len() == 0 {
        return;
    }
    let columns = y.columns();
    assert!(
        columns.end <= stride_w && columns.len().is_multiple_of(PAD) && columns.start.is_multiple_of(PAD)
    );
    assert!(rows.end() * stride_z <= z.len() && rows.end() <= y.rows(), "row {} too many", rows.end());
    assert!(neurons.end() * stride_w <= w.len() && neurons.end() <= stride_z, "neuron {}", neurons.end());
    macro_rules! go {
        ($load:ident, $z:expr, $w:expr, $scale:expr) => {
            for first in (0..rows.len()).step_by(4) {
                let some = rows.part(first, (rows.len() - first).min(4));
                let mut to = [std::ptr::null_mut(); 4];
                for r in 0..some.len() {
                    to[r] = y.row(some.at(r)).as_mut_ptr();
                }
                isa.run($load {
                    z: $z.as_ptr(),
                    stride_z,
                    rows: some,
                    w: $w.as_ptr().wrapping_add(columns.start),
                    stride_w,
                    scale: $scale,
                    neurons,
                    columns: columns.len(),
                    to,
                });
            }
        };
    }
    match (z, w) {
        (Acts::F32(z), Rows::F32(w)) => go!(Float32, z, w, None),
        (Acts::F32(z), Rows::F16(w)) => go!(Half, z, w, None),
        (Acts::F32(z), Rows::Bf16(w)) => go!(Brain, z, w, None),
        (Acts::F32(z), Rows::I8(w, scale)) => {
            assert!(neurons.end() <= scale.len());
            go!(Byte, z, w, Some(scale));
        }
        (Acts::Bf16(z), Rows::Bf16(w)) => {
            assert!(isa.bf16_products(), "bf16 activations on {}", isa.name());
            go!(Pairs, z, w, None);
        }
        (Acts::Bf16(_), _) => unreachable!("bf16 activations only meet bf16 weights"),
    }
}

struct Outer<'a, Z, W> {
    z: *const Z,
    stride_z: usize,
    /// At most four.
    rows: Pick<'a>,
    w: *const W,
    stride_w: usize,
    scale: Option<&'a [f32]>,
    neurons: Pick<'a>,
    columns: usize,
    to: [*mut f32; 4],
}

/// Neurons ahead whose weights are asked for: a list defeats the hardware's own guess.
const AHEAD: usize = 8;

macro_rules! widening {
    ($name:ident, $w:ty, $load:ident) => {
        struct $name<'a> {
            z: *const f32,
            stride_z: usize,
            rows: Pick<'a>,
            w: *const $w,
            stride_w: usize,
            scale: Option<&'a [f32]>,
            neurons: Pick<'a>,
            columns: usize,
            to: [*mut f32; 4],
        }
        impl Kernel for $name<'_> {
            type Out = ();
            #[inline(always)]
            unsafe fn run<S: Simd>(self) {
                let $name { z, stride_z, rows, w, stride_w, scale, neurons, columns, to } = self;
                let o = Outer { z, stride_z, rows, w, stride_w, scale, neurons, columns, to };
                // SAFETY: `outer` checked every row, neuron and column.
                unsafe { o.floats::<S>(|p| S::$load(p)) }
            }
        }
    };
}
widening!(Float32, f32, load);
widening!(Half, u16, load_f16);
widening!(Brain, u16, load_bf16);
widening!(Byte, i8, load_i8);

impl<W: Copy> Outer<'_, f32, W> {
    #[inline(always)]
    unsafe fn floats<S: Simd>(&self, load: impl Fn(*const W) -> S::V + Copy) {
        // SAFETY: `outer` checked every row, neuron and column.
        unsafe {
            match self.rows.len() {
                1 => self.float_tiles::<S, 1>(load),
                2 => self.float_tiles::<S, 2>(load),
                3 => self.float_tiles::<S, 3>(load),
                _ => self.float_tiles::<S, 4>(load),
            }
        }
    }

    #[inline(always)]
    unsafe fn float_tiles<S: Simd, const MR: usize>(&self, load: impl Fn(*const W) -> S::V + Copy) {
        // SAFETY: columns are a multiple of 32; the rest was checked by `outer`.
        unsafe {
            let mut c = 0;
            while c + 4 * LANES <= self.columns {
                self.float_tile::<S, MR, 4>(c, load);
                c += 4 * LANES;
            }
            while c < self.columns {
                self.float_tile::<S, MR, 2>(c, load);
                c += 2 * LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn float_tile<S: Simd, const MR: usize, const NV: usize>(
        &self,
        c: usize,
        load: impl Fn(*const W) -> S::V + Copy,
    ) {
        // SAFETY: checked by `outer`.
        unsafe {
            let z: [*const f32; MR] = std::array::from_fn(|r| self.z.add(self.rows.at(r) * self.stride_z));
            let mut acc: [[S::V; NV]; MR] =
                std::array::from_fn(|r| std::array::from_fn(|v| S::load(self.to[r].add(c + v * LANES))));
            let n = self.neurons.len();
            for i in 0..n {
                let ahead = self.neurons.at((i + AHEAD).min(n - 1));
                S::prefetch(self.w.add(ahead * self.stride_w + c).cast());
                let neuron = self.neurons.at(i);
                let w = self.w.add(neuron * self.stride_w + c);
                let wv: [S::V; NV] = std::array::from_fn(|v| load(w.add(v * LANES)));
                for r in 0..MR {
                    let mut zr = *z[r].add(neuron);
                    if let Some(scale) = self.scale {
                        zr *= scale[neuron];
                    }
                    let zv = S::splat(zr);
                    for v in 0..NV {
                        acc[r][v] = S::fma(zv, wv[v], acc[r][v]);
                    }
                }
            }
            for r in 0..MR {
                for v in 0..NV {
                    S::store(self.to[r].add(c + v * LANES), acc[r][v]);
                }
            }
        }
    }
}

struct Pairs<'a> {
    z: *const u16,
    stride_z: usize,
    rows: Pick<'a>,
    w: *const u16,
    stride_w: usize,
    #[allow(dead_code, reason = "bf16 weights have no scale; the field keeps one way to fill these")]
    scale: Option<&'a [f32]>,
    neurons: Pick<'a>,
    columns: usize,
    to: [*mut f32; 4],
}

impl Kernel for Pairs<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `outer` checked every row, neuron and column, and that `S` has the products.
        unsafe {
            if !S::DP {
                return;
            }
            match self.rows.len() {
                1 => self.tiles::<S, 1>(),
                2 => self.tiles::<S, 2>(),
                3 => self.tiles::<S, 3>(),
                _ => self.tiles::<S, 4>(),
            }
        }
    }
}

impl Pairs<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const MR: usize>(&self) {
        // SAFETY: columns are a multiple of 32; the rest was checked by `outer`.
        unsafe {
            let mut c = 0;
            while c + 4 * LANES <= self.columns {
                self.tile::<S, MR, 2>(c);
                c += 4 * LANES;
            }
            while c < self.columns {
                self.tile::<S, MR, 1>(c);
                c += 2 * LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NB: usize>(&self, c: usize) {
        // SAFETY: checked by `outer`.
        unsafe {
            let z: [*const u16; MR] = std::array::from_fn(|r| self.z.add(self.rows.at(r) * self.stride_z));
            let mut acc: [[[S::V; 2]; NB]; MR] = std::array::from_fn(|r| {
                std::array::from_fn(|b| {
                    std::array::from_fn(|h| S::load(self.to[r].add(c + (2 * b + h) * LANES)))
                })
            });
            let n = self.neurons.len();
            let mut i = 0;
            while i < n {
                let ahead = self.neurons.at((i + AHEAD).min(n - 1));
                S::prefetch(self.w.add(ahead * self.stride_w + c).cast());
                let first = self.neurons.at(i);
                let p = first & !1;
                let even = first == p;
                let odd = !even || i + 1 < n && self.neurons.at(i + 1) == p + 1;
                i += 1 + usize::from(even && odd);
                // The member of the pair that is not picked is neither read nor multiplied.
                let mask = if even && odd {
                    !0u32
                } else if even {
                    0xffff
                } else {
                    0xffff_0000
                };
                let at = self.w.add(p * self.stride_w + c);
                let wv: [[S::B; 2]; NB] = std::array::from_fn(|b| {
                    let at = at.wrapping_add(2 * b * LANES);
                    let low = if even { S::load_b(at) } else { S::zero_b() };
                    let high = if odd { S::load_b(at.wrapping_add(self.stride_w)) } else { S::zero_b() };
                    let (l, h) = S::interleave(low, high);
                    [l, h]
                });
                for r in 0..MR {
                    // The rows of `z` are padded to a multiple of 32: both of a pair are there.
                    let zv = S::splat_b(z[r].add(p).cast::<u32>().read_unaligned() & mask);
                    for b in 0..NB {
                        for h in 0..2 {
                            acc[r][b][h] = S::dp(acc[r][b][h], wv[b][h], zv);
                        }
                    }
                }
            }
            for r in 0..MR {
                for b in 0..NB {
                    for h in 0..2 {
                        S::store(self.to[r].add(c + (2 * b + h) * LANES), acc[r][b][h]);
                    }
                }
            }
        }
    }
}
