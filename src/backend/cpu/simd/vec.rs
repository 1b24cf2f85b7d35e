//! Sixteen f32 lanes, whatever registers hold them, and the portable version.
//!
//! Kernels are written once over [`Simd`] and compiled per instruction set. Invariant: for one
//! instruction set, a kernel's order of additions depends only on the shapes of one row and one
//! output, so results do not depend on what else is computed beside them.

use half::f16;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// One instruction set.
///
/// # Safety
/// Methods may be called only where the instruction set is enabled, and pointers must be valid for
/// the lanes they load or store.
pub(super) unsafe trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// Thirty-two bf16, as pairs per f32 lane.
    type B: Copy;
    /// Has products of bf16 pairs.
    const DP: bool;
    /// Has registers for tiles of 24 accumulators (else 4).
    const WIDE: bool;

    unsafe fn zero() -> Self::V;
    unsafe fn splat(v: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// Widens the even and the odd elements of 32 bf16.
    unsafe fn load_pairs(p: *const u16) -> (Self::V, Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, one rounding where the machine has it.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Larger of each lane; `b` when either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Nearest integer, ties to even; |v| < 2^22.
    unsafe fn round(v: Self::V) -> Self::V;
    /// `2^v` for integers -126..=127.
    unsafe fn pow2(v: Self::V) -> Self::V;
    /// `((0+8)+(4+12)) + ...`: halves folded onto each other until one lane is left.
    unsafe fn sum(v: Self::V) -> f32;
    /// Four sums, each with the bits that [`Simd::sum`] gives.
    #[inline(always)]
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: the caller's promise.
        v.map(|v| unsafe { Self::sum(v) })
    }
    /// Largest lane.
    unsafe fn hmax(v: Self::V) -> f32;

    unsafe fn load_b(p: *const u16) -> Self::B;
    unsafe fn zero_b() -> Self::B;
    /// A pair in every lane; the low half is the first.
    unsafe fn splat_b(pair: u32) -> Self::B;
    /// `acc + a.0 * b.0 + a.1 * b.1` in each lane.
    unsafe fn dp(acc: Self::V, a: Self::B, b: Self::B) -> Self::V;
    /// `a` and `b` interleaved element by element within each 128 bits: lower and upper halves.
    unsafe fn interleave(a: Self::B, b: Self::B) -> (Self::B, Self::B);
    /// Rounds to bf16 and stores sixteen.
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    /// Asks for the cache line at `p`, whatever it is.
    unsafe fn prefetch(p: *const u8);
}

/// `e^v` for v <= 88, at most 2 ulp off; NaN stays NaN.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(v: S::V) -> S::V {
    // SAFETY: no memory is touched; the instruction set is the caller's promise.
    unsafe {
        // From -87 down the result stays at 1.6e-38; who needs an exact 0 masks. This order of
        // operands lets a NaN through.
        let v = S::max(S::splat(-87.0), v);
        let n = S::round(S::mul(v, S::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts; the first has few bits, so n times it is exact.
        let r = S::fma(n, S::splat(-355.0 / 512.0), v);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let r2 = S::mul(r, r);
        let p = S::fma(p, r2, S::add(r, S::splat(1.0)));
        S::mul(p, S::pow2(n))
    }
}

/// Rounds to bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_bits(v: f32) -> u16 {
    let bits = v.to_bits();
    if v.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Portable lanes.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

// SAFETY: plain arithmetic on any machine.
unsafe impl Simd for Scalar {
    type V = [f32; LANES];
    type B = [u16; 2 * LANES];
    const DP: bool = false;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::V {
        [v; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        map(|i| f32::from_bits(u32::from(h[i]) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        // SAFETY: the caller's promise.
        let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        map(|i| f16::from_bits(h[i]).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        // SAFETY: the caller's promise.
        let h = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        map(|i| f32::from(h[i]))
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: the caller's promise.
        let h = unsafe { p.cast::<[u16; 2 * LANES]>().read_unaligned() };
        let part = |odd| map(|i| f32::from_bits(u32::from(h[2 * i + odd]) << 16));
        (part(0), part(1))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        map(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        map(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        map(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        map(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        map(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn round(v: Self::V) -> Self::V {
        map(|i| v[i].round_ties_even())
    }
    #[inline(always)]
    unsafe fn pow2(v: Self::V) -> Self::V {
        map(|i| f32::from_bits(((v[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        fold(v, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn hmax(v: Self::V) -> f32 {
        fold(v, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u16) -> Self::B {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::B>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn zero_b() -> Self::B {
        [0; 2 * LANES]
    }
    #[inline(always)]
    unsafe fn splat_b(pair: u32) -> Self::B {
        std::array::from_fn(|i| (pair >> (16 * (i % 2))) as u16)
    }
    #[inline(always)]
    unsafe fn dp(acc: Self::V, a: Self::B, b: Self::B) -> Self::V {
        let w = |h: u16| f32::from_bits(u32::from(h) << 16);
        map(|i| acc[i] + w(a[2 * i + 1]) * w(b[2 * i + 1]) + w(a[2 * i]) * w(b[2 * i]))
    }
    #[inline(always)]
    unsafe fn interleave(a: Self::B, b: Self::B) -> (Self::B, Self::B) {
        let part = |high: usize| {
            std::array::from_fn(|i| {
                let from = i / 8 * 8 + high * 4 + i % 8 / 2;
                if i % 2 == 0 { a[from] } else { b[from] }
            })
        };
        (part(0), part(1))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(v.map(bf16_bits)) }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

/// Folds halves onto each other until one lane is left.
#[inline(always)]
pub(super) fn fold(mut v: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            v[i] = f(v[i], v[i + half]);
        }
        half /= 2;
    }
    v[0]
}
