//! Embedding, norms, QKV post-processing, activations, argmax, loading: against f64.

use crate::bench::{self, Bench, Rng, close};
use crate::linear::ways;
use crate::orders;
use crate::selection::{HEAD_ROWS, Heads};
use polar_sparsity::backend::cuda::launch::{Kernels, Launch};
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

const T: DType = DType::BF16;
const ROUNDING: f64 = 3e-3;

fn kernels(head_dim: u32, group: u32) -> Kernels {
    Kernels::new(T, head_dim, group, 3, 227 * 1024).unwrap()
}

/// Parts that add up to `v`.
fn parts(bench: &Bench, rng: &mut Rng, v: &[f64], splits: usize, columns: usize) -> Partial {
    let mut out = vec![0.0; splits * v.len()];
    for (i, &x) in v.iter().enumerate() {
        let mut left = x;
        for s in 1..splits {
            let part = f64::from(rng.normal() as f32);
            out[s * v.len() + i] = part;
            left -= part;
        }
        out[i] = left;
    }
    Partial { data: bench.floats(&out), splits: splits as u32, columns: columns as u32 }
}

#[test]
pub fn embedding_with_and_without_positions() {
    let (bench, mut rng) = (Bench::new(0), Rng(1));
    let (hidden, vocab) = (72, 11);
    let table = rng.vector(vocab * hidden, 1.0, T);
    let places = rng.vector(9 * hidden, 1.0, T);
    let (tokens, positions) = ([3u32, 10, 0], [0u32, 6, 2]);
    for learned in [false, true] {
        let out = bench.room(4 * 3 * hidden);
        bench.start(
            &kernels(64, 1).embed(3),
            &EmbedParams {
                tokens: bench.words(&tokens),
                positions: bench.words(&positions),
                table: bench.half(&table, T),
                position_table: if learned { bench.half(&places, T) } else { Ptr::NULL },
                residual: out,
                hidden: hidden as u32,
                position_offset: 2,
            },
        );
        let mut expected = vec![];
        for r in 0..3 {
            for i in 0..hidden {
                let place = if learned { places[(positions[r] as usize + 2) * hidden + i] } else { 0.0 };
                expected.push(table[tokens[r] as usize * hidden + i] + place);
            }
        }
        close(&bench.read_floats(out, expected.len()), &expected, 1e-6, "embedding");
    }
}

#[test]
pub fn norms_add_the_pending_sum_first() {
    for (layer_norm, splits, mapped) in
        [(true, 3, false), (false, 1, false), (false, 0, false), (true, 2, true)]
    {
        for size in [(5, 136), (6, 1032), (6, 520)] {
            orders(|bench| norm(bench, size, layer_norm, splits, mapped));
        }
    }
    // Two and four times four columns a thread, the last ones in part; blocks of half as many threads, or without any
    // columns; two, four, eight blocks for a row.
    for size in [(2, 4104), (1, 8200), (6, 2048 + 264), (17, 1544), (33, 520), (17, 4104), (33, 4104)] {
        for layer_norm in [false, true] {
            norm(&Bench::new(3), size, layer_norm, 9, false);
        }
    }
}

/// By the kernels of every GPU, and in clusters of blocks.
fn norm(bench: &Bench, size: (usize, usize), layer_norm: bool, splits: usize, mapped: bool) -> Vec<u8> {
    ways(bench).flat_map(|clusters| norm_by(bench, size, layer_norm, splits, mapped, clusters)).collect()
}

