//! Who computes how many tokens in the next step, who is admitted, who is preempted: a function of
//! a snapshot.
//!
//! Order of service: higher priority first, then earlier arrival. Decoding sequences get their one
//! token first (latency of running streams), then prompts in progress share what is left of the
//! token budget in chunks, then waiting requests are admitted while all their tokens would fit.
//! When a decoding sequence needs a page and none is free, the least urgent sequence gives its pages
//! back and waits to be recomputed.

use crate::error::{Result, try_with_capacity};
use crate::kv::pages_for;

/// One sequence as the policy sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Its slot.
    pub slot: u32,
    /// Tokens known: prompt and generated.
    pub known: u32,
    /// Tokens whose K and V are in the cache.
    pub computed: u32,
    /// Leading tokens that are computed densely, in chunks; later ones decode one a step.
    pub prefill: u32,
    /// Pages it holds.
    pub pages: u32,
    /// False while it waits for the host to choose a token.
    pub ready: bool,
}

/// What bounds a step.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most sequences running.
    pub max_batch: usize,
    /// Most tokens computed in a step; at least `max_batch`.
    pub step_tokens: usize,
    /// Pages nobody holds.
    pub free_pages: usize,
}

/// A sequence's part of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its slot.
    pub slot: u32,
    /// Tokens to compute.
    pub rows: u32,
    /// One token of a sequence past its prefill.
    pub decode: bool,
}

/// What to do. Buffers are reused from step to step.
#[derive(Debug, Default)]
pub struct Decision {
    /// Running sequences that give their pages back, to be done before anything else.
    pub preempt: Vec<u32>,
    /// Waiting sequences that start running, most urgent first.
    pub admit: Vec<u32>,
    /// Work, decoding sequences first.
    pub run: Vec<Share>,
    /// A sequence that cannot go on although it has the whole cache: it ends with an error.
    pub stuck: Option<u32>,
    fate: Vec<Fate>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Scheduled,
    Preempted,
}

impl Decision {
    /// An empty decision with room for every batch.
    pub fn with_room(max_batch: usize) -> Result<Decision> {
        Ok(Decision {
            preempt: try_with_capacity(max_batch, "scheduler")?,
            admit: try_with_capacity(max_batch, "scheduler")?,
            run: try_with_capacity(max_batch, "scheduler")?,
            stuck: None,
            fate: try_with_capacity(max_batch, "scheduler")?,
        })
    }

    /// Decides. Both lists are in order of service, most urgent first; those waiting are ready.
    pub fn plan(&mut self, running: &[View], waiting: &[View], bounds: Bounds) {
        self.preempt.clear();
        self.admit.clear();
        self.run.clear();
        self.stuck = None;
        self.fate.clear();
        self.fate.resize(running.len(), Fate::Open);
        let mut room = Room { pages: bounds.free_pages, tokens: bounds.step_tokens };
        for i in 0..running.len() {
            if self.fate[i] == Fate::Open && running[i].ready && running[i].computed >= running[i].prefill {
                self.decode(running, i, &mut room);
            }
        }
        for i in 0..running.len() {
            if self.fate[i] == Fate::Open && running[i].ready && running[i].computed < running[i].prefill {
                self.prefill(running, i, &mut room);
            }
        }
        // After a preemption the pages just won are for those that run.
        if self.preempt.is_empty() && self.stuck.is_none() {
            self.admit(running, waiting, bounds, &mut room);
        }
    }

    fn decode(&mut self, running: &[View], i: usize, room: &mut Room) {
        let v = &running[i];
        if room.tokens == 0 {
            return;
        }
        let need = new_pages(v, 1);
        while need > room.pages {
            if let Some(victim) = self.victim(running, i) {
                self.drop_one(running, victim, room);
            } else if self.alone(running, i) {
                self.stuck = Some(v.slot);
                return;
            } else {
                self.drop_one(running, i, room);
                return;
            }
        }
        self.take(i, v, 1, true, room);
    }

    fn prefill(&mut self, running: &[View], i: usize, room: &mut Room) {
        let v = &running[i];
        let want = ((v.prefill - v.computed) as usize).min(room.tokens);
        if want == 0 {
            return;
        }
        loop {
            let fits = ((v.pages as usize + room.pages) * crate::kv::PAGE_TOKENS)
                .saturating_sub(v.computed as usize);
            if fits > 0 {
                self.take(i, v, want.min(fits) as u32, false, room);
                return;
            }
            if let Some(victim) = self.victim(running, i) {
                self.drop_one(running, victim, room);
            } else {
                if self.alone(running, i) {
                    self.stuck = Some(v.slot);
                }
                // Otherwise sequences that run hold the pages; they will end or be preempted.
                return;
            }
        }
    }

