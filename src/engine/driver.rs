//! Who may drive an engine, and the two halves of a step.
//!
//! `step` computes on the caller's thread. `begin` must not wait, so on a backend whose stages are
//! synchronous (the CPU) it hands the computation to a leader thread, started on first use, and
//! `finish` waits for it with a timeout.

use super::core::Core;
use super::events::EventSink;
use super::inbox::Inbox;
use super::types::{Delivered, Health, SeqId};
use crate::backend::Backend;
use crate::error::{Error, Result, Status};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Timeout that waits for as long as it takes.
pub const FOREVER: u64 = u64::MAX;

pub(crate) struct Driver<B: Backend> {
    shared: Arc<Shared<B>>,
    /// Set while a thread is inside begin, finish, step or logits.
    driving: AtomicBool,
    leader: Mutex<Option<JoinHandle<()>>>,
}

struct Shared<B: Backend> {
    inbox: Arc<Inbox>,
    /// The backend's stages return before the work is done.
    asynchronous: bool,
    core: Mutex<Core<B>>,
    flight: Mutex<Flight>,
    changed: Condvar,
}

/// Where the step in flight is.
struct Flight {
    stage: Stage,
    started: Instant,
    quit: bool,
}

enum Stage {
    /// None in flight.
    Idle,
    /// For the leader to compute.
    Queued,
    /// On the leader, or on an asynchronous device.
    Running,
    /// Computed, or failed; not committed yet.
    Done(Result<()>),
}

impl<B: Backend> Driver<B> {
    pub(crate) fn new(core: Core<B>, inbox: Arc<Inbox>) -> Driver<B> {
        Driver {
            shared: Arc::new(Shared {
                inbox,
                asynchronous: core.model.backend.caps().asynchronous,
                core: Mutex::new(core),
                flight: Mutex::new(Flight { stage: Stage::Idle, started: Instant::now(), quit: false }),
                changed: Condvar::new(),
            }),
            driving: AtomicBool::new(false),
            leader: Mutex::new(None),
        }
    }

    pub(crate) fn inbox(&self) -> &Inbox {
        &self.shared.inbox
    }

    pub(crate) fn begin(&self) -> Result<()> {
        let _turn = self.enter()?;
        if self.in_flight() {
            return Err(Error::new(Status::E_BUSY, "a step is already in flight"));
        }
        {
            let mut core = self.shared.core();
            // Undelivered events go out with the next finish, before any new work.
            if !core.events.is_empty() || !core.begin(&self.shared.inbox) {
                return Ok(());
            }
        }
        if self.shared.asynchronous { self.launch() } else { self.hand_over() }
    }

    pub(crate) fn finish(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        let _turn = self.enter()?;
        self.collect(timeout_ns, sink)
    }

    pub(crate) fn step(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        let _turn = self.enter()?;
        if self.in_flight() {
            return self.collect(timeout_ns, sink);
        }
        let started = Instant::now();
        let mut guard = self.shared.core();
        let core = &mut *guard;
        if !core.events.is_empty() {
            return Ok(core.events.drain(sink, Status::OK));
        }
        if !core.begin(&self.shared.inbox) {
            return Ok(core.events.drain(sink, Status::IDLE));
        }
        if self.shared.asynchronous {
            drop(guard);
            self.launch()?;
            return self.collect(timeout_ns, sink);
        }
        if timeout_ns != FOREVER {
            drop(guard);
            self.hand_over()?;
            return self.collect(timeout_ns, sink);
        }
        let done = self.shared.compute(core);
        self.shared.settle(core, done, started)?;
        Ok(core.events.drain(sink, Status::OK))
    }

    pub(crate) fn logits(&self, id: SeqId, out: &mut [f32]) -> Result<usize> {
        let _turn = self.enter()?;
        if self.in_flight() {
            return Err(Error::new(Status::E_BUSY, "a step is in flight; finish it first"));
        }
        let core = self.shared.core();
        let Some(logits) = core.logits(id) else {
            return Err(Error::new(
                Status::E_NOT_FOUND,
                format!("sequence {:#x} is not running with host sampling", id.0),
            ));
        };
        if logits.is_empty() {
            return Err(Error::invalid(format!("sequence {:#x} has no logits yet", id.0)));
        }
        let n = logits.len();
        if out.len() < n {
            return Err(Error::invalid(format!("room for {} logits, the vocabulary has {n}", out.len())));
        }
        out[..n].copy_from_slice(logits);
        Ok(n)
    }

