//! Head and neuron selection against sorting: exact, ties to the lower index, NaN last.

use crate::bench::{Bench, Rng};
use crate::orders;
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

const T: DType = DType::BF16;

fn kernels() -> Kernels {
    Kernels::new(T, 64, 1, 3, 227 * 1024).unwrap()
}

/// The `k` best of `scores`, ascending: higher first, ties to the lower index, NaN last.
fn best(scores: &[f64], k: usize) -> Vec<u32> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (scores[a], scores[b]);
        x.is_nan()
            .cmp(&y.is_nan())
            .then(y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal))
            .then(a.cmp(&b))
    });
    let mut kept: Vec<u32> = order[..k].iter().map(|&i| i as u32).collect();
    kept.sort_unstable();
    kept
}

/// Router sums of seven sequences in a step of nine rows, and what must be kept.
pub struct Heads {
    pub params: SelectParams,
    /// Columns of the router.
    pub columns: usize,
    keep: Vec<u32>,
    scores: Vec<Vec<f64>>,
    nans: u32,
}

pub const HEAD_ROWS: usize = 9;

impl Heads {
    /// The router's columns are those from `first` on of sums with `stride` columns.
    pub fn new(
        bench: &Bench,
        units: usize,
        per_unit: usize,
        width: usize,
        (first, stride): (usize, usize),
    ) -> Heads {
        let mut rng = Rng(units as u64);
        let (sequences, rows, columns) = (7usize, HEAD_ROWS, units * per_unit);
        // Sixty-fourths, so that sums with the bias are exact and ties happen.
        let mut logits: Vec<f64> =
            (0..rows * columns).map(|_| (rng.normal() * 64.0).round() / 64.0).collect();
        let bias: Vec<f64> = (0..columns).map(|c| (c % 3) as f64 / 4.0).collect();
        for c in 0..columns {
            logits[columns + c] = 0.25 - bias[c]; // all equal
            logits[2 * columns + c] = if c % 2 == 0 { 0.0 } else { -0.0 };
        }
        logits[3 * columns..3 * columns + per_unit].fill(f64::NAN);
        logits[4 * columns - 1] = f64::INFINITY;
        logits[4 * columns] = f64::NEG_INFINITY;
        logits[sequences * columns..].fill(f64::NAN); // prompt rows: never read
        let keep: Vec<u32> = [1, units / 2, 3, units - 1, 2, units, units / 2 + 1]
            .iter()
            .map(|&k| (k.clamp(1, units)) as u32)
            .collect();
        let scores = (0..sequences)
            .map(|b| {
                let score = |u: usize| {
                    let each = (u * per_unit..(u + 1) * per_unit).map(|c| logits[b * columns + c] + bias[c]);
                    each.fold(f64::NAN, f64::max)
                };
                (0..units).map(score).collect()
            })
            .collect();
        // The second part adds nothing; the columns around the router's belong to others.
        let mut sums: Vec<f64> = (0..2 * rows * stride).map(|_| rng.normal()).collect();
        for (i, &v) in logits.iter().enumerate() {
            let at = i / columns * stride + first + i % columns;
            sums[at] = v;
            sums[rows * stride + at] = 0.0;
        }
        let sums = bench.floats(&sums);
        let params = SelectParams {
            logits: Partial { data: sums.offset(4 * first as u64), splits: 2, columns: stride as u32 },
            bias: bench.half(&bias, T),
            keep: bench.words(&keep),
            selected: bench.room(2 * sequences * units),
            attention: bench.room(2 * sequences * units * width),
            nan_count: bench.words(&[0]),
            rows: rows as u32,
            sequences: sequences as u32,
            units: units as u32,
            per_unit: per_unit as u32,
            unit_width: width as u32,
            by_unit: 0,
        };
        let nans = u32::from(keep[3] < units as u32);
        Heads { params, columns, keep, scores, nans }
    }

    /// The same logits with a row for each of the router's columns, as `product_turned` leaves them.
    fn by_unit(self, bench: &Bench) -> Heads {
        let (p, sequences) = (self.params, self.keep.len());
        let (stride, rows) = (p.logits.columns as usize, p.rows as usize);
        let sums = bench.read_floats(p.logits.data, 2 * rows * stride);
        let turned: Vec<f64> = (0..2 * self.columns * sequences)
            .map(|i| (i / sequences, i % sequences))
            .map(|(row, b)| sums[(row / self.columns * rows + b) * stride + row % self.columns])
            .collect();
        let logits = Partial { data: bench.floats(&turned), columns: sequences as u32, ..p.logits };
        let params = SelectParams { logits, rows: self.columns as u32, by_unit: 1, ..p };
        Heads { params, ..self }
    }

