//! Monotonic time. Wall clocks jump; deadlines and statistics must not.

use once_cell::sync::Lazy;
use std::time::Instant;

static START: Lazy<Instant> = Lazy::new(Instant::now);

/// Nanoseconds since the first call in this process.
pub fn now_ns() -> u64 {
    // 2^64 ns are 584 years.
    u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The time `timeout_ns` after `now_ns`; a time-out of `u64::MAX` never comes.
pub fn deadline(now_ns: u64, timeout_ns: u64) -> u64 {
    now_ns.saturating_add(timeout_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_forward() {
        let a = now_ns();
        assert!(now_ns() >= a);
    }

    #[test]
    fn deadlines_do_not_overflow() {
        assert_eq!(deadline(5, 0), 5);
        assert_eq!(deadline(5, u64::MAX), u64::MAX);
    }
}
