//! Endurance: thousands of steps with random arrivals, lengths, densities, samplers, priorities and
//! cancels, and nothing lost at the end: one FINISHED event per request, every page back, host and
//! device memory as after the warm-up. A few hundred steps on the CPU by default; POLAR_TEST_STEPS and
//! POLAR_TEST_DEVICE (1 = the first GPU) ask for more.
#![allow(clippy::print_stdout, reason = "the table, for whoever asks with --nocapture")]

mod support;

use polar_sparsity::engine::{
    Context, ContextOptions, Engine, EngineOptions, Event, EventSink, FOREVER, FinishReason, Health,
    LoadOptions, Request, SeqId, TopLogprob,
};
use polar_sparsity::sample::Params;
use polar_sparsity::sparsity::MlpMode;
use polar_sparsity::{Result, Status};
use std::collections::HashMap;
use support::{golden_dir, request};

const MAX_QUEUE: usize = 24;
const MAX_BATCH: u32 = 12;
const PROBE_BYTES: u64 = 1 << 20;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().expect("a number"))
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("/proc");
    let pages: u64 = text.split(' ').nth(1).and_then(|p| p.parse().ok()).expect("a number");
    pages * 4096
}

/// What became of each request.
#[derive(Default)]
struct Ledger {
    /// Not finished yet, by tag.
    open: HashMap<u64, SeqId>,
    accepted: u64,
    finished: u64,
    cancelled: u64,
    preempted: u64,
    tokens: u64,
    problems: Vec<String>,
    /// Sequences whose host chooses the next token.
    asking: Vec<SeqId>,
}

impl EventSink for Ledger {
    fn event(&mut self, e: &Event, _: &[TopLogprob]) -> bool {
        self.tokens += u64::from(e.is_output);
        self.preempted += u64::from(e.preempted);
        match self.open.get(&e.user_tag) {
            Some(&id) if id == e.seq => {}
            other => self.problems.push(format!("event of request {}: {other:?}, {e:?}", e.user_tag)),
        }
        if e.logits {
            self.asking.push(e.seq);
        }
        if let Some(reason) = e.finished {
            self.open.remove(&e.user_tag);
            self.finished += 1;
            self.cancelled += u64::from(reason == FinishReason::Cancelled);
            if reason == FinishReason::Error {
                self.problems.push(format!("request {}: {}", e.user_tag, e.status.0));
            }
        }
        true
    }
}

fn sampler(random: &mut Random) -> Params {
    let mut p = Params::GREEDY;
    if random.one_in(2) {
        p.temperature = random.pick(&[0.3, 0.8, 1.5]);
        p.top_k = random.pick(&[0, 1, 7, 40]);
        p.top_p = random.pick(&[1.0, 0.9, 0.5]);
        p.min_p = random.pick(&[0.0, 0.05]);
        p.seed = random.below(1 << 30);
    }
    if random.one_in(4) {
        p.repetition_penalty = random.pick(&[1.0, 1.2]);
        (p.presence_penalty, p.frequency_penalty) = (0.3, 0.1);
    }
    if random.one_in(4) {
        (p.n_logprobs, p.logprob) = (random.below(6) as u32, true);
    }
    p
}

/// A random request over random tokens, from a few that end at once to some that fill the cache.
fn arrival(random: &mut Random, tag: u64, shape: Shape) -> (Request, Vec<i32>) {
    let prompt = 1 + {
        let most = if random.one_in(5) { shape.longest / 2 } else { 24 };
        random.below(most)
    };
    let new = 1 + {
        let most = if random.one_in(5) { shape.longest - prompt } else { 16 };
        random.below(most)
    };
    let tokens = (0..prompt + 1).map(|_| 3 + random.below(u64::from(shape.vocab) - 3) as i32).collect();
    let modes = [None, Some(MlpMode::Dense), Some(MlpMode::Reference), Some(MlpMode::Invariant)];
    let mlp_mode = random.pick(&modes[..if shape.mlp_routers { 4 } else { 2 }]);
    let made = Request {
        user_tag: tag,
        priority: random.below(3) as u32,
        ignore_eos: random.one_in(2),
        params: sampler(random),
        attn_density: random.pick(&[0.0, 0.25, 0.5, 0.7, 1.0]),
        mlp_mode,
        host_samples: random.one_in(6),
        first_stop: prompt as u32,
        n_stop: random.below(2) as u32,
        ..request(0, prompt as usize, new as u32)
    };
    (made, tokens)
}

