//! Exact attention of some query rows over one KV page, with a running softmax.
//!
//! K is stored so that lanes are the page's sixteen tokens, V so that lanes are dimensions: no
//! horizontal sums. Each K and V vector serves up to four query rows, so a page comes once from
//! memory for its whole query group. Each row has its own four score accumulators and its own
//! output, whatever rows are beside it.
//!
//! Layout of a piece: f32, f16: K `[dim][16 tokens]`, V `[16 tokens][dim]`; bf16:
//! K `[dim pair][16 tokens][2]`, V `[token pair][dim][2]`. Dimensions are padded with zeros to 16.

use super::vec::{LANES, Simd, exp};
use super::{Acts, Isa, Kernel};

/// K and V of one page and KV head.
#[derive(Clone, Copy)]
pub(crate) enum KvPiece<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary16 bits.
    F16(&'a [u16]),
    /// bfloat16 bits.
    Bf16(&'a [u16]),
}

/// Query rows and the state of their softmax.
pub(crate) struct Queries<'a> {
    /// `[row][dim]`.
    pub(crate) q: Acts<'a>,
    /// Dimensions, a multiple of 16.
    pub(crate) dims: usize,
    /// Factor of the scores.
    pub(crate) scale: f32,
    /// Tokens of the page that each row sees: first, and one past the last.
    pub(crate) visible: &'a [(u8, u8)],
    /// Largest score so far, -inf at first.
    pub(crate) max: &'a mut [f32],
    /// `[row][16]`: sums of weights so far.
    pub(crate) sum: &'a mut [f32],
    /// `[row][dim]`: weighted sums of V so far.
    pub(crate) out: &'a mut [f32],
}

/// Adds one page.
pub(crate) fn attend_page(isa: Isa, piece: KvPiece<'_>, queries: &mut Queries<'_>) {
    let (n, dims) = (queries.visible.len(), queries.dims);
    assert!(dims.is_multiple_of(LANES) && dims > 0, "{dims} dimensions");
    assert!(queries.q.len() >= n * dims && queries.out.len() >= n * dims);
    assert!(queries.max.len() >= n && queries.sum.len() >= n * LANES);
    assert!(queries.visible.iter().all(|v| usize::from(v.1) <= LANES));
    macro_rules! go {
        ($kind:ty, $q:expr, $piece:expr) => {{
            assert!($piece.len() >= 2 * LANES * dims, "piece of {}", $piece.len());
            isa.run(Page::<$kind> {
                k: $piece.as_ptr(),
                v: $piece[LANES * dims..].as_ptr(),
                q: $q.as_ptr(),
                queries,
            })
        }};
    }
    match (piece, queries.q) {
        (KvPiece::F32(p), Acts::F32(q)) => go!(Float32, q, p),
        (KvPiece::F16(p), Acts::F32(q)) => go!(Half, q, p),
        (KvPiece::Bf16(p), Acts::F32(q)) => go!(Wide, q, p),
        (KvPiece::Bf16(p), Acts::Bf16(q)) => {
            assert!(isa.bf16_products(), "bf16 queries on {}", isa.name());
            go!(Pairs, q, p);
        }
        (_, Acts::Bf16(_)) => unreachable!("bf16 queries only meet bf16 pages"),
    }
}

/// Adds to the softmax state of some rows (largest scores, sixteen sums each, outputs) what the same
/// rows saw in later pages.
pub(crate) fn merge(
    isa: Isa,
    (max, sum, out): (&mut [f32], &mut [f32], &mut [f32]),
    (later_max, later_sum, later_out): (&[f32], &[f32], &[f32]),
) {
    let n = max.len();
    assert!(sum.len() == n * LANES && n > 0 && out.len().is_multiple_of(n));
    assert!(later_max.len() == n && later_sum.len() == sum.len() && later_out.len() == out.len());
    let dims = out.len() / n;
    for (r, (old, &later)) in max.iter_mut().zip(later_max).enumerate() {
        if later == f32::NEG_INFINITY {
            continue;
        }
        let new = old.max(later);
        // Nothing seen so far weighs e^-inf = 0.
        let (a, b) = ((*old - new).exp(), (later - new).exp());
        *old = new;
        let rows = [(&mut *sum, later_sum, LANES), (&mut *out, later_out, dims)];
        for (to, from, width) in rows {
            isa.run(Blend { to: &mut to[r * width..][..width], from: &from[r * width..][..width], a, b });
        }
    }
}

