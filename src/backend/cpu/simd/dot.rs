//! Dot products of activation rows with weight rows: every matrix product but the one in
//! `outer.rs`.
//!
//! Lanes run along the reduction: lane `i` of one accumulator sums elements `i`, `i + 16`, … (or
//! pairs of them), and the lanes are folded at the end. A tile holds one accumulator per (row,
//! output), so its size never changes a result. Traffic: each weight row is read once per tile of
//! up to six activation rows, the first time from memory, then from the first-level cache.

use super::vec::{LANES, Simd};
use super::{Acts, Isa, Kernel, PAD, Pick, Rows};

/// `out[r * stride_out + o] = x[rows.at(r)] · w[outs.at(o)]` over `k` elements. `x` and `w` are
/// padded with zeros to `k`, a multiple of [`PAD`].
#[allow(clippy::too_many_arguments, reason = "two strided operands with their picks, and a result")]
pub(crate) fn dots(
    isa: Isa,
    (x, stride_x): (Acts<'_>, usize),
    rows: Pick<'_>,
    (w, stride_w): (Rows<'_>, usize),
    outs: Pick<'_>,
    k: usize,
    out: &mut [f32],
    stride_out: usize,
) {
    let (n_rows, n_outs) = (rows.len(), outs.len());
    if n_rows == 0 || n_outs == 0 {
        return;
    }
    assert!(
        k.is_multiple_of(PAD) && k <= stride_x && k <= stride_w,
        "{k} elements of {stride_x} and {stride_w}"
    );
    assert!(rows.end() * stride_x <= x.len(), "activation row {} of {}", rows.end(), x.len() / stride_x);
    assert!(outs.end() * stride_w <= w.len(), "weight row {} of {}", outs.end(), w.len() / stride_w);
    assert!(n_outs <= stride_out && (n_rows - 1) * stride_out + n_outs <= out.len(), "result too small");
    macro_rules! go {
        ($load:ty, $x:expr, $w:expr) => {
            isa.run(Dots::<$load> {
                x: $x.as_ptr(),
                stride_x,
                rows,
                w: $w.as_ptr(),
                stride_w,
                outs,
                k,
                out: out.as_mut_ptr(),
                stride_out,
            })
        };
    }
    match (x, w) {
        (Acts::F32(x), Rows::F32(w)) => go!(F32, x, w),
        (Acts::F32(x), Rows::F16(w)) => go!(F16, x, w),
        (Acts::F32(x), Rows::Bf16(w)) => go!(Bf16, x, w),
        (Acts::Bf16(x), Rows::Bf16(w)) => {
            assert!(isa.bf16_products(), "bf16 activations on {}", isa.name());
            go!(Pairs, x, w);
        }
        (Acts::F32(x), Rows::I8(w, scale)) => {
            go!(I8, x, w);
            for r in 0..n_rows {
                for (o, v) in out[r * stride_out..][..n_outs].iter_mut().enumerate() {
                    *v *= scale[outs.at(o)];
                }
            }
        }
        (Acts::Bf16(_), _) => unreachable!("bf16 activations only meet bf16 weights"),
    }
}

/// How elements become products.
trait Load {
    type X: Copy;
    type W: Copy;
    /// Elements per step.
    const STEP: usize;
    unsafe fn x<S: Simd>(p: *const Self::X) -> Operand<S>;
    unsafe fn w<S: Simd>(p: *const Self::W) -> Operand<S>;
    unsafe fn mul_add<S: Simd>(acc: S::V, x: Operand<S>, w: Operand<S>) -> S::V;
}

/// A loaded vector; one of the two, known when compiling.
union Operand<S: Simd> {
    v: S::V,
    b: S::B,
}

impl<S: Simd> Clone for Operand<S> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<S: Simd> Copy for Operand<S> {}

macro_rules! widening {
    ($name:ident, $w:ty, $load:ident) => {
        struct $name;
        impl Load for $name {
            type X = f32;
            type W = $w;
            const STEP: usize = LANES;
            #[inline(always)]
            unsafe fn x<S: Simd>(p: *const f32) -> Operand<S> {
                // SAFETY: the caller's promise.
                Operand { v: unsafe { S::load(p) } }
            }
            #[inline(always)]
            unsafe fn w<S: Simd>(p: *const $w) -> Operand<S> {
                // SAFETY: the caller's promise.
                Operand { v: unsafe { S::$load(p) } }
            }
            #[inline(always)]
            unsafe fn mul_add<S: Simd>(acc: S::V, x: Operand<S>, w: Operand<S>) -> S::V {
                // SAFETY: both were made by the functions above.
                unsafe { S::fma(x.v, w.v, acc) }
            }
        }
    };
}
widening!(F32, f32, load);
widening!(F16, u16, load_f16);
widening!(Bf16, u16, load_bf16);
widening!(I8, i8, load_i8);

struct Pairs;
impl Load for Pairs {
    type X = u16;
    type W = u16;
    const STEP: usize = 2 * LANES;
    #[inline(always)]
    unsafe fn x<S: Simd>(p: *const u16) -> Operand<S> {
        // SAFETY: the caller's promise.
        Operand { b: unsafe { S::load_b(p) } }
    }
    #[inline(always)]
    unsafe fn w<S: Simd>(p: *const u16) -> Operand<S> {
        // SAFETY: the caller's promise.
        Operand { b: unsafe { S::load_b(p) } }
    }
    #[inline(always)]
    unsafe fn mul_add<S: Simd>(acc: S::V, x: Operand<S>, w: Operand<S>) -> S::V {
        // SAFETY: both were made by the functions above.
        unsafe { S::dp(acc, x.b, w.b) }
    }
}

struct Dots<'a, L: Load> {
    x: *const L::X,
    stride_x: usize,
    rows: Pick<'a>,
    w: *const L::W,
    stride_w: usize,
    outs: Pick<'a>,
    k: usize,
    out: *mut f32,
    stride_out: usize,
}

impl<L: Load> Kernel for Dots<'_, L> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `dots` checked that all picked rows and the result lie inside their slices.
        unsafe {
            let n = self.outs.len();
            let mut o = 0;
            match self.rows.len() {
                1 if S::WIDE => {
                    while o + 8 <= n {
                        self.tile::<S, 1, 8>(0, o);
                        o += 8;
                    }
                }
                7 if S::WIDE => {
                    while o + 2 <= n {
                        self.tile::<S, 7, 2>(0, o);
                        o += 2;
                    }
                }
                8 if S::WIDE => {
                    while o + 2 <= n {
                        self.tile::<S, 8, 2>(0, o);
                        o += 2;
                    }
                }
                _ => {}
            }
            while o + 4 <= n {
                self.row_tiles::<S, 4>(o);
                o += 4;
            }
            while o < n {
                self.row_tiles::<S, 1>(o);
                o += 1;
            }
        }
    }
}

