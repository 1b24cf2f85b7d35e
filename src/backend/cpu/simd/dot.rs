//! Dot products of activation rows with weight rows: every matrix product but the one in
//! `outer.rs`.
//!
//! Lanes run along the reduction: lane `i` of one accumulator sums elements `i`, `i + 16`, … (or
//! pairs of them), and the lanes are folded at the end. A tile holds one accumulator per (row,
//! output), so its size never changes a result.
//!
//! Arrays are filled by plain loops: a closure (`array::from_fn`) that is not inlined would force all
//! sums out of their registers.
//!
//! Traffic: up to [`FEW`] short activation rows take one weight row after the other, so that memory
//! sees one stream, which its prefetchers follow best. More are bound by arithmetic: tiles of rows and outputs, each weight row read once per tile
//! of rows, the first time from memory, then from a cache.

use super::vec::{LANES, Simd};
use super::{Acts, Isa, Kernel, PAD, Pick, Rows};

/// `out[r * stride_out + o] = x[rows.at(r)] · w[outs.at(o)]` over `k` elements. `x` and `w` are
/// padded with zeros to `k`, a multiple of [`PAD`]. `spill`: room for sixteen sums per result lets
/// long rows go in several passes; no bit depends on it.
#[allow(clippy::too_many_arguments, reason = "two strided operands with their picks, and a result")]
pub(crate) fn dots(
    isa: Isa,
    (x, stride_x): (Acts<'_>, usize),
    rows: Pick<'_>,
    (w, stride_w): (Rows<'_>, usize),
    outs: Pick<'_>,
    k: usize,
    (out, stride_out): (&mut [f32], usize),
    spill: &mut [f32],
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
                pass: pass_of(n_rows, k, size_of_val(&$x[0]), n_rows * n_outs * LANES <= spill.len()),
                spill: spill.as_mut_ptr(),
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

/// Elements of one pass: a tile of rows should stay in the first-level cache while all outputs
/// pass by. More than one pass keeps its sums, exactly as they are, in `spill`.
fn pass_of(rows: usize, k: usize, size: usize, can_spill: bool) -> usize {
    if !can_spill || rows.min(8) * k * size <= L1_BYTES {
        return k;
    }
    let passes = (k * size).div_ceil(PASS_BYTES);
    k.div_ceil(passes).next_multiple_of(PAD)
}

/// What a tile of rows may take of the first-level cache.
const L1_BYTES: usize = 20 << 10;
/// Bytes of each row in one pass, when there are several.
const PASS_BYTES: usize = 2 << 10;

/// Most rows that read weights in one stream.
const FEW: usize = 8;
/// What they may take together, since each output reads all of them anew from the first-level cache.
const LINE_BYTES: usize = 16 << 10;
/// Bytes ahead that such a stream asks for.
const AHEAD: usize = 4 << 10;

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
    /// Elements of one pass; less than `k` only if `spill` has a vector for every result.
    pass: usize,
    spill: *mut f32,
    out: *mut f32,
    stride_out: usize,
}

impl<L: Load> Kernel for Dots<'_, L> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.rows.len();
        let few = if S::WIDE { FEW } else { FEW / 2 };
        let lines = n == 1 || n <= few && n * self.k * size_of::<L::X>() <= LINE_BYTES;
        let most = match n {
            _ if !S::WIDE => 2,
            7 | 8 => 8,
            _ => 6,
        };
        let mut k = 0;
        while k < self.k {
            if lines {
                // SAFETY: as below.
                unsafe { self.few::<S>(k) }
                k += self.pass;
                continue;
            }
            let mut r = 0;
            // Rows in tiles as equal as can be.
            while r < n {
                let size = (n - r).div_ceil((n - r).div_ceil(most));
                // SAFETY: `dots` checked that all picked rows and the result lie inside their
                // slices; rows r..r + size and elements from k on exist.
                unsafe {
                    match size {
                        1 => self.outputs::<S, 1>(r, k),
                        2 => self.outputs::<S, 2>(r, k),
                        3 => self.outputs::<S, 3>(r, k),
                        4 => self.outputs::<S, 4>(r, k),
                        5 => self.outputs::<S, 5>(r, k),
                        6 => self.outputs::<S, 6>(r, k),
                        7 => self.outputs::<S, 7>(r, k),
                        _ => self.outputs::<S, 8>(r, k),
                    }
                }
                r += size;
            }
            k += self.pass;
        }
    }
}

