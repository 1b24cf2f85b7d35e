//! Decode attention against softmax(q k) v in f64.

use crate::bench::{Bench, Rng, close};
use crate::orders;
use crate::router::Scores;
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::line::{Line, Worker};
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

pub const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// A cache of sequences in shuffled pages; everything that is not a token of theirs is NaN.
pub struct Cache {
    dtype: DType,
    hd: usize,
    kv_heads: usize,
    /// `[page][kv_head][K|V][16][hd]`
    pub pool: Vec<f64>,
    /// Block table of each sequence.
    pub tables: Vec<Vec<u32>>,
}

impl Cache {
    pub fn new(rng: &mut Rng, dtype: DType, hd: usize, kv_heads: usize, lengths: &[usize]) -> Cache {
        let pages: usize = lengths.iter().map(|l| l.div_ceil(16)).sum();
        let mut ids = rng.shuffled(pages + 3).into_iter();
        let mut cache = Cache {
            dtype,
            hd,
            kv_heads,
            pool: vec![f64::NAN; (pages + 3) * kv_heads * 32 * hd],
            tables: vec![],
        };
        for &length in lengths {
            let table: Vec<u32> = (0..length.div_ceil(16)).map(|_| ids.next().unwrap() as u32).collect();
            for token in 0..length {
                for head in 0..kv_heads {
                    for kv in 0..2 {
                        let at = cache.at(table[token / 16], head, kv, token % 16);
                        let row = rng.vector(hd, 1.0, dtype);
                        cache.pool[at..at + hd].copy_from_slice(&row);
                    }
                }
            }
            cache.tables.push(table);
        }
        cache
    }
    pub fn at(&self, page: u32, head: usize, kv: usize, place: usize) -> usize {
        (((page as usize * self.kv_heads + head) * 2 + kv) * 16 + place) * self.hd
    }
    /// The output for one query, and the log of the sum of exponentials as its last element.
    pub fn attend(&self, b: usize, head: usize, q: &[f64], from: usize, to: usize) -> Vec<f64> {
        let row = |token: usize, kv| {
            let at = self.at(self.tables[b][token / 16], head, kv, token % 16);
            &self.pool[at..at + self.hd]
        };
        let scores: Vec<f64> = (from..to)
            .map(|t| q.iter().zip(row(t, 0)).map(|(a, b)| a * b).sum::<f64>() / (self.hd as f64).sqrt())
            .collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let mut out = vec![0.0; self.hd];
        for (t, s) in (from..to).zip(&scores) {
            for (o, v) in out.iter_mut().zip(row(t, 1)) {
                *o += (s - max).exp() / sum * v;
            }
        }
        out.push(max + sum.ln());
        out
    }
    /// Poisons the pages of a head of a sequence.
    pub fn poison(&mut self, b: usize, head: usize) {
        for page in self.tables[b].clone() {
            let at = self.at(page, head, 0, 0);
            self.pool[at..at + 32 * self.hd].fill(f64::NAN);
        }
    }
}

struct Case {
    dtype: DType,
    hd: usize,
    kv_heads: usize,
    group: usize,
    lengths: Vec<usize>,
    /// Kept heads of each sequence; empty: all, dense.
    keep: Vec<usize>,
    window: usize,
    multiprocessors: u32,
    min_pages: u32,
    early: bool,
    worker: Worker,
    /// Least pages of a piece on the line; not 0: a worker for each.
    pages: u32,
    /// Neurons of an MLP router whose scores are taken along, its rank, and how many are chosen; 0: none.
    scores: (usize, usize, usize),
    /// These scores instead, whatever is in them.
    given: Vec<f32>,
}

