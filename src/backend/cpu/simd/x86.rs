//! The lanes of [`Simd`] in x86-64 registers: AVX-512 (with and without bf16 products) and AVX2.

use super::vec::{LANES, Simd, bf16_bits};
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ, VL.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// The same and products of bf16 pairs.
#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16;

macro_rules! avx512 {
    ($name:ident, $dp:literal, |$acc:ident, $a:ident, $b:ident| $dot:expr, |$p:ident, $v:ident| $store:expr) => {
        // SAFETY: every method needs only what the type's name says; the trait passes that on to callers,
        // and pointer validity too. Loads and stores are unaligned ones.
        unsafe impl Simd for $name {
            type V = __m512;
            type B = __m512i;
            const DP: bool = $dp;
            const WIDE: bool = true;

            #[inline(always)]
            unsafe fn zero() -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_setzero_ps() }
            }
            #[inline(always)]
            unsafe fn splat(v: f32) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_set1_ps(v) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_loadu_ps(p) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, v: __m512) {
                // SAFETY: see the impl.
                unsafe { _mm512_storeu_ps(p, v) }
            }
            #[inline(always)]
            unsafe fn load_bf16(p: *const u16) -> __m512 {
                // SAFETY: see the impl.
                unsafe {
                    let h = _mm256_loadu_si256(p.cast());
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(h)))
                }
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const u16) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
            }
            #[inline(always)]
            unsafe fn load_i8(p: *const i8) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
            }
            #[inline(always)]
            unsafe fn load_pairs(p: *const u16) -> (__m512, __m512) {
                // SAFETY: see the impl.
                unsafe {
                    let h = _mm512_loadu_si512(p.cast());
                    let odd = _mm512_and_si512(h, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                    (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(h)), _mm512_castsi512_ps(odd))
                }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: __m512, b: __m512) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_sub_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            unsafe fn max(a: __m512, b: __m512) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn round(v: __m512) -> __m512 {
                // SAFETY: see the impl.
                unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
            }
            #[inline(always)]
            unsafe fn pow2(v: __m512) -> __m512 {
                // SAFETY: see the impl.
                unsafe {
                    let n = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
                }
            }
            #[inline(always)]
            unsafe fn sum(v: __m512) -> f32 {
                // SAFETY: see the impl.
                unsafe {
                    let a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                    sum8(a)
                }
            }
            #[inline(always)]
            unsafe fn sum4(v: [__m512; 4]) -> [f32; 4] {
                // SAFETY: see the impl.
                unsafe {
                    // Folds pairs of vectors into one: the same additions as `sum`, fewer instructions.
                    let fold = |a, b| {
                        _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b))
                    };
                    let (ab, cd) = (fold(v[0], v[1]), fold(v[2], v[3]));
                    let x = _mm512_add_ps(
                        _mm512_shuffle_f32x4::<0x88>(ab, cd),
                        _mm512_shuffle_f32x4::<0xdd>(ab, cd),
                    );
                    let x = _mm512_add_ps(x, _mm512_permute_ps::<0x0e>(x));
                    let x = _mm512_add_ps(x, _mm512_permute_ps::<0x01>(x));
                    let firsts = _mm512_maskz_compress_ps(0x1111, x);
                    let mut out = [0.0; 4];
                    _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(firsts));
                    out
                }
            }
            #[inline(always)]
            unsafe fn hmax(v: __m512) -> f32 {
                // SAFETY: see the impl.
                unsafe {
                    let a = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                    max8(a)
                }
            }
            #[inline(always)]
            unsafe fn load_b(p: *const u16) -> __m512i {
                // SAFETY: see the impl.
                unsafe { _mm512_loadu_si512(p.cast()) }
            }
            #[inline(always)]
            unsafe fn zero_b() -> __m512i {
                // SAFETY: see the impl.
                unsafe { _mm512_setzero_si512() }
            }
            #[inline(always)]
            unsafe fn splat_b(pair: u32) -> __m512i {
                // SAFETY: see the impl.
                unsafe { _mm512_set1_epi32(pair as i32) }
            }
            #[inline(always)]
            unsafe fn dp($acc: __m512, $a: __m512i, $b: __m512i) -> __m512 {
                $dot
            }
            #[inline(always)]
            unsafe fn interleave(a: __m512i, b: __m512i) -> (__m512i, __m512i) {
                // SAFETY: see the impl.
                unsafe { (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)) }
            }
            #[inline(always)]
            unsafe fn store_bf16($p: *mut u16, $v: __m512) {
                $store
            }
            #[inline(always)]
            unsafe fn prefetch(p: *const u8) {
                // SAFETY: a prefetch never faults.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
            }
        }
    };
}

