//! Sequence ids: a slot and its generation, so that a stale id is recognised.
//!
//! An id is `generation << 32 | (slot + 1)`; 0 is never one.

use crate::error::{Result, try_vec, try_with_capacity};

/// The slots of one engine.
#[derive(Debug)]
pub struct Slots {
    generations: Vec<u32>,
    live: Vec<bool>,
    free: Vec<u32>,
}

impl Slots {
    /// `n` free slots.
    pub fn new(n: usize) -> Result<Slots> {
        let mut free = try_with_capacity(n, "free slots")?;
        free.extend((0..n as u32).rev());
        Ok(Slots {
            generations: try_vec(n, 1u32, "slot generations")?,
            live: try_vec(n, false, "slots")?,
            free,
        })
    }

    /// Slots in all.
    pub fn total(&self) -> usize {
        self.live.len()
    }

    /// Free slots.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a slot; its number and the new sequence's id.
    pub fn take(&mut self) -> Option<(u32, u64)> {
        let slot = self.free.pop()?;
        self.live[slot as usize] = true;
        Some((slot, self.id(slot)))
    }

    /// Frees a slot; its id is stale from now on.
    pub fn release(&mut self, slot: u32) {
        let i = slot as usize;
        if self.live[i] {
            self.live[i] = false;
            // Skips 0 on wrap-around, so that no id is ever 0 in its upper half again.
            self.generations[i] = self.generations[i].checked_add(1).unwrap_or(1);
            self.free.push(slot);
        }
    }

    /// The slot of a live id.
    pub fn find(&self, id: u64) -> Option<u32> {
        let slot = (id as u32).checked_sub(1)?;
        let i = slot as usize;
        (self.live.get(i) == Some(&true) && self.generations[i] == (id >> 32) as u32).then_some(slot)
    }

    fn id(&self, slot: u32) -> u64 {
        u64::from(self.generations[slot as usize]) << 32 | u64::from(slot + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_ids_are_found_out() {
        let mut slots = Slots::new(2).unwrap();
        let (slot, id) = slots.take().unwrap();
        assert_eq!(slots.find(id), Some(slot));
        slots.release(slot);
        assert_eq!(slots.find(id), None);
        let (again, id2) = slots.take().unwrap();
        assert_eq!(again, slot);
        assert_ne!(id, id2);
        assert_eq!(slots.find(id), None);
        for bad in [0, u64::MAX, 1, 3, id2 + 1, id2 + (1 << 32)] {
            assert_eq!(slots.find(bad), None, "{bad:#x}");
        }
    }

    #[test]
    fn generations_wrap_past_zero() {
        let mut slots = Slots::new(1).unwrap();
        slots.generations[0] = u32::MAX;
        let (slot, old) = slots.take().unwrap();
        slots.release(slot);
        let (_, new) = slots.take().unwrap();
        assert_eq!(new >> 32, 1);
        assert_eq!(slots.find(old), None);
    }
}