/// The output as bytes and the reference.
fn decode(bench: &Bench, c: &Case) -> Vec<u8> {
    let mut rng = Rng(c.hd as u64 * 1000 + c.group as u64 * 10 + c.lengths.len() as u64);
    let (n, heads) = (c.lengths.len(), c.kv_heads * c.group);
    let mut cache = Cache::new(&mut rng, c.dtype, c.hd, c.kv_heads, &c.lengths);
    let q = rng.vector(n * heads * c.hd, 1.0, c.dtype);
    let (mut tables, mut first_page, mut tokens, mut skip) = (vec![], vec![], vec![], vec![]);
    let (mut selected, mut keep) = (vec![0xffffu16; n * c.kv_heads], vec![]);
    let (mut expected, mut logs) = (vec![], vec![]);
    for b in 0..n {
        let length = c.lengths[b];
        let start = length.saturating_sub(c.window);
        let mut kept: Vec<usize> = (0..c.kv_heads).collect();
        if !c.keep.is_empty() {
            kept = rng.shuffled(c.kv_heads)[..c.keep[b]].to_vec();
            kept.sort_unstable();
        }
        for (j, &head) in kept.iter().enumerate() {
            selected[b * c.kv_heads + j] = head as u16;
        }
        for head in 0..c.kv_heads {
            for r in 0..c.group {
                let at = (b * heads + head * c.group + r) * c.hd;
                if length == 0 || !kept.contains(&head) {
                    expected.extend(vec![f64::NAN; c.hd]);
                    logs.push(f64::NAN);
                } else {
                    expected.extend(cache.attend(b, head, &q[at..at + c.hd], start, length));
                    logs.extend(expected.pop());
                }
            }
        }
        for head in (0..c.kv_heads).filter(|h| !kept.contains(h)) {
            cache.poison(b, head);
        }
        first_page.push((tables.len() + start / 16) as u32);
        tables.extend(&cache.tables[b]);
        tokens.push((length - start / 16 * 16) as u32);
        skip.push((start % 16) as u32);
        let count = if length == 0 { 0 } else { kept.len() as u32 };
        keep.push(count);
    }
    let pieces = keep.iter().copied().zip(tokens.iter().map(|t| t.div_ceil(16)));
    let mut line = Line { worker: c.worker, workers: 0, pages: c.pages };
    let all: u32 = pieces.clone().map(|(keep, pages)| keep * line.piece(pages)).sum();
    line.workers = if c.pages == 0 { (all / c.min_pages).max(1) } else { keep.iter().sum() };
    let prefix: Vec<u32> = line.prefix(pieces).collect();
    tables.push(0);
    let k = Kernels::new(c.dtype, c.hd as u32, c.group as u32, c.multiprocessors, 227 * 1024)
        .unwrap()
        .with_warpgroups(bench.device.warpgroups());
    let (neurons, rank, chosen) = c.scores;
    let scores = (neurons > 0).then(|| {
        let size = (n, neurons, rank);
        if !c.given.is_empty() {
            return Scores::given(bench, &c.given).choosing(bench, chosen);
        }
        if chosen == 0 {
            return Scores::new(bench, size, 0, false);
        }
        // Scores of many sizes, very large and very small ones too, and zeros.
        Scores::with(bench, size, 0, false, &[1.0, 1.0, 1e-7, 3e5, 0.0]).choosing(bench, chosen)
    });
    let (launch, stages) = match scores {
        None => (k.decode(n as u32, c.worker, false), k.stages),
        Some(_) => k.decode_scored(n as u32, c.worker, (chosen > 0).then_some(neurons as u32)).unwrap(),
    };
    let out = bench.room(2 * expected.len());
    let counters = bench.words(&vec![0; n * c.kv_heads]);
    let lse = bench.room(4 * n * heads);
    let page = (c.kv_heads * 32 * c.hd * 2) as u64;
    let params = DecodeParams {
        q: bench.half(&q, c.dtype),
        kv: bench.half(&cache.pool, c.dtype),
        pages: bench.words(&tables),
        first_page: bench.words(&first_page),
        tokens: bench.words(&tokens),
        skip: bench.words(&skip),
        selected: if c.keep.is_empty() {
            Ptr::NULL
        } else {
            bench.raw(&selected.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<_>>())
        },
        keep: bench.words(&keep),
        prefix: bench.words(&prefix),
        out,
        lse,
        parts: bench.room(launch.grid.0 as usize * 2 * c.group * (c.hd + 4) * 4),
        counters,
        page_stride: page,
        head_stride: page / c.kv_heads as u64,
        q_stride: (heads * c.hd) as u64,
        sequences: n as u32,
        heads: heads as u32,
        kv_heads: c.kv_heads as u32,
        stages,
        segment_cost: SEGMENT_COST,
        early: u32::from(c.early),
        scale: LOG2_E / (c.hd as f32).sqrt(),
        late: 0,
        router: scores.as_ref().map(|s| s.params).unwrap_or_default(),
        choice: scores.as_ref().map(|s| s.choice).unwrap_or_default(),
    };
    // The newest page of each sequence is being written until the kernel has waited, or all pages are.
    let page_bytes = (c.kv_heads * 32 * c.hd * 2) as u64;
    *bench.late.lock().unwrap() = match c.early {
        true => cache
            .tables
            .iter()
            .flat_map(|t| t.last())
            .map(|&p| (params.kv.offset(u64::from(p) * page_bytes), page_bytes))
            .collect(),
        false => vec![(params.kv, 2 * cache.pool.len() as u64)],
    };
    bench.start(&launch, &params);
    let got = bench.read_half(out, expected.len(), c.dtype);
    let limit = if c.dtype == DType::BF16 { 4e-3 } else { 1e-3 };
    let (mut a, mut b) = (vec![], vec![]);
    for (x, y) in bench.read_floats(lse, logs.len()).iter().zip(&logs) {
        assert!(x.is_nan() && y.is_nan() || (x - y).abs() <= 1e-3, "log-sum-exp {x}, not {y}");
    }
    for (i, (x, y)) in got.iter().zip(&expected).enumerate() {
        if y.is_nan() {
            assert!(x.is_nan(), "element {i} was written");
        } else {
            a.push(*x);
            b.push(*y);
        }
    }
    close(&a, &b, limit, &format!("decode hd {} group {} {:?}", c.hd, c.group, c.lengths));
    assert!(bench.read_words(counters, n * c.kv_heads).iter().all(|&c| c == 0), "counters are not reset");
    let mut left = bench.bytes(out, 2 * expected.len());
    left.extend(scores.into_iter().flat_map(|s| s.check(bench)));
    left
}

