//! What an engine promises its host: one FINISHED per request, nothing lost, nothing shared between
//! sequences, clear refusals.

mod support;

use polar_sparsity::Status;
use polar_sparsity::engine::{Engine, FOREVER, FinishReason, Health, Request, SeqId};
use polar_sparsity::sparsity::MlpMode;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::*;

const CASE: &str = "opt_f32";

/// Prompts of 3 to 40 tokens, cut from the golden ones.
fn prompts(n: usize) -> Vec<Vec<i32>> {
    let golden = Golden::load(CASE);
    let all: Vec<i32> = (0..3).flat_map(|i| golden.int(&format!("p{i}.prompt")).to_vec()).collect();
    (0..n).map(|i| all.iter().cycle().skip(7 * i).take(3 + (i * 11) % 38).copied().collect()).collect()
}

/// Requests over all of `prompts`, and the token array.
fn batch(prompts: &[Vec<i32>], max_new: u32) -> (Vec<Request>, Vec<i32>) {
    let mut tokens = Vec::new();
    let mut requests = Vec::new();
    for (i, p) in prompts.iter().enumerate() {
        requests.push(Request { user_tag: i as u64, ..request(tokens.len(), p.len(), max_new) });
        tokens.extend_from_slice(p);
    }
    (requests, tokens)
}

fn submit(engine: &Engine, requests: &[Request], tokens: &[i32]) -> Vec<SeqId> {
    let mut ids = vec![SeqId::default(); requests.len()];
    engine.submit(requests, tokens, &mut ids).expect("submit");
    ids
}

