//! Host memory: a steady step allocates nothing; when the k-th allocation fails, for every k, the
//! call says so, nothing is lost, and the next try works.
//!
//! Failing allocations are those whose size depends on input (options, files, requests): they go
//! through fallible calls. Small fixed ones (a handle, an error's text, a node of a JSON tree) end
//! the process when they fail, as Rust's standard library defines; `SECURITY.md` says so.

mod support;

use polar_sparsity::engine::{Engine, EngineOptions, FOREVER, LoadOptions, Model, Request, SeqId};
use polar_sparsity::{Result, Status};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use support::*;

struct Watched;

static COUNT: AtomicU64 = AtomicU64::new(0);
/// Allocations of at least this many bytes may be made to fail.
static LEAST: AtomicUsize = AtomicUsize::new(usize::MAX);

thread_local! {
    /// Counts down to the allocation that fails; `u64::MAX` = none. Only the thread that armed it.
    static COUNTDOWN: Cell<u64> = const { Cell::new(u64::MAX) };
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

fn fails(size: usize) -> bool {
    COUNT.fetch_add(1, Ordering::Relaxed);
    if size < LEAST.load(Ordering::Relaxed) {
        return false;
    }
    COUNTDOWN
        .try_with(|c| match c.get() {
            u64::MAX => false,
            0 => {
                c.set(u64::MAX);
                FAILED.with(|f| f.set(true));
                true
            }
            n => {
                c.set(n - 1);
                false
            }
        })
        .unwrap_or(false)
}

// SAFETY: forwards to the system allocator, or answers null, which the contract allows.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is the system allocator's.
        if fails(layout.size()) { std::ptr::null_mut() } else { unsafe { System.alloc(layout) } }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        if fails(layout.size()) { std::ptr::null_mut() } else { unsafe { System.alloc_zeroed(layout) } }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        if fails(size) { std::ptr::null_mut() } else { unsafe { System.realloc(p, layout, size) } }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Runs `f` with its k-th allocation of at least `least` bytes failing; its result and whether one failed.
fn with_failure<T>(k: u64, least: usize, f: impl FnOnce() -> Result<T>) -> (Result<T>, bool) {
    LEAST.store(least, Ordering::Relaxed);
    FAILED.with(|f| f.set(false));
    COUNTDOWN.with(|c| c.set(k));
    let result = f();
    COUNTDOWN.with(|c| c.set(u64::MAX));
    LEAST.store(usize::MAX, Ordering::Relaxed);
    (result, FAILED.with(Cell::get))
}

/// Fails every allocation of `f` in turn until it runs through; how many there were.
fn each_failure<T>(least: usize, mut f: impl FnMut() -> Result<T>) -> u64 {
    for k in 0.. {
        let (result, failed) = with_failure(k, least, &mut f);
        match (result, failed) {
            (Ok(_), false) => return k,
            (Err(e), true) => assert_eq!(e.status, Status::E_NOMEM, "allocation {k}: {e}"),
            (Ok(_), true) => panic!("allocation {k} failed and nobody noticed"),
            (Err(e), false) => panic!("allocation {k}: {e}"),
        }
    }
    0
}

// One test function: the countdown is the thread's, but the counter is the process's.
#[test]
fn memory() {
    steady_steps_allocate_nothing();
    every_failed_allocation_is_survived();
}

fn steady_steps_allocate_nothing() {
    for (case, density) in [("opt_f32", 0.5), ("opt_bf16", 1.0), ("llama31_f32", 0.5)] {
        let ctx = context(2);
        let model = load_model(&ctx, case);
        let routers = golden_dir(case)
            .join("routers.safetensors")
            .exists()
            .then(|| load_routers(&model, case, "routers.safetensors"));
        let engine = engine(&model, routers.as_ref(), |o| o.max_batch = 8);
        let tokens = vec![7; 64];
        let requests: Vec<Request> = (0..8)
            .map(|i| Request { attn_density: density, params: sampled(i), ..request(i, 20 + i, 60) })
            .collect();
        engine.submit(&requests, &tokens, &mut [SeqId::default(); 8]).expect("submit");
        let mut sink = Count(0);
        for _ in 0..10 {
            engine.step(FOREVER, &mut sink).expect("warm up");
        }
        // Worker threads have started by then, wherever the system had put them.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let before = COUNT.load(Ordering::Relaxed);
        for _ in 0..40 {
            engine.step(FOREVER, &mut sink).expect("a step");
        }
        let made = COUNT.load(Ordering::Relaxed) - before;
        assert_eq!(made, 0, "{case}: {made} allocations in 40 steps");
        assert!(sink.0 >= 8 * 40);
    }
}

struct Count(usize);

impl polar_sparsity::engine::EventSink for Count {
    fn event(&mut self, _: &polar_sparsity::engine::Event, _: &[polar_sparsity::engine::TopLogprob]) -> bool {
        self.0 += 1;
        true
    }
}

/// Different samplers in one batch, all features on in some.
fn sampled(i: usize) -> polar_sparsity::sample::Params {
    let mut p = polar_sparsity::sample::Params::GREEDY;
    if i.is_multiple_of(2) {
        (p.temperature, p.top_k, p.top_p, p.min_p) = (0.8, 20, 0.9, 0.01);
        (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) = (1.1, 0.2, 0.1);
        (p.n_logprobs, p.logprob, p.seed) = (5, true, i as u64);
    }
    p
}

fn every_failed_allocation_is_survived() {
    let case = "opt_f32";
    let ctx = context(1);
    let options = LoadOptions::default();
    // The JSON trees of safetensors and serde_json are bounded by the file limits and infallible.
    let loads = each_failure(64 << 10, || Model::load(&ctx, &golden_dir(case), &options, &mut |_, _| 0));
    let model = load_model(&ctx, case);
    // Large options, so that what depends on them is larger than any fixed part of an engine.
    let large = EngineOptions { max_batch: 2048, max_queue: 8192, ..EngineOptions::default() };
    let creates = each_failure(4096, || Engine::new(&model, None, &large));
    let engine = engine(&model, None, |_| {});
    let tokens = vec![9; 100];
    let requests: Vec<Request> = (0..4).map(|i| request(i, 80, 20)).collect();
    let mut ids = [SeqId::default(); 4];
    let submits = each_failure(128, || engine.submit(&requests, &tokens, &mut ids));
    assert!(loads > 0 && creates > 5 && submits > 4, "{loads} {creates} {submits}: nothing was tried");
    // What was accepted, once, runs to its end.
    assert_eq!(engine.stats().requests_accepted, 4);
    assert_eq!(run(&engine).iter().filter(|e| e.finished.is_some()).count(), 4);
}
