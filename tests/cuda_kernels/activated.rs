//! Products that do their activation too, against f64: rows, ragged ends, lists, gates, more lines than are added at once.

use crate::bench::{Bench, Rng, activation, close};
use crate::orders;
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

#[derive(Clone, Copy)]
struct Case {
    dtype: DType,
    /// As `ActivateParams` has it.
    kind: u32,
    rows: usize,
    n: usize,
    k: usize,
    /// Columns at the end that are not wanted.
    filler: usize,
    listed: bool,
    biases: bool,
    /// By warpgroups, where the GPU has them; few rows go to the other kernel all the same.
    warpgroups: bool,
}

fn product(bench: &Bench, c: &Case) -> Vec<u8> {
    if c.warpgroups && !bench.device.warpgroups() {
        return vec![];
    }
    let mut rng = Rng((c.rows * 7 + c.n * 3 + c.k) as u64);
    let gated = c.kind == 1 || c.kind == 2;
    let stored = if c.listed { 2 * c.n + 5 } else { c.n };
    let x = rng.vector(c.rows * c.k, 1.0, c.dtype);
    let list = if c.listed { rng.picked(stored, c.n) } else { (0..c.n).collect() };
    // What is not listed must not be read.
    let mut w = vec![f64::NAN; stored * c.k * if gated { 2 } else { 1 }];
    let [mut up_bias, mut gate_bias] = [0; 2].map(|_| vec![f64::NAN; stored]);
    for &neuron in &list {
        for half in 0..if gated { 2 } else { 1 } {
            let at = (half * stored + neuron) * c.k;
            w[at..at + c.k].copy_from_slice(&rng.vector(c.k, 0.5, c.dtype));
        }
        (up_bias[neuron], gate_bias[neuron]) =
            (rng.vector(1, 1.0, c.dtype)[0], rng.vector(1, 1.0, c.dtype)[0]);
    }
    let kernels = Kernels::new(c.dtype, 64, 1, 5, 227 * 1024).unwrap().with_warpgroups(c.warpgroups);
    let (rows, n, k) = (c.rows as u32, c.n as u32, c.k as u32);
    let count = c.rows * c.n;
    let out = bench.room(2 * count);
    let bias = |b: &[f64]| if c.biases { bench.half(b, c.dtype) } else { Ptr::NULL };
    let words: Vec<u32> = list.iter().map(|&i| i as u32).collect();
    let act = ActivateParams {
        index: if c.listed { bench.words(&words) } else { Ptr::NULL },
        gate_bias: bias(&gate_bias),
        up_bias: bias(&up_bias),
        out,
        rows,
        n,
        valid: n - c.filler as u32,
        kind: c.kind,
        ..Default::default()
    };
    let of = (bench.half(&x, c.dtype), bench.half(&w, c.dtype), k);
    let (launch, params) = kernels.product_activated(of, &act).expect("a product of few rows and columns");
    bench.start(&launch, &params);
    let mut expected = vec![0.0; count];
    for r in 0..c.rows {
        for (i, &neuron) in list.iter().enumerate().take(c.n - c.filler) {
            let sum = |row: usize, bias: &[f64]| -> f64 {
                let product: f64 = (0..c.k).map(|j| x[r * c.k + j] * w[row * c.k + j]).sum();
                product + if c.biases { bias[neuron] } else { 0.0 }
            };
            let up = sum(if gated { stored + neuron } else { neuron }, &up_bias);
            let gate = if gated { sum(neuron, &gate_bias) } else { 0.0 };
            expected[r * c.n + i] = activation(c.kind, gate, up);
        }
    }
    // The result's rounding to 8 (11) bits: half a last place, 2^-9 (2^-12), at most; sums of f32 add less.
    let limit = if c.dtype == DType::BF16 { 2e-3 } else { 2.5e-4 };
    let what = format!("kind {}, {} x {} x {}, listed {}", c.kind, c.rows, c.n, c.k, c.listed);
    close(&bench.read_half(out, count, c.dtype), &expected, limit, &what);
    bench.bytes(out, 2 * count)
}

const PLAIN: Case = Case {
    dtype: DType::BF16,
    kind: 0,
    rows: 3,
    n: 70,
    k: 264,
    filler: 0,
    listed: false,
    biases: true,
    warpgroups: false,
};

