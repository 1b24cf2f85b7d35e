//! The operator level on the host executor: what a host's block tables, lengths and strides become, and
//! what is refused before anything is launched.

use crate::attention::Cache;
use crate::bench::{Bench, Rng, close};
use crate::orders;
use polar_sparsity::Status;
use polar_sparsity::backend::cuda::ops::{Attention, HeadSelection, Ops, Workspace};
use polar_sparsity::backend::cuda::params::Ptr;
use polar_sparsity::dtype::DType;

const T: DType = DType::BF16;

pub fn ops(bench: &Bench) -> Ops {
    let device = &bench.device;
    Ops::new(device.multiprocessors(), device.shared_per_block(), device.warpgroups()).unwrap()
}

pub fn workspace(bench: &Bench, bytes: u64) -> Workspace {
    Workspace { at: bench.room(bytes as usize), bytes }
}

fn shorts(bench: &Bench, v: &[u16]) -> Ptr {
    bench.raw(&v.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<_>>())
}

pub fn ints(bench: &Bench, v: &[i32]) -> Ptr {
    bench.words(&v.iter().map(|&x| x as u32).collect::<Vec<_>>())
}

fn nothing() -> Attention {
    Attention {
        dtype: T,
        sequences: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
        max_pages: 1,
        table_stride: 0,
        window: 0,
        scale: 0.0,
        q_stride: 0,
        page_stride: 0,
        head_stride: 0,
        q: Ptr::NULL,
        kv: Ptr::NULL,
        block_table: Ptr::NULL,
        lengths: Ptr::NULL,
        keep: Ptr::NULL,
        selected: Ptr::NULL,
        out: Ptr::NULL,
        lse: Ptr::NULL,
        workspace: Workspace::default(),
        leave_rest: false,
    }
}

#[derive(Clone)]
struct Case {
    hd: usize,
    kv_heads: usize,
    group: usize,
    /// As the host says them: too long and negative ones too.
    lengths: Vec<i32>,
    /// Empty: all heads, no list.
    keep: Vec<i32>,
    selected: bool,
    window: u32,
    /// Layers whose pages lie in one pool; the last is used.
    layers: usize,
    fused_q: bool,
    leave_rest: bool,
}

fn case() -> Case {
    Case {
        hd: 64,
        kv_heads: 3,
        group: 2,
        lengths: vec![17, 1, 0, 130, 16, -4, 40],
        keep: vec![2, 1, 3, 1, 3, 2, 2],
        selected: true,
        window: 0,
        layers: 1,
        fused_q: false,
        leave_rest: false,
    }
}

const MAX_PAGES: usize = 9;

