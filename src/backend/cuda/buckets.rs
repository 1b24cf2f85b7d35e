//! Sizes that a step's rows are filled up to. A recorded program and a product's choice of kernel hold
//! for one number of rows, so there are few numbers: rows beyond the step's own are padding, which
//! reads and writes no page, belongs to no group of neurons and wants no logits.
//!
//! A step always computes as its bucket, recorded or not: a sequence's bits depend on the bucket of its
//! step (how a sum is cut) but not on where in the bucket the step's number of rows lies.

use std::iter::once;

/// Buckets up to 256; then every 64.
const SMALL: [usize; 15] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256];

/// The smallest bucket that holds `n` rows, `most` at the most; `n` must not be above `most`.
pub(super) fn bucket(n: usize, most: usize) -> usize {
    let up = if n == 0 { 0 } else { SMALL.into_iter().find(|&b| b >= n).unwrap_or(n.next_multiple_of(64)) };
    up.min(most)
}

/// Every bucket up to `most`, which is one itself.
pub(super) fn buckets(most: usize) -> impl Iterator<Item = usize> {
    let large = (1..).map(|i| 256 + 64 * i);
    SMALL.into_iter().chain(large).take_while(move |&b| b < most).chain(once(most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_has_a_bucket_of_the_list() {
        for most in [1, 3, 16, 20, 256, 300, 1000] {
            let all: Vec<_> = buckets(most).collect();
            assert!(all.is_sorted_by(|a, b| a < b) && all.last() == Some(&most));
            for n in 1..=most {
                let b = bucket(n, most);
                assert!(b >= n && b <= most && all.contains(&b), "{n} of {most}: {b}");
                assert_eq!(bucket(b, most), b);
                // At most half of a step is padding.
                assert!(b < 2 * n);
            }
        }
        assert_eq!(bucket(0, 16), 0);
        assert_eq!([3, 17, 33, 129, 257].map(|n| bucket(n, 4096)), [4, 24, 48, 160, 320]);
    }
}
