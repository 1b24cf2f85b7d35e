//! Every kernel on every instruction set of this machine.

use super::*;

/// Numbers of about ±1 that every dtype holds exactly.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut h = seed | 1;
    (0..n)
        .map(|_| {
            h = h.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((h >> 57) as f32 - 64.0) / 64.0
        })
        .collect()
}

fn halves(v: &[f32], bf16: bool) -> Vec<u16> {
    v.iter().map(|&v| if bf16 { bf16_bits(v) } else { half::f16::from_f32(v).to_bits() }).collect()
}

fn close(got: f32, want: f64, scale: f64, what: &str) {
    assert!((f64::from(got) - want).abs() <= scale * 1e-6, "{what}: {got} {want}");
}

/// Every way to multiply activations with weights that `isa` has.
fn ways(isa: Isa, x: &[f32], w: &[f32], f: &mut dyn FnMut(&str, Acts<'_>, Rows<'_>)) {
    let (x16, w16, w16h) = (halves(x, true), halves(w, true), halves(w, false));
    let bytes: Vec<i8> = w.iter().map(|v| (v * 64.0) as i8).collect();
    let scales = vec![1.0 / 64.0; w.len()];
    f("f32", Acts::F32(x), Rows::F32(w));
    f("f16", Acts::F32(x), Rows::F16(&w16h));
    f("bf16", Acts::F32(x), Rows::Bf16(&w16));
    f("i8", Acts::F32(x), Rows::I8(&bytes, &scales));
    if isa.bf16_products() {
        f("pairs", Acts::Bf16(&x16), Rows::Bf16(&w16));
    }
}

#[test]
fn dots_agree_with_f64() {
    for isa in Isa::all() {
        for (rows, outs, k) in [
            (1, 1, 32),
            (1, 19, 64),
            (2, 8, 96),
            (3, 5, 32),
            (4, 9, 64),
            (5, 4, 64),
            (6, 13, 128),
            (7, 11, 64),
            (8, 7, 96),
            (13, 17, 64),
            (100, 10, 32),
            (5, 9, 3200),
            (8, 7, 2592),
            (20, 5, 1056),
        ] {
            let stride = k + 32;
            let (x, w) = (numbers(1, rows * stride), numbers(2, outs * stride));
            let list: Vec<u32> = (0..outs as u32).rev().collect();
            ways(isa, &x, &w, &mut |name, acts, weights| {
                for picked in [Pick::Range(0, outs), Pick::List(&list)] {
                    let mut out = vec![f32::NAN; rows * outs];
                    let mut again = out.clone();
                    let mut spill = vec![f32::NAN; 16 * rows * outs];
                    let (from, by, all) = ((acts, stride), (weights, stride), Pick::Range(0, rows));
                    dots(isa, from, all, by, picked, k, (&mut out, outs), &mut []);
                    dots(isa, from, all, by, picked, k, (&mut again, outs), &mut spill);
                    assert!(out == again, "passes change bits: {name} {} {rows}x{outs}x{k}", isa.name());
                    for r in 0..rows {
                        for o in 0..outs {
                            let (a, b) = (&x[r * stride..], &w[picked.at(o) * stride..]);
                            let want: f64 = (0..k).map(|i| f64::from(a[i]) * f64::from(b[i])).sum();
                            close(
                                out[r * outs + o],
                                want,
                                k as f64,
                                &format!("{name} {} {rows}x{outs}x{k}", isa.name()),
                            );
                        }
                    }
                }
            });
        }
    }
}

#[test]
fn outer_agrees_with_f64_and_skips_without_a_trace() {
    use crate::sys::split::{Grid, Split};
    for isa in Isa::all() {
        for (rows, neurons, columns) in [
            (1usize, 1usize, 32usize),
            (1, 9, 64),
            (2, 33, 96),
            (3, 8, 32),
            (4, 50, 160),
            (7, 31, 64),
            (11, 40, 96),
        ] {
            let stride_z = neurons.next_multiple_of(32);
            let mut z = numbers(3, rows * stride_z);
            // Every third neuron is 0 in every row, as after a ReLU.
            z.iter_mut().enumerate().for_each(|(i, v)| {
                if i % stride_z % 3 == 1 {
                    *v = 0.0
                }
            });
            let w = numbers(4, neurons * columns);
            let alive: Vec<u32> = (0..neurons as u32).filter(|n| n % 3 != 1).collect();
            ways(isa, &z, &w, &mut |name, acts, weights| {
                let mut results = Vec::new();
                for picked in [Pick::Range(0, neurons), Pick::List(&alive)] {
                    let mut y = vec![0.0f32; rows * columns];
                    let grid = Grid::columns(&mut y, columns, columns, columns);
                    // SAFETY: the only task.
                    let mut block = unsafe { grid.part(0) };
                    // Cut between pairs, as the backend cuts.
                    let cut = neurons / 4 * 2;
                    for (first, end) in [(0, cut), (cut, neurons)] {
                        let some = match picked {
                            Pick::Range(..) => Pick::Range(first, end - first),
                            Pick::List(l) => {
                                let at = |i: usize| l.partition_point(|&n| (n as usize) < i);
                                Pick::List(&l[at(first)..at(end)])
                            }
                        };
                        let rows = Pick::Range(0, rows);
                        outer(isa, (acts, stride_z), rows, (weights, columns), some, &mut block);
                    }
                    results.push(y);
                }
                assert!(results[0] == results[1], "{name} {}", isa.name());
                for r in 0..rows {
                    for c in 0..columns {
                        let at = if name == "pairs" { c / 32 * 32 + LANE_ORDER[c % 32] } else { c };
                        let want: f64 = (0..neurons)
                            .map(|n| f64::from(z[r * stride_z + n]) * f64::from(w[n * columns + at]))
                            .sum();
                        close(
                            results[0][r * columns + c],
                            want,
                            neurons as f64,
                            &format!("{name} {}", isa.name()),
                        );
                    }
                }
            });
        }
    }
}

