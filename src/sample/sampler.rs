//! One token from one row of logits. A result depends on the row, the sequence's own tokens and its
//! parameters alone, so it is the same in any batch. Logits that are NaN or infinite count as
//! impossible.

use super::Params;
use crate::error::{Result, try_vec, try_with_capacity};

/// Buffers for one vocabulary; sampling allocates nothing.
#[derive(Debug)]
pub struct Scratch {
    /// Logits after penalties.
    adjusted: Vec<f32>,
    /// Occurrences in the output, zero between calls.
    counts: Vec<u32>,
    /// Tokens still in the race.
    candidates: Vec<u32>,
    /// Their weights.
    weights: Vec<f32>,
}

impl Scratch {
    /// Buffers for `vocab` logits.
    pub fn new(vocab: usize) -> Result<Scratch> {
        Ok(Scratch {
            adjusted: try_vec(vocab, 0.0, "sampling buffer")?,
            counts: try_vec(vocab, 0, "sampling buffer")?,
            candidates: try_with_capacity(vocab, "sampling buffer")?,
            weights: try_with_capacity(vocab, "sampling buffer")?,
        })
    }
}

/// A sampled token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Natural log of its probability under the unmodified logits; 0 when not asked for.
    pub logprob: f32,
}

/// Samples from `logits`. `tokens` is the sequence so far, its first `prompt_len` the prompt. The
/// likeliest alternatives, as many as asked for, go to `top`, likeliest first. `None`: no logit is
/// finite.
pub fn sample(
    logits: &[f32],
    tokens: &[u32],
    prompt_len: usize,
    params: &Params,
    scratch: &mut Scratch,
    mut top: impl FnMut(u32, f32),
) -> Option<Choice> {
    let best = argmax(logits)?;
    let wants = params.logprob || params.n_logprobs > 0;
    let log_sum = if wants { log_sum_exp(logits, logits[best as usize]) } else { 0.0 };
    let token = if params.penalises() {
        penalise(logits, tokens, prompt_len, params, scratch);
        let adjusted = std::mem::take(&mut scratch.adjusted);
        let token = choose(&adjusted, tokens.len(), params, scratch);
        scratch.adjusted = adjusted;
        token?
    } else if params.temperature == 0.0 {
        best
    } else {
        choose(logits, tokens.len(), params, scratch)?
    };
    if params.n_logprobs > 0 {
        let mut likeliest = [(0u32, f32::NEG_INFINITY); super::MAX_LOGPROBS];
        let likeliest = &mut likeliest[..(params.n_logprobs as usize).min(logits.len())];
        for &(token, logit) in top_n(logits, likeliest).iter() {
            top(token, logit - log_sum);
        }
    }
    let logprob = if wants { logits[token as usize] - log_sum } else { 0.0 };
    Some(Choice { token, logprob })
}

/// The lowest index of the largest finite logit.
fn argmax(logits: &[f32]) -> Option<u32> {
    // Sixteen running maxima keep the loop free of a dependency; NaN never compares greater.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = logits.as_chunks::<16>();
    for block in blocks {
        for (m, &x) in lanes.iter_mut().zip(block) {
            *m = if x > *m && x < f32::INFINITY { x } else { *m };
        }
    }
    let mut max = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for &x in rest {
        if x > max && x < f32::INFINITY {
            max = x;
        }
    }
    if max == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&x| x == max).map(|i| i as u32)
}

/// `ln Σ exp(logit)` over finite logits, `max` being the largest.
fn log_sum_exp(logits: &[f32], max: f32) -> f32 {
    let sum: f64 = logits.iter().filter(|x| x.is_finite()).map(|&x| f64::from((x - max).exp())).sum();
    max + sum.ln() as f32
}