fn attention(bench: &Bench, c: &Case) -> Vec<u8> {
    let mut rng = Rng(c.hd as u64 + c.kv_heads as u64);
    let (n, heads) = (c.lengths.len(), c.kv_heads * c.group);
    let lengths: Vec<usize> = c.lengths.iter().map(|&l| l.clamp(0, 16 * MAX_PAGES as i32) as usize).collect();
    let mut cache = Cache::new(&mut rng, T, c.hd, c.kv_heads, &lengths);
    let q = rng.vector(n * heads * c.hd, 1.0, T);
    let (mut expected, mut logs, mut computed) = (vec![], vec![], vec![]);
    let mut selected = vec![0xffffu16; n * c.kv_heads];
    for b in 0..n {
        let wanted = c.keep.get(b).map_or(c.kv_heads, |&k| (k as u32).min(c.kv_heads as u32) as usize);
        let mut kept: Vec<usize> = (0..wanted).collect();
        if c.selected {
            kept = rng.shuffled(c.kv_heads)[..wanted].to_vec();
            for (j, &head) in kept.iter().enumerate() {
                selected[b * c.kv_heads + j] = head as u16;
            }
        }
        let start = if c.window == 0 { 0 } else { lengths[b].saturating_sub(c.window as usize) };
        for head in 0..c.kv_heads {
            let run = kept.contains(&head) && lengths[b] > 0;
            for r in 0..c.group {
                let at = (b * heads + head * c.group + r) * c.hd;
                computed.push(run);
                if run {
                    expected.extend(cache.attend(b, head, &q[at..at + c.hd], start, lengths[b]));
                    logs.extend(expected.pop());
                } else {
                    expected.extend(vec![0.0; c.hd]);
                    logs.push(f64::NEG_INFINITY);
                }
            }
            if !run {
                cache.poison(b, head);
            }
        }
    }
    // Behind a sequence's last page the table holds what would crash.
    let stride = MAX_PAGES + 2;
    let mut table = vec![i32::MAX; n * stride];
    for (b, pages) in cache.tables.iter().enumerate() {
        for (i, &page) in pages.iter().enumerate() {
            table[b * stride + i] = page as i32;
        }
    }
    // Pages of several layers in turn: [page][layer][kv_head]…
    let page = c.kv_heads * 32 * c.hd;
    let mut pool = vec![f64::NAN; cache.pool.len() * c.layers];
    for (i, from) in cache.pool.chunks(page).enumerate() {
        pool[(i * c.layers + c.layers - 1) * page..][..page].copy_from_slice(from);
    }
    let row = heads * c.hd;
    let q_stride = if c.fused_q { row + 2 * c.kv_heads * c.hd } else { row };
    let mut rows = vec![f64::NAN; n * q_stride];
    for (to, from) in rows.chunks_mut(q_stride).zip(q.chunks(row)) {
        to[..row].copy_from_slice(from);
    }
    let ops = ops(bench);
    let mut op = Attention {
        sequences: n as u32,
        heads: heads as u32,
        kv_heads: c.kv_heads as u32,
        head_dim: c.hd as u32,
        max_pages: MAX_PAGES as u32,
        table_stride: stride as u32,
        window: c.window,
        q_stride: if c.fused_q { q_stride as u64 } else { 0 },
        page_stride: if c.layers > 1 { (page * c.layers) as u64 } else { 0 },
        q: bench.half(&rows, T),
        kv: bench.half(&pool, T).offset((2 * page * (c.layers - 1)) as u64),
        block_table: ints(bench, &table),
        lengths: ints(bench, &c.lengths),
        keep: if c.keep.is_empty() { Ptr::NULL } else { ints(bench, &c.keep) },
        selected: if c.selected { shorts(bench, &selected) } else { Ptr::NULL },
        out: bench.room(2 * n * row),
        lse: bench.room(4 * n * heads),
        leave_rest: c.leave_rest,
        ..nothing()
    };
    op.workspace = workspace(bench, ops.attention_workspace(&op).unwrap());
    ops.attention_plan(&op, bench).unwrap();
    // Twice: a second layer finds the plan and the counters as the first did.
    for _ in 0..2 {
        ops.attention(&op, bench).unwrap();
    }
    let (got, got_logs) = (bench.read_half(op.out, n * row, T), bench.read_floats(op.lse, n * heads));
    let (mut a, mut b) = (vec![], vec![]);
    for (i, &run) in computed.iter().enumerate() {
        let (x, y) = (&got[i * c.hd..][..c.hd], &expected[i * c.hd..][..c.hd]);
        if run {
            a.extend(x);
            b.extend(y);
            assert!((got_logs[i] - logs[i]).abs() < 1e-3, "log-sum-exp {} of head {i}", got_logs[i]);
        } else if c.leave_rest {
            assert!(x.iter().all(|v| v.is_nan()) && got_logs[i].is_nan(), "head {i} was written");
        } else {
            assert!(x.iter().all(|&v| v == 0.0) && got_logs[i] == f64::NEG_INFINITY, "head {i} is not zero");
        }
    }
    close(&a, &b, 4e-3, "attention");
    bench.bytes(op.out, 2 * n * row)
}

#[test]
pub fn attention_follows_the_hosts_tables() {
    orders(|b| attention(b, &case()));
    for c in [
        Case { keep: vec![], selected: false, ..case() },
        Case { keep: vec![], selected: false, leave_rest: true, ..case() },
        // Without a list, the first heads; outside 0 to 3, all.
        Case { keep: vec![2, -1, 1, 9, 0, 3, 1], selected: false, ..case() },
        Case { leave_rest: true, ..case() },
        Case { window: 20, ..case() },
        Case { layers: 3, fused_q: true, hd: 80, ..case() },
        Case { lengths: vec![i32::MAX, 144, 145, 5, 0, 0, i32::MIN], ..case() },
        Case { group: 16, lengths: vec![70], keep: vec![1], ..case() },
    ] {
        attention(&Bench::new(3), &c);
    }
}