    fn admit(&mut self, running: &[View], waiting: &[View], bounds: Bounds, room: &mut Room) {
        let mut count = running.len();
        // Pages that running sequences still need for the tokens they already know.
        let mut promised: usize = 0;
        for v in running {
            let scheduled = self.run.iter().find(|s| s.slot == v.slot).map_or(0, |s| s.rows);
            let held = v.pages as usize + new_pages(v, scheduled);
            promised += pages_for(v.known as usize + 1).saturating_sub(held);
        }
        for w in waiting {
            if count >= bounds.max_batch || room.tokens == 0 {
                return;
            }
            let need = pages_for(w.known as usize + 1);
            if need + promised > room.pages {
                if count == 0 && promised == 0 {
                    self.stuck = Some(w.slot);
                }
                return;
            }
            let rows = (w.prefill as usize).min(room.tokens);
            promised += need - pages_for(rows);
            room.pages -= pages_for(rows);
            room.tokens -= rows;
            self.admit.push(w.slot);
            self.run.push(Share { slot: w.slot, rows: rows as u32, decode: false });
            count += 1;
        }
    }

    /// The least urgent sequence after `i` that holds pages and is not part of this step.
    fn victim(&self, running: &[View], i: usize) -> Option<usize> {
        (i + 1..running.len()).rev().find(|&j| self.fate[j] == Fate::Open && running[j].pages > 0)
    }

    fn alone(&self, running: &[View], i: usize) -> bool {
        (0..running.len()).all(|j| j == i || self.fate[j] == Fate::Preempted || running[j].pages == 0)
    }

    fn drop_one(&mut self, running: &[View], j: usize, room: &mut Room) {
        self.fate[j] = Fate::Preempted;
        self.preempt.push(running[j].slot);
        room.pages += running[j].pages as usize;
    }

    fn take(&mut self, i: usize, v: &View, rows: u32, decode: bool, room: &mut Room) {
        self.fate[i] = Fate::Scheduled;
        room.pages -= new_pages(v, rows);
        room.tokens -= rows as usize;
        self.run.push(Share { slot: v.slot, rows, decode });
    }
}

struct Room {
    pages: usize,
    tokens: usize,
}

fn new_pages(v: &View, rows: u32) -> usize {
    pages_for(v.computed as usize + rows as usize).saturating_sub(v.pages as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(slot: u32, known: u32, computed: u32, prefill: u32) -> View {
        View { slot, known, computed, prefill, pages: pages_for(computed as usize) as u32, ready: true }
    }

    fn plan(
        running: &[View],
        waiting: &[View],
        max_batch: usize,
        step_tokens: usize,
        free_pages: usize,
    ) -> Decision {
        let mut d = Decision::with_room(max_batch).unwrap();
        d.plan(running, waiting, Bounds { max_batch, step_tokens, free_pages });
        d
    }

    #[test]
    fn decode_comes_before_prefill_and_admission() {
        let running = [view(0, 100, 40, 100), view(1, 20, 19, 10)];
        let d = plan(&running, &[view(2, 30, 0, 30)], 4, 32, 100);
        let want = [Share { slot: 1, rows: 1, decode: true }, Share { slot: 0, rows: 31, decode: false }];
        assert_eq!(d.run, want);
        assert!(d.admit.is_empty());
    }

    #[test]
    fn the_least_urgent_gives_its_pages() {
        // Slots 0 and 1 sit on page borders and need a page each; slot 2 holds two.
        let running = [view(0, 17, 16, 4), view(1, 33, 32, 4), view(2, 20, 19, 4)];
        let d = plan(&running, &[], 4, 32, 0);
        assert_eq!(d.preempt, [2]);
        assert_eq!(d.run.iter().map(|s| s.slot).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn one_that_fills_the_cache_alone_is_stuck() {
        let d = plan(&[view(0, 17, 16, 4)], &[], 4, 32, 0);
        assert_eq!((d.stuck, d.run.len()), (Some(0), 0));
        let d = plan(&[], &[view(3, 40, 0, 40)], 4, 32, 2);
        assert_eq!(d.stuck, Some(3));
    }

    #[test]
    fn the_last_of_two_on_a_full_cache_waits() {
        let running = [view(0, 17, 16, 4), view(1, 17, 16, 4)];
        let d = plan(&running, &[], 4, 32, 0);
        assert_eq!(d.preempt, [1]);
        assert_eq!(d.run, [Share { slot: 0, rows: 1, decode: true }]);
    }

    #[test]
    fn admission_keeps_order_and_counts_promised_pages() {
        // 6 pages free; slot 0 will need 3 more for its prompt, slot 1 needs 4: it must wait, and so
        // must slot 2 behind it, although it alone would fit.
        let running = [view(0, 79, 32, 79)];
        let d = plan(&running, &[view(1, 60, 0, 60), view(2, 3, 0, 3)], 4, 16, 6);
        assert!(d.admit.is_empty());
        let d = plan(&running, &[view(1, 60, 0, 60), view(2, 3, 0, 3)], 4, 200, 8);
        assert_eq!(d.admit, [1, 2]);
    }

    #[test]
    fn a_sequence_that_waits_for_its_host_is_left_alone_until_pages_are_short() {
        let mut idle = view(1, 20, 20, 4);
        idle.ready = false;
        let d = plan(&[view(0, 5, 4, 4), idle], &[], 4, 32, 1);
        assert_eq!((d.run.len(), d.preempt.len()), (1, 0));
        let d = plan(&[view(0, 17, 16, 4), idle], &[], 4, 32, 0);
        assert_eq!(d.preempt, [1]);
    }
}
