//! A step is a transaction: when any stage of it fails, the engine is as before the call, and the
//! next step gives what it would have given. When a stage panics, or the device is lost, that engine
//! says so for good, and others live on.

mod support;

use polar_sparsity::Status;
use polar_sparsity::backend::Backend;
use polar_sparsity::backend::null::{Fault, Null};
use polar_sparsity::engine::{
    EngineOn, EngineOptions, Event, FOREVER, FinishReason, Health, LoadOptions, Model, ModelOn, SeqId,
};
use polar_sparsity::model::load;
use std::sync::Arc;
use support::{Collect, Golden, context, golden_dir, load_model, request};

struct Rig {
    null: Arc<Null>,
    engine: EngineOn<Null>,
}

/// An engine on the null backend with the numbers of a golden model.
fn rig(set: impl FnOnce(&mut EngineOptions)) -> Rig {
    let null = Arc::new(Null::new());
    let checkpoint = load(&golden_dir("opt_f32"), &Default::default()).expect("a checkpoint");
    let weights = null.upload(&checkpoint, Default::default(), &mut |_, _| 0).expect("weights");
    let model = ModelOn::new(Arc::clone(&null), weights);
    let mut options = EngineOptions::default();
    set(&mut options);
    Rig { engine: EngineOn::new(&model, None, &options).expect("an engine"), null }
}

fn submit(rig: &Rig, n: usize) -> Vec<SeqId> {
    let tokens: Vec<i32> = (0..40).collect();
    let requests: Vec<_> = (0..n).map(|i| request(i, 5 + 4 * i, 12)).collect();
    let mut ids = vec![SeqId::default(); n];
    rig.engine.submit(&requests, &tokens, &mut ids).expect("submit");
    ids
}

/// Runs to the end; a failing step is tried again. Tokens by request, and how many steps failed.
fn run(rig: &Rig, mut before_step: impl FnMut(usize)) -> (Vec<(SeqId, u32)>, usize, Vec<Event>) {
    let (mut all, mut failed) = (Vec::new(), 0);
    for step in 0..10_000 {
        before_step(step);
        let mut sink = Collect::default();
        match rig.engine.step(FOREVER, &mut sink) {
            Ok(d) if d.status == Status::IDLE => break,
            Ok(_) => all.extend(sink.events),
            Err(e) => {
                assert_eq!(e.status, Status::E_DEVICE);
                assert!(sink.events.is_empty(), "a failed step delivers nothing");
                failed += 1;
            }
        }
    }
    (all.iter().filter(|e| e.is_output).filter_map(|e| Some((e.seq, e.token?))).collect(), failed, all)
}

#[test]
fn a_failed_step_changes_nothing_whichever_stage_failed() {
    let clean = rig(|o| o.step_tokens = 32);
    submit(&clean, 5);
    let (want, _, _) = run(&clean, |_| {});
    let stages = clean.null.calls();
    assert!(stages > 100);
    for k in 0..stages {
        let r = rig(|o| o.step_tokens = 32);
        submit(&r, 5);
        r.null.fail_at(k, Fault::Error);
        let (got, failed, events) = run(&r, |_| {});
        assert_eq!(failed, 1, "stage call {k}");
        assert!(got == want, "stage call {k}: tokens differ after the failed step");
        assert_eq!(events.iter().filter(|e| e.finished.is_some()).count(), 5);
        let stats = r.engine.stats();
        assert_eq!((stats.kv_pages_free, stats.health), (stats.kv_pages_total, Health::Ok));
    }
}

#[test]
fn steps_that_keep_failing_lose_no_page() {
    let r = rig(|o| o.step_tokens = 32);
    let ids = submit(&r, 3);
    let (_, failed, _) = run(&r, |step| {
        if step < 50 {
            r.null.fail_at(5, Fault::Error);
        }
        if step == 40 {
            r.engine.cancel(&ids).expect("cancel");
        }
    });
    assert!(failed >= 40);
    assert_eq!(r.engine.stats().requests_finished, 3);
    assert_eq!(r.engine.stats().kv_pages_free, r.engine.stats().kv_pages_total);
}