/// As vLLM defines them: repetition over prompt and output, presence and frequency over output.
fn penalise(logits: &[f32], tokens: &[u32], prompt_len: usize, params: &Params, scratch: &mut Scratch) {
    /// Marks a token whose penalties were applied, or that only the prompt holds.
    const PROMPT: u32 = 1 << 31;
    scratch.adjusted.clear();
    scratch.adjusted.extend_from_slice(logits);
    for (i, &t) in tokens.iter().enumerate() {
        let count = &mut scratch.counts[t as usize];
        *count = if i < prompt_len { *count | PROMPT } else { *count + 1 };
    }
    for &t in tokens {
        let count = std::mem::take(&mut scratch.counts[t as usize]);
        if count == 0 {
            continue; // a second occurrence: done at the first
        }
        let x = &mut scratch.adjusted[t as usize];
        *x = if *x > 0.0 { *x / params.repetition_penalty } else { *x * params.repetition_penalty };
        let output = count & !PROMPT;
        if output > 0 {
            *x -= params.presence_penalty + params.frequency_penalty * output as f32;
        }
    }
}

/// Greedy, or temperature, min-p, top-k and top-p, then a draw.
fn choose(logits: &[f32], position: usize, params: &Params, scratch: &mut Scratch) -> Option<u32> {
    let best = argmax(logits)?;
    if params.temperature == 0.0 {
        return Some(best);
    }
    let max = logits[best as usize];
    let inverse = 1.0 / params.temperature;
    // exp(-104) is 0 in f32: what lies below can never be drawn.
    let floor = if params.min_p > 0.0 { params.min_p.ln().max(-104.0) } else { -104.0 };
    scratch.candidates.clear();
    for (i, &x) in logits.iter().enumerate() {
        if x.is_finite() && (x - max) * inverse >= floor {
            scratch.candidates.push(i as u32);
        }
    }
    let better = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let k = params.top_k as usize;
    if k > 0 && k < scratch.candidates.len() {
        scratch.candidates.select_nth_unstable_by(k - 1, better);
        scratch.candidates.truncate(k);
        // The draw walks the list: its order must not depend on how the selection partitions.
        scratch.candidates.sort_unstable();
    }
    let weight = |t: u32| ((logits[t as usize] - max) * inverse).exp();
    if params.top_p < 1.0 {
        let total: f64 = scratch.candidates.iter().map(|&t| f64::from(weight(t))).sum();
        nucleus(&mut scratch.candidates, f64::from(params.top_p) * total, better, weight);
    }
    scratch.weights.clear();
    scratch.weights.extend(scratch.candidates.iter().map(|&t| weight(t)));
    let total: f64 = scratch.weights.iter().map(|&w| f64::from(w)).sum();
    let mut left = uniform(params.seed, position as u64) * total;
    let mut last = best;
    for (&t, &w) in scratch.candidates.iter().zip(&scratch.weights) {
        if w > 0.0 {
            last = t;
            left -= f64::from(w);
            if left < 0.0 {
                break;
            }
        }
    }
    Some(last)
}

/// Keeps the smallest set of best candidates whose weights reach `mass`. Sorts only as many as it
/// needs: a vocabulary has 10⁵ tokens, a nucleus rarely 10³.
fn nucleus(
    candidates: &mut Vec<u32>,
    mass: f64,
    better: impl Fn(&u32, &u32) -> std::cmp::Ordering,
    weight: impl Fn(u32) -> f32,
) {
    let (mut sorted, mut sum) = (0, 0.0);
    while sorted < candidates.len() {
        let end = (sorted * 8).max(256).min(candidates.len());
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted - 1, &better);
        }
        candidates[sorted..end].sort_unstable_by(&better);
        for i in sorted..end {
            sum += f64::from(weight(candidates[i]));
            if sum >= mass {
                candidates.truncate(i + 1);
                return;
            }
        }
        sorted = end;
    }
}