/// Answers those who ask for a token; some have been cancelled meanwhile.
fn answer(engine: &Engine, random: &mut Random, vocab: u32, l: &mut Ledger) -> Result<()> {
    for id in std::mem::take(&mut l.asking) {
        match engine.push_token(id, random.below(u64::from(vocab)) as i32) {
            Err(e) if e.status != Status::E_NOT_FOUND => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// `steps` steps, then until idle. Arrivals come in waves, so that the engine is idle, busy and over-full
/// in turn.
fn drive(engine: &Engine, random: &mut Random, steps: u64, shape: Shape, l: &mut Ledger) -> Result<()> {
    for step in 0..steps {
        let arrivals = random.pick(&[0, 0, 1, 1, 1, 2, 6]) * u64::from(step / 50 % 4 != 3);
        for _ in 0..arrivals {
            let tag = l.accepted;
            let (request, tokens) = arrival(random, tag, shape);
            let mut id = [SeqId::default()];
            match engine.submit(&[request], &tokens, &mut id) {
                Ok(()) => {
                    l.open.insert(tag, id[0]);
                    l.accepted += 1;
                }
                Err(e) if e.status == Status::E_QUEUE_FULL => break,
                Err(e) => return Err(e),
            }
        }
        if random.one_in(8) && !l.open.is_empty() {
            let at = random.below(l.open.len() as u64) as usize;
            let id = *l.open.values().nth(at).expect("in range");
            engine.cancel(&[id, id, SeqId(random.below(1 << 40))])?;
        }
        if random.one_in(3) {
            engine.begin()?;
            engine.finish(FOREVER, l)?;
        } else {
            engine.step(FOREVER, l)?;
        }
        if !random.one_in(4) {
            answer(engine, random, shape.vocab, l)?;
        }
    }
    loop {
        answer(engine, random, shape.vocab, l)?;
        if engine.step(FOREVER, l)?.status == Status::IDLE && l.asking.is_empty() {
            return Ok(());
        }
    }
}

/// What requests depend on.
#[derive(Clone, Copy)]
struct Shape {
    vocab: u32,
    /// Longest context.
    longest: u64,
    mlp_routers: bool,
}

fn soak(case: &str, steps: u64) {
    let device = setting("POLAR_TEST_DEVICE", 0) as u32;
    let ctx = Context::new(&ContextOptions { threads: 2, ..Default::default() }).expect("a context");
    let load = LoadOptions { device, ..LoadOptions::default() };
    let model =
        polar_sparsity::engine::Model::load(&ctx, &golden_dir(case), &load, &mut |_, _| 0).expect("a model");
    let routers =
        polar_sparsity::engine::Routers::load(&model, &golden_dir(case).join("routers.safetensors"), &load)
            .expect("routers");
    let (spec, mlp_routers) = (model.spec(), routers.info().mlp.is_some());
    let longest = u64::from(spec.max_positions) - 8;
    let shape = Shape { vocab: spec.vocab_size, longest, mlp_routers };
    let mut options = EngineOptions {
        max_batch: MAX_BATCH,
        max_queue: MAX_QUEUE as u32,
        step_tokens: 48,
        kv_bytes: PROBE_BYTES,
        ..EngineOptions::default()
    };
    options.sparsity.mlp_dense_above = 1.0;
    // Room for three of the longest requests, so that sequences are preempted.
    let probe = Engine::new(&model, Some(&routers), &options).expect("an engine").stats();
    options.kv_bytes = PROBE_BYTES / probe.kv_pages_total * (3 * longest / 16);
    let (mut random, mut ledger) = (Random(steps ^ 0x5eed), Ledger::default());
    ledger.open.reserve(MAX_QUEUE + MAX_BATCH as usize);
    let start = std::time::Instant::now();
    // A driver loads kernels when they are first used and keeps them: that is before the first figure.
    let mut first = Ledger::default();
    let engine = Engine::new(&model, Some(&routers), &options).expect("an engine");
    drive(&engine, &mut random, steps / 5, shape, &mut first).expect("a first engine");
    drop(engine);
    let free_at_start = device_free(device);
    let engine = Engine::new(&model, Some(&routers), &options).expect("an engine");
    drive(&engine, &mut random, steps / 5, shape, &mut ledger).expect("warm-up");
    let warm = resident();
    drive(&engine, &mut random, steps - steps / 5, shape, &mut ledger).expect("steps");
    let end = resident();
    let stats = engine.stats();
    let free_busy = device_free(device);
    drop(engine);
    // Engines of the same size, made and dropped: device memory neither grows nor shrinks.
    let free_before = device_free(device);
    for _ in 0..5 {
        drop(Engine::new(&model, Some(&routers), &options).expect("an engine"));
    }
    let free_after = device_free(device);
    let l = &ledger;
    println!("{case} on {}, {:.1} s", model.device_name(), start.elapsed().as_secs_f64());
    for (what, figure) in [
        ("steps", stats.steps),
        ("requests accepted", l.accepted),
        ("  FINISHED events", l.finished),
        ("  of these cancelled", l.cancelled),
        ("requests refused, queue full", stats.admission_refusals),
        ("preemptions", l.preempted),
        ("tokens out", l.tokens),
        ("pages", stats.kv_pages_total),
        ("pages free at the end", stats.kv_pages_free),
        ("resident KiB after the warm-up", warm >> 10),
        ("resident KiB at the end", end >> 10),
        ("device KiB free, before the engine", free_at_start >> 10),
        ("device KiB free, engine alive", free_busy >> 10),
        ("device KiB free, engine dropped", free_before >> 10),
        ("device KiB free, five more dropped", free_after >> 10),
    ] {
        println!("  {what:<36} {figure:>12}");
    }
    assert!(l.problems.is_empty(), "{} problems, first: {}", l.problems.len(), l.problems[0]);
    assert!(l.open.is_empty(), "requests never finished: {:?}", l.open.keys());
    assert_eq!((l.finished, stats.requests_finished), (l.accepted, l.accepted));
    assert_eq!((stats.kv_pages_free, stats.health), (stats.kv_pages_total, Health::Ok));
    assert_eq!((stats.running, stats.waiting), (0, 0));
    if stats.steps >= 500 {
        assert!(l.cancelled > 0 && l.preempted > 0 && stats.admission_refusals > 0, "the trace is too tame");
    }
    // One per cent, and what an allocator keeps of a thread's arena; on a GPU also what the driver keeps of
    // each recorded step, of which there are at most 64.
    let programs = if device == 0 { 0 } else { 64 * (256 << 10) };
    assert!(end <= warm + warm / 100 + (1 << 20) + programs, "resident memory grew from {warm} to {end}");
    // What the driver keeps for itself once kernels and recorded steps have run is not ours to give back;
    // it does not grow with another engine.
    let (once, again) = (64 << 20, 4 << 20);
    assert!(free_before + once >= free_at_start, "device memory fell from {free_at_start} to {free_before}");
    assert!(free_after + again >= free_before, "device memory fell from {free_before} to {free_after}");
}

/// Bytes free on the GPU; a processor's memory is the process's own, which is watched already.
fn device_free(device: u32) -> u64 {
    #[cfg(feature = "cuda")]
    if let Some(ordinal) = device.checked_sub(1) {
        use polar_sparsity::backend::cuda::{device::Device, driver::Driver};
        static WATCH: std::sync::OnceLock<Driver> = std::sync::OnceLock::new();
        return WATCH.get_or_init(|| Driver::open(ordinal).expect("a GPU")).free_memory().expect("a figure");
    }
    assert_eq!(device, 0, "this build has no GPUs");
    0
}

#[test]
fn nothing_is_lost_over_many_steps() {
    let steps = setting("POLAR_TEST_STEPS", 600);
    for case in ["opt_f32", "llama31_f32"] {
        soak(case, steps / 2);
    }
}