fn norm_by(
    bench: &Bench,
    (rows, hidden): (usize, usize),
    layer_norm: bool,
    splits: usize,
    mapped: bool,
    clusters: bool,
) -> Vec<u8> {
    let mut rng = Rng(9);
    let eps = 1e-5;
    let residual: Vec<f64> = rng.vector(rows * hidden, 1.0, DType::F32).iter().map(|v| v + 0.5).collect();
    let delta = rng.vector(rows * hidden, 1.0, DType::F32);
    let [add, weight, bias] = [0; 3].map(|_| rng.vector(hidden, 1.0, T));
    let map: Vec<usize> = if mapped { vec![4, 1] } else { (0..rows).collect() };
    let mut expected = vec![];
    let mut sums = residual.clone();
    for r in 0..rows {
        for i in 0..hidden {
            sums[r * hidden + i] += add[i] + if splits > 0 { delta[r * hidden + i] } else { 0.0 };
        }
    }
    for &r in &map {
        let row = &sums[r * hidden..(r + 1) * hidden];
        let mean = if layer_norm { row.iter().sum::<f64>() / hidden as f64 } else { 0.0 };
        let square = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / hidden as f64;
        for i in 0..hidden {
            expected.push(
                (row[i] - mean) / (square + eps).sqrt() * weight[i] + if layer_norm { bias[i] } else { 0.0 },
            );
        }
    }
    let stream = bench.floats(&residual);
    let out = bench.room(2 * expected.len());
    let mut delta = parts(bench, &mut rng, &delta, splits.max(1), hidden);
    delta.splits = splits as u32;
    bench.start(
        &kernels(64, 1).with_warpgroups(clusters).norm(map.len() as u32, hidden as u32),
        &NormParams {
            residual: stream,
            delta,
            delta_bias: bench.half(&add, T),
            weight: bench.half(&weight, T),
            bias: if layer_norm { bench.half(&bias, T) } else { Ptr::NULL },
            out,
            row_map: if mapped {
                bench.words(&map.iter().map(|&r| r as u32).collect::<Vec<_>>())
            } else {
                Ptr::NULL
            },
            rows: rows as u32,
            hidden: hidden as u32,
            epsilon: eps as f32,
            late: u32::from(rows % 2 == 0),
        },
    );
    close(&bench.read_half(out, expected.len(), T), &expected, ROUNDING, "norm");
    let kept = if mapped { &residual } else { &sums };
    close(&bench.read_floats(stream, kept.len()), kept, 1e-6, "residual");
    bench.bytes(out, 2 * expected.len())
}