fn case() -> Case {
    Case {
        dtype: DType::BF16,
        hd: 64,
        kv_heads: 3,
        group: 1,
        lengths: vec![0, 1, 15, 16, 17, 130, 0],
        keep: vec![],
        window: usize::MAX,
        multiprocessors: 3,
        min_pages: 4,
        early: true,
        worker: Worker::Small,
        pages: 0,
        scores: (0, 0, 0),
        given: vec![],
    }
}

#[test]
pub fn decode_every_head_size_and_type() {
    for dtype in [DType::BF16, DType::F16] {
        for hd in [64, 80, 96, 128, 256] {
            decode(
                &Bench::new(0),
                &Case { dtype, hd, lengths: vec![0, 1, 17, 83], keep: vec![2; 4], ..case() },
            );
        }
    }
}

#[test]
pub fn decode_every_group() {
    for group in [1, 2, 4, 5, 7, 8, 12, 16] {
        decode(&Bench::new(0), &Case { group, lengths: vec![33, 1, 70], keep: vec![1, 2, 1], ..case() });
    }
}

#[test]
pub fn decode_lengths_workers_and_orders() {
    for (multiprocessors, min_pages) in [(1, 4), (3, 1), (20, 1), (132, 4)] {
        orders(|b| {
            decode(b, &Case { multiprocessors, min_pages, keep: vec![2, 1, 3, 1, 2, 3, 1], ..case() })
        });
    }
}

#[test]
pub fn decode_ragged_long_among_ones() {
    let mut lengths = vec![1; 9];
    lengths[4] = 900;
    decode(&Bench::new(5), &Case { lengths, keep: vec![1; 9], multiprocessors: 7, min_pages: 1, ..case() });
}

#[test]
pub fn decode_window() {
    for (window, early) in [(1, true), (5, false), (16, true), (40, true)] {
        decode(&Bench::new(0), &Case { window, early, lengths: vec![1, 16, 17, 100], group: 2, ..case() });
    }
}