    fn enter(&self) -> Result<Turn<'_>> {
        self.shared.inbox.check_health()?;
        if self.driving.swap(true, Ordering::Acquire) {
            return Err(Error::new(Status::E_BUSY, "another thread is inside step"));
        }
        Ok(Turn(&self.driving))
    }

    fn in_flight(&self) -> bool {
        !matches!(self.shared.flight().stage, Stage::Idle)
    }

    /// Starts a step on an asynchronous device.
    fn launch(&self) -> Result<()> {
        let started = Instant::now();
        let mut core = self.shared.core();
        match self.shared.compute(&mut core) {
            Ok(()) => {
                let mut flight = self.shared.flight();
                flight.started = started;
                flight.stage = Stage::Running;
                Ok(())
            }
            Err(e) => self.shared.settle(&mut core, Err(e), started),
        }
    }

    /// Gives the step to the leader thread.
    fn hand_over(&self) -> Result<()> {
        if let Err(e) = self.start_leader() {
            self.shared.core().roll_back();
            return Err(e);
        }
        let mut flight = self.shared.flight();
        flight.started = Instant::now();
        flight.stage = Stage::Queued;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn start_leader(&self) -> Result<()> {
        let mut leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        if leader.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("polar-leader".into()).spawn(move || shared.lead());
            *leader = Some(thread.map_err(|e| Error::os("leader thread", &e))?);
        }
        Ok(())
    }

    /// Waits for the step in flight, commits it, delivers events.
    fn collect(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        let waited = self.shared.wait(timeout_ns)?;
        let mut guard = match waited {
            Waited::NotYet => {
                return Ok(Delivered { status: Status::PENDING, n_events: 0, n_logprobs: 0 });
            }
            Waited::Nothing => {
                let mut core = self.shared.core();
                return Ok(core.events.drain(sink, Status::IDLE));
            }
            Waited::Done(done, started) => {
                let mut core = self.shared.core();
                self.shared.settle(&mut core, done, started)?;
                core
            }
        };
        Ok(guard.events.drain(sink, Status::OK))
    }
}

impl<B: Backend> Drop for Driver<B> {
    fn drop(&mut self) {
        self.shared.flight().quit = true;
        self.shared.changed.notify_all();
        let leader = self.leader.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(leader) = leader {
            // Its panics were caught and reported; there is nothing left to learn from it.
            let _ = leader.join();
        }
    }
}

enum Waited {
    Nothing,
    NotYet,
    Done(Result<()>, Instant),
}

impl<B: Backend> Shared<B> {
    fn core(&self) -> MutexGuard<'_, Core<B>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flight(&self) -> MutexGuard<'_, Flight> {
        self.flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Computes, turning a panic into a dead engine.
    fn compute(&self, core: &mut Core<B>) -> Result<()> {
        catch_unwind(AssertUnwindSafe(|| core.compute())).unwrap_or_else(|payload| {
            std::mem::forget(payload); // its Drop may panic again
            self.inbox.set_health(Health::Dead);
            Err(Error::new(Status::E_PANIC, "a bug in the library ended this engine"))
        })
    }

    /// Commits a computed step, or undoes a failed one.
    fn settle(&self, core: &mut Core<B>, done: Result<()>, started: Instant) -> Result<()> {
        let elapsed = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        match done.and_then(|()| core.commit(&self.inbox, elapsed)) {
            Ok(()) => Ok(()),
            Err(e) => {
                if e.status == Status::E_DEVICE_LOST {
                    self.inbox.set_health(Health::DeviceLost);
                }
                core.roll_back();
                Err(e)
            }
        }
    }

    fn wait(&self, timeout_ns: u64) -> Result<Waited> {
        // A timeout too long for the clock waits for as long as it takes.
        let deadline = match timeout_ns {
            FOREVER => None,
            ns => Instant::now().checked_add(Duration::from_nanos(ns)),
        };
        let mut flight = self.flight();
        loop {
            match std::mem::replace(&mut flight.stage, Stage::Idle) {
                Stage::Idle => return Ok(Waited::Nothing),
                Stage::Done(done) => return Ok(Waited::Done(done, flight.started)),
                Stage::Running if self.asynchronous => {
                    // The device runs; nobody else touches the core meanwhile.
                    let mut core = self.core();
                    match core.poll(timeout_ns) {
                        Ok(true) => return Ok(Waited::Done(Ok(()), flight.started)),
                        Ok(false) => {
                            flight.stage = Stage::Running;
                            return Ok(Waited::NotYet);
                        }
                        Err(e) => return Ok(Waited::Done(Err(e), flight.started)),
                    }
                }
                stage => flight.stage = stage,
            }
            flight = match deadline {
                None => self.changed.wait(flight).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(Waited::NotYet);
                    }
                    self.changed.wait_timeout(flight, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// The leader thread's life.
    fn lead(&self) {
        let mut flight = self.flight();
        loop {
            if matches!(flight.stage, Stage::Queued) {
                flight.stage = Stage::Running;
                drop(flight);
                let done = self.compute(&mut self.core());
                flight = self.flight();
                flight.stage = Stage::Done(done);
                self.changed.notify_all();
            }
            if flight.quit {
                return;
            }
            if !matches!(flight.stage, Stage::Queued) {
                flight = self.changed.wait(flight).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}
