//! Semantics and statistics of the sampler.

use super::sampler::internals::{exp_below, uniform};
use super::*;

fn choose(logits: &[f32], params: &Params, tokens: &[u32], n_prompt: usize) -> (sampler::Choice, Vec<(u32, f32)>) {
    let mut s = Sampler::new(logits.len()).unwrap();
    let mut top = [(0, 0.0); MAX_LOGPROBS];
    let c = s.choose(logits, params, tokens, n_prompt, &mut top);
    (c, top[..c.n_top as usize].to_vec())
}

fn draws(logits: &[f32], params: Params, n: usize) -> Vec<f64> {
    let mut s = Sampler::new(logits.len()).unwrap();
    let mut top = [(0, 0.0); MAX_LOGPROBS];
    let mut counts = vec![0.0; logits.len()];
    for seed in 0..n as u64 {
        let c = s.choose(logits, &Params { seed, ..params }, &[1, 2, 3], 3, &mut top);
        counts[c.token as usize] += 1.0 / n as f64;
    }
    counts
}

const WARM: Params = Params { temperature: 1.0, ..Params::GREEDY };

#[test]
fn greedy_takes_the_lowest_of_equals() {
    assert_eq!(choose(&[1.0, 5.0, 5.0, f32::NAN], &Params::GREEDY, &[], 0).0.token, 1);
    let mut long = vec![0.0; 1000];
    long[777] = 1.0;
    long[990] = 1.0;
    assert_eq!(choose(&long, &Params::GREEDY, &[], 0).0.token, 777);
}

#[test]
fn nothing_finite_is_broken() {
    for logits in [[f32::NAN; 3], [f32::NEG_INFINITY; 3], [f32::INFINITY, f32::NAN, f32::NAN]] {
        assert!(choose(&logits, &Params::GREEDY, &[], 0).0.broken);
        assert!(choose(&logits, &WARM, &[], 0).0.broken);
    }
    let c = choose(&[f32::NAN, -3.0, f32::NEG_INFINITY], &WARM, &[], 0).0;
    assert!(!c.broken && c.token == 1);
}

#[test]
fn frequencies_follow_probabilities() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin() * 2.0).collect();
    for temperature in [0.5, 1.0, 2.0] {
        let got = draws(&logits, Params { temperature, ..WARM }, 40_000);
        let e: Vec<f64> = logits.iter().map(|&l| f64::from(l / temperature).exp()).collect();
        let sum: f64 = e.iter().sum();
        let chi: f64 =
            got.iter().zip(&e).map(|(g, e)| (g - e / sum).powi(2) / (e / sum)).sum::<f64>() * 40_000.0;
        assert!(chi < 49.0 + 5.0 * 98f64.sqrt(), "chi² {chi} at temperature {temperature}");
    }
}

#[test]
fn filters_keep_what_they_should() {
    let probs = [0.4f32, 0.3, 0.15, 0.1, 0.05];
    let logits = probs.map(f32::ln);
    let kept = |p: Params| draws(&logits, p, 4000).iter().map(|&c| c > 0.0).collect::<Vec<_>>();
    assert_eq!(kept(WARM), [true; 5]);
    assert_eq!(kept(Params { top_k: 2, ..WARM }), [true, true, false, false, false]);
    assert_eq!(kept(Params { top_p: 0.75, ..WARM }), [true, true, true, false, false]);
    assert_eq!(kept(Params { top_p: 0.01, ..WARM }), [true, false, false, false, false]);
    assert_eq!(kept(Params { min_p: 0.3, ..WARM }), [true, true, true, false, false]);
    assert_eq!(kept(Params { min_p: 1.0, ..WARM }), [true, false, false, false, false]);
    // After top_k = 3 the rest is 0.47, 0.35, 0.18: half the mass is the first two.
    assert_eq!(kept(Params { top_k: 3, top_p: 0.5, ..WARM }), [true, true, false, false, false]);
}

#[test]
fn top_p_over_a_flat_vocabulary() {
    let logits = vec![0.0; 5000];
    let kept = draws(&logits, Params { top_p: 0.5, ..WARM }, 20_000);
    assert!(kept[2500..].iter().all(|&c| c == 0.0) && kept[..2500].iter().filter(|&&c| c > 0.0).count() > 2400);
}

