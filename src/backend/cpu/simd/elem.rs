//! Norms, activations and conversions of one row.

use super::vec::{LANES, Simd, bf16_bits, exp, fold};
use super::{Isa, Kernel};
use crate::sys::alloc::Pod;

/// `out = x / sqrt(mean(x²) + eps) * weight` over `weight.len()` elements.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = weight.len();
    let squares = isa.run(Sum { x: &x[..n], shift: 0.0, square: true });
    let factor = 1.0 / (squares / n as f32 + eps).sqrt();
    isa.run(Affine { x: &x[..n], shift: 0.0, factor, weight, bias: None, out: &mut out[..n] });
}

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias` over `weight.len()` elements.
pub(crate) fn layer_norm(
    isa: Isa,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) {
    let n = weight.len();
    let mean = isa.run(Sum { x: &x[..n], shift: 0.0, square: false }) / n as f32;
    let squares = isa.run(Sum { x: &x[..n], shift: mean, square: true });
    let factor = 1.0 / (squares / n as f32 + eps).sqrt();
    isa.run(Affine { x: &x[..n], shift: mean, factor, weight, bias, out: &mut out[..n] });
}

/// Rounds to bf16.
pub(crate) fn to_bf16(isa: Isa, x: &[f32], out: &mut [u16]) {
    assert_eq!(x.len(), out.len());
    isa.run(ToBf16 { x, out });
}

/// `gate = silu(gate) * up`.
pub(crate) fn silu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len());
    isa.run(SiluMul { gate, up });
}

/// `gate = relu(gate) * up`.
pub(crate) fn relu_mul(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = relu(*g) * u;
    }
}

/// `max(v, 0)`; NaN stays NaN.
#[inline(always)]
pub(crate) fn relu(v: f32) -> f32 {
    if v < 0.0 { 0.0 } else { v }
}

/// Asks for a piece of memory ahead of its use.
pub(crate) fn prefetch<T: Pod>(isa: Isa, data: &[T]) {
    isa.run(Prefetch { from: data.as_ptr().cast(), bytes: size_of_val(data) });
}

/// The sum of sixteen lanes, halves folded onto each other.
pub(crate) fn fold_sum(lanes: &[f32; LANES]) -> f32 {
    fold(*lanes, |a, b| a + b)
}

/// Sum of `x - shift` or of its squares: four vectors of partial sums, then the rest.
struct Sum<'a> {
    x: &'a [f32],
    shift: f32,
    square: bool,
}

impl Kernel for Sum<'_> {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let Sum { x, shift, square } = self;
        let (chunks, rest) = x.as_chunks::<{ 4 * LANES }>();
        // SAFETY: each load lies inside its chunk.
        let mut sum = unsafe {
            let s = S::splat(shift);
            let mut acc = [S::zero(); 4];
            for chunk in chunks {
                for (a, acc) in acc.iter_mut().enumerate() {
                    let v = S::sub(S::load(chunk.as_ptr().add(a * LANES)), s);
                    *acc = if square { S::fma(v, v, *acc) } else { S::add(*acc, v) };
                }
            }
            S::sum(S::add(S::add(acc[0], acc[1]), S::add(acc[2], acc[3])))
        };
        for v in rest {
            let v = v - shift;
            sum += if square { v * v } else { v };
        }
        sum
    }
}

struct Affine<'a> {
    x: &'a [f32],
    shift: f32,
    factor: f32,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for Affine<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Affine { x, shift, factor, weight, bias, out } = self;
        match bias {
            Some(bias) => {
                for (((o, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                    *o = (x - shift) * factor * w + b;
                }
            }
            None => {
                for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
                    *o = (x - shift) * factor * w;
                }
            }
        }
    }
}

struct ToBf16<'a> {
    x: &'a [f32],
    out: &'a mut [u16],
}

impl Kernel for ToBf16<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (x, rest) = self.x.as_chunks::<LANES>();
        let (out, out_rest) = self.out.as_chunks_mut::<LANES>();
        for (x, out) in x.iter().zip(out) {
            // SAFETY: sixteen elements each.
            unsafe { S::store_bf16(out.as_mut_ptr(), S::load(x.as_ptr())) }
        }
        for (x, out) in rest.iter().zip(out_rest) {
            *out = bf16_bits(*x);
        }
    }
}

struct SiluMul<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for SiluMul<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (gate, gate_rest) = self.gate.as_chunks_mut::<LANES>();
        let (up, up_rest) = self.up.as_chunks::<LANES>();
        for (g, u) in gate.iter_mut().zip(up) {
            // SAFETY: sixteen elements each.
            unsafe { silu_mul_lanes::<S>(g, u) }
        }
        if !gate_rest.is_empty() {
            let (mut g, mut u) = ([0.0; LANES], [0.0; LANES]);
            g[..gate_rest.len()].copy_from_slice(gate_rest);
            u[..up_rest.len()].copy_from_slice(up_rest);
            // SAFETY: sixteen elements each.
            unsafe { silu_mul_lanes::<S>(&mut g, &u) }
            gate_rest.copy_from_slice(&g[..gate_rest.len()]);
        }
    }
}

#[inline(always)]
unsafe fn silu_mul_lanes<S: Simd>(gate: &mut [f32; LANES], up: &[f32; LANES]) {
    let mut below = [0.0; LANES];
    // SAFETY: sixteen elements each.
    unsafe {
        let g = S::load(gate.as_ptr());
        // exp(-g) without overflow: silu(-88) is 0 to f32's last denormal anyway.
        let e = exp::<S>(S::sub(S::zero(), S::max(S::splat(-88.0), g)));
        S::store(below.as_mut_ptr(), S::add(e, S::splat(1.0)));
        for ((g, b), u) in gate.iter_mut().zip(below).zip(up) {
            *g = *g / b * u;
        }
    }
}

struct Prefetch {
    from: *const u8,
    bytes: usize,
}

impl Kernel for Prefetch {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for at in (0..self.bytes).step_by(64) {
            // SAFETY: a prefetch touches nothing.
            unsafe { S::prefetch(self.from.wrapping_add(at)) }
        }
    }
}
