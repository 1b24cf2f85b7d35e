//! Panics on demand, for tests of what follows one. Not in normal builds.

use std::cell::Cell;

thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(0) };
}

/// Lets this thread's `n`-th use of a handle from now on panic; 0 = none.
#[cfg_attr(feature = "fault", unsafe(no_mangle))]
pub extern "C" fn polar_test_panic_at(n: u64) {
    LEFT.set(n);
}

/// Counts one use of a handle.
pub(super) fn tick() {
    let left = LEFT.get();
    LEFT.set(left.saturating_sub(1));
    if left == 1 {
        panic!("a fault the tests asked for");
    }
}
