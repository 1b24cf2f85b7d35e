//! What the host costs per step: a full engine on the null backend, whose stages do nothing.

use super::random::Random;
use super::specs;
use polar_sparsity::backend::Backend;
use polar_sparsity::backend::null::Null;
use polar_sparsity::engine::{
    EngineOn, EngineOptions, Event, EventSink, FOREVER, ModelOn, Request, SeqId, TopLogprob,
};
use polar_sparsity::sample::Params;
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Counts allocations.
pub struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);

// SAFETY: forwards to the system allocator and counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }
}

struct Nothing(u64);

impl EventSink for Nothing {
    fn event(&mut self, _: &Event, _: &[TopLogprob]) -> bool {
        self.0 += 1;
        true
    }
}

/// Microseconds and allocations per decode step of `batch` sequences.
pub fn measure(batch: u32) -> Value {
    const STEPS: u32 = 1000;
    let null = Arc::new(Null::new());
    let weights = null.upload(&Random::new(specs::named("llama-3.2-1b")), Default::default(), &mut |_, _| 0);
    let model = ModelOn::new(null, weights.expect("weights"));
    let options =
        EngineOptions { max_batch: batch, kv_bytes: 8 << 30, max_context: 4096, ..Default::default() };
    let engine = EngineOn::new(&model, None, &options).expect("an engine");
    let params = Params::GREEDY;
    let request = |i: u32| Request {
        user_tag: u64::from(i),
        first_token: 0,
        n_tokens: 16 + i,
        first_stop: 0,
        n_stop: 0,
        max_new_tokens: 2 * STEPS,
        priority: 0,
        ignore_eos: true,
        host_samples: false,
        params,
        attn_density: 0.0,
        mlp_mode: None,
    };
    let requests: Vec<Request> = (0..batch).map(request).collect();
    let tokens = vec![5; 16 + batch as usize];
    engine.submit(&requests, &tokens, &mut vec![SeqId::default(); batch as usize]).expect("submit");
    let mut sink = Nothing(0);
    while sink.0 < 20 * u64::from(batch) {
        engine.step(FOREVER, &mut sink).expect("a step");
    }
    let mut times = Vec::with_capacity(STEPS as usize);
    let allocations = COUNT.load(Ordering::Relaxed);
    let mut made = 0;
    for _ in 0..STEPS {
        let start = Instant::now();
        engine.step(FOREVER, &mut sink).expect("a step");
        times.push(start.elapsed().as_secs_f64() * 1e6);
        made = COUNT.load(Ordering::Relaxed) - allocations;
    }
    times.sort_by(f64::total_cmp);
    let (median, late) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    json!({"kind": "host", "batch": batch, "us_median": median, "us_p99": late, "allocations": made})
}
