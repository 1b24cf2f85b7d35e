//! Who may use a device's stream while one thread records it: that thread alone. Engines on one device
//! share its stream, and what another thread starts, asks or waits for during a recording would become
//! part of it or spoil it.

use crate::error::{Error, Result, Status};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

/// Recordings take microseconds; one that never ends belongs to an engine that died in it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Uses under way, and who records.
#[derive(Default)]
pub(super) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    inside: usize,
    recorder: Option<ThreadId>,
}

/// A use of the stream, until dropped.
pub(super) struct Turn(Arc<Turns>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.lock().inside -= 1;
        self.0.changed.notify_all();
    }
}

impl Turns {
    /// Waits while another thread records.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Turn> {
        let me = thread::current().id();
        self.wait(|s| s.recorder.is_none_or(|r| r == me))?.inside += 1;
        Ok(Turn(Arc::clone(self)))
    }

    /// Waits until nobody uses the stream, then keeps it for this thread until [`Turns::end`].
    pub(super) fn record(&self) -> Result<()> {
        let me = thread::current().id();
        self.wait(|s| s.inside == 0 && s.recorder.is_none())?.recorder = Some(me);
        Ok(())
    }

    /// Ends this thread's recording, if it has one.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        if state.recorder == Some(thread::current().id()) {
            state.recorder = None;
            self.changed.notify_all();
        }
    }

    fn wait(&self, mut free: impl FnMut(&State) -> bool) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        let (state, waited) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |s| !free(s))
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(Error::new(Status::E_DEVICE, "another engine keeps the device's stream"));
        }
        Ok(state)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment, so a panic leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn a_recording_has_the_stream_to_itself() {
        let turns = Arc::new(Turns::default());
        let (recording, used) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|s| {
            for i in 0..4 {
                let (turns, recording, used) = (&turns, &recording, &used);
                s.spawn(move || {
                    for _ in 0..300 {
                        if i % 2 == 0 {
                            turns.record().unwrap();
                            assert_eq!(recording.fetch_add(1, Ordering::SeqCst), 0, "one at a time");
                            assert_eq!(used.load(Ordering::SeqCst), 0, "nobody else is inside");
                            let _own = turns.enter().unwrap();
                            thread::yield_now();
                            recording.fetch_sub(1, Ordering::SeqCst);
                            turns.end();
                        } else {
                            let _turn = turns.enter().unwrap();
                            used.fetch_add(1, Ordering::SeqCst);
                            assert_eq!(recording.load(Ordering::SeqCst), 0, "nobody records");
                            let _nested = turns.enter().unwrap();
                            used.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        turns.end();
        assert!(turns.lock().recorder.is_none() && turns.lock().inside == 0);
    }
}
