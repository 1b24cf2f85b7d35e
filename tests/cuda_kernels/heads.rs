//! The products around attention over selected heads against f64: what belongs to heads that no sequence keeps is NaN.

use crate::bench::{Bench, Rng, close};
use crate::orders;
use polar_sparsity::backend::cuda::heads::Units;
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

/// Most parts of a sum.
const PARTS: usize = 16;

/// Rows of `x` times rows of `w`, in f64.
fn product(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let dot = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w))).collect()
}

/// The `keep` largest units, by the largest of their logits.
fn kept(logits: &[f64], per_unit: usize, keep: usize) -> Vec<usize> {
    let score = |u: usize| logits[u * per_unit..][..per_unit].iter().copied().fold(f64::MIN, f64::max);
    let mut order: Vec<usize> = (0..logits.len() / per_unit).collect();
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
    order.truncate(keep);
    order.sort_unstable();
    order
}

/// Of `count` sums in so many parts.
fn added(bench: &Bench, at: Ptr, count: usize, parts: usize) -> Vec<f64> {
    let sums = bench.read_floats(at, parts * count);
    (0..count).map(|i| (0..parts).map(|s| sums[s * count + i]).sum()).collect()
}

/// k roundings of f32 add up like a random walk.
fn limit(k: usize) -> f64 {
    2e-6f64.max((k as f64).sqrt() * f64::from(f32::EPSILON))
}

fn kernels(bench: &Bench, dtype: DType, multiprocessors: u32) -> Option<Kernels> {
    let kernels = Kernels::new(dtype, 128, 1, multiprocessors, 227 * 1024).unwrap();
    bench.device.warpgroups().then(|| kernels.with_warpgroups(true))
}

#[derive(Clone, Copy)]
struct Choosing {
    dtype: DType,
    keep: usize,
    units: usize,
    width: usize,
    per_unit: usize,
    k: usize,
    multiprocessors: u32,
}

fn choosing(bench: &Bench, c: &Choosing) -> Vec<u8> {
    let Some(kernels) = kernels(bench, c.dtype, c.multiprocessors) else { return vec![] };
    let (q, columns) = (c.units * c.width, c.units * c.per_unit);
    let (first, n) = (3 * q, 3 * q + columns.next_multiple_of(4));
    let mut rng = Rng((q + c.k + c.keep) as u64);
    let x = rng.vector(c.k, 1.0, c.dtype);
    let router = rng.vector((n - first) * c.k, 0.1, c.dtype);
    let bias = rng.vector(columns, 0.5, c.dtype);
    let mut logits = product(&x, &router[..columns * c.k], c.k);
    logits.iter_mut().zip(&bias).for_each(|(v, bias)| *v += bias);
    let list = kept(&logits, c.per_unit, c.keep);
    let wanted = |column: usize| column >= q || list.contains(&(column / c.width));
    let mut w = rng.vector(first * c.k, 0.1, c.dtype);
    w.chunks_mut(c.k).enumerate().filter(|(j, _)| !wanted(*j)).for_each(|(_, row)| row.fill(f64::NAN));

    let (out, arrived) = (bench.room(4 * PARTS * n), bench.words(&[0, 77, 0]));
    let select = SelectParams {
        bias: bench.half(&bias, c.dtype),
        keep: bench.words(&[c.keep as u32]),
        selected: bench.room(2 * c.units),
        nan_count: bench.words(&[0]),
        rows: 1,
        sequences: 1,
        units: c.units as u32,
        per_unit: c.per_unit as u32,
        unit_width: c.width as u32,
        ..SelectParams::default()
    };
    let of = (bench.half(&x, c.dtype), bench.half(&w, c.dtype), bench.half(&router, c.dtype), out);
    let size = (1, first as u32, c.k as u32);
    let (launch, params) = kernels.choosing(of, size, &select, arrived).expect("one sequence");
    bench.start(&launch, &params);

    let said = bench.read_words(arrived, 3);
    let workers = launch.grid.0 - params.routing;
    let parts = (workers / (c.keep * c.width / 128) as u32).min(PARTS as u32);
    assert_eq!(said, [0, parts, 0]);
    let got = bench.bytes(select.selected, 2 * c.keep);
    let expected: Vec<u8> = list.iter().flat_map(|&unit| (unit as u16).to_le_bytes()).collect();
    assert_eq!(got, expected);
    assert_eq!(bench.read_words(select.nan_count, 1), [0]);
    let [of_kv, of_q] = [params.product.splits, said[1]].map(|parts| added(bench, out, n, parts as usize));
    let expected = product(&x, &w, c.k);
    let columns = || (0..first).filter(|&j| wanted(j));
    let sums: Vec<f64> = columns().map(|j| if j < q { of_q[j] } else { of_kv[j] }).collect();
    let expected: Vec<f64> = columns().map(|j| expected[j]).collect();
    close(&sums, &expected, limit(c.k), "q, k and v");
    rounded_to_q_k_and_v(bench, c, &kernels, &params, &[of_q, of_kv].concat());
    sums.iter().flat_map(|v| v.to_le_bytes()).chain(got).collect()
}

