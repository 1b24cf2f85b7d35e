//! Neuron selection and MLP at the operator level, on the host executor.

use crate::bench::{Bench, Rng, close};
use crate::ops::{ints, ops, refused, workspace};
use crate::orders;
use polar_sparsity::Status;
use polar_sparsity::backend::cuda::ops::{Mlp, NeuronSelection, Workspace};
use polar_sparsity::backend::cuda::params::Ptr;
use polar_sparsity::dtype::DType;

const T: DType = DType::BF16;

/// `x [rows][k]` times `w [n][k]`.
fn product(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let one = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    x.chunks(k).flat_map(|row| w.chunks(k).map(move |n| one(row, n))).collect()
}

fn no_selection() -> NeuronSelection {
    NeuronSelection {
        dtype: T,
        rows: 1,
        hidden: 64,
        rank: 16,
        neurons: 64,
        keep: 8,
        x: Ptr::NULL,
        down: Ptr::NULL,
        up: Ptr::NULL,
        logits: Ptr::NULL,
        active_rows: Ptr::NULL,
        index: Ptr::NULL,
        nan_count: Ptr::NULL,
        workspace: Workspace::default(),
    }
}

fn no_mlp() -> Mlp {
    Mlp {
        dtype: T,
        rows: 1,
        hidden: 64,
        neurons: 64,
        keep: 8,
        x: Ptr::NULL,
        up: Ptr::NULL,
        up_bias: Ptr::NULL,
        down: Ptr::NULL,
        down_bias: Ptr::NULL,
        index: Ptr::NULL,
        out: Ptr::NULL,
        workspace: Workspace::default(),
    }
}

/// Padding rows have no say, and NaN in them is not seen.
#[test]
pub fn neurons_are_those_with_the_largest_sums() {
    for (rows, active, own_scores) in [(5, 3, false), (5, 5, false), (1, 1, false), (5, 3, true)] {
        orders(|b| select(b, rows, active, own_scores));
    }
}

fn select(bench: &Bench, rows: usize, active: usize, own_scores: bool) -> Vec<u8> {
    let mut rng = Rng(rows as u64);
    let (hidden, rank, neurons, keep) = (136, 24, 328, 77);
    let mut x = rng.vector(rows * hidden, 1.0, T);
    let (down, up) = (rng.vector(rank * hidden, 0.1, T), rng.vector(neurons * rank, 0.3, T));
    let mut logits = product(&product(&x, &down, hidden), &up, rank);
    x[active * hidden..].fill(f64::NAN);
    logits[active * neurons..].fill(f64::NAN);
    let ops = ops(bench);
    let mut op = NeuronSelection {
        rows: rows as u32,
        neurons: neurons as u32,
        keep: keep as u32,
        active_rows: if active < rows { ints(bench, &[active as i32]) } else { Ptr::NULL },
        index: bench.room(4 * 80),
        nan_count: bench.words(&[0]),
        ..no_selection()
    };
    if own_scores {
        op.logits = bench.floats(&logits);
    } else {
        (op.hidden, op.rank) = (hidden as u32, rank as u32);
        (op.x, op.down, op.up) = (bench.half(&x, T), bench.half(&down, T), bench.half(&up, T));
    }
    op.workspace = workspace(bench, ops.neuron_selection_workspace(&op).unwrap());
    ops.neuron_selection(&op, bench).unwrap();
    let list = bench.read_words(op.index, 80);
    assert!(list[..keep].windows(2).all(|w| w[0] < w[1]) && list[keep..] == [0, 0, 0], "{list:?}");
    let sum = |n: usize| (0..active).map(|r| logits[r * neurons + n].max(0.0)).sum::<f64>();
    let sums: Vec<f64> = (0..neurons).map(sum).collect();
    let kept = |n: &usize| list[..keep].contains(&(*n as u32));
    let lowest = (0..neurons).filter(kept).map(|n| sums[n]).fold(f64::MAX, f64::min);
    let left = (0..neurons).filter(|n| !kept(n)).map(|n| sums[n]).fold(0.0, f64::max);
    let largest = sums.iter().copied().fold(0.0, f64::max);
    // The router's middle is rounded to 16 bits.
    let slack = if own_scores { 1e-6 } else { 1e-2 };
    assert!(left <= lowest + slack * largest, "{left} left out, {lowest} kept");
    assert_eq!(bench.read_words(op.nan_count, 1), [0]);
    bench.bytes(op.index, 4 * 80)
}

#[test]
pub fn mlp_runs_the_listed_neurons() {
    for (rows, keep) in [(1, 40), (9, 33), (40, 8)] {
        orders(|b| mlp(b, rows, Some(keep)));
    }
    mlp(&Bench::new(3), 64, Some(96));
}

#[test]
fn mlp_without_a_list_runs_all() {
    for rows in [1, 20, 70] {
        mlp(&Bench::new(2), rows, None);
    }
}

