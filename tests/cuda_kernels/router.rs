//! The MLP router's second product as scores: of 16-bit numbers, of bytes, and taken along by decode attention
//! (`attention.rs`); and what makes bytes of rows.

use crate::bench::{Bench, Rng, close};
use crate::orders;
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

/// Groups of rows: most in group 0, if that is asked for, some of their own, some none.
fn groups(rows: usize, first_group: u32) -> (Vec<u32>, usize) {
    let mut next = 0;
    let group = (0..rows)
        .map(|r| match r % 5 {
            3 => NONE,
            0 | 2 if first_group == 0 => 0,
            _ => {
                next += 1;
                next
            }
        })
        .collect();
    (group, (next + 1 - first_group) as usize)
}

/// Sums of positive logits by group.
fn expected(
    (group, groups, first_group): (&[u32], usize, u32),
    (n, rank): (usize, usize),
    (z, w): (&[f64], &[f64]),
    before: &[f64],
) -> Vec<f64> {
    let mut scores = vec![0.0; groups * n];
    if first_group == 0 && !before.is_empty() {
        scores[..n].copy_from_slice(&before[..n]);
    }
    for r in (0..group.len()).filter(|&r| group[r] != NONE) {
        for j in 0..n {
            let logit: f64 = (0..rank).map(|i| z[r * rank + i] * w[j * rank + i]).sum();
            scores[(group[r] - first_group) as usize * n + j] += logit.max(0.0);
        }
    }
    scores
}

fn of_16_bits(
    bench: &Bench,
    (dtype, rows, n, rank): (DType, usize, usize, usize),
    first_group: u32,
    more: bool,
) -> Vec<u8> {
    let mut rng = Rng((rows + n + rank) as u64);
    let (group, count) = groups(rows, first_group);
    let (mut z, w) = (rng.vector(rows * rank, 1.0, dtype), rng.vector(n * rank, 0.1, dtype));
    for r in (0..rows).filter(|&r| group[r] == NONE) {
        z[r * rank..(r + 1) * rank].fill(f64::NAN);
    }
    let before = if more { rng.vector(count * n, 1.0, DType::F32) } else { vec![] };
    let scores = if more { bench.floats(&before) } else { bench.room(4 * count * n) };
    let params = RouterParams {
        z: bench.half(&z, dtype),
        w: bench.half(&w, dtype),
        scores,
        group: bench.words(&group),
        rows: rows as u32,
        n: n as u32,
        rank: rank as u32,
        first_group,
        more: more.into(),
        ..Default::default()
    };
    let kernels = Kernels::new(dtype, 64, 1, 5, 227 * 1024).unwrap();
    bench.start(&kernels.router_scores(rows as u32, n as u32), &params);
    let want = expected((&group, count, first_group), (n, rank), (&z, &w), &before);
    close(
        &bench.read_floats(scores, count * n),
        &want,
        2e-6,
        &format!("scores of {rows} rows, {n} x {rank}"),
    );
    bench.bytes(scores, 4 * count * n)
}

/// Rows of whole numbers as `cuda/router_bytes.cuh` wants them: those of z in tiles of 8, those of w in tiles of 16.
fn in_tiles(rows: &[i8], rank: usize, tile: usize) -> Vec<u8> {
    let pieces = rank.div_ceil(64);
    let mut out = vec![0; (rows.len() / rank).next_multiple_of(tile) * pieces * 64];
    for (i, v) in rows.iter().enumerate() {
        let (row, c) = (i / rank, i % rank);
        let place = match tile {
            8 => row % 8 * 64 + c % 64,
            _ => c / 8 % 2 * 512 + (row % 8 * 4 + c / 16 % 4) * 16 + c / 4 % 2 * 8 + row / 8 % 2 * 4 + c % 4,
        };
        out[(row / tile * pieces + c / 64) * tile * 64 + place] = *v as u8;
    }
    out
}

/// A router's product of bytes, and what it must leave.
pub struct Scores {
    pub params: RouterBytesParams,
    pub choice: NeuronParams,
    expected: Vec<f64>,
    kept: usize,
    /// Scores that are there already, any numbers.
    given: bool,
}

impl Scores {
    pub fn new(bench: &Bench, size: (usize, usize, usize), first_group: u32, more: bool) -> Scores {
        Scores::with(bench, size, first_group, more, &[1.0])
    }

