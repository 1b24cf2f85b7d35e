//! Weighted sums of weight rows: the down projection of a ReLU MLP, stored `[neuron][column]`, so
//! that a neuron left out is a row never read.
//!
//! Lanes run along the columns; each column of each row has one accumulator, in memory between
//! blocks of neurons, and neurons are added in ascending order. Leaving out neurons whose weight is 0 changes
//! no bit. With products of bf16 pairs the pairs are always (2p, 2p + 1), a missing one counts as
//! 0, and columns are stored in [`LANE_ORDER`] so that interleaving two rows gives natural order.

use super::vec::{LANES, Simd};
use super::{Acts, Isa, Kernel, PAD, Pick, Rows};
use crate::sys::split::Block;
use std::marker::PhantomData;

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

/// Most activation rows of one pass over the weights.
const ROWS: usize = 8;
/// Neurons of a block when a few rows share the weights: their whole width is read before the next
/// block begins, so that memory sees few streams. The sums of a single row stay in registers, and
/// those of many rows stay where they are while all neurons pass by.
const FEW: usize = 8;
/// Neurons ahead whose weights are asked for.
const AHEAD: usize = 8;

/// `y[r] += Σ z[rows.at(r)][n] · w[n]` over the neurons `n` of `neurons` (ascending), for the
/// columns of `y`, whose first row is row 0 of `rows` numbering: `y.row(rows.at(r))`.
/// Column counts are multiples of [`PAD`]. `w` has all columns, or those of the panel of `stride_w`
/// columns that `y` lies in.
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
    let (first, columns) = (y.columns().start % stride_w.max(1), y.columns().len());
    assert!(first + columns <= stride_w && columns.is_multiple_of(PAD) && first.is_multiple_of(PAD));
    assert!(rows.end() * stride_z <= z.len() && rows.end() <= y.rows(), "row {} too many", rows.end());
    assert!(neurons.end() * stride_w <= w.len() && neurons.end() <= stride_z, "neuron {}", neurons.end());
    macro_rules! go {
        ($kind:ty, $z:expr, $w:expr, $scale:expr) => {
            for r in (0..rows.len()).step_by(ROWS) {
                let some = rows.part(r, (rows.len() - r).min(ROWS));
                let mut to = [std::ptr::null_mut(); ROWS];
                for r in 0..some.len() {
                    to[r] = y.row(some.at(r)).as_mut_ptr();
                }
                isa.run(Outer::<$kind> {
                    z: $z.as_ptr(),
                    stride_z,
                    rows: some,
                    w: $w.as_ptr().wrapping_add(first),
                    stride_w,
                    scale: $scale,
                    neurons,
                    block: if (2..=ROWS).contains(&rows.len()) { FEW } else { neurons.len() },
                    columns,
                    to,
                    kind: PhantomData,
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

struct Outer<'a, K: Kind> {
    z: *const K::Z,
    stride_z: usize,
    /// At most [`ROWS`].
    rows: Pick<'a>,
    w: *const K::W,
    stride_w: usize,
    scale: Option<&'a [f32]>,
    neurons: Pick<'a>,
    /// Neurons whose whole width is used before the next ones.
    block: usize,
    columns: usize,
    to: [*mut f32; ROWS],
    kind: PhantomData<K>,
}

/// How elements become products.
trait Kind: Sized {
    type Z: Copy;
    type W: Copy;
    /// Adds `neurons` to `acc`: rows `z` by `NV` vectors of columns from `c` on.
    unsafe fn add<S: Simd, const MR: usize, const NV: usize>(
        o: &Outer<'_, Self>,
        acc: &mut [[S::V; NV]; MR],
        z: &[*const Self::Z; MR],
        c: usize,
        neurons: Pick<'_>,
    );
}

impl<K: Kind> Kernel for Outer<'_, K> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.neurons.len();
        let mut first = 0;
        while first < n {
            let count = self.block_from(first);
            // SAFETY: `outer` checked every row, neuron and column.
            unsafe { self.block::<S>(first, count) }
            first += count;
        }
    }
}

impl<K: Kind> Outer<'_, K> {
    /// Neurons of the block from the `first`-th on; a pair (2p, 2p + 1) is never cut.
    #[inline(always)]
    fn block_from(&self, first: usize) -> usize {
        let count = self.block.min(self.neurons.len() - first);
        let end = first + count;
        let last = self.neurons.at(end - 1);
        let cut = last.is_multiple_of(2) && end < self.neurons.len() && self.neurons.at(end) == last + 1;
        count + usize::from(cut)
    }

    /// A block of neurons, all rows and columns.
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, first: usize, count: usize) {
        let neurons = self.neurons.part(first, count);
        let ahead = if self.block == FEW { count } else { 0 };
        let later = first + AHEAD..(first + AHEAD + ahead).min(self.neurons.len());
        let mut c = 0;
        while c < self.columns {
            let left = (self.columns - c) / LANES;
            let vectors = if S::WIDE && self.rows.len() == 1 && left >= 16 { 16 } else { left.min(4) & !1 };
            let width = vectors * LANES;
            for i in later.clone() {
                let at = self.w.wrapping_add(self.neurons.at(i) * self.stride_w + c).cast::<u8>();
                for line in (0..width * size_of::<K::W>()).step_by(64) {
                    // SAFETY: a prefetch never faults.
                    unsafe { S::prefetch(at.wrapping_add(line)) }
                }
            }
            let mut r = 0;
            while r < self.rows.len() {
                let size = (self.rows.len() - r).min(4);
                // SAFETY: rows r..r + size exist; columns are a multiple of 32.
                unsafe {
                    match (size, vectors) {
                        (1, 16) => self.tile::<S, 1, 16>(r, c, neurons),
                        (1, 4) => self.tile::<S, 1, 4>(r, c, neurons),
                        (2, 4) => self.tile::<S, 2, 4>(r, c, neurons),
                        (3, 4) => self.tile::<S, 3, 4>(r, c, neurons),
                        (_, 4) => self.tile::<S, 4, 4>(r, c, neurons),
                        (1, _) => self.tile::<S, 1, 2>(r, c, neurons),
                        (2, _) => self.tile::<S, 2, 2>(r, c, neurons),
                        (3, _) => self.tile::<S, 3, 2>(r, c, neurons),
                        (_, _) => self.tile::<S, 4, 2>(r, c, neurons),
                    }
                }
                r += size;
            }
            c += width;
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NV: usize>(&self, r: usize, c: usize, neurons: Pick<'_>) {
        // SAFETY: checked by `outer`.
        unsafe {
            let mut z = [self.z; MR];
            for i in 0..MR {
                z[i] = self.z.add(self.rows.at(r + i) * self.stride_z);
            }
            let to = |i: usize, v: usize| self.to[r + i].add(c + v * LANES);
            let mut acc = [[S::zero(); NV]; MR];
            for i in 0..MR {
                for v in 0..NV {
                    acc[i][v] = S::load(to(i, v));
                }
            }
            K::add::<S, MR, NV>(self, &mut acc, &z, c, neurons);
            for i in 0..MR {
                for v in 0..NV {
                    S::store(to(i, v), acc[i][v]);
                }
            }
        }
    }

    /// Asks for a later neuron's weights of the tile, where blocks do not.
    #[inline(always)]
    unsafe fn ahead<S: Simd, const NV: usize>(&self, neurons: Pick<'_>, i: usize, c: usize) {
        if self.block != FEW {
            let neuron = neurons.at((i + AHEAD).min(neurons.len() - 1));
            let at = self.w.wrapping_add(neuron * self.stride_w + c).cast::<u8>();
            for line in (0..NV * LANES * size_of::<K::W>()).step_by(64) {
                // SAFETY: a prefetch never faults.
                unsafe { S::prefetch(at.wrapping_add(line)) }
            }
        }
    }
}

macro_rules! widening {
    ($name:ident, $w:ty, $load:ident) => {
        struct $name;
        impl Kind for $name {
            type Z = f32;
            type W = $w;
            #[inline(always)]
            unsafe fn add<S: Simd, const MR: usize, const NV: usize>(
                o: &Outer<'_, Self>,
                acc: &mut [[S::V; NV]; MR],
                z: &[*const f32; MR],
                c: usize,
                neurons: Pick<'_>,
            ) {
                for i in 0..neurons.len() {
                    let neuron = neurons.at(i);
                    // SAFETY: the caller's promise.
                    unsafe {
                        o.ahead::<S, NV>(neurons, i, c);
                        let w = o.w.add(neuron * o.stride_w + c);
                        let mut wv = [S::zero(); NV];
                        for v in 0..NV {
                            wv[v] = S::$load(w.add(v * LANES));
                        }
                        for r in 0..MR {
                            let mut zr = *z[r].add(neuron);
                            if let Some(scale) = o.scale {
                                zr *= scale[neuron];
                            }
                            let zv = S::splat(zr);
                            for v in 0..NV {
                                acc[r][v] = S::fma(zv, wv[v], acc[r][v]);
                            }
                        }
                    }
                }
            }
        }
    };
}
widening!(Float32, f32, load);
widening!(Half, u16, load_f16);
widening!(Brain, u16, load_bf16);
widening!(Byte, i8, load_i8);

struct Pairs;
impl Kind for Pairs {
    type Z = u16;
    type W = u16;
    #[inline(always)]
    unsafe fn add<S: Simd, const MR: usize, const NV: usize>(
        o: &Outer<'_, Self>,
        acc: &mut [[S::V; NV]; MR],
        z: &[*const u16; MR],
        c: usize,
        neurons: Pick<'_>,
    ) {
        if !S::DP {
            return;
        }
        let n = neurons.len();
        let mut i = 0;
        while i < n {
            let first = neurons.at(i);
            let p = first & !1;
            let even = first == p;
            let odd = !even || i + 1 < n && neurons.at(i + 1) == p + 1;
            // The member of the pair that is not picked is neither read nor multiplied.
            let mask = if even && odd {
                !0u32
            } else if even {
                0xffff
            } else {
                0xffff_0000
            };
            // SAFETY: the caller's promise; rows of `z` are padded to a multiple of 32, so both of a
            // pair are there.
            unsafe {
                o.ahead::<S, NV>(neurons, i, c);
                if even && odd {
                    o.ahead::<S, NV>(neurons, i + 1, c);
                }
                let at = o.w.add(p * o.stride_w + c);
                let mut zv = [S::splat_b(0); MR];
                for r in 0..MR {
                    zv[r] = S::splat_b(z[r].add(p).cast::<u32>().read_unaligned() & mask);
                }
                for v in (0..NV).step_by(2) {
                    let at = at.wrapping_add(v * LANES);
                    let low = if even { S::load_b(at) } else { S::zero_b() };
                    let high = if odd { S::load_b(at.wrapping_add(o.stride_w)) } else { S::zero_b() };
                    let (low, high) = S::interleave(low, high);
                    for r in 0..MR {
                        acc[r][v] = S::dp(acc[r][v], low, zv[r]);
                        acc[r][v + 1] = S::dp(acc[r][v + 1], high, zv[r]);
                    }
                }
            }
            i += 1 + usize::from(even && odd);
        }
    }
}
