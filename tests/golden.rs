//! Every family against Hugging Face transformers, on tiny random models: logits of prefill and
//! decode, greedy tokens over 64 steps, and sparse decode against a masked reference.
//! `tests/data/golden/README.md` says what the files hold.

mod support;

use polar_sparsity::engine::{EngineOptions, Model, SeqId};
use polar_sparsity::sparsity::MlpMode;
use support::*;

/// Cases whose weights are f32: logits must agree to round-off and greedy tokens exactly.
const F32: [&str; 13] = [
    "opt_f32",
    "llama2_f32",
    "llama31_f32",
    "llama32_tied_f32",
    "llama_linear_f32",
    "llama_headdim_f32",
    "llama_bias_f32",
    "llama_sharded_f32",
    "mistral_window_f32",
    "mistral_full_f32",
    "qwen2_f32",
    "qwen2_nowindow_f32",
    "qwen3_f32",
];

/// Cases in half precision.
const HALF: [&str; 6] = ["opt_bf16", "opt_f16", "llama31_bf16", "llama_f16", "qwen2_bf16", "qwen3_bf16"];

/// Logits have a standard deviation of 3 to 4.5; two f32 programs that sum in another order differ
/// by some 1e-5 after three layers (transformers against its own cache: 6.5e-6; numpy f64: 6e-5).
const F32_TOLERANCE: f64 = 2e-4;

/// Teacher-forced logits of the three prompts together, compared with `compare(name, ours, golden)`.
fn compare_logits(case: &str, set: fn(&mut EngineOptions), mut compare: impl FnMut(&str, &[f32], &[f32])) {
    let golden = Golden::load(case);
    let ctx = context(2);
    let model = load_model(&ctx, case);
    let vocab = model.spec().vocab_size as usize;
    let names: Vec<(String, String)> =
        (0..3).map(|i| (format!("p{i}.prompt"), format!("p{i}.forced"))).collect();
    let seqs: Vec<Forced<'_>> = names
        .iter()
        .map(|(p, f)| Forced { prompt: golden.int(p), fed: golden.int(f), attn_density: 0.0, mlp: None })
        .collect();
    let logits = teacher_force(&engine(&model, None, set), vocab, &seqs);
    for (i, rows) in logits.iter().enumerate() {
        let prefill = format!("p{i}.prefill_logits_f32");
        let last = golden.floats[&prefill].0[0] - 1;
        compare(&format!("{case} {prefill}"), &rows[0], golden.row(&prefill, last));
        for (s, row) in rows[1..].iter().enumerate() {
            let decode = format!("p{i}.decode_logits_f32");
            compare(&format!("{case} {decode} step {s}"), row, golden.row(&decode, s));
        }
    }
}

fn f32_close(name: &str, ours: &[f32], golden: &[f32]) {
    let diff = max_diff(ours, golden);
    assert!(diff < F32_TOLERANCE, "{name}: largest difference {diff:.2e}");
}

#[test]
fn f32_logits_agree_with_transformers() {
    for case in F32 {
        compare_logits(case, |_| {}, f32_close);
    }
}

#[test]
fn f32_logits_agree_when_prefill_comes_in_chunks() {
    for case in F32 {
        // 5 rows a step: prompts of 30 to 90 tokens take many chunks, beside the others' decode.
        compare_logits(case, |o| (o.max_batch, o.step_tokens) = (3, 5), f32_close);
    }
}

#[test]
fn every_prompt_position_agrees() {
    // The logits of a prompt's inner positions, each as the end of a shorter prompt.
    for case in F32 {
        let golden = Golden::load(case);
        let ctx = context(1);
        let model = load_model(&ctx, case);
        let vocab = model.spec().vocab_size as usize;
        let prompt = golden.int("p1.prompt");
        let seqs: Vec<Forced<'_>> = (1..=prompt.len())
            .map(|n| Forced { prompt: &prompt[..n], fed: &[], attn_density: 0.0, mlp: None })
            .collect();
        let logits = teacher_force(&engine(&model, None, |_| {}), vocab, &seqs);
        for (i, rows) in logits.iter().enumerate() {
            f32_close(&format!("{case} position {i}"), &rows[0], golden.row("p1.prefill_logits_f32", i));
        }
    }
}

