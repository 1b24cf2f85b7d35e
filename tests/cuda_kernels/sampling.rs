//! Sampling on the device against `sample::sample`: the same tokens for the same seeds, and where they
//! differ (a GPU's exp is not the host's to the last bit), the draw must lie on a boundary in f64.

use crate::bench::{Bench, Rng};
use polar_sparsity::backend::cuda::device::{AnyDevice, Device, start};
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::sampling::{Request, Sampling};
use polar_sparsity::backend::{Limits, Report};
use polar_sparsity::dtype::DType;
use polar_sparsity::sample::{self, Params};
use std::sync::Arc;

const WARM: Params = Params { temperature: 1.0, ..Params::GREEDY };

/// One row of logits and the request that owns it.
#[derive(Clone)]
struct Case {
    id: u64,
    logits: Vec<f32>,
    tokens: Vec<u32>,
    prompt: usize,
    params: Params,
}

impl Case {
    fn new(logits: &[f32], params: Params) -> Case {
        Case { id: 1, logits: logits.to_vec(), tokens: vec![0; 5], prompt: 5, params }
    }
}

/// Token, log probability and alternatives; `None` for a broken row.
type Outcome = Option<(u32, f32, Vec<(u32, f32)>)>;

/// A sampler and the device it runs on.
struct Sampler {
    device: Arc<AnyDevice>,
    sampling: Sampling<AnyDevice>,
    vocab: usize,
    rows: usize,
}

impl Sampler {
    fn new(seed: u32, rows: usize, vocab: usize) -> Sampler {
        let device = Arc::new(AnyDevice(Bench::new(seed).device));
        let kernels = Kernels::new(DType::BF16, 64, 1, device.multiprocessors(), 227 * 1024).unwrap();
        let sampling = Sampling::new(&device, &kernels, rows, vocab).unwrap();
        Sampler { device, sampling, vocab, rows }
    }

    fn run(&mut self, cases: &[Case]) -> Vec<Outcome> {
        let bytes: Vec<u8> = cases.iter().flat_map(|c| &c.logits).flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(bytes.len(), 4 * self.vocab * cases.len());
        let logits = self.device.alloc(bytes.len() as u64).unwrap();
        self.device.copy_in(logits, &bytes).unwrap();
        self.sampling.clear().unwrap();
        let (launch, params) = self.sampling.likeliest(logits, cases.len() as u32);
        start(&*self.device, &launch, &params).unwrap();
        for (row, c) in cases.iter().enumerate() {
            let request =
                Request { row, sequence: c.id, tokens: &c.tokens, prompt_len: c.prompt, params: &c.params };
            self.sampling.add(&request).unwrap();
        }
        self.sampling.run(logits).unwrap();
        let limits = Limits { max_batch: self.rows, max_rows: self.rows, pages: 1, max_context: 1 };
        let mut report = Report::with_limits(&limits).unwrap();
        self.sampling.fetch().unwrap();
        self.device.synchronize().unwrap();
        self.sampling.report(cases.len(), &mut report);
        self.device.free(logits);
        let of = |s: &polar_sparsity::backend::Sampled| {
            let top = report.top[s.first_top as usize..][..s.n_top as usize].to_vec();
            (!s.broken).then_some((s.token, s.logprob, top))
        };
        report.sampled.iter().map(of).collect()
    }
}

fn on_host(c: &Case) -> Outcome {
    let mut scratch = sample::Scratch::new(c.logits.len()).unwrap();
    let mut top = vec![];
    let params = Params { logprob: true, ..c.params };
    let put = |t, l| top.push((t, l));
    let choice = sample::sample(&c.logits, &c.tokens, c.prompt, &params, &mut scratch, put)?;
    Some((choice.token, choice.logprob, top))
}