/// The largest finite logits with their tokens, largest first, ties to the lower token.
fn top_n<'a>(logits: &[f32], best: &'a mut [(u32, f32)]) -> &'a [(u32, f32)] {
    let mut n = 0;
    for (i, &x) in logits.iter().enumerate() {
        if !x.is_finite() || (n == best.len() && x <= best[n - 1].1) {
            continue;
        }
        let at = best[..n].partition_point(|&(_, y)| y >= x);
        n = (n + 1).min(best.len());
        best[at..n].rotate_right(1);
        best[at] = (i as u32, x);
    }
    &best[..n]
}

/// A number in [0, 1) from a counter: splitmix64 of seed and position, so that the n-th token of a
/// request draws the same number whatever else runs.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (mix(mix(seed) ^ position) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(logits: &[f32], tokens: &[u32], prompt: usize, params: Params) -> u32 {
        let mut scratch = Scratch::new(logits.len()).unwrap();
        let choice = sample(logits, tokens, prompt, &params, &mut scratch, |_, _| {});
        assert!(scratch.counts.iter().all(|&c| c == 0));
        choice.unwrap().token
    }

    fn at(temperature: f32) -> Params {
        Params { temperature, ..Params::GREEDY }
    }

    /// Share of each token over many positions.
    fn shares(logits: &[f32], params: Params) -> Vec<f64> {
        let mut scratch = Scratch::new(logits.len()).unwrap();
        let mut counts = vec![0.0; logits.len()];
        const N: usize = 40_000;
        let tokens = vec![0; N];
        for n in 0..N {
            let t = sample(logits, &tokens[..n], 0, &params, &mut scratch, |_, _| {}).unwrap().token;
            counts[t as usize] += 1.0 / N as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_skips_what_is_not_finite() {
        assert_eq!(draw(&[1.0, 3.0, 3.0, 2.0], &[], 0, Params::GREEDY), 1);
        assert_eq!(draw(&[f32::NAN, f32::INFINITY, -5.0, f32::NEG_INFINITY], &[], 0, Params::GREEDY), 2);
        let mut scratch = Scratch::new(2).unwrap();
        assert_eq!(sample(&[f32::NAN, f32::NAN], &[], 0, &Params::GREEDY, &mut scratch, |_, _| {}), None);
        let long: Vec<f32> = (0..1000).map(|i| if i == 999 { 5.0 } else { (i % 7) as f32 / 2.0 }).collect();
        assert_eq!(draw(&long, &[], 0, Params::GREEDY), 999);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        // Standard error at 40,000 draws: 0.0025 at most; five of them.
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        for temperature in [0.5, 1.0, 2.0] {
            let w: Vec<f64> = logits.iter().map(|&x| f64::from(x / temperature).exp()).collect();
            let total: f64 = w.iter().sum();
            for (got, w) in shares(&logits, at(temperature)).iter().zip(&w) {
                assert!((got - w / total).abs() < 0.0125, "{got} {}", w / total);
            }
        }
    }

    #[test]
    fn truncations_keep_what_they_say() {
        let p = [0.4f32, 0.3, 0.2, 0.1];
        let logits: Vec<f32> = p.iter().map(|x| x.ln()).collect();
        let alive = |params: Params| shares(&logits, params).iter().map(|&s| s > 0.0).collect::<Vec<_>>();
        assert_eq!(alive(Params { top_k: 2, ..at(1.0) }), [true, true, false, false]);
        assert_eq!(alive(Params { top_p: 0.69, ..at(1.0) }), [true, true, false, false]);
        assert_eq!(alive(Params { top_p: 0.71, ..at(1.0) }), [true, true, true, false]);
        assert_eq!(alive(Params { top_p: 1e-6, ..at(1.0) }), [true, false, false, false]);
        assert_eq!(alive(Params { min_p: 0.45, ..at(1.0) }), [true, true, true, false]);
        assert_eq!(alive(Params { min_p: 1.0, ..at(1.0) }), [true, false, false, false]);
        let s = shares(&logits, Params { top_k: 2, ..at(1.0) });
        assert!((s[0] - 4.0 / 7.0).abs() < 0.0125);
    }

    #[test]
    fn a_nucleus_larger_than_one_sorted_piece_is_exact() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 5000) as f32 / 5000.0).collect();
        let mut all: Vec<u32> = (0..5000).collect();
        let better = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let weight = |t: u32| logits[t as usize].exp();
        let total: f64 = all.iter().map(|&t| f64::from(weight(t))).sum();
        let mut sorted = all.clone();
        sorted.sort_by(better);
        let mut sum = 0.0;
        let n = sorted
            .iter()
            .position(|&t| {
                sum += f64::from(weight(t));
                sum >= 0.8 * total
            })
            .unwrap()
            + 1;
        nucleus(&mut all, 0.8 * total, better, weight);
        assert_eq!(all, sorted[..n]);
    }

    #[test]
    fn penalties_count_prompt_and_output_as_vllm_does() {
        let logits = [2.0f32, 1.9, -0.1, -0.2];
        let with = |set: fn(&mut Params)| {
            let mut p = Params::GREEDY;
            set(&mut p);
            p
        };
        // Token 0 in the prompt: repetition divides its logit, presence and frequency do not see it.
        assert_eq!(draw(&logits, &[0], 1, with(|p| p.repetition_penalty = 1.2)), 1);
        assert_eq!(draw(&logits, &[0], 1, with(|p| p.presence_penalty = 5.0)), 0);
        assert_eq!(draw(&logits, &[0], 0, with(|p| p.presence_penalty = 0.2)), 1);
        // Frequency counts: once is not enough, three times is.
        assert_eq!(draw(&logits, &[0], 0, with(|p| p.frequency_penalty = 0.04)), 0);
        assert_eq!(draw(&logits, &[0, 0, 0], 0, with(|p| p.frequency_penalty = 0.04)), 1);
        // Negative logits are multiplied.
        let negative = [-1.0f32, -1.1];
        assert_eq!(draw(&negative, &[0], 1, with(|p| p.repetition_penalty = 1.2)), 1);
    }

    #[test]
    fn alternatives_are_the_likeliest_in_order() {
        let logits = [0.0f32, 5.0, f32::NAN, 3.0, 5.0, -1.0];
        let params = Params { n_logprobs: 4, logprob: true, ..Params::GREEDY };
        let mut scratch = Scratch::new(6).unwrap();
        let mut top = Vec::new();
        let choice = sample(&logits, &[], 0, &params, &mut scratch, |t, p| top.push((t, p))).unwrap();
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 4, 3, 0]);
        assert_eq!(top[0], (choice.token, choice.logprob));
        let sum: f64 = [0.0f64, 5.0, 3.0, 5.0, -1.0].iter().map(|x| x.exp()).sum();
        assert!((f64::from(choice.logprob) - (5.0 - sum.ln())).abs() < 1e-6);
    }

    #[test]
    fn the_same_seed_draws_the_same_token() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 13) as f32 / 4.0).collect();
        let mut seen = std::collections::HashSet::new();
        for seed in 0..50 {
            let params = Params { seed, ..at(1.0) };
            let t = draw(&logits, &[1, 2, 3], 1, params);
            assert_eq!(t, draw(&logits, &[9, 8, 7], 2, params));
            seen.insert(t);
        }
        assert!(seen.len() > 10);
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        for (name, params) in [
            ("temperature", at(f32::NAN)),
            ("temperature", at(-1.0)),
            ("top_p", Params { top_p: 0.0, ..at(1.0) }),
            ("min_p", Params { min_p: 1.5, ..at(1.0) }),
            ("repetition_penalty", Params { repetition_penalty: 0.0, ..at(1.0) }),
            ("presence_penalty", Params { presence_penalty: f32::INFINITY, ..at(1.0) }),
            ("n_logprobs", Params { n_logprobs: 21, ..at(1.0) }),
        ] {
            assert!(params.check().unwrap_err().message.contains(name));
        }
        assert_eq!(Params::GREEDY.check(), Ok(()));
    }
}
