//! A thread pool for stages of a few microseconds: N - 1 workers and the caller.
//!
//! A job is open while the caller works on it; workers join it if they are awake in time, and the
//! caller waits only for those that joined. A worker the system does not run therefore costs
//! speed, never progress: with more threads than cores, or in a forked child, work still ends.
//! Each thread begins with a run of neighbouring tasks of its own, so that it walks through memory in
//! order, and takes others' last tasks when it has none left.
//! Workers spin for a short while between jobs and then sleep. A job allocates nothing.

use super::ahead::Ahead;
use super::split::Split;
use crate::error::{Error, Result, Status, try_with_capacity};
use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most threads of a pool.
pub const MAX_THREADS: usize = 1024;
/// How long an idle worker spins before it sleeps: longer than the serial code between two stages,
/// shorter than anyone would notice as waste after a step.
const SPIN: Duration = Duration::from_micros(100);
/// Set in [`Shared::state`] while workers may join.
const OPEN: u64 = 1 << 15;
/// The bits of [`Shared::state`] that count workers inside the job.
const INSIDE: u64 = OPEN - 1;
/// One job number in [`Shared::state`].
const NEXT_JOB: u64 = 1 << 16;

type Task = dyn Fn(usize, usize) + Sync;

#[derive(Clone, Copy)]
struct Job {
    task: *const Task,
    ahead: Ahead,
}

/// The tasks of one thread's share of a job that nobody took yet: the first one in the upper half,
/// one past the last in the lower. Its owner takes from the front, so that it walks through memory
/// in order and finds what it asked for ahead; who has nothing left takes from the back.
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn set(&self, first: usize, end: usize) {
        self.0.store((first as u64) << 32 | end as u64, Ordering::Relaxed);
    }

    fn take(&self, own: bool) -> Option<usize> {
        let mut now = self.0.load(Ordering::Relaxed);
        loop {
            let (first, end) = (now >> 32, now & u64::from(u32::MAX));
            if first >= end {
                return None;
            }
            let (left, task) = if own { (now + (1 << 32), first) } else { (now - 1, end - 1) };
            match self.0.compare_exchange_weak(now, left, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(task as usize),
                Err(other) => now = other,
            }
        }
    }
}

struct Shared {
    /// Job number, [`OPEN`], workers inside.
    state: AtomicU64,
    /// One per thread.
    shares: Vec<Share>,
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    sleeping: AtomicUsize,
    door: Mutex<()>,
    bell: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// More threads than cores: spinning would keep the others from running.
    crowded: bool,
}

// SAFETY: `job` is written only while no job is open and nobody is inside one, by the one caller
// that holds `Pool::turn`; workers read it only after joining, which orders the read after the
// write. The pointer in it is valid until the caller has seen the last worker leave.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// The pool. Calls from several threads take turns.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