    /// Neuron i's scores are this many times as large: `factors` in turn.
    pub fn with(
        bench: &Bench,
        (rows, n, rank): (usize, usize, usize),
        first_group: u32,
        more: bool,
        factors: &[f64],
    ) -> Scores {
        let mut rng = Rng((rows + n + rank) as u64);
        let (group, count) = groups(rows, first_group);
        let mut whole = |len: usize| -> Vec<i8> {
            let mut v: Vec<i8> =
                rng.vector(len, 40.0, DType::F32).iter().map(|v| v.clamp(-127.0, 127.0) as i8).collect();
            (v[0], v[1]) = (-127, 127);
            v
        };
        let (z, w) = (whole(rows * rank), whole(n * rank));
        let mut scales =
            |n: usize| -> Vec<f64> { rng.vector(n, 0.01, DType::F32).iter().map(|v| v.abs()).collect() };
        let (mut z_scales, mut w_scales) = (scales(rows), scales(n));
        w_scales.iter_mut().enumerate().for_each(|(i, s)| *s *= factors[i % factors.len()]);
        let times = |v: &[i8], scales: &[f64]| -> Vec<f64> {
            v.iter().enumerate().map(|(i, &v)| f64::from(v) * scales[i / rank]).collect()
        };
        let before = if more { rng.vector(count * n, 1.0, DType::F32) } else { vec![] };
        let of = (&group[..], count, first_group);
        let want = expected(of, (n, rank), (&times(&z, &z_scales), &times(&w, &w_scales)), &before);
        for r in (0..rows).filter(|&r| group[r] == NONE) {
            z_scales[r] = f64::NAN;
        }
        let params = RouterBytesParams {
            z: bench.raw(&in_tiles(&z, rank, 8)),
            z_scales: bench.floats(&z_scales),
            w: bench.raw(&in_tiles(&w, rank, 16)),
            scales: bench.floats(&w_scales),
            scores: if more { bench.floats(&before) } else { bench.room(4 * count * n) },
            group: bench.words(&group),
            rows: rows as u32,
            n: n as u32,
            pieces: rank.div_ceil(64) as u32,
            first_group,
            more: more.into(),
            ..Default::default()
        };
        Scores { params, expected: want, kept: 0, choice: NeuronParams::default(), given: false }
    }

    /// Of one row of zeros, which leaves these scores as they are.
    pub fn given(bench: &Bench, scores: &[f32]) -> Scores {
        let mut s = Scores::with(bench, (1, scores.len(), 8), 0, true, &[0.0]);
        let wide: Vec<f64> = scores.iter().map(|&v| v.into()).collect();
        s.params.scores = bench.floats(&wide);
        Scores { expected: wide, given: true, ..s }
    }

    /// Group 0's best neurons are chosen as well.
    pub fn choosing(mut self, bench: &Bench, keep: usize) -> Scores {
        let n = self.params.n as usize;
        self.kept = keep;
        self.params.arrived = bench.words(&[0]);
        self.choice = NeuronParams {
            scores: self.params.scores,
            index: bench.room(4 * keep.next_multiple_of(8)),
            masks: bench.room(4 * n.div_ceil(32)),
            nan_count: bench.words(&[0]),
            n: n as u32,
            keep0: keep as u32,
            ..Default::default()
        };
        self
    }

    pub fn check(&self, bench: &Bench) -> Vec<u8> {
        let got = bench.read_floats(self.params.scores, self.expected.len());
        if self.given {
            assert_eq!(format!("{got:?}"), format!("{:?}", self.expected));
        } else {
            close(&got, &self.expected, 2e-6, &format!("scores {:?}", self.params));
        }
        if self.kept > 0 {
            let n = self.params.n as usize;
            let nans = got[..n].iter().filter(|v| v.is_nan()).count() as u32;
            let mut best: Vec<usize> = (0..n).collect();
            let order = |i: usize| if got[i].is_nan() { -1.0 } else { got[i] };
            best.sort_by(|&a, &b| order(b).total_cmp(&order(a)).then(a.cmp(&b)));
            best.truncate(self.kept);
            best.sort_unstable();
            let (mut list, mut mask) = (vec![0; self.kept.next_multiple_of(8)], vec![0; n.div_ceil(32)]);
            for (place, &neuron) in best.iter().enumerate() {
                list[place] = neuron as u32;
                mask[neuron / 32] |= 1 << (neuron % 32);
            }
            assert_eq!(bench.read_words(self.choice.index, list.len()), list, "{} of {n}", self.kept);
            assert_eq!(bench.read_words(self.choice.masks, mask.len()), mask);
            assert_eq!(bench.read_words(self.choice.nan_count, 1), [nans]);
            assert_eq!(bench.read_words(self.params.arrived, 1), [0], "the counter is not reset");
        }
        bench.bytes(self.params.scores, 4 * self.expected.len())
    }
}