#[test]
fn penalties_as_defined() {
    let p = Params { repetition_penalty: 2.0, ..Params::GREEDY };
    // 3.0 / 2 loses to 2.0; a negative logit is multiplied.
    assert_eq!(choose(&[3.0, 2.0, -1.0], &p, &[0, 0], 2).0.token, 1);
    assert_eq!(choose(&[-1.0, -1.5, -9.0], &p, &[0], 1).0.token, 1);
    // Presence and frequency look at the output only.
    let p = Params { presence_penalty: 1.5, ..Params::GREEDY };
    assert_eq!(choose(&[3.0, 2.0], &p, &[0], 1).0.token, 0);
    assert_eq!(choose(&[3.0, 2.0], &p, &[1, 0], 1).0.token, 1);
    let p = Params { frequency_penalty: 0.4, ..Params::GREEDY };
    assert_eq!(choose(&[3.0, 2.0], &p, &[0, 0], 0).0.token, 0);
    assert_eq!(choose(&[3.0, 2.0], &p, &[0, 0, 0], 0).0.token, 1);
    // Tokens outside the vocabulary are ignored, and counts do not leak into the next call.
    let mut s = Sampler::new(2).unwrap();
    let mut top = [(0, 0.0); MAX_LOGPROBS];
    s.choose(&[3.0, 2.0], &p, &[0, 0, 0, 77], 0, &mut top);
    assert_eq!(s.choose(&[3.0, 2.0], &p, &[1], 0, &mut top).token, 0);
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let logits = [1.0f32, 3.0, 3.0, -2.0, f32::NAN];
    let lse = logits[..4].iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
    let p = Params { n_logprobs: 3, logprob: true, repetition_penalty: 5.0, ..Params::GREEDY };
    let (c, top) = choose(&logits, &p, &[1], 1);
    assert_eq!(c.token, 2);
    assert!((f64::from(c.logprob) - (3.0 - lse)).abs() < 1e-6);
    assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
    assert!((f64::from(top[2].1) - (1.0 - lse)).abs() < 1e-6);
    assert!(choose(&logits, &Params::GREEDY, &[], 0).0.logprob.is_nan());
    let (_, all) = choose(&logits, &Params { n_logprobs: 20, ..p }, &[], 0);
    assert_eq!(all.len(), 4);
}

#[test]
fn extreme_temperatures_do_not_overflow() {
    let p = Params { temperature: 1e-38, ..WARM };
    assert_eq!(choose(&[1e30, -1e30, 1e30, 2e30], &p, &[], 0).0.token, 3);
    assert_eq!(choose(&[f32::INFINITY, 0.0], &WARM, &[], 0).0.token, 0);
}

#[test]
fn random_numbers_are_uniform_and_fixed() {
    let mean: f64 = (0..10_000).map(|i| uniform(i / 100, i % 100)).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.01, "{mean}");
    assert_eq!(uniform(1, 2), uniform(1, 2));
    assert_ne!(uniform(1, 2), uniform(2, 1));
}

#[test]
fn exponential_is_close() {
    for i in 0..87_000 {
        let x = -(i as f32) / 1000.0;
        let (got, want) = (f64::from(exp_below(x)), f64::from(x).exp());
        assert!((got / want - 1.0).abs() < 4e-7, "{x}: {got} {want}");
    }
    assert_eq!(exp_below(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp_below(0.0), 1.0);
}

#[test]
fn bad_parameters_are_named() {
    let bad = [
        (Params { temperature: -1.0, ..WARM }, "temperature"),
        (Params { temperature: f32::NAN, ..WARM }, "temperature"),
        (Params { top_p: 0.0, ..WARM }, "top_p"),
        (Params { top_p: 1.5, ..WARM }, "top_p"),
        (Params { min_p: -0.1, ..WARM }, "min_p"),
        (Params { repetition_penalty: 0.0, ..WARM }, "repetition_penalty"),
        (Params { presence_penalty: f32::INFINITY, ..WARM }, "presence_penalty"),
        (Params { frequency_penalty: f32::NAN, ..WARM }, "frequency_penalty"),
        (Params { n_logprobs: 21, ..WARM }, "n_logprobs"),
    ];
    for (p, name) in bad {
        assert!(p.check().unwrap_err().message.contains(name), "{name}");
    }
    assert!(WARM.check().is_ok() && Params::GREEDY.check().is_ok());
}