/// Every token that a draw within 1e-6 of the exact one, of a nucleus within 1e-6, could give.
fn on_the_boundary(c: &Case) -> Vec<u32> {
    let p = &c.params;
    let mut logits = c.logits.clone();
    let mut counts = vec![(false, 0u32); logits.len()];
    for (i, &t) in c.tokens.iter().enumerate() {
        let count = &mut counts[t as usize];
        *count = (true, count.1 + u32::from(i >= c.prompt));
    }
    for (x, &(seen, output)) in logits.iter_mut().zip(&counts) {
        if seen {
            *x = if *x > 0.0 { *x / p.repetition_penalty } else { *x * p.repetition_penalty };
        }
        if output > 0 {
            *x -= p.presence_penalty + p.frequency_penalty * output as f32;
        }
    }
    let max = logits.iter().copied().filter(|x| x.is_finite()).fold(f32::NEG_INFINITY, f32::max);
    let inverse = 1.0 / p.temperature;
    let floor = if p.min_p > 0.0 { p.min_p.ln().max(-104.0) } else { -104.0 };
    let mut kept: Vec<usize> = (0..logits.len())
        .filter(|&i| logits[i].is_finite() && (logits[i] - max) * inverse >= floor)
        .collect();
    let best_first =
        |kept: &mut Vec<usize>| kept.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if p.top_k > 0 {
        best_first(&mut kept);
        kept.truncate(p.top_k as usize);
    }
    kept.sort_unstable();
    if p.top_p < 1.0 {
        best_first(&mut kept);
    }
    let weight = |i: usize| f64::from((logits[i] - max) * inverse).exp();
    let mut sums = vec![];
    let mut sum = 0.0;
    for &i in &kept {
        sum += weight(i);
        sums.push(sum);
    }
    let mut out = vec![];
    for slip in [-1e-6, 0.0, 1e-6] {
        let mass = f64::from(p.top_p) * sum * (1.0 + slip);
        let n = if p.top_p < 1.0 { sums.iter().filter(|&&s| s < mass).count() + 1 } else { kept.len() };
        let n = n.min(kept.len());
        for slip in [-1e-6, 0.0, 1e-6] {
            let at = (uniform(p.seed, c.tokens.len() as u64) + slip) * sums[n - 1];
            let place = sums[..n].iter().filter(|&&s| s <= at).count().min(n - 1);
            out.push(kept[place] as u32);
        }
    }
    out
}

/// The engine's random numbers, written down again: seeds must mean the same everywhere.
fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |v: u64| Rng(v).bits();
    (mix(mix(seed) ^ position) >> 11) as f64 / (1u64 << 53) as f64
}

/// Holds outcomes against the host's. Returns how many tokens differ (each on a boundary).
#[track_caller]
fn same(cases: &[Case], got: &[Outcome]) -> usize {
    let mut differ = 0;
    for (c, got) in cases.iter().zip(got) {
        let want = on_host(c);
        let what = format!("vocab {}, {} tokens, {:?}", c.logits.len(), c.tokens.len(), c.params);
        let (Some(got), Some(want)) = (got, &want) else {
            assert_eq!(got, &want, "{what}");
            continue;
        };
        if got.0 != want.0 {
            assert!(c.params.temperature > 0.0, "{what}: {} for {}", got.0, want.0);
            let near = on_the_boundary(c);
            assert!(near.contains(&got.0) && near.contains(&want.0), "{what}: {} for {}", got.0, want.0);
            differ += 1;
        }
        let close = |a: f32, b: f32| a == b || (a - b).abs() <= 2e-5 + 2e-6 * b.abs();
        assert!(got.0 != want.0 || close(got.1, want.1), "{what}: {} for {}", got.1, want.1);
        let tokens = |top: &[(u32, f32)]| top.iter().map(|t| t.0).collect::<Vec<_>>();
        assert_eq!(tokens(&got.2), tokens(&want.2), "{what}");
        for (a, b) in got.2.iter().zip(&want.2) {
            assert!(close(a.1, b.1), "{what}: {a:?} for {b:?}");
        }
    }
    differ
}

