//! Events of the engine into the caller's arrays.

use super::constants::*;
use super::copy;
use super::types::{polar_event, polar_logprob};
use crate::engine::{Event, EventSink, FinishReason, TopLogprob};
use crate::error::{Error, Result};
use std::mem::MaybeUninit;

/// The caller's arrays and how full they are. The counts are written with every event, so that what
/// was delivered stays delivered when the step then fails.
pub(super) struct Arrays<'a> {
    events: *mut polar_event,
    events_cap: usize,
    n_events: &'a mut MaybeUninit<usize>,
    used: usize,
    logprobs: *mut polar_logprob,
    logprobs_cap: usize,
    n_logprobs: Option<&'a mut MaybeUninit<usize>>,
    logprobs_used: usize,
}

impl Arrays<'_> {
    /// Checks the arrays and sets both counts to 0.
    pub(super) fn new(
        events: *mut polar_event,
        events_cap: usize,
        n_events: *mut usize,
        logprobs: *mut polar_logprob,
        logprobs_cap: usize,
        n_logprobs: *mut usize,
    ) -> Result<Self> {
        copy::array(events, events_cap, "events")?;
        copy::array(logprobs, logprobs_cap, "logprobs")?;
        if (1..POLAR_MAX_LOGPROBS as usize).contains(&logprobs_cap) {
            return Err(Error::invalid(format!(
                "logprobs_cap is {logprobs_cap}, allowed are 0 and {POLAR_MAX_LOGPROBS} or more"
            )));
        }
        let n_events = copy::out(n_events, "n_events")?;
        let n_logprobs = match logprobs_cap {
            0 if n_logprobs.is_null() => None,
            _ => Some(copy::out(n_logprobs, "n_logprobs")?),
        };
        let mut arrays = Arrays {
            events,
            events_cap,
            n_events,
            used: 0,
            logprobs,
            logprobs_cap,
            n_logprobs,
            logprobs_used: 0,
        };
        arrays.write_counts();
        Ok(arrays)
    }

    fn write_counts(&mut self) {
        self.n_events.write(self.used);
        if let Some(n) = &mut self.n_logprobs {
            n.write(self.logprobs_used);
        }
    }
}

impl EventSink for Arrays<'_> {
    fn event(&mut self, event: &Event, top: &[TopLogprob]) -> bool {
        // Without an array the alternatives are dropped; the event says that it has none.
        let top = if self.logprobs_cap == 0 { &[] } else { top };
        if self.used == self.events_cap || self.logprobs_cap - self.logprobs_used < top.len() {
            return false;
        }
        for (i, alternative) in top.iter().enumerate() {
            let value = polar_logprob { token: id(alternative.token), logprob: alternative.logprob };
            // SAFETY: below `logprobs_cap` elements, which the caller says are there.
            unsafe { self.logprobs.add(self.logprobs_used + i).write(value) };
        }
        let value = to_c(event, top.len() as u32, self.logprobs_used as u32);
        // SAFETY: below `events_cap` elements, which the caller says are there.
        unsafe { self.events.add(self.used).write(value) };
        self.logprobs_used += top.len();
        self.used += 1;
        self.write_counts();
        true
    }
}

fn to_c(event: &Event, n_logprobs: u32, first_logprob: u32) -> polar_event {
    let mut flags = 0;
    for (set, flag) in [
        (event.token.is_some() && event.is_output, POLAR_EVENT_TOKEN),
        (event.finished.is_some(), POLAR_EVENT_FINISHED),
        (event.preempted, POLAR_EVENT_PREEMPTED),
        (event.logits, POLAR_EVENT_LOGITS),
    ] {
        flags |= if set { flag } else { 0 };
    }
    polar_event {
        seq: event.seq.0,
        user_tag: event.user_tag,
        token: event.token.map_or(-1, id),
        logprob: event.logprob,
        flags,
        reason: match event.finished {
            None => POLAR_FINISH_NONE,
            Some(FinishReason::Stop) => POLAR_FINISH_STOP,
            Some(FinishReason::Length) => POLAR_FINISH_LENGTH,
            Some(FinishReason::Cancelled) => POLAR_FINISH_CANCELLED,
            Some(FinishReason::Error) => POLAR_FINISH_ERROR,
        },
        status: event.status.0,
        n_logprobs,
        first_logprob,
        n_generated: event.n_generated,
        attn_density: event.counts.attn_density(),
        mlp_density: event.counts.mlp_density(),
        reserved: [0; 2],
    }
}

