//! The products against sums in f64: row counts around every tile edge, lists of rows, ragged edges.

use crate::bench::{Bench, Rng, close, rounded};
use crate::orders;
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// w is `[n][k]`, as stored.
    Rows,
    /// w is `[k][n]`.
    Columns,
}

#[derive(Clone, Copy)]
struct Case {
    dtype: DType,
    layout: Layout,
    rows: usize,
    n: usize,
    k: usize,
    /// Rows of w on disk when a list picks among them.
    stored: Option<usize>,
}

const PLAIN: Case = Case { dtype: DType::BF16, layout: Layout::Rows, rows: 0, n: 0, k: 0, stored: None };

/// By the kernels of every GPU, and by those of compute capability 9.0.
pub fn ways(bench: &Bench) -> impl Iterator<Item = bool> {
    let newest = bench.device.warpgroups();
    [false, true].into_iter().filter(move |wide| !wide || newest)
}

fn in_both_ways(case: impl Fn(&Bench, bool) -> Vec<u8>) {
    orders(|bench| ways(bench).flat_map(|wide| case(bench, wide)).collect::<Vec<u8>>());
}

fn product(bench: &Bench, c: &Case) -> Vec<u8> {
    ways(bench).flat_map(|wide| product_by(bench, c, wide)).collect()
}

fn product_by(bench: &Bench, c: &Case, wide: bool) -> Vec<u8> {
    let mut rng = Rng((c.rows * 7 + c.n * 3 + c.k) as u64);
    let x = rng.vector(c.rows * c.k, 1.0, c.dtype);
    let picked = if c.layout == Layout::Rows { c.n } else { c.k };
    let stored = c.stored.unwrap_or(picked);
    let width = if c.layout == Layout::Rows { c.k } else { c.n };
    let list = if c.stored.is_some() { rng.picked(stored, picked) } else { (0..picked).collect() };
    let mut w = vec![f64::NAN; stored * width];
    for &row in &list {
        let values = rng.vector(width, 0.1, c.dtype);
        w[row * width..(row + 1) * width].copy_from_slice(&values);
    }
    let k = Kernels::new(c.dtype, 64, 1, 5, 227 * 1024).unwrap().with_warpgroups(wide);
    let (rows, n, kk) = (c.rows as u32, c.n as u32, c.k as u32);
    let (launch, splits) = match (c.layout, c.stored) {
        (Layout::Rows, None) => k.linear(rows, n, kk),
        (Layout::Rows, Some(_)) => k.linear_up(rows, n, kk),
        (Layout::Columns, _) => k.linear_transposed(rows, n, kk),
    };
    let count = splits as usize * c.rows * c.n;
    let out = bench.room(4 * count);
    bench.start(
        &launch,
        &LinearParams {
            x: bench.half(&x, c.dtype),
            w: bench.half(&w, c.dtype),
            index: match c.stored {
                Some(_) => bench.words(&list.iter().map(|&i| i as u32).collect::<Vec<_>>()),
                None => Ptr::NULL,
            },
            out,
            rows,
            n,
            k: kk,
            splits,
            ..Default::default()
        },
    );
    let parts = bench.read_floats(out, count);
    let mut got = vec![0.0; c.rows * c.n];
    for (i, v) in parts.iter().enumerate() {
        got[i % (c.rows * c.n)] += v;
    }
    let mut expected = vec![0.0; c.rows * c.n];
    for r in 0..c.rows {
        for i in 0..c.n {
            expected[r * c.n + i] = (0..c.k)
                .map(|j| {
                    let at = if c.layout == Layout::Rows { list[i] * c.k + j } else { list[j] * c.n + i };
                    x[r * c.k + j] * w[at]
                })
                .sum();
        }
    }
    // k roundings of f32 add up like a random walk.
    let limit = 2e-6f64.max((c.k as f64).sqrt() * f64::from(f32::EPSILON));
    close(&got, &expected, limit, &format!("product {} x {} x {}", c.rows, c.n, c.k));
    bench.bytes(out, 4 * count)
}