/// What `qkv_chosen` makes of the sums: q by its own number of parts, k and v by theirs, of heads of 128.
fn rounded_to_q_k_and_v(bench: &Bench, c: &Choosing, kernels: &Kernels, of: &ChoosingParams, sums: &[f64]) {
    let (q, first, n) = (c.units * c.width, 3 * c.units * c.width, of.product.n as usize);
    let heads = q / 128;
    let place = 5;
    // Rounded to 8 bits, or 11: half a last place, and what f32 adds.
    let near = |got: f64, sum: f64, j: usize| {
        assert!((got - sum).abs() <= sum.abs() / 256.0, "column {j}: {got}, {sum}")
    };
    let params = QkvParams {
        qkv: Partial { data: of.product.out, splits: of.product.splits, columns: of.product.n },
        positions: bench.words(&[0]),
        kv_slot: bench.words(&[place]),
        q: bench.room(2 * q),
        kv: bench.room(2 * heads * 2 * 16 * 128),
        rows: 1,
        heads: heads as u32,
        kv_heads: heads as u32,
        head_dim: 128,
        norm_dim: 128,
        arrived: of.arrived,
        ..QkvParams::default()
    };
    bench.start(&kernels.qkv_chosen(3 * heads as u32), &params);
    let (got_q, page) =
        (bench.read_half(params.q, q, c.dtype), bench.read_half(params.kv, heads * 4096, c.dtype));
    let list = bench.bytes(of.select.selected, 2 * c.keep);
    for unit in list.as_chunks::<2>().0.iter().map(|&b| usize::from(u16::from_le_bytes(b))) {
        for j in unit * c.width..(unit + 1) * c.width {
            near(got_q[j], sums[j], j);
        }
    }
    for j in q..first {
        let (is_v, head, i) = ((j - q) / q, (j - q) % q / 128, j % 128);
        let got = page[((head * 2 + is_v) * 16 + place as usize) * 128 + i];
        near(got, sums[n + j], j);
    }
}

/// One head and all; units of several blocks, a router by query heads; one part of k and v and two; more blocks than q has
/// parts, and fewer.
#[test]
pub fn one_sequences_heads_are_chosen_in_the_product() {
    let plain = Choosing {
        dtype: DType::BF16,
        keep: 2,
        units: 4,
        width: 128,
        per_unit: 1,
        k: 1344,
        multiprocessors: 40,
    };
    for keep in [1, 4] {
        choosing(&Bench::new(0), &Choosing { keep, ..plain });
    }
    orders(|b| choosing(b, &plain));
    orders(|b| choosing(b, &Choosing { k: 648, multiprocessors: 5, keep: 3, ..plain }));
    let grouped = Choosing { dtype: DType::F16, units: 3, width: 256, per_unit: 2, ..plain };
    choosing(&Bench::new(0), &Choosing { keep: 1, ..grouped });
    choosing(&Bench::new(0), &Choosing { units: 9, keep: 5, k: 704, multiprocessors: 20, ..plain });
}

