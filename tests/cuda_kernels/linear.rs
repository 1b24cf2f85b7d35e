//! The products against sums in f64: row counts around every tile edge, lists of rows, ragged edges.

use crate::bench::{Bench, Rng, close};
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

struct Case {
    dtype: DType,
    layout: Layout,
    rows: usize,
    n: usize,
    k: usize,
    /// Rows of w on disk when a list picks among them.
    stored: Option<usize>,
}

fn product(bench: &Bench, c: &Case) -> Vec<u8> {
    let mut rng = Rng((c.rows * 7 + c.n * 3 + c.k) as u64);
    let x = rng.vector(c.rows * c.k, 1.0, c.dtype);
    let picked = if c.layout == Layout::Rows { c.n } else { c.k };
    let stored = c.stored.unwrap_or(picked);
    let width = if c.layout == Layout::Rows { c.k } else { c.n };
    let mut list = rng.shuffled(stored)[..picked].to_vec();
    list.sort_unstable();
    if c.stored.is_some() {
        // Both ends of the matrix are among them.
        list[0] = 0;
        list[picked - 1] = stored - 1;
    } else {
        list = (0..picked).collect();
    }
    let mut w = vec![f64::NAN; stored * width];
    for &row in &list {
        let values = rng.vector(width, 0.1, c.dtype);
        w[row * width..(row + 1) * width].copy_from_slice(&values);
    }
    let k = Kernels::new(c.dtype, 64, 1, 5, 227 * 1024).unwrap();
    let (rows, n, kk) = (c.rows as u32, c.n as u32, c.k as u32);
    let (launch, splits) =
        if c.layout == Layout::Rows { k.linear(rows, n, kk) } else { k.linear_transposed(rows, n, kk) };
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
    close(&got, &expected, 2e-6, &format!("product {} x {} x {}", c.rows, c.n, c.k));
    bench.bytes(out, 4 * count)
}

#[test]
fn skinny_products_at_every_tile_edge() {
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
fn skinny_products_of_listed_rows() {
    for (rows, n) in [(1, 8), (2, 72), (33, 128)] {
        orders(|b| {
            product(b, &Case { dtype: DType::BF16, layout: Layout::Rows, rows, n, k: 96, stored: Some(300) })
        });
    }
}

#[test]
fn skinny_products_of_two_matrices_are_those_of_one() {
    const T: DType = DType::BF16;
    let k = Kernels::new(T, 64, 1, 5, 227 * 1024).unwrap();
    for (rows, n, first) in [(1u32, 72u32, 64u32), (9, 70, 65), (33, 200, 1), (3, 12, 8), (64, 136, 135)] {
        orders(|bench| {
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

#[test]
fn down_products_dense_and_of_listed_rows() {
    for rows in [1, 7, 8, 9, 16, 17, 32, 33, 64] {
        let c = Case { dtype: DType::BF16, layout: Layout::Columns, rows, n: 72, k: 136, stored: Some(200) };
        product(&Bench::new(0), &c);
    }
    for (n, k) in [(8, 8), (256, 16), (264, 24), (320, 400)] {
        orders(|b| {
            product(b, &Case { dtype: DType::F16, layout: Layout::Columns, rows: 5, n, k, stored: None })
        });
    }
}

#[test]
fn tiled_products_with_ragged_edges() {
    for layout in [Layout::Rows, Layout::Columns] {
        for (rows, n, k) in [(65, 40, 72), (130, 136, 8), (200, 128, 200)] {
            product(&Bench::new(0), &Case { dtype: DType::BF16, layout, rows, n, k, stored: None });
        }
        orders(|b| product(b, &Case { dtype: DType::F16, layout, rows: 70, n: 24, k: 264, stored: None }));
    }
}