#[test]
fn attention_agrees_with_f64() {
    for isa in Isa::all() {
        for (n, dims) in [(1usize, 16usize), (2, 32), (3, 80), (4, 128), (5, 64), (16, 256)] {
            let (pages, tokens) = (3, 48);
            let q = numbers(5, n * dims);
            let (k, v) = (numbers(6, tokens * dims), numbers(7, tokens * dims));
            // Row r sees tokens r..40 + r / 2.
            let seen = |r: usize, page: usize| {
                let low = r.saturating_sub(page * 16).min(16);
                let high = (40 + r / 2).saturating_sub(page * 16).min(16);
                (low as u8, high as u8)
            };
            for kind in 0..4 {
                if kind == 3 && !isa.bf16_products() {
                    continue;
                }
                let q16 = halves(&q, true);
                let (mut max, mut sum) = (vec![f32::NEG_INFINITY; n], vec![0.0; n * 16]);
                let mut out = vec![0.0; n * dims];
                for page in 0..pages {
                    let at = |t: usize, d: usize| (page * 16 + t) * dims + d;
                    let mut piece = vec![0.0; 32 * dims];
                    for t in 0..16 {
                        for d in 0..dims {
                            let (ki, vi) = match kind {
                                0 | 1 => (d * 16 + t, t * dims + d),
                                _ => ((d / 2 * 16 + t) * 2 + d % 2, (t / 2 * dims + d) * 2 + t % 2),
                            };
                            piece[ki] = k[at(t, d)];
                            piece[16 * dims + vi] = v[at(t, d)];
                        }
                    }
                    let visible: Vec<(u8, u8)> = (0..n).map(|r| seen(r, page)).collect();
                    let packed = halves(&piece, kind >= 2);
                    let piece = match kind {
                        0 => KvPiece::F32(&piece),
                        1 => KvPiece::F16(&packed),
                        _ => KvPiece::Bf16(&packed),
                    };
                    let mut queries = Queries {
                        q: if kind == 3 { Acts::Bf16(&q16) } else { Acts::F32(&q) },
                        dims,
                        scale: 0.3,
                        visible: &visible,
                        max: &mut max,
                        sum: &mut sum,
                        out: &mut out,
                    };
                    attend_page(isa, piece, &mut queries);
                }
                for r in 0..n {
                    let row = r..40 + r / 2;
                    let score = |t: usize| -> f64 {
                        (0..dims)
                            .map(|d| f64::from(q[r * dims + d]) * f64::from(k[t * dims + d]))
                            .sum::<f64>()
                            * 0.3
                    };
                    let most = row.clone().map(score).fold(f64::MIN, f64::max);
                    let p: Vec<f64> = row.clone().map(|t| (score(t) - most).exp()).collect();
                    let total: f64 = p.iter().sum();
                    let got_total = f64::from(fold_sum(&sum.as_chunks::<16>().0[r]));
                    for d in 0..dims {
                        let want =
                            row.clone().zip(&p).map(|(t, p)| p * f64::from(v[t * dims + d])).sum::<f64>()
                                / total;
                        let got = f64::from(out[r * dims + d]) / got_total;
                        // Weights in bf16 have eight bits.
                        let allowed = if kind == 3 { 4e-3 } else { 3e-6 };
                        assert!(
                            (got - want).abs() < allowed,
                            "{} kind {kind} row {r} of {n}x{dims}: {got} {want}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn norms_and_activations_agree_with_f64() {
    for isa in Isa::all() {
        for n in [1usize, 16, 63, 64, 65, 300] {
            let (x, w, b) = (numbers(8, n), numbers(9, n), numbers(10, n));
            let f = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let (xd, wd, bd) = (f(&x), f(&w), f(&b));
            let mean = xd.iter().sum::<f64>() / n as f64;
            let square = |m: f64| xd.iter().map(|v| (v - m) * (v - m)).sum::<f64>() / n as f64;
            let mut out = vec![0.0; n];
            rms_norm(isa, &x, &w, 1e-3, &mut out);
            for i in 0..n {
                close(out[i], xd[i] / (square(0.0) + 1e-3).sqrt() * wd[i], 2.0, "rms");
            }
            layer_norm(isa, &x, &w, Some(&b), 1e-3, &mut out);
            for i in 0..n {
                close(out[i], (xd[i] - mean) / (square(mean) + 1e-3).sqrt() * wd[i] + bd[i], 4.0, "layer");
            }
            let mut gate: Vec<f32> = x.iter().map(|v| v * 120.0).collect();
            let want: Vec<f64> = gate.iter().map(|&g| f64::from(g) / (1.0 + (-f64::from(g)).exp())).collect();
            silu_mul(isa, &mut gate, &w);
            for i in 0..n {
                close(gate[i], want[i] * wd[i], 120.0, "silu");
            }
            let mut rounded = vec![0; n];
            to_bf16(isa, &x, &mut rounded);
            assert_eq!(rounded, halves(&x, true));
        }
    }
}