#[test]
fn half_precision_logits_are_nearer_to_f32_than_transformers_in_half() {
    for case in HALF {
        let golden = Golden::load(case);
        // Transformers rounds every intermediate to half; we keep f32 between matrix products.
        let theirs = golden.fact("rms_diff_dtype_vs_f32");
        let (mut sum, mut n) = (0.0, 0usize);
        compare_logits(
            case,
            |_| {},
            |_, ours, golden| {
                let rms = rms_diff(ours, golden);
                sum += rms * rms;
                n += 1;
            },
        );
        let ours = (sum / n as f64).sqrt();
        assert!(ours < theirs, "{case}: rms {ours:.4} from the f32 run, transformers in half {theirs:.4}");
    }
}

fn greedy_requests(golden: &Golden) -> (Vec<i32>, Vec<polar_sparsity::engine::Request>) {
    let (mut tokens, mut requests) = (Vec::new(), Vec::new());
    for i in 0..3 {
        let prompt = golden.int(&format!("p{i}.prompt"));
        requests.push(request(tokens.len(), prompt.len(), 64));
        tokens.extend_from_slice(prompt);
    }
    (tokens, requests)
}

fn expect_greedy(case: &str, golden: &Golden, ids: &[SeqId], events: &[polar_sparsity::engine::Event]) {
    let outputs = outputs(events);
    for (i, id) in ids.iter().enumerate() {
        assert_eq!(outputs[id], golden.int(&format!("p{i}.greedy")), "{case}, prompt {i}");
    }
}

#[test]
fn greedy_tokens_equal_transformers_together_and_in_chunks() {
    for case in F32 {
        let golden = Golden::load(case);
        let ctx = context(2);
        let model = load_model(&ctx, case);
        let (tokens, requests) = greedy_requests(&golden);
        for (max_batch, step_tokens) in [(8, 0), (2, 7)] {
            let engine = engine(&model, None, |o| (o.max_batch, o.step_tokens) = (max_batch, step_tokens));
            let mut ids = vec![SeqId::default(); 3];
            engine.submit(&requests, &tokens, &mut ids).expect("submit");
            expect_greedy(case, &golden, &ids, &run(&engine));
        }
    }
}

#[test]
fn greedy_tokens_are_the_same_for_late_joiners() {
    for case in ["opt_f32", "llama31_f32", "mistral_window_f32", "qwen3_f32"] {
        let golden = Golden::load(case);
        let ctx = context(2);
        let model = load_model(&ctx, case);
        let (tokens, requests) = greedy_requests(&golden);
        let engine = engine(&model, None, |_| {});
        let mut ids = vec![SeqId::default(); 3];
        let mut events = Vec::new();
        for (i, request) in requests.iter().enumerate() {
            engine.submit(std::slice::from_ref(request), &tokens, &mut ids[i..=i]).expect("submit");
            for _ in 0..11 {
                events.extend(step(&engine).expect("a step").1);
            }
        }
        events.extend(run(&engine));
        expect_greedy(case, &golden, &ids, &events);
    }
}

#[test]
fn greedy_tokens_survive_preemption() {
    for case in ["opt_f32", "llama31_f32", "mistral_window_f32", "qwen2_f32"] {
        let golden = Golden::load(case);
        let ctx = context(2);
        let model = load_model(&ctx, case);
        let (tokens, requests) = greedy_requests(&golden);
        let longest = requests.iter().map(|r| r.n_tokens as usize + 64).max().unwrap_or(0);
        let engine = engine(&model, None, |o| {
            // Room for the longest alone and a little more.
            o.kv_bytes = page_bytes(&model) * (longest.div_ceil(16) as u64 + 2);
        });
        let mut ids = vec![SeqId::default(); 3];
        engine.submit(&requests, &tokens, &mut ids).expect("submit");
        let events = run(&engine);
        assert!(engine.stats().preemptions > 0, "{case}: nothing was preempted");
        assert_eq!(events.iter().filter(|e| e.finished.is_some()).count(), 3);
        expect_greedy(case, &golden, &ids, &events);
        assert_eq!(engine.stats().kv_pages_free, engine.stats().kv_pages_total);
    }
}