avx512!(Avx512, false, |_acc, _a, _b| unreachable!("no bf16 products"), |p, v| {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: see the impl.
    unsafe {
        _mm512_storeu_ps(lanes.as_mut_ptr(), v);
        p.cast::<[u16; LANES]>().write_unaligned(lanes.map(bf16_bits));
    }
});
avx512!(
    Avx512Bf16,
    true,
    |acc, a, b| {
        // SAFETY: see the impl; the two types are 64 bytes of the same bf16 elements.
        unsafe {
            let (a, b) =
                (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b));
            _mm512_dpbf16_ps(acc, a, b)
        }
    },
    |p, v| {
        // SAFETY: see the impl; the two types are 32 bytes of the same elements.
        unsafe {
            let h = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            _mm256_storeu_si256(p.cast(), h);
        }
    }
);

#[inline(always)]
unsafe fn sum8(a: __m256) -> f32 {
    // SAFETY: AVX, which every caller has.
    unsafe {
        let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
        _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)))
    }
}

#[inline(always)]
unsafe fn max8(a: __m256) -> f32 {
    // SAFETY: AVX, which every caller has.
    unsafe {
        let b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let c = _mm_max_ps(b, _mm_movehl_ps(b, b));
        _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)))
    }
}

/// AVX2, FMA and F16C: two registers for sixteen lanes.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY: every method needs only AVX2, FMA and F16C; the trait passes that on to callers, and
// pointer validity too. Loads and stores are unaligned ones.
unsafe impl Simd for Avx2 {
    type V = [__m256; 2];
    type B = [u16; 2 * LANES];
    const DP: bool = false;
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: see the impl.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::V {
        // SAFETY: see the impl.
        unsafe { [_mm256_set1_ps(v); 2] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: see the impl.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: see the impl.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        // SAFETY: see the impl.
        unsafe {
            let w = |p: *const u16| {
                let h = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(h))
            };
            [w(p), w(p.add(8))]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        // SAFETY: see the impl.
        unsafe {
            let w = |p: *const u16| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
            [w(p), w(p.add(8))]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        // SAFETY: see the impl.
        unsafe {
            let w = |p: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
            [w(p), w(p.add(8))]
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const u16) -> (Self::V, Self::V) {
        // SAFETY: see the impl.
        unsafe {
            let h = [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(16).cast())];
            let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let even = |h| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(h));
            let odd = |h| _mm256_castsi256_ps(_mm256_and_si256(h, mask));
            ([even(h[0]), even(h[1])], [odd(h[0]), odd(h[1])])
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see the impl.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see the impl.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see the impl.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: see the impl.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see the impl.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn round(v: Self::V) -> Self::V {
        // SAFETY: see the impl.
        unsafe { v.map(|v| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v)) }
    }
    #[inline(always)]
    unsafe fn pow2(v: Self::V) -> Self::V {
        // SAFETY: see the impl.
        unsafe {
            v.map(|v| {
                let n = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
            })
        }
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        // SAFETY: see the impl.
        unsafe { sum8(_mm256_add_ps(v[0], v[1])) }
    }
    #[inline(always)]
    unsafe fn hmax(v: Self::V) -> f32 {
        // SAFETY: see the impl.
        unsafe { max8(_mm256_max_ps(v[0], v[1])) }
    }
    #[inline(always)]
    unsafe fn load_b(_: *const u16) -> Self::B {
        unreachable!("no bf16 products")
    }
    #[inline(always)]
    unsafe fn zero_b() -> Self::B {
        unreachable!("no bf16 products")
    }
    #[inline(always)]
    unsafe fn splat_b(_: u32) -> Self::B {
        unreachable!("no bf16 products")
    }
    #[inline(always)]
    unsafe fn dp(_: Self::V, _: Self::B, _: Self::B) -> Self::V {
        unreachable!("no bf16 products")
    }
    #[inline(always)]
    unsafe fn interleave(_: Self::B, _: Self::B) -> (Self::B, Self::B) {
        unreachable!("no bf16 products")
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::V) {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: see the impl.
        unsafe {
            Self::store(lanes.as_mut_ptr(), v);
            p.cast::<[u16; LANES]>().write_unaligned(lanes.map(bf16_bits));
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