fn logits(rng: &mut Rng, vocab: usize, scale: f64) -> Vec<f32> {
    (0..vocab).map(|_| (rng.normal() * scale) as f32).collect()
}

/// Every kind of parameters, for `vocab` tokens.
fn settings(vocab: usize) -> Vec<Params> {
    let mut all = vec![Params::GREEDY];
    let k = vocab as u32;
    for temperature in [1e-45, 0.3, 1.0, 100.0] {
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (0, 1.0, 0.05),
            (1, 1.0, 0.0),
            (7, 1.0, 0.0),
            (k, 1.0, 0.0),
            (k.saturating_sub(1), 0.9, 0.0),
            (u32::MAX, 0.5, 0.0),
            (0, 0.9, 0.0),
            (0, 0.999_999, 0.0),
            (0, f32::MIN_POSITIVE, 0.0),
            (0, 0.7, 0.1),
            (50, 0.7, 1e-4),
            (5, 0.2, 1.0),
        ] {
            all.push(Params { temperature, top_k, top_p, min_p, ..Params::GREEDY });
        }
    }
    let penalties =
        [(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 0.31), (0.8, -0.5, 0.2), (100.0, 100.0, 100.0)];
    let n = all.len();
    for i in 0..n {
        let (repetition_penalty, presence_penalty, frequency_penalty) = penalties[i % penalties.len()];
        all.push(Params { repetition_penalty, presence_penalty, frequency_penalty, ..all[i] });
    }
    for (i, p) in all.iter_mut().enumerate() {
        p.n_logprobs = [0, 0, 1, 5, 20][i % 5];
        p.seed = 1000 + i as u64;
    }
    all
}

#[test]
fn sampling_is_the_hosts_for_every_kind_of_parameters() {
    every_kind(&[(1, 1.0), (129, 4.0), (5003, 0.01), (9001, 2.0)]);
}

/// The same where it takes little time.
pub fn every_kind_of_few_tokens() {
    every_kind(&[(1300, 0.5)]);
}

/// Vocabularies and scales of their logits.
fn every_kind(vocabularies: &[(usize, f64)]) {
    let mut rng = Rng(40);
    let (mut differ, mut all) = (0, 0);
    for &(vocab, scale) in vocabularies {
        let settings = settings(vocab);
        let mut sampler = Sampler::new(3, 16, vocab);
        for (round, chunk) in settings.chunks(16).enumerate() {
            let cases: Vec<Case> = chunk
                .iter()
                .enumerate()
                .map(|(row, &params)| {
                    let length = 1 + rng.below(60);
                    Case {
                        id: (16 * round + row) as u64 + 1,
                        logits: logits(&mut rng, vocab, scale),
                        tokens: (0..length).map(|_| rng.below(vocab.min(40)) as u32).collect(),
                        prompt: 1 + rng.below(length),
                        params,
                    }
                })
                .collect();
            let got = sampler.run(&cases);
            differ += same(&cases, &got);
            all += cases.len();
        }
    }
    eprintln!("{differ} of {all} tokens differ, each on a boundary");
    assert!(differ * 100 <= all);
}

#[test]
pub fn ties_go_to_the_lower_token() {
    // More tokens than a list of candidates holds, all alike; few different values; both zeros.
    let mut rng = Rng(41);
    let flat = vec![2.5f32; 6000];
    let steps: Vec<f32> = (0..6000).map(|_| rng.below(5) as f32).collect();
    let zeros: Vec<f32> = (0..6000).map(|i| if i % 3 == 0 { -0.0 } else { 0.0 }).collect();
    let mut sampler = Sampler::new(9, 16, 6000);
    for row in [flat, steps, zeros] {
        let cases: Vec<Case> = [
            Params { n_logprobs: 20, ..Params::GREEDY },
            Params { top_k: 5, ..WARM },
            Params { top_k: 4500, ..WARM },
            Params { top_k: 4500, top_p: 0.4, ..WARM },
            Params { top_p: 0.5, ..WARM },
            Params { top_p: 0.99, n_logprobs: 3, ..WARM },
            WARM,
        ]
        .into_iter()
        .flat_map(|p| [1u64, 2].map(|seed| Case::new(&row, Params { seed, ..p })))
        .collect();
        assert_eq!(same(&cases, &sampler.run(&cases)), 0);
    }
}