/// Greedy outputs of each request, in request order.
fn generate(engine: &Engine, requests: &[Request], tokens: &[i32]) -> Vec<Vec<i32>> {
    let ids = submit(engine, requests, tokens);
    let mut out = outputs(&run(engine));
    ids.iter().map(|id| out.remove(id).unwrap_or_default()).collect()
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_in_any_batch() {
    let prompts = prompts(9);
    let seqs = |from: &[Vec<i32>]| -> Vec<Vec<Vec<f32>>> {
        let ctx = context(2);
        let model = load_model(&ctx, CASE);
        let routers = load_routers(&model, CASE, "routers.safetensors");
        let engine = engine(&model, Some(&routers), |o| o.sparsity.mlp_dense_above = 1.0);
        let forced: Vec<Forced<'_>> = from
            .iter()
            .map(|p| Forced {
                prompt: p,
                fed: &[5, 9, 17, 33, 65, 129, 200, 3],
                attn_density: 0.5,
                mlp: Some(MlpMode::Invariant),
            })
            .collect();
        teacher_force(&engine, model.spec().vocab_size as usize, &forced)
    };
    let together = seqs(&prompts);
    for (i, prompt) in prompts.iter().enumerate() {
        let alone = seqs(std::slice::from_ref(prompt));
        assert!(bits(&alone[0]) == bits(&together[i]), "prompt {i} differs from itself in a batch");
    }
}

fn bits(rows: &[Vec<f32>]) -> Vec<u32> {
    rows.iter().flatten().map(|x| x.to_bits()).collect()
}

#[test]
fn thread_counts_agree_bit_for_bit() {
    for case in ["opt_bf16", "llama31_f32", "llama_f16"] {
        let golden = Golden::load(case);
        let of = |threads| {
            let ctx = context(threads);
            let model = load_model(&ctx, case);
            let fed = golden.int("p2.forced");
            let seq = Forced { prompt: golden.int("p2.prompt"), fed, attn_density: 0.0, mlp: None };
            let rows = teacher_force(&engine(&model, None, |_| {}), model.spec().vocab_size as usize, &[seq]);
            bits(&rows[0])
        };
        let one = of(1);
        for threads in [2, 3, 4] {
            assert!(of(threads) == one, "{case}: {threads} threads differ from one");
        }
    }
}

#[test]
fn density_one_is_dense_bit_for_bit() {
    let prompts = prompts(4);
    let ctx = context(2);
    let model = load_model(&ctx, CASE);
    let routers = load_routers(&model, CASE, "routers.safetensors");
    let vocab = model.spec().vocab_size as usize;
    let forced: Vec<Forced<'_>> = prompts
        .iter()
        .map(|p| Forced { prompt: p, fed: &[1, 2, 3, 4, 5], attn_density: 1.0, mlp: Some(MlpMode::Dense) })
        .collect();
    let with =
        teacher_force(&engine(&model, Some(&routers), |o| o.sparsity.attn_density = 0.5), vocab, &forced);
    let without = teacher_force(&engine(&model, None, |_| {}), vocab, &forced);
    assert!(with.iter().map(|r| bits(r)).eq(without.iter().map(|r| bits(r))));
}

#[test]
fn a_sparse_sequence_is_the_same_after_preemption() {
    let ctx = context(2);
    let model = load_model(&ctx, CASE);
    let routers = load_routers(&model, CASE, "routers.safetensors");
    let (mut requests, tokens) = batch(&prompts(6), 40);
    for r in &mut requests {
        (r.attn_density, r.mlp_mode) = (0.5, Some(MlpMode::Invariant));
    }
    let roomy = engine(&model, Some(&routers), |o| o.sparsity.mlp_dense_above = 1.0);
    let want = generate(&roomy, &requests, &tokens);
    assert_eq!(roomy.stats().preemptions, 0);
    let total = roomy.stats().kv_pages_total;
    let tight = engine(&model, Some(&routers), |o| {
        o.sparsity.mlp_dense_above = 1.0;
        o.kv_bytes = page_bytes(&model, total) * 9;
    });
    assert!(generate(&tight, &requests, &tokens) == want, "outputs changed by preemption");
    assert!(tight.stats().preemptions > 0, "nothing was preempted");
    assert_eq!(tight.stats().kv_pages_free, tight.stats().kv_pages_total);
}

/// Bytes of a page: the smallest `kv_bytes` that still gives a page, found by halving.
fn page_bytes(model: &polar_sparsity::engine::Model, _total: u64) -> u64 {
    let (mut low, mut high) = (1u64, 1 << 24);
    while low < high {
        let mid = (low + high) / 2;
        let options = polar_sparsity::engine::EngineOptions { kv_bytes: mid, ..Default::default() };
        if Engine::new(model, None, &options).is_ok() { high = mid } else { low = mid + 1 }
    }
    low
}

#[test]
fn every_request_finishes_once_under_threads_that_submit_and_cancel() {
    let ctx = context(2);
    let model = load_model(&ctx, CASE);
    let routers = load_routers(&model, CASE, "routers.safetensors");
    let engine = engine(&model, Some(&routers), |o| {
        (o.max_batch, o.max_queue, o.step_tokens) = (6, 64, 24);
        o.kv_bytes = page_bytes(&model, 0) * 16;
    });
    let (accepted, refused, busy) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let stop = AtomicBool::new(false);
    let mut finished: HashMap<SeqId, usize> = HashMap::new();
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for t in 0..16u64 {
            let (engine, accepted, refused) = (&engine, &accepted, &refused);
            workers.push(scope.spawn(move || {
                let mut random = t + 1;
                let mut next = || {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (random >> 33) as usize
                };
                for _ in 0..25 {
                    let (mut requests, tokens) = batch(&prompts(1 + next() % 3), 1 + (next() % 20) as u32);
                    for r in &mut requests {
                        r.attn_density = [0.0, 0.5, 0.75, 1.0][next() % 4];
                        r.mlp_mode = [None, Some(MlpMode::Dense), Some(MlpMode::Invariant)][next() % 3];
                        r.priority = (next() % 3) as u32;
                    }
                    let mut ids = vec![SeqId::default(); requests.len()];
                    match engine.submit(&requests, &tokens, &mut ids) {
                        Ok(()) => {
                            accepted.fetch_add(ids.len(), Ordering::Relaxed);
                            if next() % 3 == 0 {
                                engine.cancel(&ids).expect("cancel");
                                engine.cancel(&ids[..1]).expect("cancel twice");
                            }
                        }
                        Err(e) => {
                            assert_eq!(e.status, Status::E_QUEUE_FULL);
                            refused.fetch_add(requests.len(), Ordering::Relaxed);
                            std::thread::yield_now();
                        }
                    }
                }
            }));
        }
        // A second driver, which must be told so and do no harm.
        scope.spawn(|| {
            let mut sink = Collect { cap: Some(0), ..Collect::default() };
            while !stop.load(Ordering::Relaxed) {
                match engine.step(0, &mut sink) {
                    Err(e) if e.status == Status::E_BUSY => busy.fetch_add(1, Ordering::Relaxed),
                    Err(e) => panic!("{e}"),
                    Ok(_) => 0,
                };
                std::thread::yield_now();
            }
        });
        loop {
            let alive = workers.iter().any(|w| !w.is_finished());
            match step(&engine) {
                Ok((status, events)) => {
                    for e in events.iter().filter(|e| e.finished.is_some()) {
                        *finished.entry(e.seq).or_default() += 1;
                    }
                    if status == Status::IDLE
                        && !alive
                        && engine.stats().waiting + engine.stats().running == 0
                    {
                        break;
                    }
                }
                Err(e) => assert_eq!(e.status, Status::E_BUSY, "{e}"),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(finished.len(), accepted.load(Ordering::Relaxed));
    assert!(finished.values().all(|&n| n == 1), "a request finished twice");
    let stats = engine.stats();
    assert_eq!(stats.requests_accepted, stats.requests_finished);
    assert_eq!(stats.admission_refusals as usize, refused.load(Ordering::Relaxed));
    assert_eq!(stats.kv_pages_free, stats.kv_pages_total);
    assert_eq!(stats.health, Health::Ok);
}

#[test]
fn small_event_arrays_lose_nothing() {
    let ctx = context(1);
    let model = load_model(&ctx, CASE);
    let (requests, tokens) = batch(&prompts(5), 6);
    let want = generate(&engine(&model, None, |_| {}), &requests, &tokens);
    for cap in [0, 1, 2] {
        let engine = engine(&model, None, |_| {});
        let ids = submit(&engine, &requests, &tokens);
        let mut all = Vec::new();
        let mut truncated = 0;
        for _ in 0..1000 {
            // A cap of 0 only learns that events wait; every other call takes some.
            let cap = if cap == 0 && truncated % 2 == 0 { 0 } else { cap.max(1) };
            let mut sink = Collect { cap: Some(cap), ..Collect::default() };
            let delivered = engine.step(FOREVER, &mut sink).expect("a step");
            assert!(delivered.n_events <= cap);
            truncated += usize::from(delivered.status == Status::TRUNCATED);
            all.extend(sink.events);
            if delivered.status == Status::IDLE {
                break;
            }
        }
        let mut out = outputs(&all);
        let got: Vec<Vec<i32>> = ids.iter().map(|id| out.remove(id).unwrap_or_default()).collect();
        assert!(got == want, "cap {cap}");
        assert!(truncated > 0);
    }
}

#[test]
fn the_two_halves_of_a_step() {
    let ctx = context(2);
    let model = load_model(&ctx, CASE);
    let (requests, tokens) = batch(&prompts(3), 12);
    let want = generate(&engine(&model, None, |_| {}), &requests, &tokens);
    let engine = engine(&model, None, |_| {});
    let mut ids = submit(&engine, &requests[..1], &tokens);
    engine.begin().expect("begin");
    assert_eq!(engine.begin().expect_err("a step is in flight").status, Status::E_BUSY);
    // Joins the next step.
    ids.extend(submit(&engine, &requests[1..], &tokens));
    let mut all = Vec::new();
    let mut idle = false;
    while !idle {
        let mut sink = Collect::default();
        let delivered = engine.finish(0, &mut sink).expect("finish");
        all.extend(sink.events);
        match delivered.status {
            Status::PENDING => std::thread::yield_now(),
            Status::IDLE => idle = true,
            _ => engine.begin().expect("begin"),
        }
    }
    let mut out = outputs(&all);
    let got: Vec<Vec<i32>> = ids.iter().map(|id| out.remove(id).unwrap_or_default()).collect();
    assert!(got == want);
    // Freed with a step in flight: drop waits for it.
    submit(&engine, &requests, &tokens);
    engine.begin().expect("begin");
    drop(engine);
}

#[test]
fn stop_tokens_end_a_sequence_and_are_not_output() {
    let ctx = context(1);
    let model = load_model(&ctx, CASE);
    let (mut requests, mut tokens) = batch(&prompts(1), 30);
    let full = generate(&engine(&model, None, |_| {}), &requests, &tokens).remove(0);
    let stop = full[9];
    let first = full.iter().position(|&t| t == stop).expect("it is there");
    (requests[0].first_stop, requests[0].n_stop) = (tokens.len() as u32, 1);
    tokens.push(stop);
    let engine = engine(&model, None, |_| {});
    submit(&engine, &requests, &tokens);
    let events = run(&engine);
    let last = events.last().expect("events");
    assert_eq!(
        (last.finished, last.token, last.is_output),
        (Some(FinishReason::Stop), Some(stop as u32), false)
    );
    assert_eq!(outputs(&events).values().next().map(Vec::as_slice), Some(&full[..first]));
    assert_eq!(last.n_generated as usize, first);
}

#[test]
fn log_probabilities_come_with_the_token() {
    let ctx = context(1);
    let model = load_model(&ctx, CASE);
    let (mut requests, tokens) = batch(&prompts(2), 5);
    for r in &mut requests {
        (r.params.logprob, r.params.n_logprobs) = (true, 7);
    }
    let engine = engine(&model, None, |_| {});
    submit(&engine, &requests, &tokens);
    let mut seen = 0;
    loop {
        let mut sink = Collect::default();
        if engine.step(FOREVER, &mut sink).expect("a step").status == Status::IDLE {
            break;
        }
        for (e, top) in sink.events.iter().zip(&sink.top) {
            assert_eq!((e.n_logprobs, top.len()), (7, 7));
            assert!(top.windows(2).all(|w| w[0].logprob >= w[1].logprob));
            // Greedy: the token is the likeliest.
            assert_eq!((Some(top[0].token), top[0].logprob), (e.token, e.logprob));
            let mass: f32 = top.iter().map(|t| t.logprob.exp()).sum();
            assert!(mass > 0.0 && mass <= 1.0001);
            seen += 1;
        }
    }
    assert_eq!(seen, 10);
}

#[test]
fn a_full_queue_takes_none_of_a_batch() {
    let ctx = context(1);
    let model = load_model(&ctx, CASE);
    let engine = engine(&model, None, |o| (o.max_queue, o.max_batch) = (4, 2));
    let (requests, tokens) = batch(&prompts(5), 3);
    let mut ids = vec![SeqId::default(); 5];
    assert_eq!(engine.submit(&requests, &tokens, &mut ids).expect_err("5 > 4").status, Status::E_QUEUE_FULL);
    submit(&engine, &requests[..3], &tokens);
    assert_eq!(
        engine.submit(&requests[3..], &tokens, &mut ids).expect_err("room for 1").status,
        Status::E_QUEUE_FULL
    );
    assert_eq!(ids, vec![SeqId::default(); 5]);
    assert_eq!(engine.stats().requests_accepted, 3);
    assert_eq!(run(&engine).iter().filter(|e| e.finished.is_some()).count(), 3);
    submit(&engine, &requests[..4], &tokens);
}

#[test]
fn bad_requests_are_refused_by_name() {
    let ctx = context(1);
    let model = load_model(&ctx, CASE);
    let engine = engine(&model, None, |_| {});
    let long: Vec<i32> = vec![1; 1 << 16];
    let good = request(0, 4, 4);
    let table: Vec<(Request, &[i32], Status, &str)> = vec![
        (Request { n_tokens: 0, ..good }, &[1; 8], Status::E_INVALID, "empty"),
        (Request { first_token: 6, ..good }, &[1; 8], Status::E_INVALID, "6..10"),
        (
            Request { first_token: u32::MAX, n_tokens: u32::MAX, ..good },
            &[1; 8],
            Status::E_INVALID,
            "array of 8",
        ),
        (Request { first_stop: 7, n_stop: 2, ..good }, &[1; 8], Status::E_INVALID, "stop tokens slice 7..9"),
        (good, &[1, 2, -1, 3], Status::E_INVALID, "id -1"),
        (good, &[1, 2, 3, 257], Status::E_INVALID, "id 257, the vocabulary has 257"),
        (Request { max_new_tokens: 0, ..good }, &[1; 8], Status::E_INVALID, "max_new_tokens"),
        (Request { n_tokens: 1 << 16, ..good }, &long, Status::E_LIMIT, "65536"),
        (Request { attn_density: 0.5, ..good }, &[1; 8], Status::E_INVALID, "attention routers"),
        (Request { attn_density: f32::NAN, ..good }, &[1; 8], Status::E_INVALID, "attn_density"),
        (Request { attn_density: 1.5, ..good }, &[1; 8], Status::E_INVALID, "1.5"),
        (Request { mlp_mode: Some(MlpMode::Reference), ..good }, &[1; 8], Status::E_INVALID, "MLP routers"),
        (
            Request { params: with(|p| p.temperature = f32::NAN), ..good },
            &[1; 8],
            Status::E_INVALID,
            "temperature",
        ),
        (Request { params: with(|p| p.top_p = 1.5), ..good }, &[1; 8], Status::E_INVALID, "top_p"),
        (Request { params: with(|p| p.min_p = -0.1), ..good }, &[1; 8], Status::E_INVALID, "min_p"),
        (
            Request { params: with(|p| p.repetition_penalty = 0.0), ..good },
            &[1; 8],
            Status::E_INVALID,
            "repetition_penalty",
        ),
        (Request { params: with(|p| p.n_logprobs = 21), ..good }, &[1; 8], Status::E_INVALID, "n_logprobs"),
    ];
    for (request, tokens, status, part) in table {
        // A good request before it must not be taken either.
        let mut ids = [SeqId::default(); 2];
        let error = engine.submit(&[good_in(tokens), request], tokens, &mut ids).expect_err(part);
        assert_eq!(error.status, status, "{error}");
        assert!(error.message.contains(part), "{error} lacks {part:?}");
        assert!(
            error.message.starts_with("request 1:") || error.message.starts_with("request 0:"),
            "{error}"
        );
        assert_eq!(ids, [SeqId::default(); 2]);
    }
    assert_eq!(engine.stats().requests_accepted, 0);
}

fn good_in(_tokens: &[i32]) -> Request {
    request(0, 1, 1)
}

fn with(set: impl FnOnce(&mut polar_sparsity::sample::Params)) -> polar_sparsity::sample::Params {
    let mut params = polar_sparsity::sample::Params::GREEDY;
    set(&mut params);
    params
}

#[test]
fn stale_ids_are_refused_or_ignored() {
    let ctx = context(1);
    let model = load_model(&ctx, CASE);
    let engine = engine(&model, None, |_| {});
    let (requests, tokens) = batch(&prompts(1), 1);
    let old = submit(&engine, &requests, &tokens)[0];
    run(&engine);
    let new = submit(&engine, &requests, &tokens)[0];
    assert_ne!(old, new);
    engine.cancel(&[old, SeqId(0), SeqId(u64::MAX)]).expect("unknown ids are ignored");
    let mut logits = vec![0.0; 257];
    assert_eq!(engine.logits(old, &mut logits).expect_err("stale").status, Status::E_NOT_FOUND);
    assert_eq!(engine.push_token(old, 1).expect_err("stale").status, Status::E_NOT_FOUND);
    assert_eq!(engine.push_token(new, 1).expect_err("not asked").status, Status::E_INVALID);
    let reasons: Vec<_> = run(&engine).iter().filter_map(|e| e.finished).collect();
    assert_eq!(reasons, [FinishReason::Length]);
}

#[test]
fn one_sequence_that_outgrows_the_cache_ends_with_an_error() {
    let ctx = context(1);
    let model = load_model(&ctx, CASE);
    let engine = engine(&model, None, |o| o.kv_bytes = page_bytes(&model, 0) * 2);
    let (mut requests, tokens) = batch(&prompts(1), 100);
    requests[0].n_tokens = 3;
    submit(&engine, &requests, &tokens);
    let events = run(&engine);
    let last = events.last().expect("events");
    // The context is the whole cache: it ends by length there.
    assert_eq!((last.finished, last.n_generated), (Some(FinishReason::Length), 29));
    let (requests, tokens) = batch(&[vec![1; 40]], 1);
    let error = engine.submit(&requests, &tokens, &mut [SeqId::default()]).expect_err("40 > 32");
    assert_eq!(error.status, Status::E_LIMIT);
}

#[test]
fn density_that_was_reached_is_reported() {
    let ctx = context(1);
    let model = load_model(&ctx, CASE);
    let routers = load_routers(&model, CASE, "routers.safetensors");
    let engine = engine(&model, Some(&routers), |o| o.sparsity.mlp_dense_above = 1.0);
    let (mut requests, tokens) = batch(&prompts(3), 8);
    requests[0].attn_density = 1.0;
    requests[0].mlp_mode = Some(MlpMode::Dense);
    requests[1].attn_density = 0.5;
    requests[1].mlp_mode = Some(MlpMode::Invariant);
    requests[2].attn_density = 0.17;
    requests[2].mlp_mode = Some(MlpMode::Dense);
    submit(&engine, &requests, &tokens);
    let mut reached = HashMap::new();
    for e in run(&engine).iter().filter(|e| e.finished.is_some()) {
        reached.insert(e.user_tag, (e.counts.attn_density(), e.counts.mlp_density()));
    }
    // 3 layers of 6 heads, the first dense: (6 + 3 + 3)/18, (6 + 1 + 1)/18; K(1) = 26, 42, 74 of 107.
    assert_eq!(reached[&0], (1.0, 1.0));
    assert_eq!(reached[&1], ((12.0f64 / 18.0) as f32, ((26 + 42 + 74) as f64 / 321.0) as f32));
    assert_eq!(reached[&2], ((8.0f64 / 18.0) as f32, 1.0));
}