/// `to = a * to + b * from`, a multiple of sixteen elements.
struct Blend<'a> {
    to: &'a mut [f32],
    from: &'a [f32],
    a: f32,
    b: f32,
}

impl Kernel for Blend<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (to, from) = (self.to.as_chunks_mut::<LANES>().0, self.from.as_chunks::<LANES>().0);
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: sixteen elements each.
            unsafe {
                let kept = S::mul(S::load(to.as_ptr()), S::splat(self.a));
                S::store(to.as_mut_ptr(), S::fma(S::load(from.as_ptr()), S::splat(self.b), kept));
            }
        }
    }
}

/// Weights of one row's sixteen tokens.
type Weights = [f32; LANES];

/// How a page's elements are read.
trait Kind {
    type Q: Copy;
    type E: Copy;
    /// Elements of a row of `q` and vectors' worth of K in one step.
    const STEP: usize;
    /// Adds the scores' share of K step `i`.
    unsafe fn score<S: Simd, const N: usize>(
        acc: &mut [S::V; N],
        k: *const Self::E,
        q: &[*const Self::Q; N],
        i: usize,
    );
    /// Adds tokens `2 * pair` and `2 * pair + 1` of sixteen columns from `c` on.
    unsafe fn value<S: Simd, const N: usize>(
        acc: &mut [S::V; N],
        v: *const Self::E,
        dims: usize,
        pair: usize,
        c: usize,
        p: &[Weights; N],
    );
}

macro_rules! floats {
    ($name:ident, $e:ty, $load:ident) => {
        struct $name;
        impl Kind for $name {
            type Q = f32;
            type E = $e;
            const STEP: usize = 1;
            #[inline(always)]
            unsafe fn score<S: Simd, const N: usize>(
                acc: &mut [S::V; N],
                k: *const $e,
                q: &[*const f32; N],
                i: usize,
            ) {
                // SAFETY: the caller's promise: `i` is below the number of steps.
                unsafe {
                    let k = S::$load(k.add(i * LANES));
                    for n in 0..N {
                        acc[n] = S::fma(k, S::splat(*q[n].add(i)), acc[n]);
                    }
                }
            }
            #[inline(always)]
            unsafe fn value<S: Simd, const N: usize>(
                acc: &mut [S::V; N],
                v: *const $e,
                dims: usize,
                pair: usize,
                c: usize,
                p: &[Weights; N],
            ) {
                for t in [2 * pair, 2 * pair + 1] {
                    // SAFETY: the caller's promise: token and columns are inside the piece.
                    unsafe {
                        let v = S::$load(v.add(t * dims + c));
                        for n in 0..N {
                            acc[n] = S::fma(v, S::splat(p[n][t]), acc[n]);
                        }
                    }
                }
            }
        }
    };
}
floats!(Float32, f32, load);
floats!(Half, u16, load_f16);

/// bf16 pages, widened.
struct Wide;
impl Kind for Wide {
    type Q = f32;
    type E = u16;
    const STEP: usize = 2;
    #[inline(always)]
    unsafe fn score<S: Simd, const N: usize>(
        acc: &mut [S::V; N],
        k: *const u16,
        q: &[*const f32; N],
        i: usize,
    ) {
        // SAFETY: the caller's promise: `i` is below the number of steps.
        unsafe {
            let (a, b) = S::load_pairs(k.add(2 * i * LANES));
            for n in 0..N {
                acc[n] = S::fma(a, S::splat(*q[n].add(2 * i)), acc[n]);
                acc[n] = S::fma(b, S::splat(*q[n].add(2 * i + 1)), acc[n]);
            }
        }
    }
    #[inline(always)]
    unsafe fn value<S: Simd, const N: usize>(
        acc: &mut [S::V; N],
        v: *const u16,
        dims: usize,
        pair: usize,
        c: usize,
        p: &[Weights; N],
    ) {
        // SAFETY: the caller's promise: pair and columns are inside the piece.
        unsafe {
            let (a, b) = S::load_pairs(v.add(2 * (pair * dims + c)));
            for n in 0..N {
                acc[n] = S::fma(a, S::splat(p[n][2 * pair]), acc[n]);
                acc[n] = S::fma(b, S::splat(p[n][2 * pair + 1]), acc[n]);
            }
        }
    }
}

