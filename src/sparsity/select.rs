//! What a selection means, independent of any device: the CPU backend calls these, other backends
//! are tested against them.
//!
//! Ties go to the lower index; NaN sorts last and is counted. Lists are ascending.

use crate::error::{Result, try_vec, try_with_capacity};

/// Room for selections among up to a fixed number of units.
#[derive(Debug, Default)]
pub struct Selector {
    keys: Vec<u64>,
    scores: Vec<f32>,
}

impl Selector {
    /// Room for `units` units.
    pub fn new(units: usize) -> Result<Selector> {
        Ok(Selector {
            keys: try_with_capacity(units, "selection keys")?,
            scores: try_vec(units, 0.0, "selection scores")?,
        })
    }

    /// The `k` units with the highest scores, ascending, into `out`. Returns how many scores are NaN.
    pub fn top_k(&mut self, scores: &[f32], k: usize, out: &mut Vec<u32>) -> u64 {
        out.clear();
        let k = k.min(scores.len());
        let nan = scores.iter().filter(|s| s.is_nan()).count() as u64;
        if k == 0 {
            return nan;
        }
        self.keys.clear();
        self.keys.extend(scores.iter().enumerate().map(|(i, &s)| key(s, i)));
        let rank = self.narrow(k - 1);
        let worst = *self.keys.select_nth_unstable(rank).1;
        out.extend((0..scores.len()).filter(|&i| key(scores[i], i) <= worst).map(|i| i as u32));
        nan
    }

    /// Leaves, of many keys, those whose first bits are those of the `rank`-th; its rank among them.
    /// Counting is several times faster than partitioning them all.
    fn narrow(&mut self, rank: usize) -> usize {
        const BITS: u32 = 11;
        if self.keys.len() < 1 << 9 {
            return rank;
        }
        let bucket = |key: u64| (key >> (64 - BITS)) as usize;
        let mut counts = [0u32; 1 << BITS];
        self.keys.iter().for_each(|&k| counts[bucket(k)] += 1);
        let (mut wanted, mut before) = (0, 0);
        while before + counts[wanted] as usize <= rank {
            before += counts[wanted] as usize;
            wanted += 1;
        }
        self.keys.retain(|&k| bucket(k) == wanted);
        rank - before
    }

    /// The top `k` neurons of a batch by the sum over its rows of the positive part of their logits
    /// (the paper's rule). Rows are added in the order given. Returns how many sums are NaN.
    pub fn top_k_of_batch<'a>(
        &mut self,
        rows: impl Iterator<Item = &'a [f32]>,
        units: usize,
        k: usize,
        out: &mut Vec<u32>,
    ) -> u64 {
        let mut sums = std::mem::take(&mut self.scores);
        let n = units.min(sums.len());
        sums[..n].fill(0.0);
        for row in rows {
            for (sum, &logit) in sums[..n].iter_mut().zip(row) {
                // Written so that a NaN logit makes the sum NaN.
                *sum += if logit < 0.0 { 0.0 } else { logit };
            }
        }
        let nan = self.top_k(&sums[..n], k, out);
        self.scores = sums;
        nan
    }
}

/// Orders by score descending, then index ascending: the smallest key is the best unit.
fn key(score: f32, index: usize) -> u64 {
    let ordered = if score.is_nan() {
        0
    } else {
        // Adding 0 turns -0 into 0, so that the two tie.
        let bits = (score + 0.0).to_bits();
        if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
    };
    u64::from(!ordered) << 32 | index as u64
}

/// Score of a KV head from the logits of its query heads: their maximum, NaN only if all are.
pub fn group_score(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NAN, f32::max)
}

/// A score for [`super::Source::Random`]: uniform, fixed by its arguments alone.
pub fn random_score(seed: u64, layer: usize, position: u32, token: u32, unit: usize) -> f32 {
    let mut h = seed;
    for v in [layer as u64, u64::from(position), u64::from(token), unit as u64] {
        h = mix(h ^ v.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
    (h >> 40) as f32 / (1u64 << 24) as f32
}

/// The finaliser of splitmix64.
fn mix(mut h: u64) -> u64 {
    h = h.wrapping_add(0x9e37_79b9_7f4a_7c15);
    h = (h ^ h >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ h >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ h >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn top(scores: &[f32], k: usize) -> (Vec<u32>, u64) {
        let mut s = Selector::new(scores.len()).unwrap();
        let mut out = Vec::new();
        let nan = s.top_k(scores, k, &mut out);
        (out, nan)
    }

    #[test]
    fn ties_nan_and_zeros() {
        let n = f32::NAN;
        assert_eq!(top(&[1.0, 3.0, 3.0, 3.0], 2), (vec![1, 2], 0));
        assert_eq!(top(&[n, -5.0, n, f32::NEG_INFINITY], 3), (vec![0, 1, 3], 2));
        assert_eq!(top(&[-0.0, 0.0, 0.0], 1), (vec![0], 0));
        assert_eq!(top(&[f32::NEG_INFINITY, n, f32::INFINITY], 2), (vec![0, 2], 1));
        assert_eq!(top(&[1.0, 2.0], 9), (vec![0, 1], 0));
        assert_eq!(top(&[1.0, 2.0], 0), (vec![], 0));
    }

    #[test]
    fn agrees_with_sorting() {
        for units in [1usize, 2, 7, 32, 1000] {
            let scores: Vec<f32> = (0..units).map(|i| (random_score(7, 0, 0, 0, i) * 50.0).floor()).collect();
            let mut order: Vec<usize> = (0..units).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
            for k in [1, units / 2, units] {
                let mut want: Vec<u32> = order[..k.min(units)].iter().map(|&i| i as u32).collect();
                want.sort_unstable();
                assert_eq!(top(&scores, k).0, want, "{k} of {units}");
            }
        }
    }

    #[test]
    fn batch_sum_ignores_negative_logits() {
        let mut s = Selector::new(3).unwrap();
        let mut out = Vec::new();
        let rows: [&[f32]; 2] = [&[1.0, -100.0, 0.4], &[-9.0, 1.2, 0.5]];
        assert_eq!(s.top_k_of_batch(rows.into_iter(), 3, 2, &mut out), 0);
        assert_eq!(out, [0, 1]);
        let rows: [&[f32]; 2] = [&[f32::NAN, 0.0, 0.0], &[5.0, 0.0, 1.0]];
        assert_eq!(s.top_k_of_batch(rows.into_iter(), 3, 1, &mut out), 1);
        assert_eq!(out, [2]);
    }

    #[test]
    fn group_takes_the_maximum() {
        assert_eq!(group_score(&[1.0, f32::NAN, 3.0]), 3.0);
        assert!(group_score(&[f32::NAN]).is_nan());
    }
}