#[test]
pub fn qkv_bias_norm_rotation_and_pages() {
    for (hd, kv_heads, group, biased, normed, rotated) in [
        (64, 2, 2, true, false, true),
        (80, 3, 1, true, false, false),
        (128, 1, 7, false, true, true),
        (256, 1, 2, false, true, true),
    ] {
        for (rows, splits) in [(4, 2), (17, 9), (17, 1)] {
            orders(|b| qkv(b, (rows, splits), hd, kv_heads, group, biased, normed, rotated));
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "one call")]
fn qkv(
    bench: &Bench,
    (rows, splits): (usize, usize),
    hd: usize,
    kv_heads: usize,
    group: usize,
    biased: bool,
    normed: bool,
    rotated: bool,
) -> Vec<u8> {
    let mut rng = Rng(hd as u64);
    let heads = kv_heads * group;
    let (columns, eps) = ((heads + 2 * kv_heads) * hd, 1e-6);
    let qkv = rng.vector(rows * columns, 1.0, DType::F32);
    let bias = rng.vector(columns, 1.0, T);
    let [q_norm, k_norm] = [0; 2].map(|_| rng.vector(hd, 1.0, T));
    let positions: Vec<u32> = (0..rows).map(|r| [0, 5, 31, 2][r % 4]).collect();
    let slots: Vec<u32> = (0..rows as u32)
        .map(|r| [3 * 16, 5, NONE, 16 + 15].get(r as usize).copied().unwrap_or(6 + r))
        .collect();
    let angles: Vec<f64> =
        (0..32 * hd / 2).map(|i| (i / (hd / 2)) as f64 * 0.7f64.powi((i % (hd / 2)) as i32)).collect();
    let table: Vec<f64> = angles.iter().flat_map(|a| [a.cos(), a.sin()]).collect();
    let mut q = vec![0.0; rows * heads * hd];
    let mut pool = vec![f64::NAN; 4 * kv_heads * 32 * hd];
    for r in 0..rows {
        for head in 0..heads + 2 * kv_heads {
            let mut v: Vec<f64> = (0..hd)
                .map(|i| qkv[r * columns + head * hd + i] + if biased { bias[head * hd + i] } else { 0.0 })
                .collect();
            let is_v = head >= heads + kv_heads;
            if normed && !is_v {
                let weight = if head < heads { &q_norm } else { &k_norm };
                let square = v.iter().map(|x| x * x).sum::<f64>() / hd as f64;
                v.iter_mut().zip(weight).for_each(|(x, w)| *x *= w / (square + eps).sqrt());
            }
            if rotated && !is_v {
                let half = hd / 2;
                let old = v.clone();
                for i in 0..half {
                    let (sin, cos) = angles[positions[r] as usize * half + i].sin_cos();
                    v[i] = old[i] * cos - old[i + half] * sin;
                    v[i + half] = old[i + half] * cos + old[i] * sin;
                }
            }
            if head < heads {
                q[(r * heads + head) * hd..][..hd].copy_from_slice(&v);
            } else if slots[r] != NONE {
                let kv_head = (head - heads) % kv_heads;
                let (page, place) = (slots[r] as usize / 16, slots[r] as usize % 16);
                let at = (((page * kv_heads + kv_head) * 2 + usize::from(is_v)) * 16 + place) * hd;
                pool[at..at + hd].copy_from_slice(&v);
            }
        }
    }
    let out = bench.room(2 * q.len());
    let kv = bench.room(2 * pool.len());
    let or_null = |on: bool, v: &[f64]| if on { bench.half(v, T) } else { Ptr::NULL };
    bench.start(
        &kernels(hd as u32, group as u32).qkv(
            (rows as u32, (heads + 2 * kv_heads) as u32, splits as u32),
            0,
            false,
        ),
        &QkvParams {
            qkv: parts(bench, &mut rng, &qkv, splits, columns),
            bias: or_null(biased, &bias),
            q_norm: or_null(normed, &q_norm),
            k_norm: or_null(normed, &k_norm),
            rotation: if rotated { bench.floats(&table) } else { Ptr::NULL },
            positions: bench.words(&positions),
            kv_slot: bench.words(&slots),
            q: out,
            kv,
            rows: rows as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: hd as u32,
            norm_dim: hd as u32,
            epsilon: eps as f32,
            ..Default::default()
        },
    );
    close(&bench.read_half(out, q.len(), T), &q, ROUNDING, "q");
    let got = bench.read_half(kv, pool.len(), T);
    let written: Vec<usize> = (0..pool.len()).filter(|&i| !pool[i].is_nan()).collect();
    assert!(
        (0..pool.len()).all(|i| pool[i].is_nan() == got[i].is_nan()),
        "only the tokens' own places are written"
    );
    let pick = |v: &[f64]| written.iter().map(|&i| v[i]).collect::<Vec<_>>();
    close(&pick(&got), &pick(&pool), ROUNDING, "k and v");
    bench.bytes(kv, 2 * pool.len())
}

/// The router's columns behind those of q, k and v, as one product leaves them.
#[test]
pub fn qkv_selects_heads_beside_its_work() {
    for (kv_heads, group, per_unit) in [(4usize, 2usize, 1usize), (8, 4, 4), (3, 1, 1), (2, 7, 7)] {
        orders(|bench| {
            let (hd, rows) = (64, HEAD_ROWS as u32);
            let heads = kv_heads * group;
            let first = (heads + 2 * kv_heads) * hd;
            let router = kv_heads * per_unit;
            let stride = first + router.next_multiple_of(4);
            let case = Heads::new(bench, kv_heads, per_unit, group * hd, (first, stride));
            let slots: Vec<u32> = (0..rows).map(|r| 16 * r + r).collect();
            let (slots, bytes) = (bench.words(&slots), 2 * HEAD_ROWS * heads * hd);
            let sums =
                Partial { data: Ptr(case.params.logits.data.0 - 4 * first as u64), ..case.params.logits };
            let run = |select: SelectParams| {
                let (q, kv) = (bench.room(bytes), bench.room(2 * HEAD_ROWS * kv_heads * 32 * hd));
                let params = QkvParams {
                    qkv: sums,
                    positions: slots,
                    kv_slot: slots,
                    q,
                    kv,
                    rows,
                    heads: heads as u32,
                    kv_heads: kv_heads as u32,
                    head_dim: hd as u32,
                    norm_dim: hd as u32,
                    select,
                    ..Default::default()
                };
                let router = select.units * select.per_unit;
                let all = (heads + 2 * kv_heads) as u32;
                bench.start(
                    &kernels(hd as u32, group as u32).qkv((rows, all, sums.splits), router, false),
                    &params,
                );
                [bench.bytes(q, bytes), bench.bytes(kv, 2 * HEAD_ROWS * kv_heads * 32 * hd)].concat()
            };
            let (with, without) = (run(case.params), run(SelectParams::default()));
            assert!(with == without, "q, k and v depend on the selection");
            assert!(without[..bytes].iter().any(|&v| v != 0xff));
            case.check(bench)
        });
    }
}

#[test]
pub fn activations_lists_and_masks() {
    for kind in 0..4 {
        for listed in [false, true] {
            activation(kind, listed);
        }
    }
}

fn activation(kind: u32, listed: bool) {
    let (bench, mut rng) = (Bench::new(0), Rng(4));
    let (rows, n, valid, ffn) = (3usize, 304usize, 301usize, 400usize);
    let gated = kind == 1 || kind == 2;
    let columns = if gated { 2 * n } else { n };
    let input = rng.vector(rows * columns, 2.0, DType::F32);
    let [gate_bias, up_bias] = [0; 2].map(|_| rng.vector(ffn, 1.0, T));
    let mut index: Vec<u32> = rng.shuffled(ffn)[..n].iter().map(|&i| i as u32).collect();
    index.sort_unstable();
    let words = n.div_ceil(32);
    let masks: Vec<u32> = (0..2 * words).map(|_| rng.bits() as u32).collect();
    let group = [1u32, NONE, 0];
    let mut expected = vec![0.0; rows * n];
    for r in 0..rows {
        for i in 0..valid {
            if group[r] != NONE && masks[group[r] as usize * words + i / 32] >> (i % 32) & 1 == 0 {
                continue;
            }
            let neuron = if listed { index[i] as usize } else { i };
            let up = input[r * columns + if gated { n } else { 0 } + i] + up_bias[neuron];
            let gate = input[r * columns + i] + gate_bias[neuron];
            expected[r * n + i] = bench::activation(kind, gate, up);
        }
    }
    let out = bench.room(2 * expected.len());
    bench.start(
        &kernels(64, 1).activate(rows as u32, n as u32),
        &ActivateParams {
            input: parts(&bench, &mut rng, &input, 2, columns),
            gate_bias: bench.half(&gate_bias, T),
            up_bias: bench.half(&up_bias, T),
            index: if listed { bench.words(&index) } else { Ptr::NULL },
            masks: bench.words(&masks),
            group: bench.words(&group),
            out,
            rows: rows as u32,
            n: n as u32,
            valid: valid as u32,
            kind,
        },
    );
    close(&bench.read_half(out, expected.len(), T), &expected, ROUNDING, "activation");
}

#[test]
pub fn argmax_ties_nan_and_log_probability() {
    let bench = Bench::new(3);
    let vocab = 5000;
    let mut rng = Rng(6);
    let mut logits: Vec<Vec<f64>> = (0..4).map(|_| rng.vector(vocab, 3.0, DType::F32)).collect();
    logits[0][4321] = 50.0;
    logits[0][17] = 50.0;
    logits[0][3] = f64::NAN;
    logits[1][0] = f64::NEG_INFINITY;
    logits[2].fill(f64::NAN);
    logits[3].fill(f64::NEG_INFINITY);
    let (token, logprob) = (bench.room(16), bench.room(16));
    let (parts, counters) = (bench.room(4 * 32 * 12), bench.words(&[0; 4]));
    let params = ArgmaxParams {
        logits: bench.floats(&logits.concat()),
        token,
        logprob,
        parts,
        counters,
        vocab: vocab as u32,
    };
    for pieces in [1, 5, 5] {
        bench.start(&Launch { grid: (pieces, 4), ..kernels(64, 1).argmax(4) }, &params);
        let (tokens, logprobs) = (bench.read_words(token, 4), bench.read_floats(logprob, 4));
        for r in 0..2 {
            let row = &logits[r];
            let best = (0..vocab)
                .rev()
                .fold(0, |best, i| if row[i] >= row[best] || row[best].is_nan() { i } else { best });
            let sum: f64 = row.iter().filter(|v| !v.is_nan()).map(|v| (v - row[best]).exp()).sum();
            assert_eq!(tokens[r] as usize, best);
            assert!((logprobs[r] + sum.ln()).abs() < 1e-5, "{} {}", logprobs[r], -sum.ln());
        }
        assert_eq!(tokens[0], 17);
        assert!(logprobs[2].is_nan() && logprobs[3].is_nan());
    }
}

#[test]
pub fn transposition_and_conversion() {
    let (bench, mut rng) = (Bench::new(0), Rng(8));
    let (rows, columns, wide, first) = (37usize, 45usize, 100usize, 20usize);
    let v = rng.vector(rows * columns, 1.0, T);
    let out = bench.room(2 * columns * wide);
    bench.start(
        &kernels(64, 1).transpose(rows as u32, columns as u32),
        &TransposeParams {
            input: bench.half(&v, T),
            out,
            in_rows: rows as u32,
            columns: columns as u32,
            out_columns: wide as u32,
            first: first as u32,
        },
    );
    let got = bench.read_half(out, columns * wide, T);
    for c in 0..columns {
        for r in 0..wide {
            let at = got[c * wide + r];
            if (first..first + rows).contains(&r) {
                assert_eq!(at, v[(r - first) * columns + c]);
            } else {
                assert!(at.is_nan());
            }
        }
    }
    let v = rng.vector(1000, 1.0, DType::F32);
    for (kind, dtype) in [(1, DType::BF16), (2, DType::F16)] {
        let out = bench.room(2000);
        let params = ConvertParams { input: bench.floats(&v), out, count: 1000, in_kind: 0, out_kind: kind };
        bench.start(&kernels(64, 1).convert(1000), &params);
        let exact: Vec<f64> = v.iter().map(|&x| crate::bench::rounded(x, dtype)).collect();
        assert_eq!(bench.read_half(out, 1000, dtype), exact);
    }
}