/// More sequences than the plan takes at a time.
#[test]
fn attention_plans_hundreds_of_sequences() {
    let lengths: Vec<i32> = (0..600).map(|b| b * 7 % 23).collect();
    let keep: Vec<i32> = (0..600).map(|b| b % 2 + 1).collect();
    let c = Case { kv_heads: 2, group: 1, lengths, keep, ..case() };
    attention(&Bench::new(0), &c);
}

/// The error of a call that must be refused before it starts anything.
#[track_caller]
pub fn refused(result: polar_sparsity::Result<()>, status: Status, words: &[&str]) {
    let error = result.expect_err("refused");
    assert_eq!(error.status, status, "{error}");
    for word in words {
        assert!(error.message.contains(word), "{error} does not name {word}");
    }
}

#[test]
fn attention_arguments_are_checked() {
    let bench = &Bench::new(0);
    let ops = ops(bench);
    // A GPU's many multiprocessors want more workspace than the executor's few.
    let bytes = 1 << 23;
    let room = bench.room(bytes);
    let good = Attention {
        heads: 4,
        kv_heads: 2,
        q: room,
        kv: room,
        block_table: room,
        lengths: room,
        out: room,
        workspace: Workspace { at: room, bytes: bytes as u64 },
        ..nothing()
    };
    let needed = ops.attention_workspace(&good).unwrap();
    assert!(needed <= bytes as u64, "{needed}");
    type Spoil = fn(&mut Attention);
    let both: [(Status, &[&str], Spoil); 13] = [
        (Status::E_INVALID, &["num_sequences", "0"], |o| o.sequences = 0),
        (Status::E_LIMIT, &["num_sequences", "70000"], |o| o.sequences = 70_000),
        (Status::E_INVALID, &["num_heads is 3", "num_kv_heads 2"], |o| o.heads = 3),
        (Status::E_LIMIT, &["num_kv_heads is 257"], |o| o.kv_heads = 257),
        (Status::E_UNSUPPORTED, &["17 query heads"], |o| o.heads = 34),
        (Status::E_UNSUPPORTED, &["head size 72"], |o| o.head_dim = 72),
        (Status::E_UNSUPPORTED, &["float32"], |o| o.dtype = DType::F32),
        (Status::E_INVALID, &["max_pages is 0"], |o| o.max_pages = 0),
        (Status::E_LIMIT, &["num_sequences 60000", "max_pages 100000"], |o| {
            (o.sequences, o.max_pages) = (60_000, 100_000);
        }),
        (Status::E_INVALID, &["block_table_stride is 3", "max_pages 4"], |o| {
            (o.max_pages, o.table_stride) = (4, 3);
        }),
        (Status::E_INVALID, &["scale is NaN"], |o| o.scale = f32::NAN),
        (Status::E_INVALID, &["scale is -1"], |o| o.scale = -1.0),
        (Status::E_INVALID, &["head_dim is 0"], |o| o.head_dim = 0),
    ];
    for (status, words, spoil) in both {
        let mut op = good;
        spoil(&mut op);
        refused(ops.attention_workspace(&op).map(|_| ()), status, words);
        refused(ops.attention_plan(&op, bench), status, words);
        refused(ops.attention(&op, bench), status, words);
    }
    let run: [(&[&str], Spoil); 10] = [
        (&["q is NULL"], |o| o.q = Ptr::NULL),
        (&["q is at", "16"], |o| o.q.0 += 8),
        (&["kv is NULL"], |o| o.kv = Ptr::NULL),
        (&["out is NULL"], |o| o.out = Ptr::NULL),
        (&["block_table is NULL"], |o| o.block_table = Ptr::NULL),
        (&["selected is at"], |o| o.selected.0 = 1),
        (&["page_stride is 2040"], |o| o.page_stride = 2040),
        (&["head_stride is 2052"], |o| o.head_stride = 2052),
        (&["q_stride is 248", "256"], |o| o.q_stride = 248),
        (&["workspace is NULL"], |o| o.workspace.at = Ptr::NULL),
    ];
    for (words, spoil) in run {
        let mut op = good;
        spoil(&mut op);
        refused(ops.attention(&op, bench), Status::E_INVALID, words);
    }
    let mut op = good;
    op.workspace.bytes = needed - 1;
    let words = [format!("{}", needed - 1), format!("{needed}")];
    refused(ops.attention(&op, bench), Status::E_INVALID, &words.each_ref().map(|w| &**w));
    refused(ops.attention_plan(&op, bench), Status::E_INVALID, &["workspace_bytes"]);
    op = good;
    op.lengths = Ptr::NULL;
    refused(ops.attention_plan(&op, bench), Status::E_INVALID, &["seq_lens is NULL"]);
}