#[test]
fn a_panic_kills_its_engine_only() {
    let (a, b) = (rig(|_| {}), rig(|_| {}));
    submit(&a, 2);
    submit(&b, 2);
    a.null.fail_at(7, Fault::Panic);
    let mut sink = Collect::default();
    assert_eq!(a.engine.step(FOREVER, &mut sink).expect_err("it panics").status, Status::E_PANIC);
    assert_eq!(a.engine.stats().health, Health::Dead);
    assert_eq!(a.engine.step(FOREVER, &mut sink).expect_err("dead").status, Status::E_PANIC);
    assert_eq!(a.engine.begin().expect_err("dead").status, Status::E_PANIC);
    assert_eq!(a.engine.submit(&[], &[], &mut []).expect_err("dead").status, Status::E_PANIC);
    assert_eq!(a.engine.cancel(&[]).expect_err("dead").status, Status::E_PANIC);
    assert_eq!(run(&b, |_| {}).0.len(), 24);
    // The leader thread's panics are caught as well.
    let c = rig(|_| {});
    submit(&c, 2);
    c.null.fail_at(3, Fault::Panic);
    c.engine.begin().expect("begin");
    assert_eq!(c.engine.finish(FOREVER, &mut sink).expect_err("it panicked").status, Status::E_PANIC);
    assert_eq!(c.engine.stats().health, Health::Dead);
}

#[test]
fn a_lost_device_is_reported_in_the_same_call_and_for_good() {
    let r = rig(|_| {});
    submit(&r, 1);
    r.null.fail_at(4, Fault::Lost);
    let mut sink = Collect::default();
    for _ in 0..3 {
        assert_eq!(r.engine.step(FOREVER, &mut sink).expect_err("lost").status, Status::E_DEVICE_LOST);
        assert_eq!(r.engine.stats().health, Health::DeviceLost);
    }
    assert_eq!(r.engine.submit(&[], &[], &mut []).expect_err("lost").status, Status::E_DEVICE_LOST);
}

#[test]
fn loading_can_be_cancelled_at_every_report() {
    let ctx = context(1);
    let dir = golden_dir("llama31_f32");
    let mut reports = 0;
    Model::load(&ctx, &dir, &LoadOptions::default(), &mut |done, total| {
        assert!(done <= total);
        reports += 1;
        0
    })
    .expect("a model");
    assert!(reports > 1);
    for k in 0..reports {
        let mut seen = 0;
        let error = Model::load(&ctx, &dir, &LoadOptions::default(), &mut |_, _| {
            seen += 1;
            i32::from(seen > k)
        })
        .err()
        .expect("cancelled");
        assert_eq!(error.status, Status::E_CANCELLED, "report {k}");
    }
}

/// Copies a golden model and spoils one weight.
fn spoiled(case: &str, tensor: &str, value: f32) -> std::path::PathBuf {
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("spoiled-{tensor}-{value}"));
    std::fs::create_dir_all(&dir).expect("a folder");
    std::fs::copy(golden_dir(case).join("config.json"), dir.join("config.json")).expect("config");
    let mut bytes = std::fs::read(golden_dir(case).join("model.safetensors")).expect("weights");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("JSON");
    let at = 8 + header + json[tensor]["data_offsets"][0].as_u64().expect("an offset") as usize;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(dir.join("model.safetensors"), bytes).expect("weights");
    dir
}

#[test]
fn weights_that_are_not_finite_are_refused_or_end_the_sequence() {
    let ctx = context(1);
    for value in [f32::NAN, f32::INFINITY] {
        let dir = spoiled("llama2_f32", "model.norm.weight", value);
        let checked = LoadOptions { check_finite: true, ..LoadOptions::default() };
        let error = Model::load(&ctx, &dir, &checked, &mut |_, _| 0).err().expect("refused");
        assert_eq!(error.status, Status::E_MODEL);
        assert!(error.message.contains("model.norm.weight"), "{error}");
    }
    // Unchecked: every logit is NaN, and the sequence ends with an error instead of a made-up token.
    let dir = spoiled("llama2_f32", "model.norm.weight", f32::NAN);
    let model = Model::load(&ctx, &dir, &LoadOptions::default(), &mut |_, _| 0).expect("unchecked");
    let engine = support::engine(&model, None, |_| {});
    engine.submit(&[request(0, 3, 5)], &[1, 2, 3], &mut [SeqId::default()]).expect("submit");
    let events = support::run(&engine);
    let last = events.last().expect("events");
    assert_eq!((last.finished, last.status), (Some(FinishReason::Error), Status::E_MODEL));
    assert!(events.iter().all(|e| !e.is_output));
}

#[test]
fn a_good_model_still_works_beside_a_broken_one() {
    let ctx = context(1);
    let golden = Golden::load("llama2_f32");
    let model = load_model(&ctx, "llama2_f32");
    let engine = support::engine(&model, None, |_| {});
    let prompt = golden.int("p0.prompt");
    engine.submit(&[request(0, prompt.len(), 64)], prompt, &mut [SeqId::default()]).expect("submit");
    let out = support::outputs(&support::run(&engine));
    assert_eq!(out.values().next().map(Vec::as_slice), Some(golden.int("p0.greedy")));
}