impl Pool {
    /// `threads` in all, the caller among them; 0 = as many as there are cores.
    pub fn new(threads: usize) -> Result<Pool> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if threads == 0 { cores.min(MAX_THREADS) } else { threads };
        if threads > MAX_THREADS {
            return Err(Error::invalid(format!("threads is {threads}, at most {MAX_THREADS} allowed")));
        }
        let mut shares = try_with_capacity(threads, "thread pool")?;
        shares.extend((0..threads).map(|_| Share(AtomicU64::new(0))));
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            shares,
            job: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            door: Mutex::new(()),
            bell: Condvar::new(),
            panic: Mutex::new(None),
            crowded: threads > cores,
        });
        let workers = try_with_capacity(threads - 1, "thread pool")?;
        let mut pool = Pool { shared, workers, turn: Mutex::new(()) };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let name = format!("polar-{worker}");
            let spawned = std::thread::Builder::new().name(name).spawn(move || shared.serve(worker));
            match spawned {
                Ok(handle) => pool.workers.push(handle),
                Err(e) => {
                    let mut error = Error::os(format_args!("thread {worker} of {threads}"), &e);
                    error.status = Status::E_NOMEM;
                    return Err(error);
                }
            }
        }
        Ok(pool)
    }

    /// Threads, the caller among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Wakes sleeping workers ahead of a job.
    pub fn wake(&self) {
        if self.shared.sleeping.load(Ordering::Relaxed) > 0 {
            let _door = lock(&self.shared.door);
            self.shared.bell.notify_all();
        }
    }

    /// Calls `task(worker, index)` once for every index below `n`, which is below 2^32. A panic in
    /// any of them is raised again here, once all have ended. A task must not call the pool it runs
    /// on. Threads that find no task left fetch what `ahead` says the next job reads.
    pub fn run(&self, n: usize, ahead: Ahead, task: &(dyn Fn(usize, usize) + Sync)) {
        if n <= 1 || self.workers.is_empty() {
            (0..n).for_each(|i| task(0, i));
            return;
        }
        assert!(u32::try_from(n).is_ok(), "{n} tasks");
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: erases the lifetime; nobody uses the pointer after `leave` below, which runs
        // before `task` goes out of scope, whether a task panics or not.
        let task: &'static Task = unsafe { std::mem::transmute(task) };
        let opened = Job { task, ahead };
        // SAFETY: no job is open and nobody is inside one: the previous call waited for that, and
        // this one holds the turn.
        unsafe { *shared.job.get() = Some(opened) };
        let threads = self.threads();
        for (i, share) in shared.shares.iter().enumerate() {
            share.set(n * i / threads, n * (i + 1) / threads);
        }
        let job = shared.state.load(Ordering::Relaxed) / NEXT_JOB + 1;
        shared.state.store((job * NEXT_JOB) | OPEN, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            let _door = lock(&shared.door);
            shared.bell.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| shared.work(0, opened)));
        shared.leave(ahead);
        let theirs = lock(&shared.panic).take();
        drop(turn);
        if let Some(payload) = mine.err().or(theirs) {
            resume_unwind(payload);
        }
    }

    /// Runs `task` on every part of `parts`, with the worker's own element of `locals`
    /// (at least as many as threads).
    pub fn split<P: Split, L: Send>(
        &self,
        parts: P,
        locals: &mut [L],
        ahead: Ahead,
        task: impl Fn(&mut L, P::Part, usize) + Sync,
    ) {
        assert!(locals.len() >= self.threads(), "{} locals, {} threads", locals.len(), self.threads());
        let locals = Locals(locals.as_mut_ptr());
        self.run(parts.tasks(), ahead, &|worker, i| {
            // SAFETY: a worker index belongs to one thread during a job and is below
            // `threads()`; each task index comes once, so its part does too.
            let (local, part) = unsafe { (&mut *locals.at(worker), parts.part(i)) };
            task(local, part, i);
        });
    }

    /// The same on the calling thread alone, for work too small to share.
    pub fn serial<P: Split>(parts: P, task: impl Fn(P::Part, usize)) {
        for i in 0..parts.tasks() {
            // SAFETY: each task index comes once.
            task(unsafe { parts.part(i) }, i);
        }
    }

    /// Runs `task` on every part of `parts`.
    pub fn each<P: Split>(&self, parts: P, task: impl Fn(P::Part, usize) + Sync) {
        self.run(parts.tasks(), Ahead::NOTHING, &|_, i| {
            // SAFETY: each task index comes once.
            let part = unsafe { parts.part(i) };
            task(part, i);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.door));
        self.shared.bell.notify_all();
        for worker in self.workers.drain(..) {
            // A worker's panics are caught inside; nothing to report here.
            let _ = worker.join();
        }
    }
}

struct Locals<L>(*mut L);

// SAFETY: each thread takes only its own element.
unsafe impl<L: Send> Sync for Locals<L> {}

impl<L> Locals<L> {
    fn at(&self, worker: usize) -> *mut L {
        self.0.wrapping_add(worker)
    }
}