#[test]
pub fn skinny_products_at_every_tile_edge() {
    for rows in [1, 7, 8, 9, 16, 17, 32, 33, 64] {
        product(
            &Bench::new(0),
            &Case { dtype: DType::BF16, layout: Layout::Rows, rows, n: 70, k: 264, stored: None },
        );
    }
    for (n, k) in [(1, 8), (64, 32), (65, 40), (200, 1032)] {
        orders(|b| {
            product(b, &Case { dtype: DType::F16, layout: Layout::Rows, rows: 3, n, k, stored: None })
        });
    }
}

#[test]
pub fn skinny_products_of_listed_rows() {
    for (rows, n) in [(1, 8), (2, 72), (33, 128)] {
        orders(|b| {
            let c = Case { dtype: DType::BF16, layout: Layout::Rows, rows, n, k: 96, stored: Some(300) };
            assert!(ways(b).all(|wide| product_by(b, &c, wide).len() == 4 * rows * n));
            product(b, &Case { k: 648, ..c })
        });
    }
}

/// The down product that makes its input: parts of the up product, biases, columns past the kept ones.
fn made_down(bench: &Bench, rows: usize, d: usize, kept: usize, splits: usize) -> Vec<u8> {
    let (dtype, stored) = (DType::BF16, kept + 40);
    let mut rng = Rng((rows * 5 + d + kept) as u64);
    let k = kept.next_multiple_of(8);
    let list = rng.picked(stored, kept);
    let (mut w, mut bias) = (vec![f64::NAN; stored * d], vec![f64::NAN; stored]);
    for &neuron in &list {
        w[neuron * d..(neuron + 1) * d].copy_from_slice(&rng.vector(d, 0.1, dtype));
        bias[neuron] = rng.vector(1, 1.0, dtype)[0];
    }
    let mut parts = rng.vector(splits * rows * k, 1.0, DType::F32);
    for row in parts.chunks_mut(k) {
        row[kept..].fill(f64::NAN); // products of rows that only fill up the list
    }
    let y = |r: usize, j: usize| {
        let sum: f64 = (0..splits).map(|s| parts[(s * rows + r) * k + j]).sum();
        rounded((sum + bias[list[j]]).max(0.0), dtype)
    };
    let mut index: Vec<u32> = list.iter().map(|&i| i as u32).collect();
    index.resize(k, 0);
    let kernels = Kernels::new(dtype, 64, 1, 5, 227 * 1024).unwrap();
    let (launch, cut) = kernels.mlp_down(d as u32, k as u32);
    let count = cut as usize * rows * d;
    let out = bench.room(4 * count);
    bench.start(
        &launch,
        &DownParams {
            up: Partial { data: bench.floats(&parts), splits: splits as u32, columns: k as u32 },
            up_bias: bench.half(&bias, dtype),
            w: bench.half(&w, dtype),
            index: bench.words(&index),
            out,
            rows: rows as u32,
            n: d as u32,
            k: k as u32,
            valid: kept as u32,
            splits: cut,
        },
    );
    let sums = bench.read_floats(out, count);
    let (mut got, mut expected) = (vec![0.0; rows * d], vec![0.0; rows * d]);
    for (i, v) in sums.iter().enumerate() {
        got[i % (rows * d)] += v;
    }
    for r in 0..rows {
        for j in 0..kept {
            let v = y(r, j);
            for i in 0..d {
                expected[r * d + i] += v * w[list[j] * d + i];
            }
        }
    }
    // An activation may round the other way: its parts are summed in another order here.
    close(&got, &expected, 2e-4, &format!("down product of {rows} x {kept} of {stored}, {splits} parts"));
    bench.bytes(out, 4 * count)
}

#[test]
pub fn down_products_that_make_their_input() {
    for rows in 1..=4 {
        made_down(&Bench::new(2), rows, 72, 131, 3);
    }
    for (kept, splits) in [(1, 1), (16, 2), (127, 16), (1100, 5), (2203, 4), (4100, 3)] {
        orders(|b| made_down(b, 3, 264, kept, splits));
    }
}