#[test]
fn decode_all_selected_is_dense_bit_for_bit() {
    let dense = decode(&Bench::new(0), &case());
    for early in [false, true] {
        let all = decode(&Bench::new(0), &Case { keep: vec![3; 7], early, ..case() });
        assert!(dense == all);
    }
    assert!(dense == decode(&Bench::new(0), &Case { early: false, ..case() }));
}

/// Blocks of eight warps, with pieces cut by workers, and with a worker for each; pages of the line that no piece has.
#[test]
pub fn decode_in_large_blocks() {
    for dtype in [DType::BF16, DType::F16] {
        for hd in [64, 80, 96, 128] {
            let lengths = vec![0, 1, 17, 283];
            decode(
                &Bench::new(0),
                &Case { dtype, hd, worker: Worker::Large, lengths, keep: vec![2; 4], ..case() },
            );
        }
    }
    use Worker::{Large, Small};
    for (worker, pages, multiprocessors, min_pages) in
        [(Large, 0, 20, 1), (Large, 10, 12, 1), (Small, 9, 2, 1)]
    {
        let keep = vec![2, 1, 3, 1, 2, 3, 1];
        orders(|b| {
            let keep = keep.clone();
            decode(b, &Case { worker, pages, multiprocessors, min_pages, group: 4, keep, ..case() })
        });
    }
    decode(&Bench::new(3), &Case { worker: Large, ..one_long(60, 128, 8) });
}

/// Clusters of blocks for a piece each: fewer pages than warps, clusters without a piece, dense heads, every group.
#[test]
pub fn decode_in_clusters() {
    let clusters = |blocks| Case {
        worker: Worker::Cluster { blocks, most: 13 },
        pages: 20,
        multiprocessors: 48,
        ..case()
    };
    for (dtype, blocks) in [(DType::BF16, 4), (DType::F16, 2)] {
        for hd in [64, 80, 96, 128] {
            let lengths = vec![0, 1, 17, 283];
            decode(&Bench::new(0), &Case { dtype, hd, lengths, keep: vec![2; 4], ..clusters(blocks) });
        }
    }
    for (blocks, group, keep) in [(2, 4, vec![2, 1, 3, 1, 2, 3]), (8, 1, vec![]), (4, 8, vec![1; 6])] {
        orders(|b| {
            let lengths = vec![0, 15, 16, 40, 320, 0];
            decode(b, &Case { group, lengths, keep: keep.clone(), early: group > 1, ..clusters(blocks) })
        });
    }
    decode(&Bench::new(3), &Case { window: 40, lengths: vec![1, 16, 17, 100], ..clusters(2) });
}

/// With the scores of neurons, and with their choice.
#[test]
pub fn decode_takes_scores_along() {
    for dtype in [DType::BF16, DType::F16] {
        for (hd, large, chosen) in [(64, false, 41), (64, true, 0), (128, false, 0), (128, true, 41)] {
            let worker = if large { Worker::Large } else { Worker::Small };
            let case = Case { dtype, hd, worker, ..along((136, 72, chosen)) };
            decode(&Bench::new(0), &Case { lengths: vec![0, 1, 17, 40], keep: vec![1; 4], ..case });
        }
    }
}

fn along(scores: (usize, usize, usize)) -> Case {
    Case { scores, multiprocessors: 3, min_pages: 1, kv_heads: 2, ..case() }
}

/// Fewer and more tiles of neurons than blocks, blocks without pages, dense heads, every number of rows.
#[test]
fn decode_takes_scores_of_any_number_along() {
    for (scores, keep, worker) in
        [((40, 64, 40), vec![], Worker::Large), ((430, 72, 130), vec![2, 1, 2, 1, 2, 1], Worker::Small)]
    {
        orders(|b| {
            let lengths = vec![0, 1, 15, 16, 17, 40];
            decode(b, &Case { worker, lengths, keep: keep.clone(), group: 4, ..along(scores) })
        });
    }
    for (rows, rank, chosen) in [(9, 1024, 0), (33, 72, 100), (34, 72, 130), (64, 72, 7)] {
        let lengths: Vec<_> = (0..rows).map(|i| i * 7 % 20).collect();
        decode(&Bench::new(3), &Case { keep: vec![1; rows], lengths, ..along((136, rank, chosen)) });
    }
    // Nothing to attend to.
    decode(&Bench::new(0), &Case { lengths: vec![0; 3], ..along((136, 72, 8)) });
}