fn mlp(bench: &Bench, rows: usize, keep: Option<usize>) -> Vec<u8> {
    let mut rng = Rng(rows as u64 + 5);
    let (hidden, neurons) = (136, 96);
    let x = rng.vector(rows * hidden, 1.0, T);
    let [mut up, mut down] = [0.2, 0.2].map(|scale| rng.vector(neurons * hidden, scale, T));
    let (mut up_bias, down_bias) = (rng.vector(neurons, 0.3, T), rng.vector(hidden, 0.3, T));
    let mut list = rng.shuffled(neurons)[..keep.unwrap_or(neurons)].to_vec();
    list.sort_unstable();
    // What is not listed must not be seen.
    for n in (0..neurons).filter(|n| !list.contains(n)) {
        up[n * hidden..][..hidden].fill(f64::NAN);
        down[n * hidden..][..hidden].fill(f64::NAN);
        up_bias[n] = f64::NAN;
    }
    // The repetitions that fill up the list do read neuron 0, and count nothing.
    if !list.contains(&0) {
        list[0] = 0;
        for (rows, scale) in [(&mut up, 0.2), (&mut down, 0.2)] {
            rows[..hidden].copy_from_slice(&rng.vector(hidden, scale, T));
        }
        up_bias[0] = 0.25;
    }
    let mut expected = vec![];
    for row in x.chunks(hidden) {
        let mut out = down_bias.clone();
        for &n in &list {
            let y = row.iter().zip(&up[n * hidden..]).map(|(a, b)| a * b).sum::<f64>() + up_bias[n];
            for (o, w) in out.iter_mut().zip(&down[n * hidden..]) {
                *o += y.max(0.0) * w;
            }
        }
        expected.extend(out);
    }
    let mut index: Vec<u32> = list.iter().map(|&n| n as u32).collect();
    index.resize(list.len().next_multiple_of(8), 0);
    let ops = ops(bench);
    let mut op = Mlp {
        rows: rows as u32,
        hidden: hidden as u32,
        neurons: neurons as u32,
        keep: keep.unwrap_or(0) as u32,
        x: bench.half(&x, T),
        up: bench.half(&up, T),
        up_bias: bench.half(&up_bias, T),
        down: bench.half(&down, T),
        down_bias: bench.half(&down_bias, T),
        index: if keep.is_some() { bench.words(&index) } else { Ptr::NULL },
        out: bench.room(2 * rows * hidden),
        ..no_mlp()
    };
    op.workspace = workspace(bench, ops.mlp_workspace(&op).unwrap());
    ops.mlp(&op, bench).unwrap();
    close(&bench.read_half(op.out, rows * hidden, T), &expected, 6e-3, "mlp");
    bench.bytes(op.out, 2 * rows * hidden)
}

#[test]
fn arguments_are_checked() {
    let bench = &Bench::new(0);
    let ops = ops(bench);
    let room = bench.room(1 << 16);
    let space = Workspace { at: room, bytes: 1 << 16 };
    let good =
        NeuronSelection { x: room, down: room, up: room, index: room, workspace: space, ..no_selection() };
    type Spoil = fn(&mut NeuronSelection);
    let cases: [(Status, &[&str], Spoil); 9] = [
        (Status::E_INVALID, &["num_rows is 0"], |o| o.rows = 0),
        (Status::E_INVALID, &["keep is 0"], |o| o.keep = 0),
        (Status::E_LIMIT, &["keep is 65", "64"], |o| o.keep = 65),
        (Status::E_INVALID, &["num_neurons is 60", "8"], |o| o.neurons = 60),
        (Status::E_INVALID, &["rank is 12"], |o| o.rank = 12),
        (Status::E_INVALID, &["hidden_size is 0"], |o| o.hidden = 0),
        (Status::E_UNSUPPORTED, &["num_neurons is 100000"], |o| o.neurons = 100_000),
        (Status::E_INVALID, &["router_up is NULL"], |o| o.up = Ptr::NULL),
        (Status::E_INVALID, &["index is at"], |o| o.index.0 += 4),
    ];
    for (status, words, spoil) in cases {
        let mut op = good;
        spoil(&mut op);
        refused(ops.neuron_selection(&op, bench), status, words);
    }
    let good = Mlp { x: room, up: room, down: room, out: room, workspace: space, ..no_mlp() };
    type SpoilMlp = fn(&mut Mlp);
    let cases: [(Status, &[&str], SpoilMlp); 6] = [
        (Status::E_LIMIT, &["num_rows is 65", "64"], |o| (o.rows, o.index) = (65, o.x)),
        (Status::E_LIMIT, &["keep is 65"], |o| (o.keep, o.index) = (65, o.x)),
        (Status::E_INVALID, &["hidden_size is 60"], |o| o.hidden = 60),
        (Status::E_INVALID, &["down is NULL"], |o| o.down = Ptr::NULL),
        (Status::E_INVALID, &["workspace_bytes is 1,"], |o| o.workspace.bytes = 1),
        (Status::E_INVALID, &["workspace is at", "256"], |o| o.workspace.at.0 += 16),
    ];
    for (status, words, spoil) in cases {
        let mut op = good;
        spoil(&mut op);
        refused(ops.mlp(&op, bench), status, words);
    }
}