/// A router of the host's own shape, and scores the host brings: the same heads, and zeros for the rest.
#[test]
fn heads_are_those_with_the_largest_scores() {
    for (kv_heads, rows) in [(8, 8), (8, 32), (5, 5)] {
        orders(|b| heads(b, kv_heads, rows));
    }
}

fn heads(bench: &Bench, kv_heads: usize, router_rows: usize) -> Vec<u8> {
    let mut rng = Rng(router_rows as u64);
    let (n, hidden, width) = (5, 136, 64);
    let x = rng.vector(n * hidden, 1.0, T);
    let weight = rng.vector(router_rows * hidden, 0.1, T);
    let bias = rng.vector(router_rows, 0.1, T);
    let keep = [1, 2, 3, 5, -1];
    let mut plain = vec![];
    for row in x.chunks(hidden) {
        plain.extend(weight.chunks(hidden).map(|w| w.iter().zip(row).map(|(a, b)| a * b).sum::<f64>()));
    }
    let ops = ops(bench);
    let mut op = HeadSelection {
        dtype: T,
        sequences: n as u32,
        hidden: hidden as u32,
        kv_heads: kv_heads as u32,
        router_rows: router_rows as u32,
        unit_width: width as u32,
        x: bench.half(&x, T),
        weight: bench.half(&weight, T),
        bias: bench.half(&bias, T),
        logits: Ptr::NULL,
        keep: ints(bench, &keep),
        selected: bench.room(2 * n * kv_heads),
        zero: bench.room(2 * n * kv_heads * width),
        nan_count: bench.words(&[0]),
        workspace: Workspace::default(),
    };
    let mut all = vec![];
    for own_scores in [false, true] {
        if own_scores {
            op.logits = bench.floats(&plain);
            (op.x, op.weight, op.hidden) = (Ptr::NULL, Ptr::NULL, 0);
        }
        op.workspace = workspace(bench, ops.head_selection_workspace(&op).unwrap());
        ops.head_selection(&op, bench).unwrap();
        let got = bench.bytes(op.selected, 2 * n * kv_heads);
        let zeros = bench.read_half(op.zero, n * kv_heads * width, T);
        for b in 0..n {
            let group = router_rows / kv_heads;
            let score = |u: usize| {
                (u * group..(u + 1) * group)
                    .map(|i| plain[b * router_rows + i] + bias[i])
                    .fold(f64::MIN, f64::max)
            };
            let mut order: Vec<usize> = (0..kv_heads).collect();
            order.sort_by(|&i, &j| score(j).total_cmp(&score(i)).then(i.cmp(&j)));
            let kept = (keep[b] as u32).min(kv_heads as u32) as usize;
            let mut expected = order[..kept].to_vec();
            expected.sort_unstable();
            let list: Vec<usize> = got[2 * b * kv_heads..][..2 * kept]
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&v| usize::from(u16::from_le_bytes(v)))
                .collect();
            assert_eq!(list, expected, "sequence {b}");
            for u in 0..kv_heads {
                let row = &zeros[(b * kv_heads + u) * width..][..width];
                assert!(row.iter().all(|v| if expected.contains(&u) { v.is_nan() } else { *v == 0.0 }));
            }
        }
        all.extend(got);
    }
    assert_eq!(bench.read_words(op.nan_count, 1), [0]);
    all
}