/// Of sequences that keep these heads of so many.
fn chosen(
    bench: &Bench,
    dtype: DType,
    lists: &[&[u16]],
    (count, width): (usize, usize),
    n: usize,
) -> Vec<u8> {
    let Some(kernels) = kernels(bench, dtype, 5) else { return vec![] };
    let (rows, k) = (lists.len(), count * width);
    let wanted = |column: usize| lists.iter().any(|l| l.contains(&((column / width) as u16)));
    let mut rng = Rng((rows * 3 + k + n) as u64);
    let mut x = vec![0.0; rows * k];
    for (b, list) in lists.iter().enumerate() {
        for &unit in *list {
            x[b * k + usize::from(unit) * width..][..width].copy_from_slice(&rng.vector(width, 1.0, dtype));
        }
    }
    let w = rng.vector(n * k, 0.1, dtype);
    let expected = product(&x, &w, k);
    // What nobody keeps must not be read.
    let hide = |v: &[f64]| -> Vec<f64> {
        v.iter().enumerate().map(|(i, &v)| if wanted(i % k) { v } else { f64::NAN }).collect()
    };
    let selected: Vec<u8> = (0..rows * count)
        .flat_map(|i| lists[i / count].get(i % count).copied().unwrap_or(u16::MAX).to_le_bytes())
        .collect();
    let keep: Vec<u32> = lists.iter().map(|l| l.len() as u32).collect();
    let out = bench.room(4 * PARTS * rows * n);
    let of = (bench.half(&hide(&x), dtype), bench.half(&hide(&w), dtype), out);
    let units = Units { count: count as u32, width: width as u32 };
    let lists = (bench.raw(&selected), bench.words(&keep));
    let (launch, params) = kernels.chosen(of, (rows as u32, n as u32), units, lists);
    bench.start(&launch, &params);
    let parts = params.product.splits as usize;
    close(&added(bench, out, rows * n, parts), &expected, limit(k), "output projection");
    bench.bytes(out, 4 * parts * rows * n)
}

/// Fewer steps than parts, and more; padding, which keeps none; ragged columns.
#[test]
pub fn the_output_projection_leaves_out_heads_that_nobody_keeps() {
    let (bf16, f16) = (DType::BF16, DType::F16);
    chosen(&Bench::new(0), bf16, &[&[3]], (4, 64), 70);
    chosen(&Bench::new(0), f16, &[&[0, 1, 2]], (3, 256), 128);
    orders(|b| chosen(b, bf16, &[&[1, 6, 7]], (8, 128), 200));
    orders(|b| chosen(b, bf16, &[&[1, 9], &[1, 20, 31]], (32, 64), 130));
    chosen(&Bench::new(0), bf16, &[&[0], &[]], (2, 512), 264);
    chosen(&Bench::new(0), f16, &[&[0], &[2], &[2, 4], &[], &[1], &[6], &[0], &[5]], (7, 128), 8);
}

#[test]
fn heads_are_chosen_in_the_product_where_all_its_blocks_run_at_once() {
    let kernels = Kernels::new(DType::BF16, 128, 1, 132, 227 << 10).unwrap();
    let hopper = kernels.with_warpgroups(true);
    let blocks = |kernels: &Kernels, rows: u32, units: u32, width: u32, kv: u32, k: u32| {
        let select = SelectParams {
            sequences: rows,
            units,
            per_unit: 1,
            unit_width: width,
            ..SelectParams::default()
        };
        let none = Ptr::NULL;
        let made = kernels.choosing((none, none, none, none), (rows, units * width + kv, k), &select, none);
        made.map(|(launch, params)| (launch.grid.0, params.product.splits, params.select.logits.splits))
    };
    // OPT-6.7B and LLaMA-2-7B: four parts of 64 tiles, and eight of the router's k.
    assert_eq!(blocks(&hopper, 1, 32, 128, 8192, 4096), Some((264, 4, 8)));
    assert_eq!(blocks(&hopper, 2, 32, 128, 8192, 4096), None);
    // LLaMA-3.1-8B has too little of k and v; heads of 64 are two to a block; a short k; another GPU.
    assert_eq!(blocks(&hopper, 1, 8, 512, 2048, 4096), None);
    assert_eq!(blocks(&hopper, 1, 32, 64, 4096, 4096), None);
    assert_eq!(blocks(&hopper, 1, 32, 128, 8192, 576), None);
    assert_eq!(blocks(&kernels, 1, 32, 128, 8192, 4096), None);
}
