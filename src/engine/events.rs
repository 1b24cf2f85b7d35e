//! Events on their way to the host: filled by a step, emptied before the next one starts, so it
//! never outgrows what one step can produce.

use super::types::{Delivered, Event, TopLogprob};
use crate::error::{Error, Result, Status, try_with_capacity};
use std::collections::VecDeque;

/// Where a step's events go, one call each.
pub trait EventSink {
    /// Takes an event and its alternatives. False: no room, nothing was taken.
    fn event(&mut self, event: &Event, top: &[TopLogprob]) -> bool;
}

pub(crate) struct EventQueue {
    events: VecDeque<(Event, usize)>,
    top: Vec<TopLogprob>,
}

impl EventQueue {
    pub(crate) fn new(max_events: usize, max_top: usize) -> Result<EventQueue> {
        let mut events = VecDeque::new();
        events.try_reserve_exact(max_events).map_err(|_| Error::no_memory("event queue"))?;
        Ok(EventQueue { events, top: try_with_capacity(max_top, "log probabilities")? })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub(crate) fn push(&mut self, mut event: Event, top: &[(u32, f32)]) {
        let first = self.top.len();
        self.top.extend(top.iter().map(|&(token, logprob)| TopLogprob { token, logprob }));
        event.n_logprobs = top.len() as u32;
        self.events.push_back((event, first));
    }

    /// Delivers until the sink is full. `empty` is the status when there was nothing.
    pub(crate) fn drain(&mut self, sink: &mut dyn EventSink, empty: Status) -> Delivered {
        let mut out = Delivered { status: empty, n_events: 0, n_logprobs: 0 };
        while let Some((event, first)) = self.events.front() {
            let n = event.n_logprobs as usize;
            if !sink.event(event, &self.top[*first..first + n]) {
                out.status = Status::TRUNCATED;
                return out;
            }
            out.status = Status::OK;
            out.n_events += 1;
            out.n_logprobs += n;
            self.events.pop_front();
        }
        self.top.clear();
        out
    }
}