/// bf16 pages and bf16 queries, multiplied in pairs. The weights in `Weights` are bf16 pairs.
struct Pairs;
impl Kind for Pairs {
    type Q = u16;
    type E = u16;
    const STEP: usize = 2;
    #[inline(always)]
    unsafe fn score<S: Simd, const N: usize>(
        acc: &mut [S::V; N],
        k: *const u16,
        q: &[*const u16; N],
        i: usize,
    ) {
        // SAFETY: the caller's promise: `i` is below the number of steps.
        unsafe {
            let k = S::load_b(k.add(2 * i * LANES));
            for n in 0..N {
                let pair = q[n].add(2 * i).cast::<u32>().read_unaligned();
                acc[n] = S::dp(acc[n], k, S::splat_b(pair));
            }
        }
    }
    #[inline(always)]
    unsafe fn value<S: Simd, const N: usize>(
        acc: &mut [S::V; N],
        v: *const u16,
        dims: usize,
        pair: usize,
        c: usize,
        p: &[Weights; N],
    ) {
        // SAFETY: the caller's promise: pair and columns are inside the piece.
        unsafe {
            let v = S::load_b(v.add(2 * (pair * dims + c)));
            for n in 0..N {
                acc[n] = S::dp(acc[n], v, S::splat_b(p[n][pair].to_bits()));
            }
        }
    }
}

struct Page<'a, 'b, K: Kind> {
    k: *const K::E,
    v: *const K::E,
    q: *const K::Q,
    queries: &'a mut Queries<'b>,
}

impl<K: Kind> Kernel for Page<'_, '_, K> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let n = self.queries.visible.len();
        let mut r = 0;
        // SAFETY: `attend_page` checked that rows, state and piece have the sizes named there.
        unsafe {
            if S::WIDE {
                while r + 4 <= n {
                    self.rows::<S, 4>(r);
                    r += 4;
                }
                while r + 2 <= n {
                    self.rows::<S, 2>(r);
                    r += 2;
                }
            }
            while r < n {
                self.rows::<S, 1>(r);
                r += 1;
            }
        }
    }
}

impl<K: Kind> Page<'_, '_, K> {
    #[inline(always)]
    unsafe fn rows<S: Simd, const N: usize>(&mut self, r: usize) {
        // SAFETY: rows r..r + N exist.
        unsafe {
            let scores = self.scores::<S, N>(r);
            let mut p = [[0.0; LANES]; N];
            let mut alpha = [1.0; N];
            for n in 0..N {
                (alpha[n], p[n]) = self.soften::<S>(r + n, scores[n]);
            }
            self.values::<S, N>(r, &alpha, &p);
        }
    }

    #[inline(always)]
    unsafe fn scores<S: Simd, const N: usize>(&self, r: usize) -> [S::V; N] {
        let dims = self.queries.dims;
        // SAFETY: rows r..r + N exist; steps cover `dims`, a multiple of 16.
        unsafe {
            let mut q = [self.q; N];
            for n in 0..N {
                q[n] = self.q.add((r + n) * dims);
            }
            let mut acc = [[S::zero(); N]; 4];
            let mut i = 0;
            while i < dims / K::STEP {
                for (a, acc) in acc.iter_mut().enumerate() {
                    K::score::<S, N>(acc, self.k, &q, i + a);
                }
                i += 4;
            }
            let scale = S::splat(self.queries.scale);
            let mut scores = [S::zero(); N];
            for n in 0..N {
                let sum = S::add(S::add(acc[0][n], acc[1][n]), S::add(acc[2][n], acc[3][n]));
                scores[n] = S::mul(sum, scale);
            }
            scores
        }
    }