fn of_bytes(bench: &Bench, size: (usize, usize, usize), first_group: u32, more: bool) -> Vec<u8> {
    let scores = Scores::new(bench, size, first_group, more);
    let kernels = Kernels::new(DType::BF16, 64, 1, 5, 227 * 1024).unwrap();
    bench.start(&kernels.router_scores_bytes(size.0 as u32, size.1 as u32), &scores.params);
    scores.check(bench)
}

#[test]
pub fn router_products_leave_scores() {
    for more in [false, true] {
        for rows in [1, 2, 7, 8, 9, 16, 17, 33, 64] {
            let first_group = u32::from(rows == 2 || rows == 9);
            of_bytes(&Bench::new(6), (rows, 130, 72), first_group, more);
            if !more {
                of_16_bits(&Bench::new(6), (DType::BF16, rows, 130, 72), first_group, more);
            }
        }
        orders(|b| of_16_bits(b, (DType::F16, 6, 200, 264), 0, more));
        orders(|b| of_bytes(b, (6, 200, 264), 0, more));
    }
    // Pieces: a rest of one, as many as are held at once, more.
    for (rank, rows) in [(8, 3), (64, 34), (1024, 3), (1032, 34), (2112, 3)] {
        of_bytes(&Bench::new(7), (rows, 40, rank), 0, false);
    }
}

/// Sums of rows as bytes: each number within half a step, zeros behind the columns, nothing of other rows.
fn narrow(bench: &Bench, (rows, sequences, columns): (usize, usize, usize), odd: Option<f64>) -> Vec<u8> {
    let (splits, pieces, width) = (3, columns.div_ceil(64), columns + 12);
    let mut rng = Rng((rows + columns) as u64);
    let mut parts: Vec<Vec<f64>> = (0..splits).map(|_| rng.vector(rows * width, 1.0, DType::F32)).collect();
    for part in &mut parts {
        for (i, v) in part.iter_mut().enumerate() {
            let (row, c) = (i / width, i % width);
            if row >= sequences || c >= columns {
                *v = f64::NAN;
            } else if row == 1 {
                *v = 0.0;
            }
        }
    }
    if let Some(odd) = odd {
        parts[1][columns - 1] = odd;
    }
    let factors = rng.vector(columns, 2.0, DType::F32);
    let room = sequences.next_multiple_of(8) * pieces * 64;
    let (out, scales) = (bench.raw(&vec![0; room]), bench.room(4 * sequences));
    let params = NarrowParams {
        sums: Partial { data: bench.floats(&parts.concat()), splits: splits as u32, columns: width as u32 },
        out,
        scales,
        factors: bench.floats(&factors),
        rows: rows as u32,
        sequences: sequences as u32,
        columns: columns as u32,
        pieces: pieces as u32,
    };
    bench.start(
        &Kernels::new(DType::BF16, 64, 1, 5, 227 * 1024)
            .unwrap()
            .narrow_rows(sequences as u32, pieces as u32),
        &params,
    );
    let (bytes, steps) = (bench.bytes(out, room), bench.read_floats(scales, sequences));
    for row in 0..sequences {
        let sum = |c: usize| factors[c] * parts.iter().map(|p| p[row * width + c]).sum::<f64>();
        let most = (0..columns).map(|c| sum(c).abs()).fold(0.0, f64::max);
        if row == 0 && odd.is_some() {
            assert!(steps[0].is_nan(), "a row that is not finite has scale {}", steps[0]);
            continue;
        }
        assert!((steps[row] - most / 127.0).abs() <= 1e-6 * most, "scale {} of {most}", steps[row]);
        for c in 0..64 * pieces {
            let got = bytes[((row / 8 * pieces + c / 64) * 8 + row % 8) * 64 + c % 64] as i8;
            let want = if c < columns { sum(c) } else { 0.0 };
            let off = (f64::from(got) * steps[row] - want).abs();
            assert!(off <= 0.5001 * steps[row], "row {row}, column {c}: {got} for {want}");
        }
    }
    [bytes, bench.bytes(scales, 4 * sequences)].concat()
}

#[test]
pub fn rows_become_bytes() {
    for size in [(1, 1, 8), (9, 9, 64), (12, 7, 1024), (4, 3, 1100)] {
        orders(|b| narrow(b, size, None));
    }
    for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        narrow(&Bench::new(0), (3, 2, 72), Some(odd));
    }
}