/// Bytes of a KV page, from what an engine of a known size reports.
fn page_bytes(model: &Model) -> u64 {
    const KV: u64 = 1 << 20;
    let pages = engine(model, None, |o| (o.kv_bytes, o.max_batch) = (KV, 4096)).stats().kv_pages_total;
    KV / pages
}

/// Sparse decode of single sequences against the masked reference.
fn sparse_single(case: &str, variant: &str, file: &str, attn_density: f32, mlp: MlpMode) {
    let golden = Golden::load(case);
    let ctx = context(2);
    let model = load_model(&ctx, case);
    let routers = load_routers(&model, case, file);
    let vocab = model.spec().vocab_size as usize;
    let engine = engine(&model, Some(&routers), |o| o.sparsity.mlp_dense_above = 1.0);
    for i in 0..3 {
        let fed = &golden.int(&format!("p{i}.forced"))[..6];
        let seq = Forced { prompt: golden.int(&format!("p{i}.prompt")), fed, attn_density, mlp: Some(mlp) };
        let rows = teacher_force(&engine, vocab, &[seq]);
        for (s, row) in rows[0][1..].iter().enumerate() {
            let name = format!("sparse.{variant}.p{i}.logits");
            f32_close(&format!("{case} {name} step {s}"), row, golden.row(&name, s));
        }
    }
}

#[test]
fn sparse_decode_equals_the_masked_reference() {
    use MlpMode::{Dense, Invariant, Reference};
    for (variant, density, mlp) in [
        ("attn50", 0.5, Dense),
        ("attn70", 0.7, Dense),
        ("mlp", 1.0, Invariant),
        ("mlp", 1.0, Reference),
        ("attn50_mlp", 0.5, Invariant),
        ("attn50_mlp", 0.5, Reference),
    ] {
        sparse_single("opt_f32", variant, "routers.safetensors", density, mlp);
    }
    for (case, variant, file, density) in [
        ("llama31_f32", "g50", "routers.safetensors", 0.5),
        ("llama31_f32", "g40", "routers.safetensors", 0.4),
        ("llama31_f32", "h50", "routers_h.safetensors", 0.5),
        ("qwen2_f32", "g50", "routers.safetensors", 0.5),
        ("qwen2_f32", "g80", "routers.safetensors", 0.8),
        ("qwen2_f32", "h50", "routers_h.safetensors", 0.5),
    ] {
        sparse_single(case, variant, file, density, Dense);
    }
}

#[test]
fn the_batch_rule_equals_the_reference() {
    let case = "opt_f32";
    let golden = Golden::load(case);
    let ctx = context(2);
    let model = load_model(&ctx, case);
    let routers = load_routers(&model, case, "routers.safetensors");
    let vocab = model.spec().vocab_size as usize;
    for (variant, density) in [("batch3_mlp", 1.0), ("batch3_attn50_mlp", 0.5)] {
        let engine = engine(&model, Some(&routers), |o| o.sparsity.mlp_dense_above = 1.0);
        let names: Vec<(String, String)> =
            (0..3).map(|i| (format!("p{i}.prompt"), format!("p{i}.forced"))).collect();
        let seqs: Vec<Forced<'_>> = names
            .iter()
            .map(|(p, f)| Forced {
                prompt: golden.int(p),
                fed: &golden.int(f)[..6],
                attn_density: density,
                mlp: Some(MlpMode::Reference),
            })
            .collect();
        // All prompts prefill in one step, so the three decode in lock-step, as the reference did.
        let logits = teacher_force(&engine, vocab, &seqs);
        let name = format!("sparse.{variant}.logits");
        for s in 0..6 {
            for (i, rows) in logits.iter().enumerate() {
                f32_close(
                    &format!("{name} step {s} sequence {i}"),
                    &rows[s + 1],
                    golden.row(&name, s * 3 + i),
                );
            }
        }
    }
}