impl Shared {
    /// A worker's life.
    fn serve(&self, worker: usize) {
        let mut done = 0;
        loop {
            let Some(state) = self.wait_for_job(done) else { return };
            done = state / NEXT_JOB;
            // Joins only the very job it saw, and only while it is open.
            let mut state = state;
            while state & OPEN != 0 && state / NEXT_JOB == done {
                match self.state.compare_exchange_weak(state, state + 1, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => {
                        // SAFETY: joined: the caller wrote the job before opening it and leaves it
                        // alone until this worker has left.
                        let job = unsafe { *self.job.get() };
                        if let Some(job) = job
                            && let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.work(worker, job)))
                        {
                            *lock(&self.panic) = Some(payload);
                        }
                        self.state.fetch_sub(1, Ordering::Release);
                        if let Some(job) = job {
                            let mut fetch = job.ahead.of(worker, self.shares.len());
                            // Until the next job opens: `state` then has another number.
                            while self.state.load(Ordering::Relaxed) / NEXT_JOB == done && fetch.some() {}
                        }
                        break;
                    }
                    Err(now) => state = now,
                }
            }
        }
    }

    /// Takes tasks until none is left. After a panic the rest is not started.
    fn work(&self, worker: usize, job: Job) {
        struct Rest<'a>(&'a [Share]);
        impl Drop for Rest<'_> {
            fn drop(&mut self) {
                self.0.iter().for_each(|share| share.set(0, 0));
            }
        }
        let rest = Rest(&self.shares);
        // SAFETY: valid while this thread is inside the job.
        let task = unsafe { &*job.task };
        let (before, from) = self.shares.split_at(worker);
        for (i, share) in from.iter().chain(before).enumerate() {
            while let Some(index) = share.take(i == 0) {
                task(worker, index);
            }
        }
        std::mem::forget(rest);
    }

    /// Closes the job and waits for the workers inside.
    fn leave(&self, ahead: Ahead) {
        self.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut spins = 0u32;
        let mut fetch = ahead.of(0, self.shares.len());
        while self.state.load(Ordering::Acquire) & INSIDE != 0 {
            if fetch.some() {
                continue;
            }
            spins += 1;
            if self.crowded || spins > 20_000 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Waits for a job other than `done`; `None` when the pool ends.
    fn wait_for_job(&self, done: u64) -> Option<u64> {
        let mut since = None;
        let mut spins = 0u32;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let state = self.state.load(Ordering::SeqCst);
            if state & OPEN != 0 && state / NEXT_JOB != done {
                return Some(state);
            }
            spins += 1;
            if !spins.is_multiple_of(64) && !self.crowded {
                std::hint::spin_loop();
                continue;
            }
            if self.crowded {
                std::thread::yield_now();
            }
            if since.get_or_insert_with(Instant::now).elapsed() < SPIN {
                continue;
            }
            self.sleep(done);
            since = None;
        }
    }

    fn sleep(&self, done: u64) {
        let door = lock(&self.door);
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        // The caller opens a job and then looks at `sleeping`; this looks at the job after setting
        // `sleeping`: one of the two sees the other, so no bell is missed.
        let state = self.state.load(Ordering::SeqCst);
        let nothing = state & OPEN == 0 || state / NEXT_JOB == done;
        if nothing && !self.stop.load(Ordering::SeqCst) {
            drop(self.bell.wait(door).unwrap_or_else(PoisonError::into_inner));
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Nothing these locks guard can be left half done by a panic.
fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::split::Chunks;
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads).unwrap();
            for n in [0, 1, 2, 7, 1000] {
                for _ in 0..50 {
                    let mut hits = vec![0u32; n];
                    pool.each(Chunks::new(&mut hits, 1), |part, _| part[0] += 1);
                    assert!(hits.iter().all(|&h| h == 1));
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_come_back() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(1));
            pool.wake();
            let sum = AtomicUsize::new(0);
            pool.run(100, Ahead::NOTHING, &|_, i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(4).unwrap();
        for bad in 0..40 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(40, Ahead::NOTHING, &|_, i| {
                    std::thread::yield_now();
                    assert_ne!(i, bad, "on purpose");
                });
            }));
            assert!(caught.is_err());
            let count = AtomicUsize::new(0);
            pool.run(10, Ahead::NOTHING, &|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 10);
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2).unwrap();
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for _ in 0..200 {
                        let mut locals = [0u64; 2];
                        let mut parts = vec![1u64; 64];
                        pool.split(Chunks::new(&mut parts, 1), &mut locals, Ahead::NOTHING, |l, p, _| {
                            *l += p[0]
                        });
                        assert_eq!(locals.iter().sum::<u64>(), 64);
                    }
                });
            }
        });
    }

    #[test]
    fn too_many_threads_is_an_error() {
        assert!(Pool::new(MAX_THREADS + 1).is_err());
    }
}