#[test]
fn what_is_not_finite_is_impossible() {
    let mut rng = Rng(42);
    let vocab = 700;
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let mut holes = logits(&mut rng, vocab, 3.0);
    for (i, x) in holes.iter_mut().enumerate() {
        match i % 7 {
            0 => *x = nan,
            1 => *x = -inf,
            2 => *x = inf,
            _ => {}
        }
    }
    let mut one = vec![-inf; vocab];
    one[333] = -1e30;
    let mut wide = vec![-f32::MAX; vocab];
    wide[1] = f32::MAX;
    let broken = [vec![nan; vocab], vec![-inf; vocab], vec![inf; vocab]];
    let mut sampler = Sampler::new(5, 16, vocab);
    for row in [holes, one, wide].into_iter().chain(broken) {
        let penalised = Params { repetition_penalty: 2.0, frequency_penalty: 1.0, ..Params::GREEDY };
        let cases: Vec<Case> = [
            Params { n_logprobs: 20, ..Params::GREEDY },
            penalised,
            Params { temperature: 1.0, ..penalised },
            Params { temperature: 1.0, top_k: 3, ..penalised },
            WARM,
            Params { top_k: 10, n_logprobs: 2, ..WARM },
            Params { top_p: 0.8, ..WARM },
            Params { min_p: 0.2, ..WARM },
        ]
        .into_iter()
        .enumerate()
        .map(|(i, p)| Case { id: i as u64 + 1, tokens: vec![3, 4, 5, 5], prompt: 2, ..Case::new(&row, p) })
        .collect();
        same(&cases, &sampler.run(&cases));
    }
    // Penalties that leave nothing finite.
    let row = vec![f32::MAX; vocab];
    let params = Params { repetition_penalty: 0.01, ..WARM };
    let everything: Vec<u32> = (0..vocab as u32).collect();
    let cases = [params, Params { temperature: 0.0, ..params }, Params { top_k: 2, ..params }].map(|p| {
        Case { id: u64::from(p.top_k) + 90, tokens: everything.clone(), prompt: 1, ..Case::new(&row, p) }
    });
    assert_eq!(on_host(&cases[0]), None);
    for case in cases {
        same(std::slice::from_ref(&case), &sampler.run(std::slice::from_ref(&case)));
    }
}

#[test]
pub fn counts_follow_sequences_that_grow_leave_and_return() {
    let mut rng = Rng(43);
    let (vocab, rows) = (300, 3);
    let mut sampler = Sampler::new(0, rows, vocab);
    let params = Params {
        temperature: 0.8,
        repetition_penalty: 1.4,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        ..Params::GREEDY
    };
    // One prompt is longer than what is counted in one launch.
    let mut cases: Vec<Case> = (0..7)
        .map(|i| {
            let length = if i == 2 { 40_000 } else { 10 + rng.below(20) };
            let tokens: Vec<u32> = (0..length).map(|_| rng.below(vocab / 2) as u32).collect();
            Case { id: i + 1, tokens, prompt: length, ..Case::new(&[], Params { seed: i, ..params }) }
        })
        .collect();
    for step in 0..30 {
        // Which of the seven run changes; the others wait with their tokens unchanged.
        let first = if step % 4 == 3 { rng.below(7) } else { step / 4 % 7 };
        let chosen: Vec<usize> = (0..rows).map(|i| (first + 2 * i) % 7).collect();
        for &i in &chosen {
            cases[i].logits = logits(&mut rng, vocab, 2.0);
        }
        let batch: Vec<Case> = chosen.iter().map(|&i| cases[i].clone()).collect();
        let got = sampler.run(&batch);
        same(&batch, &got);
        for (&i, outcome) in chosen.iter().zip(&got) {
            // A token or, after a host's own choice, several.
            let token = outcome.as_ref().unwrap().0;
            cases[i].tokens.extend(std::iter::repeat_n(token, 1 + step % 2));
        }
    }
    // Another sequence under a number seen before, but shorter, is not taken for it.
    let short = Case { tokens: vec![7, 8], prompt: 1, ..cases[0].clone() };
    same(std::slice::from_ref(&short), &sampler.run(std::slice::from_ref(&short)));
    // A token that is not in the vocabulary is refused, and the sampler goes on.
    sampler.sampling.clear().unwrap();
    let bad = Request { row: 0, sequence: 77, tokens: &[5, 300], prompt_len: 1, params: &params };
    assert!(sampler.sampling.add(&bad).unwrap_err().message.contains("token 300"));
    let again = [cases[1].clone(), Case { id: 78, tokens: vec![5, 5, 6], prompt: 1, ..cases[2].clone() }];
    let again = again.map(|c| Case { logits: logits(&mut rng, vocab, 2.0), ..c });
    same(&again, &sampler.run(&again));
}

