//! Products whose last columns come from bytes, against sums in f64.

use crate::bench::{Bench, Rng, close};
use crate::orders;
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

/// Columns of w and of the second matrix, where the bytes begin, and all.
struct Columns {
    first: usize,
    ends: usize,
    first_byte: usize,
    n: usize,
}

/// `[rows][k]` as `cuda/wide_bytes.cuh` has it.
fn in_tiles(numbers: &[i8], k: usize) -> Vec<u8> {
    let steps = k.div_ceil(64);
    let mut out = vec![0; (numbers.len() / k).next_multiple_of(128) * steps * 64];
    for (i, v) in numbers.iter().enumerate() {
        let (row, c) = (i / k, i % k);
        let step = 8192 * (row / 128 * steps + c / 64);
        // 16 rows of 64 columns; eight of them; four columns apart by eight, side by side by two.
        let place = row / 16 % 8 * 1024 + row / 8 % 2 * 512 + row % 8 * 64 + c / 2 % 4 * 16;
        out[step + place + c / 16 % 4 * 4 + c / 8 % 2 * 2 + c % 2] = *v as u8;
    }
    out
}

fn product(bench: &Bench, (dtype, rows, k): (DType, usize, usize), c: &Columns) -> Vec<u8> {
    let kernels = Kernels::new(dtype, 64, 1, 5, 227 * 1024).unwrap().with_warpgroups(true);
    assert!(kernels.takes_bytes(rows as u32));
    let mut rng = Rng((rows + c.n + k) as u64);
    let x = rng.vector(rows * k, 1.0, dtype);
    let halves = rng.vector(c.ends * k, 0.1, dtype);
    // Every byte there is, and more at random.
    let numbers: Vec<i8> = (0..(c.n - c.first_byte) * k)
        .map(|i| if i < 256 { i as u8 as i8 } else { rng.below(256) as u8 as i8 })
        .collect();
    let (w, more) = halves.split_at(c.first * k);
    // Rows that follow those of the second matrix are not its own.
    let more = [more, &vec![f64::NAN; 200 * k]].concat();
    let (launch, splits) = kernels.linear(rows as u32, c.n as u32, k as u32);
    let (count, out) = (rows * c.n, bench.room(4 * splits as usize * rows * c.n));
    let params = LinearParams {
        x: bench.half(&x, dtype),
        w: if w.is_empty() { Ptr::NULL } else { bench.half(w, dtype) },
        out,
        rows: rows as u32,
        n: c.n as u32,
        k: k as u32,
        splits,
        more: bench.half(&more, dtype),
        first: c.first as u32,
        ..Default::default()
    };
    let bytes = bench.raw(&in_tiles(&numbers, k));
    let (launch, params) = kernels.from_bytes((launch, params), bytes, (c.first_byte as u32, c.ends as u32));
    bench.start(&launch, &params);
    let parts = bench.read_floats(out, splits as usize * count);
    let (mut got, mut expected, mut bits) = (Vec::new(), Vec::new(), Vec::new());
    for r in 0..rows {
        let x = &x[r * k..][..k];
        for j in (0..c.ends).chain(c.first_byte..c.n) {
            let sums = parts.iter().skip(r * c.n + j).step_by(count);
            bits.extend(sums.clone().flat_map(|v| v.to_bits().to_le_bytes()));
            // In the size of the others' sums.
            let unit = if j < c.ends { 1.0 } else { 1e-3 };
            got.push(unit * sums.sum::<f64>());
            expected.push(if j < c.ends {
                x.iter().zip(&halves[j * k..]).map(|(x, w)| x * w).sum::<f64>()
            } else {
                unit * x
                    .iter()
                    .zip(&numbers[(j - c.first_byte) * k..])
                    .map(|(x, &w)| x * f64::from(w))
                    .sum::<f64>()
            });
        }
    }
    let limit = 2e-6f64.max((k as f64).sqrt() * f64::from(f32::EPSILON));
    close(
        &got,
        &expected,
        limit,
        &format!("{rows} rows, {} columns from {} on bytes, {k}", c.n, c.first_byte),
    );
    bits
}

#[test]
pub fn columns_come_from_bytes() {
    if !Bench::new(0).device.warpgroups() {
        return;
    }
    let beside = Columns { first: 136, ends: 148, first_byte: 256, n: 392 };
    let alone = Columns { first: 0, ends: 0, first_byte: 0, n: 72 };
    let behind = Columns { first: 128, ends: 128, first_byte: 128, n: 256 };
    for (rows, k) in [(1, 264), (8, 64), (9, 136), (17, 264), (33, 72), (64, 520)] {
        for c in [&beside, &alone, &behind] {
            product(&Bench::new(3), (DType::BF16, rows, k), c);
            product(&Bench::new(3), (DType::F16, rows, k), c);
        }
    }
    // More steps than there are stages.
    for rows in [3, 64] {
        orders(|b| product(b, (DType::BF16, rows, 1608), &beside));
    }
}