/// Token ids are below the vocabulary size, which fits an `i32`.
fn id(token: u32) -> i32 {
    i32::try_from(token).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SeqId;
    use crate::error::Status;
    use crate::sparsity::Counts;
    use std::ptr::null_mut;

    fn event(token: u32) -> Event {
        Event {
            seq: SeqId(1),
            user_tag: 2,
            token: Some(token),
            is_output: true,
            logprob: -1.0,
            n_logprobs: 2,
            finished: None,
            preempted: false,
            logits: false,
            status: Status::OK,
            n_generated: 1,
            counts: Counts { attn_run: 1, attn_total: 2, mlp_run: 0, mlp_total: 0 },
        }
    }

    const TOP: [TopLogprob; 2] =
        [TopLogprob { token: 5, logprob: -0.5 }, TopLogprob { token: 6, logprob: -0.75 }];

    fn empty() -> polar_event {
        to_c(&event(0), 0, 0)
    }

    #[test]
    fn a_full_array_takes_nothing() {
        let (mut n, mut array) = (9, [empty(); 1]);
        let mut a = Arrays::new(array.as_mut_ptr(), 1, &mut n, null_mut(), 0, null_mut()).expect("valid");
        assert!(a.event(&event(4), &TOP));
        assert!(!a.event(&event(5), &TOP));
        assert_eq!((n, array[0].token, array[0].n_logprobs, array[0].attn_density), (1, 4, 0, 0.5));
    }

    #[test]
    fn no_room_at_all_is_legal() {
        let mut n = 9;
        let mut a = Arrays::new(null_mut(), 0, &mut n, null_mut(), 0, null_mut()).expect("valid");
        assert!(!a.event(&event(4), &[]));
        assert_eq!(n, 0);
    }

    #[test]
    fn alternatives_follow_their_event() {
        let (mut n, mut m, mut array) = (0, 0, [empty(); 12]);
        let mut top = [polar_logprob { token: 0, logprob: 0.0 }; 21];
        let mut a = Arrays::new(array.as_mut_ptr(), 12, &mut n, top.as_mut_ptr(), 21, &mut m).expect("valid");
        for i in 0..10 {
            assert!(a.event(&event(i), &TOP));
        }
        assert!(!a.event(&event(10), &TOP), "an event whose alternatives do not fit waits whole");
        assert_eq!((n, m), (10, 20));
        assert_eq!((array[9].first_logprob, array[9].n_logprobs), (18, 2));
        assert_eq!((top[19].token, top[19].logprob), (6, -0.75));
    }

    #[test]
    fn arrays_that_can_never_work_are_refused() {
        let (mut n, mut m, mut array) = (0, 0, [empty(); 1]);
        let mut top = [polar_logprob { token: 0, logprob: 0.0 }; 19];
        let e = array.as_mut_ptr();
        assert!(Arrays::new(e, 1, &mut n, top.as_mut_ptr(), 19, &mut m).is_err());
        assert!(Arrays::new(e, 1, null_mut(), null_mut(), 0, &mut m).is_err());
        assert!(Arrays::new(null_mut(), 1, &mut n, null_mut(), 0, null_mut()).is_err());
        assert!(Arrays::new(e, 1, &mut n, top.as_mut_ptr(), 20, null_mut()).is_err());
    }
}