#[test]
fn a_row_is_sampled_the_same_alone_and_in_any_batch() {
    let mut rng = Rng(44);
    let vocab = 5003;
    let shared = logits(&mut rng, vocab, 2.0);
    let cases: Vec<Case> = [
        WARM,
        Params { top_k: 40, top_p: 0.9, ..WARM },
        Params { top_p: 0.95, n_logprobs: 4, ..WARM },
        Params { repetition_penalty: 1.2, top_k: 9, ..WARM },
        Params { presence_penalty: 2.0, ..Params::GREEDY },
        Params::GREEDY,
    ]
    .into_iter()
    .enumerate()
    .map(|(i, p)| Case { id: i as u64 + 1, ..Case::new(&shared, Params { seed: i as u64, ..p }) })
    .collect();
    let together = Sampler::new(0, 16, vocab).run(&cases);
    for seed in [1, 77] {
        let mut other = Sampler::new(seed, 16, vocab);
        assert_eq!(other.run(&cases), together);
        for (c, want) in cases.iter().zip(&together) {
            assert_eq!(&other.run(std::slice::from_ref(c))[0], want, "alone");
        }
    }
    same(&cases, &together);
}

#[test]
fn draws_follow_the_softmax() {
    let row = [0.0f32, 1.0, 2.0, -1.0];
    let mut sampler = Sampler::new(0, 250, 4);
    let mut counts = [0.0f64; 4];
    for round in 0..8 {
        let cases: Vec<Case> =
            (0..250).map(|i| Case::new(&row, Params { seed: 250 * round + i, ..WARM })).collect();
        let got = sampler.run(&cases);
        same(&cases, &got);
        got.iter().for_each(|o| counts[o.as_ref().unwrap().0 as usize] += 1.0 / 2000.0);
    }
    let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
    for (share, &x) in counts.iter().zip(&row) {
        // Five standard errors.
        assert!((share - f64::from(x).exp() / total).abs() < 0.056, "{counts:?}");
    }
}

#[test]
fn more_tokens_than_chunks_of_the_smallest_size() {
    let mut rng = Rng(45);
    let vocab = 300_001;
    let row = logits(&mut rng, vocab, 2.0);
    let cases = [WARM, Params { top_p: 0.6, ..WARM }].map(|p| Case::new(&row, Params { seed: 3, ..p }));
    same(&cases, &Sampler::new(0, 2, vocab).run(&cases));
}

#[test]
fn a_vocabulary_too_large_is_refused() {
    let device = Arc::new(AnyDevice(Bench::new(0).device));
    let kernels = Kernels::new(DType::BF16, 64, 1, 3, 227 * 1024).unwrap();
    let e = Sampling::new(&device, &kernels, 1, (1 << 20) + 1).err().unwrap();
    assert_eq!(e.status, polar_sparsity::Status::E_UNSUPPORTED);
}