    /// One row's running softmax: what to multiply its sums with, and the new weights.
    #[inline(always)]
    unsafe fn soften<S: Simd>(&mut self, row: usize, scores: S::V) -> (f32, Weights) {
        let (first, end) = self.queries.visible[row];
        let (first, end) = (usize::from(first), usize::from(end));
        let all = first == 0 && end == LANES;
        let mut lanes = [0.0; LANES];
        // SAFETY: `lanes` and a row of `sum` hold sixteen elements.
        unsafe {
            let mut scores = scores;
            if !all {
                S::store(lanes.as_mut_ptr(), scores);
                hide(&mut lanes, first, end, f32::NEG_INFINITY);
                scores = S::load(lanes.as_ptr());
            }
            let old = self.queries.max[row];
            let new = old.max(S::hmax(scores));
            if new == f32::NEG_INFINITY {
                return (1.0, [0.0; LANES]);
            }
            let p = exp::<S>(S::sub(scores, S::splat(new)));
            S::store(lanes.as_mut_ptr(), p);
            if !all {
                hide(&mut lanes, first, end, 0.0);
            }
            let p = S::load(lanes.as_ptr());
            let mut alpha = 1.0;
            if new != old {
                let mut lanes = [0.0; LANES];
                S::store(lanes.as_mut_ptr(), exp::<S>(S::splat(old - new)));
                alpha = if old == f32::NEG_INFINITY { 0.0 } else { lanes[0] };
            }
            self.queries.max[row] = new;
            let sum = self.queries.sum[row * LANES..][..LANES].as_mut_ptr();
            S::store(sum, S::fma(S::load(sum), S::splat(alpha), p));
            if S::DP && size_of::<K::Q>() == 2 {
                let mut pairs = [0u16; 2 * LANES];
                S::store_bf16(pairs.as_mut_ptr(), p);
                for (lane, pair) in lanes.iter_mut().zip(pairs.as_chunks::<2>().0) {
                    *lane = f32::from_bits(u32::from(pair[0]) | u32::from(pair[1]) << 16);
                }
            }
            (alpha, lanes)
        }
    }

    #[inline(always)]
    unsafe fn values<S: Simd, const N: usize>(&mut self, r: usize, alpha: &[f32; N], p: &[Weights; N]) {
        let dims = self.queries.dims;
        // SAFETY: rows r..r + N of `out` exist; columns stay below `dims`.
        unsafe {
            let mut out = [self.queries.out.as_mut_ptr(); N];
            for n in 0..N {
                out[n] = out[n].add((r + n) * dims);
            }
            let mut c = 0;
            while c < dims {
                if c + 4 * LANES <= dims {
                    self.columns::<S, N, 4>(&out, c, alpha, p);
                    c += 4 * LANES;
                } else {
                    self.columns::<S, N, 1>(&out, c, alpha, p);
                    c += LANES;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize, const NV: usize>(
        &self,
        out: &[*mut f32; N],
        c: usize,
        alpha: &[f32; N],
        p: &[Weights; N],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [[S::zero(); N]; NV];
            for v in 0..NV {
                for n in 0..N {
                    acc[v][n] = S::mul(S::load(out[n].add(c + v * LANES)), S::splat(alpha[n]));
                }
            }
            for pair in 0..LANES / 2 {
                for v in 0..NV {
                    K::value::<S, N>(&mut acc[v], self.v, self.queries.dims, pair, c + v * LANES, p);
                }
            }
            for v in 0..NV {
                for n in 0..N {
                    S::store(out[n].add(c + v * LANES), acc[v][n]);
                }
            }
        }
    }
}

/// Puts `value` into the lanes outside `first..end`.
#[inline(always)]
fn hide(lanes: &mut [f32; LANES], first: usize, end: usize, value: f32) {
    for (t, lane) in lanes.iter_mut().enumerate() {
        if t < first || t >= end {
            *lane = value;
        }
    }
}