impl<L: Load> Dots<'_, L> {
    /// All rows by `NR` outputs, rows in tiles as equal as can be.
    #[inline(always)]
    unsafe fn row_tiles<S: Simd, const NR: usize>(&self, o: usize) {
        let n = self.rows.len();
        let most = if S::WIDE { 6 } else { 2 };
        let mut r = 0;
        while r < n {
            let left = n - r;
            let size = left.div_ceil(left.div_ceil(most));
            // SAFETY: rows r..r + size and outputs o..o + NR exist.
            unsafe {
                match size {
                    1 => self.tile::<S, 1, NR>(r, o),
                    2 => self.tile::<S, 2, NR>(r, o),
                    3 => self.tile::<S, 3, NR>(r, o),
                    4 => self.tile::<S, 4, NR>(r, o),
                    5 => self.tile::<S, 5, NR>(r, o),
                    _ => self.tile::<S, 6, NR>(r, o),
                }
            }
            r += size;
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NR: usize>(&self, r: usize, o: usize) {
        // SAFETY: the picked rows lie inside their arrays, `k` elements each; results likewise.
        unsafe {
            let x: [*const L::X; MR] =
                std::array::from_fn(|i| self.x.add(self.rows.at(r + i) * self.stride_x));
            let w: [*const L::W; NR] =
                std::array::from_fn(|j| self.w.add(self.outs.at(o + j) * self.stride_w));
            let mut acc = [[S::zero(); NR]; MR];
            // The first rows to use these weights ask for those of the next tile: rows are too
            // short for the hardware to catch up with each anew.
            let ahead = NR * self.stride_w;
            let mut k = 0;
            while k < self.k {
                let wv: [Operand<S>; NR] = std::array::from_fn(|j| L::w::<S>(w[j].add(k)));
                if r == 0 {
                    for w in &w {
                        S::prefetch(w.wrapping_add(k + ahead).cast());
                    }
                }
                for i in 0..MR {
                    let xv = L::x::<S>(x[i].add(k));
                    for j in 0..NR {
                        acc[i][j] = L::mul_add::<S>(acc[i][j], xv, wv[j]);
                    }
                }
                k += L::STEP;
            }
            for (i, acc) in acc.iter().enumerate() {
                let out = self.out.add((r + i) * self.stride_out + o);
                let (fours, rest) = acc.as_chunks::<4>();
                for (j, four) in fours.iter().enumerate() {
                    out.add(4 * j).cast::<[f32; 4]>().write_unaligned(S::sum4(*four));
                }
                for (j, one) in rest.iter().enumerate() {
                    *out.add(4 * fours.len() + j) = S::sum(*one);
                }
            }
        }
    }
}
