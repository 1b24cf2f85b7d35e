//! Kernels: the only unsafe code of the CPU backend. Callers see safe functions on slices that
//! check every bound once per call; the instruction set is a value that only detection makes.

#![allow(clippy::needless_range_loop, reason = "one index names a row or lane of several arrays")]

mod attend;
mod dot;
mod elem;
mod outer;
mod vec;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use attend::{KvPiece, Queries, attend_page, merge};
pub(crate) use dot::dots;
pub(crate) use elem::{fold_sum, layer_norm, prefetch, relu, relu_mul, rms_norm, silu_mul, to_bf16};
pub(crate) use outer::{LANE_ORDER, outer};
pub(crate) use vec::bf16_bits;

use vec::Simd;

/// An instruction set this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// Those this machine has, best first; the last is the portable one.
    pub fn all() -> impl Iterator<Item = Isa> {
        let portable = std::iter::once(Isa(Level::Portable));
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            let list = [(bf16, Level::Avx512Bf16), (avx512, Level::Avx512), (avx2, Level::Avx2)];
            list.into_iter().filter(|l| l.0).map(|l| Isa(l.1)).chain(portable)
        }
        #[cfg(not(target_arch = "x86_64"))]
        portable
    }

    /// The best one.
    pub fn best() -> Isa {
        Isa::all().next().unwrap_or(Isa(Level::Portable))
    }

    /// Short name.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => "avx512-bf16",
        }
    }

    /// Multiplies bf16 pairs, so activations of bf16 models are kept in bf16.
    pub fn bf16_products(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => true,
            _ => false,
        }
    }

    fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self.0 {
            // SAFETY: plain arithmetic runs anywhere.
            Level::Portable => unsafe { kernel.run::<vec::Scalar>() },
            // SAFETY: an `Isa` is made only by `all`, which saw these features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { on_avx2(kernel) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { on_avx512(kernel) },
            // SAFETY: likewise.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => unsafe { on_avx512_bf16(kernel) },
        }
    }
}

/// A kernel with its arguments, compiled once per instruction set.
trait Kernel {
    type Out;
    /// # Safety
    /// The instruction set of `S` is enabled; the arguments keep the kernel's own contract.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn on_avx2<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: enabled on this function.
    unsafe { kernel.run::<x86::Avx2>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn on_avx512<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: enabled on this function.
    unsafe { kernel.run::<x86::Avx512>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn on_avx512_bf16<K: Kernel>(kernel: K) -> K::Out {
    // SAFETY: enabled on this function.
    unsafe { kernel.run::<x86::Avx512Bf16>() }
}

/// Elements that a matrix's rows are padded to, with zeros: no kernel has a tail.
pub(crate) const PAD: usize = 32;

/// Some of the rows of an array.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pick<'a> {
    /// First and count.
    Range(usize, usize),
    /// Any, in this order.
    List(&'a [u32]),
}

impl<'a> Pick<'a> {
    /// How many.
    #[inline(always)]
    pub(crate) fn len(self) -> usize {
        match self {
            Pick::Range(_, n) => n,
            Pick::List(l) => l.len(),
        }
    }

    /// The `i`-th.
    #[inline(always)]
    pub(crate) fn at(self, i: usize) -> usize {
        match self {
            Pick::Range(first, _) => first + i,
            Pick::List(l) => l[i] as usize,
        }
    }

    /// `count` of them from the `first`-th on.
    pub(crate) fn part(self, first: usize, count: usize) -> Pick<'a> {
        match self {
            Pick::Range(f, n) => {
                debug_assert!(first + count <= n);
                Pick::Range(f + first, count)
            }
            Pick::List(l) => Pick::List(&l[first..first + count]),
        }
    }

    /// One more than the largest row.
    pub(crate) fn end(self) -> usize {
        match self {
            Pick::Range(first, n) => first + n,
            Pick::List(l) => l.iter().max().map_or(0, |&m| m as usize + 1),
        }
    }
}

/// Rows of weights as stored, `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary16 bits.
    F16(&'a [u16]),
    /// bfloat16 bits.
    Bf16(&'a [u16]),
    /// Bytes, and one scale per row.
    I8(&'a [i8], &'a [f32]),
}

impl Rows<'_> {
    /// Elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            Rows::F32(w) => w.len(),
            Rows::F16(w) | Rows::Bf16(w) => w.len(),
            Rows::I8(w, _) => w.len(),
        }
    }
}

/// Rows of activations: f32, or bf16 where products of bf16 pairs are used.
#[derive(Clone, Copy)]
pub(crate) enum Acts<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// bfloat16 bits.
    Bf16(&'a [u16]),
}

impl Acts<'_> {
    fn len(&self) -> usize {
        match self {
            Acts::F32(x) => x.len(),
            Acts::Bf16(x) => x.len(),
        }
    }
}

#[cfg(test)]
mod tests;