    /// Lists, zeros and the count of NaN, after the selection ran.
    pub fn check(&self, bench: &Bench) -> Vec<u8> {
        let (units, width) = (self.params.units as usize, self.params.unit_width as usize);
        let list = bench.bytes(self.params.selected, 2 * self.keep.len() * units);
        let zeros = bench.bytes(self.params.attention, 2 * self.keep.len() * units * width);
        for (b, &keep) in self.keep.iter().enumerate() {
            let expected = best(&self.scores[b], keep as usize);
            let got: Vec<u32> = (0..keep as usize)
                .map(|j| {
                    let at = 2 * (b * units + j);
                    u32::from(u16::from_le_bytes([list[at], list[at + 1]]))
                })
                .collect();
            assert_eq!(got, expected, "sequence {b}");
            for u in 0..units {
                let row = &zeros[2 * (b * units + u) * width..][..2 * width];
                let filler = if expected.contains(&(u as u32)) { 0xff } else { 0 };
                assert!(row.iter().all(|&v| v == filler), "sequence {b} unit {u}");
            }
        }
        assert_eq!(bench.read_words(self.params.nan_count, 1), [self.nans]);
        list
    }
}

#[test]
pub fn heads() {
    for (units, per_unit, width) in
        [(8, 1, 64), (8, 4, 256), (72, 1, 64), (5, 7, 448), (1, 16, 1024), (256, 1, 64), (32, 8, 512)]
    {
        orders(|bench| {
            let columns = units * per_unit;
            let new = || Heads::new(bench, units, per_unit, width, (0, columns));
            let [one, other] = [new(), new().by_unit(bench)].map(|heads| {
                bench.start(&kernels().select_heads(heads.params.sequences, columns as u32), &heads.params);
                heads.check(bench)
            });
            assert!(one == other, "{units} units of {per_unit}: by sequence, by unit");
            one
        });
    }
}

#[test]
pub fn neurons() {
    for (n, keep0, keep_other) in
        [(1000, 130, 77), (1000, 1000, 1), (33, 1, 32), (4096, 2049, 512), (64, NONE, 9)]
    {
        orders(|b| select_neurons(b, n, keep0, keep_other));
    }
}

#[test]
pub fn neurons_by_their_scores() {
    let tiny = f32::from_bits(1);
    let mut rng = Rng(5);
    let spread: Vec<f32> = (0..2500).map(|_| (rng.normal() * 3.0).exp() as f32).collect();
    // One bin of the first digit, and pairs of equal ones.
    let near: Vec<f32> = (0..2500).map(|i| 1.0 + (i / 2 * 37 % 1250) as f32 * 1e-5).collect();
    let mut odd = vec![0.0f32; 700];
    for (at, v) in
        [(3, f32::INFINITY), (4, f32::NAN), (699, tiny), (31, tiny), (32, 2.0 * tiny), (600, f32::MAX)]
    {
        odd[at] = v;
    }
    for (scores, keeps) in [
        (spread, vec![0, 1, 7, 8, 640, 2499, 2500]),
        (near, vec![1, 2, 3, 1000, 2499]),
        (odd, vec![1, 2, 3, 4, 5, 6, 320, 699, 700]),
        (vec![0.75; 100], vec![1, 33, 99, 100]),
        (vec![0.0; 100], vec![1, 33, 100]),
        (vec![f32::NAN; 40], vec![1, 33, 40]),
        (vec![1.5], vec![0, 1]),
    ] {
        for keep in keeps {
            chosen_by_score(&Bench::new(3), &scores, keep);
        }
    }
    // More than the registers hold.
    let large: Vec<f32> = (0..16_500).map(|_| (rng.normal() as f32).max(0.0)).collect();
    chosen_by_score(&Bench::new(0), &large, 1632);
    chosen_by_score(&Bench::new(4), &large, 12_345);
}

