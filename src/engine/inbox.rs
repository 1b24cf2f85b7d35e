//! Where other threads meet the engine: submitted requests, cancels, host-chosen tokens, and the
//! counters they may read. One short lock; nothing here waits for a step.

use super::seq::{Admission, Seq, check_token};
use super::types::{Health, Request, SeqId, Stats};
use crate::error::{Error, Result, Status, try_vec, try_with_capacity};
use crate::sched::Slots;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) struct Inbox {
    admission: Admission,
    max_queue: usize,
    state: Mutex<State>,
}

struct State {
    slots: Slots,
    incoming: VecDeque<Seq>,
    /// Requests accepted and never admitted yet.
    queued: usize,
    next_arrival: u64,
    /// Ids to cancel; `cancelled` keeps each at most once in here.
    cancels: Vec<SeqId>,
    cancelled: Vec<bool>,
    /// Tokens hosts chose.
    tokens: Vec<(SeqId, u32)>,
    /// Slots whose host may choose a token now.
    awaiting: Vec<bool>,
    accepted: u64,
    refused: u64,
    stats: Stats,
}

impl Inbox {
    pub(crate) fn new(
        admission: Admission,
        max_queue: usize,
        max_batch: usize,
        stats: Stats,
    ) -> Result<Inbox> {
        let n = max_queue + max_batch;
        let mut incoming = VecDeque::new();
        incoming.try_reserve_exact(max_queue).map_err(|_| Error::no_memory("request queue"))?;
        Ok(Inbox {
            admission,
            max_queue,
            state: Mutex::new(State {
                slots: Slots::new(n)?,
                incoming,
                queued: 0,
                next_arrival: 0,
                // A slot can be released and taken again once between two drains.
                cancels: try_with_capacity(2 * n, "cancel list")?,
                cancelled: try_vec(n, false, "cancel flags")?,
                tokens: try_with_capacity(2 * n, "host tokens")?,
                awaiting: try_vec(n, false, "host flags")?,
                accepted: 0,
                refused: 0,
                stats,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn submit(&self, requests: &[Request], tokens: &[i32], out: &mut [SeqId]) -> Result<()> {
        if requests.len() > self.max_queue {
            self.lock().refused += requests.len() as u64;
            return Err(self.queue_full(requests.len(), self.max_queue));
        }
        if out.len() < requests.len() {
            return Err(Error::invalid(format!("{} ids for {} requests", out.len(), requests.len())));
        }
        // Everything that can fail happens before the lock.
        let mut seqs = try_with_capacity(requests.len(), "requests")?;
        for (i, request) in requests.iter().enumerate() {
            seqs.push(Seq::new(i, request, tokens, &self.admission)?);
        }
        let mut state = self.lock();
        let room = (self.max_queue - state.queued).min(state.slots.free());
        if seqs.len() > room {
            state.refused += seqs.len() as u64;
            return Err(self.queue_full(seqs.len(), room));
        }
        for (mut seq, out) in seqs.into_iter().zip(out) {
            let Some((_, id)) = state.slots.take() else { break };
            seq.id = SeqId(id);
            seq.arrival = state.next_arrival;
            state.next_arrival += 1;
            *out = seq.id;
            state.incoming.push_back(seq);
            state.queued += 1;
            state.accepted += 1;
        }
        Ok(())
    }

    fn queue_full(&self, wanted: usize, room: usize) -> Error {
        Error::new(Status::E_QUEUE_FULL, format!("{wanted} requests, room for {room} of {}", self.max_queue))
    }

    pub(crate) fn cancel(&self, ids: &[SeqId]) {
        let mut state = self.lock();
        for &id in ids {
            if let Some(slot) = state.slots.find(id.0)
                && !state.cancelled[slot as usize]
            {
                state.cancelled[slot as usize] = true;
                state.cancels.push(id);
            }
        }
    }

    pub(crate) fn push_token(&self, id: SeqId, token: i32) -> Result<()> {
        let token = check_token(token, self.admission.vocab_size).map_err(Error::invalid)?;
        let mut state = self.lock();
        let Some(slot) = state.slots.find(id.0) else {
            return Err(Error::new(Status::E_NOT_FOUND, format!("sequence {:#x} is not running", id.0)));
        };
        if !state.awaiting[slot as usize] {
            return Err(Error::invalid(format!("sequence {:#x} does not wait for a token", id.0)));
        }
        state.awaiting[slot as usize] = false;
        state.tokens.push((id, token));
        Ok(())
    }

    /// Hands what arrived to the driver: new sequences, then cancels, then tokens, each with its
    /// slot. Stale entries are dropped.
    pub(crate) fn drain(&self, mut take: impl FnMut(u32, Arrival)) {
        let mut guard = self.lock();
        let state = &mut *guard;
        while let Some(seq) = state.incoming.pop_front() {
            if let Some(slot) = state.slots.find(seq.id.0) {
                take(slot, Arrival::Request(seq));
            }
        }
        for (id, token) in state.tokens.drain(..) {
            if let Some(slot) = state.slots.find(id.0) {
                take(slot, Arrival::Token(token));
            }
        }
        for id in state.cancels.drain(..) {
            if let Some(slot) = state.slots.find(id.0) {
                take(slot, Arrival::Cancel);
            }
        }
    }

    /// A request left the bounded queue.
    pub(crate) fn left_queue(&self) {
        let mut state = self.lock();
        state.queued = state.queued.saturating_sub(1);
    }

    /// The host of `slot` may choose a token.
    pub(crate) fn await_token(&self, slot: u32) {
        self.lock().awaiting[slot as usize] = true;
    }

    /// The sequence in `slot` is over; its id is stale from now on.
    pub(crate) fn release(&self, slot: u32) {
        let mut state = self.lock();
        state.slots.release(slot);
        state.cancelled[slot as usize] = false;
        state.awaiting[slot as usize] = false;
    }

    /// Replaces what [`Inbox::stats`] answers.
    pub(crate) fn publish(&self, stats: &Stats) {
        let mut state = self.lock();
        let health = state.stats.health;
        state.stats = *stats;
        state.stats.health = health;
    }

    pub(crate) fn stats(&self) -> Stats {
        let state = self.lock();
        Stats {
            requests_accepted: state.accepted,
            admission_refusals: state.refused,
            waiting: state.stats.waiting + state.incoming.len() as u64,
            ..state.stats
        }
    }

    pub(crate) fn set_health(&self, health: Health) {
        let mut state = self.lock();
        if state.stats.health == Health::Ok {
            state.stats.health = health;
        }
    }

    pub(crate) fn health(&self) -> Health {
        self.lock().stats.health
    }

    /// Refuses calls on a dead engine.
    pub(crate) fn check_health(&self) -> Result<()> {
        match self.health() {
            Health::Ok => Ok(()),
            Health::Dead => {
                Err(Error::new(Status::E_PANIC, "the engine died of a bug in the library; free it"))
            }
            Health::DeviceLost => {
                Err(Error::new(Status::E_DEVICE_LOST, "the device is lost; restart the process"))
            }
        }
    }
}

/// What an [`Inbox`] hands over.
#[allow(clippy::large_enum_variant, reason = "moved once, from one place to the next; a box would allocate")]
pub(crate) enum Arrival {
    Request(Seq),
    Token(u32),
    Cancel,
}