/// The block that chooses, among scores of every kind: ties, few and many of them, and what is no number.
#[test]
pub fn decode_chooses_among_any_scores() {
    let mut rng = Rng(11);
    let mut spread: Vec<f32> = (0..2500).map(|_| (rng.normal() * 3.0).exp() as f32).collect();
    let even: Vec<f32> = (0..1600).map(|_| rng.normal().abs() as f32).collect();
    let ties: Vec<f32> = (0..1600).map(|i| 1.0 + (i * 37 % 5) as f32 * 1e-6).collect();
    let pairs: Vec<f32> = (0..1200).map(|i| 1.0 + (i / 2 * 37 % 600) as f32 * 1e-5).collect();
    let relu: Vec<f32> = (0..1000).map(|_| (rng.normal() as f32).max(0.0)).collect();
    let mut odd = vec![0.0f32; 700];
    for (at, v) in [(3, f32::INFINITY), (4, f32::NAN), (699, 1e-45), (31, 1e-45), (600, f32::MAX)] {
        odd[at] = v;
    }
    (spread[0], spread[1]) = (1e30, 1e-30);
    // More than 32 for each thread of either size of block.
    let mut many: Vec<f32> = (0..9003).map(|_| (rng.normal() as f32 - 0.5).max(0.0)).collect();
    (many[17], many[9002]) = (f32::NAN, f32::NAN);
    let lists: [(Vec<f32>, &[usize]); 10] = [
        (spread, &[1, 2, 7, 640, 2499, 2500]),
        (many, &[900, 6001, 9002]),
        (even, &[1, 160, 480, 1599]),
        (ties, &[1, 320, 321, 800, 1599]),
        (pairs, &[1, 2, 3, 601, 1199]),
        (relu, &[100, 700, 1000]),
        (odd, &[1, 2, 3, 4, 5, 320, 699, 700]),
        (vec![0.75; 600], &[1, 333, 599]),
        (vec![0.0; 600], &[1, 33, 600]),
        (vec![f32::NAN; 300], &[1, 33, 300]),
    ];
    for (given, keeps) in lists {
        for (i, &keep) in keeps.iter().enumerate() {
            let worker = if i % 2 == 0 { Worker::Large } else { Worker::Small };
            let case = along((given.len(), 8, keep));
            decode(&Bench::new(i as u32), &Case { lengths: vec![17], worker, given: given.clone(), ..case });
        }
    }
}

/// A sequence of one KV head, in as many parts as there are workers.
fn one_long(pages: usize, hd: usize, group: usize) -> Case {
    let lengths = vec![16 * pages + 3];
    Case { hd, group, kv_heads: 1, lengths, multiprocessors: 20, min_pages: 1, ..case() }
}

/// More parts than are merged at once, and more sequences than one look at the table finds.
#[test]
fn decode_many_parts_and_many_sequences() {
    for (hd, group) in [(64, 1), (128, 4), (256, 2), (80, 16)] {
        decode(&Bench::new(3), &one_long(40, hd, group));
    }
    for n in [31, 32, 33, 64, 65, 1030] {
        let lengths = (0..n).map(|i| if i % 5 == 1 { 0 } else { 1 + i * 7 % 40 }).collect();
        decode(&Bench::new(0), &Case { lengths, kv_heads: 1, multiprocessors: 4, min_pages: 1, ..case() });
    }
}

#[test]
fn unsupported_shapes_are_errors() {
    for (dtype, hd, group) in
        [(DType::F32, 64, 1), (DType::BF16, 72, 1), (DType::BF16, 64, 17), (DType::BF16, 256, 9)]
    {
        assert!(Kernels::new(dtype, hd, group, 1, 227 * 1024).is_err());
    }
    // The device trait's own contract, as the engine relies on it.
    let bench = Bench::new(0);
    let at = bench.room(8);
    bench.device.zero(at, 8).unwrap();
    assert_eq!(bench.bytes(at, 8), [0; 8]);
}