#[test]
fn skinny_products_of_two_matrices_are_those_of_one() {
    const T: DType = DType::BF16;
    for (rows, n, first) in [(1u32, 72u32, 64u32), (9, 70, 65), (33, 200, 1), (3, 12, 8), (64, 136, 135)] {
        in_both_ways(|bench, wide| {
            let k = Kernels::new(T, 64, 1, 5, 227 * 1024).unwrap().with_warpgroups(wide);
            let (mut rng, kk) = (Rng(u64::from(n)), 264u32);
            let x = bench.half(&rng.vector((rows * kk) as usize, 1.0, T), T);
            let w = rng.vector((n * kk) as usize, 0.1, T);
            let (launch, splits) = k.linear(rows, n, kk);
            let bytes = (4 * splits * rows * n) as usize;
            let run = |w: &[f64], more: &[f64]| {
                let out = bench.room(bytes);
                let more = if more.is_empty() { Ptr::NULL } else { bench.half(more, T) };
                let w = bench.half(w, T);
                let params =
                    LinearParams { x, w, out, rows, n, k: kk, splits, more, first, ..Default::default() };
                bench.start(&launch, &params);
                bench.bytes(out, bytes)
            };
            let (one, (low, high)) = (run(&w, &[]), w.split_at((first * kk) as usize));
            assert!(one == run(low, high), "{rows} rows, {first} of {n}");
            one
        });
    }
}

/// Turned round, the matrix is what the kernel ahead made: the bits are those of the product whose matrix may be
/// read early, which fails while that memory is marked as being written.
#[test]
fn a_matrix_that_comes_late_is_waited_for() {
    for (rows, n, kk) in [(8u32, 70u32, 264u32), (32, 130, 72), (64, 65, 520)] {
        in_both_ways(|bench, wide| {
            let k = Kernels::new(DType::BF16, 64, 1, 5, 227 * 1024).unwrap().with_warpgroups(wide);
            let mut rng = Rng(u64::from(n));
            let x = bench.half(&rng.vector((rows * kk) as usize, 1.0, DType::BF16), DType::BF16);
            let w = bench.half(&rng.vector((n * kk) as usize, 0.1, DType::BF16), DType::BF16);
            let (launch, splits) = k.linear(rows, n, kk);
            let bytes = (4 * splits * rows * n) as usize;
            let run = |late: u32| {
                let out = bench.room(bytes);
                bench.late.lock().unwrap().clear();
                if late == LATE_WEIGHTS {
                    bench.late.lock().unwrap().push((w, u64::from(2 * n * kk)));
                }
                let params = LinearParams { x, w, out, rows, n, k: kk, splits, late, ..Default::default() };
                bench.start(&launch, &params);
                bench.bytes(out, bytes)
            };
            let early = run(0);
            assert!(early == run(LATE_WEIGHTS), "{rows} rows, {n} x {kk}");
            assert!(early == run(LATE_SUCCESSOR), "{rows} rows, {n} x {kk}");
            early
        });
    }
}

#[test]
fn down_products_dense_and_of_listed_rows() {
    down_products_of_every_number_of_rows();
    // Several chunks of columns a block.
    for (rows, k) in [(3, 4808), (16, 7208), (20, 1600), (40, 2600)] {
        down_of_chunks(rows, 1288, k);
    }
}

const LISTED: Case = Case { layout: Layout::Columns, n: 72, k: 136, stored: Some(200), ..PLAIN };

fn down_of_chunks(rows: usize, n: usize, k: usize) {
    product(&Bench::new(5), &Case { rows, n, k, stored: Some(k + 9), ..LISTED });
}

/// Several chunks of columns a block, of few blocks.
pub fn down_products_of_chunks() {
    for (rows, k) in [(3, 6008), (20, 2600)] {
        down_of_chunks(rows, 136, k);
    }
}

pub fn down_products_of_every_number_of_rows() {
    for rows in [1, 7, 8, 9, 16, 17, 32, 33, 64] {
        product(&Bench::new(0), &Case { rows, ..LISTED });
    }
    for (n, k) in [(8, 8), (256, 16), (264, 24), (320, 400)] {
        let c = Case { dtype: DType::F16, rows: 5, n, k, stored: None, ..LISTED };
        orders(|b| product(b, &c));
    }
}

#[test]
pub fn tiled_products_with_ragged_edges() {
    for layout in [Layout::Rows, Layout::Columns] {
        for (rows, n, k) in [(65, 40, 72), (130, 136, 8), (200, 128, 200)] {
            product(&Bench::new(0), &Case { dtype: DType::BF16, layout, rows, n, k, stored: None });
        }
        orders(|b| product(b, &Case { dtype: DType::F16, layout, rows: 70, n: 24, k: 264, stored: None }));
    }
}