impl<L: Load> Dots<'_, L> {
    /// All rows, at most [`FEW`], by all outputs, elements from `k` on.
    #[inline(always)]
    unsafe fn few<S: Simd>(&self, k: usize) {
        let n = self.outs.len();
        let mut o = 0;
        // SAFETY: outputs o..o + width exist.
        unsafe {
            while o < n {
                let width = if o + 4 <= n && self.rows.len() <= 2 { 4 } else { 1 };
                match (self.rows.len(), width) {
                    (1, 4) => self.lines::<S, 1, 4>(o, k),
                    (2, 4) => self.lines::<S, 2, 4>(o, k),
                    (1, _) => self.lines::<S, 1, 1>(o, k),
                    (2, _) => self.lines::<S, 2, 1>(o, k),
                    (3, _) => self.lines::<S, 3, 1>(o, k),
                    (4, _) => self.lines::<S, 4, 1>(o, k),
                    (5, _) => self.lines::<S, 5, 1>(o, k),
                    (6, _) => self.lines::<S, 6, 1>(o, k),
                    (7, _) => self.lines::<S, 7, 1>(o, k),
                    _ => self.lines::<S, 8, 1>(o, k),
                }
                o += width;
            }
        }
    }

    /// All `MR` rows by `NR` outputs (1 or 4), one output after the other.
    #[inline(always)]
    unsafe fn lines<S: Simd, const MR: usize, const NR: usize>(&self, o: usize, first: usize) {
        let end = (first + self.pass).min(self.k);
        // SAFETY: as in `tile`.
        unsafe {
            // A pass over part of long rows goes on with the next row's part.
            let far = if self.pass < self.k { self.stride_w } else { AHEAD / size_of::<L::W>() };
            let mut x = [self.x; MR];
            for i in 0..MR {
                x[i] = self.x.add(self.rows.at(i) * self.stride_x);
            }
            let mut acc: [[S::V; NR]; MR] = self.start::<S, MR, NR>(0, o, first);
            for j in 0..NR {
                let w = self.w.add(self.outs.at(o + j) * self.stride_w);
                // Behind a listed row lies one that nobody reads; the next listed one is.
                let later = match self.outs {
                    Pick::Range(..) => w.wrapping_add(far),
                    Pick::List(list) => {
                        let next = list[(o + j + 1).min(list.len() - 1)] as usize;
                        self.w.wrapping_add(next * self.stride_w)
                    }
                };
                let mut sums = [S::zero(); MR];
                for i in 0..MR {
                    sums[i] = acc[i][j];
                }
                let mut k = first;
                while k < end {
                    let wv = L::w::<S>(w.add(k));
                    S::prefetch(later.wrapping_add(k).cast());
                    for i in 0..MR {
                        sums[i] = L::mul_add::<S>(sums[i], L::x::<S>(x[i].add(k)), wv);
                    }
                    k += L::STEP;
                }
                for i in 0..MR {
                    acc[i][j] = sums[i];
                }
            }
            if end < self.k {
                self.keep::<S, MR, NR>(0, o, &acc);
            } else if NR == 1 {
                // Rows in fours: their sums cost the least together.
                let out = |i: usize| self.out.add(i * self.stride_out + o);
                let mut column = [S::zero(); MR];
                for i in 0..MR {
                    column[i] = acc[i][0];
                }
                let (fours, rest) = column.as_chunks::<4>();
                for (c, four) in fours.iter().enumerate() {
                    for (i, sum) in S::sum4(*four).into_iter().enumerate() {
                        *out(4 * c + i) = sum;
                    }
                }
                for (i, one) in rest.iter().enumerate() {
                    *out(4 * fours.len() + i) = S::sum(*one);
                }
            } else {
                self.finish::<S, MR, NR>(0, o, &acc);
            }
        }
    }

    /// Sums so far: none, or what an earlier pass kept.
    #[inline(always)]
    unsafe fn start<S: Simd, const MR: usize, const NR: usize>(
        &self,
        r: usize,
        o: usize,
        first: usize,
    ) -> [[S::V; NR]; MR] {
        // SAFETY: `spill` has a vector for every result when there is more than one pass.
        unsafe {
            let mut acc = [[S::zero(); NR]; MR];
            if first > 0 {
                for i in 0..MR {
                    for j in 0..NR {
                        acc[i][j] = S::load(self.spilled(r + i, o + j));
                    }
                }
            }
            acc
        }
    }

    /// Keeps sums for the next pass.
    #[inline(always)]
    unsafe fn keep<S: Simd, const MR: usize, const NR: usize>(
        &self,
        r: usize,
        o: usize,
        acc: &[[S::V; NR]; MR],
    ) {
        for i in 0..MR {
            for j in 0..NR {
                // SAFETY: as in `start`.
                unsafe { S::store(self.spilled(r + i, o + j), acc[i][j]) }
            }
        }
    }

    #[inline(always)]
    fn spilled(&self, r: usize, o: usize) -> *mut f32 {
        self.spill.wrapping_add((r * self.outs.len() + o) * LANES)
    }

    /// Folds and stores sums.
    #[inline(always)]
    unsafe fn finish<S: Simd, const MR: usize, const NR: usize>(
        &self,
        r: usize,
        o: usize,
        acc: &[[S::V; NR]; MR],
    ) {
        for (i, acc) in acc.iter().enumerate() {
            // SAFETY: the result has room for these rows and outputs.
            unsafe {
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

    /// One tile of rows by all outputs, elements from `k` on.
    #[inline(always)]
    unsafe fn outputs<S: Simd, const MR: usize>(&self, r: usize, k: usize) {
        let n = self.outs.len();
        let mut o = 0;
        // SAFETY: outputs o..o + width exist.
        unsafe {
            if MR > 6 {
                while o + 3 <= n {
                    self.tile::<S, MR, 3>(r, o, k);
                    o += 3;
                }
            } else {
                while o + 4 <= n {
                    self.tile::<S, MR, 4>(r, o, k);
                    o += 4;
                }
            }
            while o < n {
                self.tile::<S, MR, 1>(r, o, k);
                o += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NR: usize>(&self, r: usize, o: usize, first: usize) {
        let end = (first + self.pass).min(self.k);
        // SAFETY: the picked rows lie inside their arrays, `k` elements each; results likewise, and
        // `spill` has a vector for each when there is more than one pass.
        unsafe {
            let mut x = [self.x; MR];
            for i in 0..MR {
                x[i] = self.x.add(self.rows.at(r + i) * self.stride_x);
            }
            let mut w = [self.w; NR];
            for j in 0..NR {
                w[j] = self.w.add(self.outs.at(o + j) * self.stride_w);
            }
            let mut acc: [[S::V; NR]; MR] = self.start::<S, MR, NR>(r, o, first);
            // The first rows to use these weights ask for those of the next tile: rows are too
            // short for the hardware to catch up with each anew.
            let ahead = NR * self.stride_w;
            let mut k = first;
            while k < end {
                let mut wv = [Operand::<S> { v: S::zero() }; NR];
                for j in 0..NR {
                    wv[j] = L::w::<S>(w[j].add(k));
                }
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
            if end < self.k {
                self.keep::<S, MR, NR>(r, o, &acc);
            } else {
                self.finish::<S, MR, NR>(r, o, &acc);
            }
        }
    }
}
