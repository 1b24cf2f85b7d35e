//! Fetching what the next job will read while a thread has nothing else to do.
//!
//! Between two stages memory would stand idle: the last tasks end at different times, and small
//! serial work lies between. A prefetch changes no value and may name any address, so this needs no
//! promise about lifetimes.

/// Bytes one thread fetches at most: what surely fits its second-level cache beside its work.
const MOST: usize = 256 << 10;
/// Bytes between two looks at whether to stop.
const STEP: usize = 1 << 10;

/// What the next job reads: task `i` reads the `i`-th piece of each part.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ahead {
    parts: [Part; 2],
}

#[derive(Clone, Copy, Debug, Default)]
struct Part {
    base: usize,
    bytes: usize,
    piece: usize,
}

impl Ahead {
    /// Nothing is known.
    pub const NOTHING: Ahead = Ahead { parts: [Part { base: 0, bytes: 0, piece: 0 }; 2] };

    /// Up to two arrays, cut into pieces of `piece` bytes.
    pub fn pieces(arrays: [&[u8]; 2], piece: usize) -> Ahead {
        Ahead { parts: arrays.map(|a| Part { base: a.as_ptr() as usize, bytes: a.len(), piece }) }
    }

    /// What `thread` of `threads` will begin with.
    pub(super) fn of(&self, thread: usize, threads: usize) -> Fetch {
        let ranges = self.parts.map(|p| {
            let tasks = p.bytes.div_ceil(p.piece.max(1));
            let first = tasks * thread / threads * p.piece;
            (p.base + first, p.base + p.bytes.min(first + p.piece.min(MOST / 2)))
        });
        Fetch { ranges, left: MOST }
    }
}

/// A thread's progress.
pub(super) struct Fetch {
    ranges: [(usize, usize); 2],
    left: usize,
}

impl Fetch {
    /// Asks for some more; false when there is no more to ask for.
    pub(super) fn some(&mut self) -> bool {
        for (at, end) in &mut self.ranges {
            if at < end && self.left > 0 {
                let to = (*at + STEP).min(*end);
                (*at..to).step_by(64).for_each(fetch);
                *at = to;
                self.left = self.left.saturating_sub(STEP);
                return true;
            }
        }
        false
    }
}

fn fetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch never faults and changes no value.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address as *const i8) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