fn chosen_by_score(bench: &Bench, scores: &[f32], keep: usize) {
    let (n, words) = (scores.len(), scores.len().div_ceil(32));
    let wide: Vec<f64> = scores.iter().map(|&v| f64::from(v)).collect();
    let (index, masks) = (bench.room(4 * keep.next_multiple_of(8).max(8)), bench.room(4 * words));
    let nan_count = bench.words(&[0]);
    let params = NeuronParams {
        scores: bench.floats(&wide),
        index,
        masks,
        nan_count,
        n: n as u32,
        keep0: keep as u32,
        ..NeuronParams::default()
    };
    bench.start(&kernels().select_neurons(1, n as u32), &params);
    let expected = best(&wide, keep);
    let list = bench.read_words(index, keep.next_multiple_of(8));
    assert_eq!(list[..keep], expected, "{keep} of {n}");
    assert!(list[keep..].iter().all(|&i| i == 0));
    let mask = bench.read_words(masks, words);
    let kept: Vec<u32> =
        (0..32 * words as u32).filter(|&j| mask[j as usize / 32] >> (j % 32) & 1 == 1).collect();
    assert_eq!(kept, expected, "mask of {keep} of {n}");
    let nans = scores.iter().filter(|v| v.is_nan()).count();
    assert_eq!(bench.read_words(nan_count, 1), [nans as u32]);
}

fn select_neurons(bench: &Bench, n: usize, keep0: u32, keep_other: u32) -> Vec<u8> {
    let mut rng = Rng(n as u64);
    // Rows 0, 2, 3 in group 0; row 1 and row 4 alone; row 5 is padding.
    let group = [0u32, 1, 0, 0, 2, NONE];
    let (rows, splits) = (group.len(), 2);
    // Coarse values, so that sums tie often.
    let mut logits: Vec<f64> = (0..rows * n).map(|_| (rng.normal() * 4.0).round() / 4.0).collect();
    logits[4 * n..5 * n].fill(-1.0); // nothing positive: the lowest indices stay
    logits[2 * n + 5] = f64::NAN;
    logits[5 * n..].fill(f64::NAN);
    let mut halves: Vec<f64> = logits.iter().map(|v| v / 2.0).collect();
    halves.extend(halves.clone());
    let words = n.div_ceil(32);
    let wanted = if keep0 == NONE { 0 } else { keep0 as usize };
    let index = bench.room(4 * wanted.next_multiple_of(8).max(8));
    // A group more than there are: its blocks must write nothing.
    let masks = bench.room(4 * 4 * words);
    let nan_count = bench.words(&[0]);
    let scores = bench.room(4 * 4 * n);
    let params = NeuronParams {
        logits: Partial { data: bench.floats(&halves), splits, columns: n as u32 },
        scores,
        group: bench.words(&group),
        last_group: bench.words(&[2]),
        index,
        masks,
        nan_count,
        rows: rows as u32,
        n: n as u32,
        keep0,
        keep_other,
        first_group: 0,
    };
    bench.start(&kernels().neuron_scores(4, n as u32), &params);
    bench.start(&kernels().select_neurons(4, n as u32), &params);
    let got = bench.read_words(masks, 4 * words);
    assert!(got[3 * words..].iter().all(|&w| w == NONE));
    assert!(bench.read_words(scores, 4 * n)[3 * n..].iter().all(|&w| w == NONE));
    for g in 0..3u32 {
        let keep = if g == 0 { keep0 } else { keep_other };
        if keep == NONE {
            continue;
        }
        let scores: Vec<f64> = (0..n)
            .map(|j| {
                (0..rows)
                    .filter(|&r| group[r] == g)
                    .map(|r| logits[r * n + j])
                    .map(|v| if v < 0.0 { 0.0 } else { v })
                    .sum()
            })
            .collect();
        let expected = best(&scores, keep as usize);
        let mask = &got[g as usize * words..][..words];
        let kept: Vec<u32> = (0..n as u32).filter(|&j| mask[j as usize / 32] >> (j % 32) & 1 == 1).collect();
        assert_eq!(kept, expected, "group {g}");
        if g == 0 {
            let list = bench.read_words(index, wanted.next_multiple_of(8));
            assert_eq!(&list[..wanted], expected);
            assert!(list[wanted..].iter().all(|&i| i == 0));
        }
    }
    assert_eq!(bench.read_words(nan_count, 1), [if keep0 == NONE { 0 } else { 1 }]);
    bench.bytes(masks, 4 * words)
}