#[test]
pub fn products_with_an_activation_of_every_kind() {
    for kind in 0..4 {
        for rows in [1, 3, 8] {
            product(&Bench::new(0), &Case { kind, rows, biases: rows != 3, ..PLAIN });
            product(&Bench::new(0), &Case { kind, rows, dtype: DType::F16, n: 33, ..PLAIN });
        }
    }
}

#[test]
pub fn products_with_an_activation_at_every_edge() {
    // One neuron, one piece of k; steps of k at both ends of a warp's; more lines than are added at once.
    for (n, k) in [(1, 8), (8, 256), (9, 264), (41, 2048), (17, 4096), (620, 72)] {
        product(&Bench::new(0), &Case { n, k, ..PLAIN });
    }
    orders(|b| product(b, &Case { n: 70, k: 2056, ..PLAIN }));
    orders(|b| product(b, &Case { kind: 1, n: 310, rows: 8, k: 72, ..PLAIN }));
}

#[test]
pub fn products_of_listed_rows_with_an_activation() {
    for (rows, n, k, filler) in [(1, 8, 96, 0), (8, 128, 1032, 7), (5, 600, 40, 1)] {
        product(&Bench::new(0), &Case { rows, n, k, filler, listed: true, ..PLAIN });
    }
    orders(|b| product(b, &Case { rows: 2, n: 72, k: 648, filler: 5, listed: true, ..PLAIN }));
}

/// Rows that end in and between tiles, columns too; one part and several, more and fewer than tiles of rows.
#[test]
pub fn products_of_more_rows_with_an_activation() {
    let wide = Case { warpgroups: true, ..PLAIN };
    for (rows, n, k) in [(9, 2, 8), (16, 128, 64), (17, 130, 520), (31, 126, 1000)] {
        product(&Bench::new(0), &Case { rows, n, k, ..wide });
        product(&Bench::new(0), &Case { rows, n, k, dtype: DType::F16, kind: 3, biases: false, ..wide });
    }
    for (rows, n, k, filler) in [(17, 8, 96, 0), (33, 136, 1032, 7), (64, 600, 520, 1)] {
        product(&Bench::new(0), &Case { rows, n, k, filler, listed: true, ..wide });
    }
    orders(|b| product(b, &Case { rows: 40, n: 72, k: 2600, filler: 5, listed: true, ..wide }));
}

#[test]
fn a_product_with_its_activation_is_of_few_rows_and_columns_where_shared_memory_allows_it() {
    let kernels = |kib: u32| Kernels::new(DType::BF16, 128, 1, 132, kib << 10).unwrap();
    let h200 = kernels(227);
    let product = |kernels: &Kernels, rows, n, k, gated| {
        let act = ActivateParams { rows, n, kind: u32::from(gated), ..Default::default() };
        kernels.product_activated((Ptr::NULL, Ptr::NULL, k), &act).map(|(launch, _)| launch.grid.0)
    };
    let blocks = |rows, n, k, gated| product(&h200, rows, n, k, gated);
    // Two for every multiprocessor that the norm leaves, no fewer than eight lines each.
    assert_eq!(blocks(8, 16_384, 4096, false), Some(2 * 124));
    assert_eq!(blocks(1, 14_336, 4096, true), Some(2 * 131));
    assert_eq!(blocks(8, 1024, 4096, false), Some(128));
    assert_eq!(blocks(1, 4, 8, false), Some(1));
    assert_eq!(blocks(9, 1024, 4096, false), None);
    assert_eq!(blocks(8, 1024, 4104, false), None);
    assert!(product(&kernels(163), 1, 1024, 4096, false).is_none());
    // With clusters of a norm's blocks ahead, or of its own: three blocks for each of 80 tiles of columns.
    let hopper = h200.with_warpgroups(true);
    assert_eq!(product(&hopper, 8, 16_384, 4096, false), Some(2 * 132));
    assert_eq!(product(&hopper, 64, 10_160, 4096, false), Some(240));
    assert_eq!(product(&hopper, 64, 10_161, 4096, false), None);
    assert_eq!(product(&hopper, 65, 10_160, 4096, false), None);
    assert_eq!(product(&hopper, 9, 20_480, 4096, false), None);
    assert_eq!(product(&hopper, 9, 10_160, 4096, true), None);
}
