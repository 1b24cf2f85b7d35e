//! A row's bits depend on nothing but the row: not on the batch, the threads or the chunks; and
//! what was not selected is not read.

#[path = "../../../tests/rig/mod.rs"]
mod rig;

use super::Isa;
use crate::backend::{Limits, WeightOptions};
use crate::dtype::{DType, widen};
use crate::error::Result;
use crate::format::{Limits as FileLimits, Shards, TensorSource};
use crate::model::{self, Fingerprint, ModelSpec, Weights};
use crate::sparsity::{MlpMode, Options, RouterFile, SeqSetting, Source};
use crate::tensor::TensorInfo;
use rig::specs::{llama, opt};
use rig::synthetic::{Rng, Synthetic, routers};
use rig::{DENSE, Rig, Setup};
use std::path::Path;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Shapes with odd widths: padding, tails, groups of one to many, windows, head norms.
fn models(dtype: DType) -> Vec<(&'static str, ModelSpec)> {
    let window = ModelSpec { window: Some(21), ..llama(dtype, 2, 72, (6, 2), 24, 100) };
    let normed = ModelSpec { qk_norm: true, qkv_bias: true, ..llama(dtype, 2, 64, (16, 1), 8, 96) };
    vec![
        ("mha", llama(dtype, 2, 80, (5, 5), 16, 130)),
        ("window", window),
        ("mqa", normed),
        ("wide heads", llama(dtype, 2, 96, (2, 1), 256, 64)),
        ("opt", opt(dtype, 3, 6, 20, 107)),
    ]
}

fn prompt(seed: u64, n: usize) -> Vec<u32> {
    let mut rng = Rng(seed * 7919 + 1);
    (0..n).map(|_| (rng.next() >> 20) as u32 % 256).collect()
}

/// What the last sparse MLP ran for the one row of a step.
fn selected_neurons(s: &super::CpuScratch) -> Vec<u32> {
    let own = s.select.n_reference == 0;
    if own { s.select.invariant[0].clone() } else { s.select.reference.clone() }
}

fn set_neurons(w: &mut super::CpuWeights, layer: usize, neurons: &[usize], value: f32) {
    w.layers[layer].up.mat.set_rows(neurons, value);
    w.layers[layer].down.mat.set_rows(neurons, value);
}

/// NaN in every element of a piece.
fn poison_page(kv: &mut super::CpuKv, layer: usize, page: u32, head: usize) {
    let piece = kv.shape.piece_bytes();
    let at = ((layer * kv.pages + page as usize) * kv.shape.heads + head) * piece;
    kv.bytes_mut()[at..at + piece].fill(0xff);
}

fn bits(v: &[f32]) -> Vec<u32> {
    assert!(v.iter().all(|v| v.is_finite()));
    v.iter().map(|v| v.to_bits()).collect()
}

/// Logits of a prompt and some decode steps, alone, with given threads and chunk.
fn alone(rig: &mut Rig, tokens: &[u32], decode: usize, chunk: usize, setting: SeqSetting) -> Vec<Vec<u32>> {
    let id = rig.add(tokens, setting);
    let n = tokens.len() - decode;
    let mut last = vec![];
    for at in (0..n).step_by(chunk) {
        last = rig.run(&[(id, chunk.min(n - at), false)]);
    }
    let mut out = vec![bits(&last[0])];
    for _ in 0..decode {
        out.push(bits(&rig.run(&[(id, 1, true)])[0]));
    }
    out
}

#[test]
fn neither_chunks_nor_threads_change_a_bit() {
    for dtype in DTYPES {
        for (name, spec) in models(dtype) {
            let src = Synthetic::new(spec);
            for isa in Isa::all() {
                let tokens = prompt(3, 75);
                let mut want = None;
                for (threads, chunk) in [(1, 75), (2, 1), (4, 7), (2, 16), (3, 33)] {
                    let mut rig = Rig::new(&src, &Setup { isa, threads, ..Setup::default() });
                    let got = alone(&mut rig, &tokens, 3, chunk, DENSE);
                    let want = want.get_or_insert_with(|| got.clone());
                    assert!(*want == got, "{name} {dtype:?} {} threads {threads} chunk {chunk}", isa.name());
                }
            }
        }
    }
}

/// Contexts of several parts: shared among threads, computed by one, prefilled in any chunks, with
/// half the heads or all, with a window that begins inside a part.
#[test]
fn parts_of_a_context_do_not_change_a_bit() {
    let limits = Limits { max_batch: 3, max_rows: 640, pages: 256, max_context: 1200 };
    for (name, spec) in models(DType::BF16).into_iter().take(2) {
        let spec = ModelSpec { window: spec.window.map(|_| 700), ..spec };
        let src = Synthetic::new(spec.clone());
        let file = routers(&spec, false, None, &[]);
        let tokens = prompt(5, 1100);
        for isa in Isa::all() {
            for density in [1.0, 0.5] {
                let setting = SeqSetting { attn_density: Some(density), mlp: MlpMode::Dense };
                let mut want = None;
                for (threads, chunk) in [(1, 640), (2, 129), (4, 600)] {
                    let what = format!("{name} {} density {density} threads {threads}", isa.name());
                    let setup = Setup { isa, threads, limits, routers: Some(&file), ..Setup::default() };
                    let mut rig = Rig::new(&src, &setup);
                    let got = alone(&mut rig, &tokens, 3, chunk, setting);
                    let want = want.get_or_insert_with(|| got.clone());
                    assert!(*want == got, "{what}");
                    let heads = (f64::from(density) * f64::from(spec.num_kv_heads)) as usize;
                    let shared = threads > 1 && heads.max(1) < 4 * threads;
                    assert_eq!(shared, !rig.scratch.cuts.is_empty(), "{what}");
                    if threads == 2 {
                        // Beside a short one and a longer prompt nothing else comes out.
                        let ids = [&tokens[..], &tokens[..40], &tokens[..600]].map(|t| rig.add(t, setting));
                        for at in [0, 600] {
                            rig.run(&[(ids[0], if at == 0 { 600 } else { 497 }, false)]);
                        }
                        rig.run(&[(ids[1], 37, false)]);
                        let mixed = rig.run(&[(ids[0], 1, true), (ids[1], 1, true), (ids[2], 600, false)]);
                        assert!(bits(&mixed[0]) == want[1], "{what}, mixed");
                    }
                }
            }
        }
    }
}

#[test]
fn neighbours_do_not_change_a_bit() {
    for (kept, dtype) in
        [(None, DType::F32), (None, DType::BF16), (None, DType::F16), (Some(DType::I8), DType::BF16)]
    {
        for (name, spec) in models(dtype) {
            let src = Synthetic::new(spec.clone());
            let mlp = (name == "opt").then_some(9);
            let file = routers(&spec, false, mlp, &[(1, 31), (64, 60)]);
            for isa in Isa::all() {
                for sparse in [false, true] {
                    let mode = if mlp.is_some() { MlpMode::Invariant } else { MlpMode::Dense };
                    let setting =
                        if sparse { SeqSetting { attn_density: Some(0.5), mlp: mode } } else { DENSE };
                    neighbours(name, &src, &file, isa, setting, kept);
                }
            }
        }
    }
}

fn neighbours(
    name: &str,
    src: &Synthetic,
    file: &RouterFile,
    isa: Isa,
    setting: SeqSetting,
    kept: Option<DType>,
) {
    let setup =
        Setup { isa, routers: Some(file), weights: WeightOptions { dtype: kept }, ..Setup::default() };
    let prompts: Vec<Vec<u32>> = (0..9).map(|i| prompt(i, 6 + 11 * i as usize)).collect();
    let want: Vec<_> =
        prompts.iter().map(|p| alone(&mut Rig::new(src, &setup), p, 4, p.len(), setting)).collect();
    // All prompts at once, then batches of every size, a prefill chunk beside them.
    let mut rig = Rig::new(src, &Setup { threads: 4, ..setup });
    let ids: Vec<usize> = prompts.iter().map(|p| rig.add(p, setting)).collect();
    for group in [&ids[..4], &ids[4..6], &ids[6..8], &ids[8..]] {
        let work: Vec<_> = group.iter().map(|&i| (i, prompts[i].len() - 4, false)).collect();
        let got = rig.run(&work);
        for (&i, got) in group.iter().zip(&got) {
            assert!(bits(got) == want[i][0], "{name} {} prefill {i}", isa.name());
        }
    }
    let mut done = vec![0; ids.len()];
    for (round, size) in [1usize, 2, 3, 5, 6, 7, 8, 9, 4].into_iter().enumerate() {
        let mut work: Vec<_> =
            ids.iter().filter(|&&i| done[i] < 4).take(size).map(|&i| (i, 1, true)).collect();
        if work.is_empty() {
            break;
        }
        let decoding = work.len();
        let extra = rig.add(&prompt(100 + round as u64, 5), setting);
        work.push((extra, 5, false));
        let got = rig.run(&work);
        for (&(i, ..), got) in work[..decoding].iter().zip(&got) {
            done[i] += 1;
            assert!(bits(got) == want[i][done[i]], "{name} {} {setting:?} row {i} of {decoding}", isa.name());
        }
    }
}

#[test]
fn full_selection_is_dense() {
    for dtype in DTYPES {
        let spec = opt(dtype, 3, 6, 20, 107);
        let file = routers(&spec, false, Some(9), &[(64, 107)]);
        let options = Options { mlp_dense_above: 1.0, ..Options::default() };
        for isa in Isa::all() {
            let setup = Setup { isa, routers: Some(&file), options, ..Setup::default() };
            let src = Synthetic::new(spec.clone());
            let dense = alone(&mut Rig::new(&src, &setup), &prompt(1, 40), 4, 40, DENSE);
            for mlp in [MlpMode::Reference, MlpMode::Invariant] {
                let all = SeqSetting { attn_density: Some(1.0), mlp };
                assert!(dense == alone(&mut Rig::new(&src, &setup), &prompt(1, 40), 4, 40, all));
            }
        }
    }
}

/// Biases that keep neurons from firing make a dense model of the selected ones: the others are
/// exact zeros there, and poison here.
#[test]
fn sparse_is_masked_dense_and_reads_nothing_else() {
    for dtype in DTYPES {
        let spec = opt(dtype, 2, 4, 16, 96);
        let file = routers(&spec, false, Some(9), &[(64, 20)]);
        for isa in Isa::all() {
            for mlp in [MlpMode::Reference, MlpMode::Invariant] {
                let setup = Setup { isa, routers: Some(&file), ..Setup::default() };
                let setting = SeqSetting { attn_density: Some(1.0), mlp };
                let src = Synthetic::new(spec.clone());
                let mut rig = Rig::new(&src, &setup);
                let tokens = prompt(5, 1);
                let id = rig.add(&tokens, setting);
                let want = bits(&rig.run(&[(id, 1, true)])[0]);
                let counts = rig.report.counts[0];
                assert_eq!((counts.mlp_run, counts.mlp_total), (40, 192));
                let list = selected_neurons(&rig.scratch);
                assert_eq!(list.len(), 20);
                // Layer 1's list is the one still there: poison what it left out, in layer 1.
                let out: Vec<usize> = (0..96).filter(|n| !list.contains(&(*n as u32))).collect();
                let mut rig = Rig::new(&src, &setup);
                set_neurons(&mut rig.weights, 1, &out, f32::NAN);
                let id = rig.add(&tokens, setting);
                assert!(want == bits(&rig.run(&[(id, 1, true)])[0]), "{dtype:?} {} {mlp:?}", isa.name());
                // Zero weights for them in a dense model give the same bits.
                let mut rig = Rig::new(&src, &setup);
                set_neurons(&mut rig.weights, 1, &out, 0.0);
                let setting = SeqSetting { attn_density: Some(1.0), mlp };
                let id = rig.add(&tokens, setting);
                let got = bits(&rig.run(&[(id, 1, true)])[0]);
                assert!(want == got);
            }
        }
    }
}

#[test]
fn unselected_heads_and_freed_pages_are_not_read() {
    for dtype in DTYPES {
        let spec = llama(dtype, 2, 64, (8, 4), 16, 64);
        let file = routers(&spec, false, None, &[]);
        for isa in Isa::all() {
            let setup = Setup { isa, routers: Some(&file), ..Setup::default() };
            let setting = SeqSetting { attn_density: Some(0.5), mlp: MlpMode::Dense };
            let src = Synthetic::new(spec.clone());
            let run = |poison: bool| {
                let mut rig = Rig::new(&src, &setup);
                if poison {
                    // What earlier owners left everywhere.
                    rig.kv.bytes_mut().fill(0xff);
                }
                let id = rig.add(&prompt(9, 52), setting);
                rig.run(&[(id, 50, false)]);
                if poison {
                    let pages = rig.seqs[id].pages.clone();
                    // Find out who is selected, then poison the others' earlier pages.
                    rig.fill(&[(id, 1, true)]);
                    rig.go();
                    let live = rig.scratch.select.live[..4].to_vec();
                    assert_eq!(live.iter().filter(|l| **l).count(), 2);
                    for (head, _) in live.iter().enumerate().filter(|(_, l)| !**l) {
                        pages[..3].iter().for_each(|&p| poison_page(&mut rig.kv, 1, p, head));
                    }
                    rig.seqs[id].done -= 1;
                }
                let out = bits(&rig.run(&[(id, 1, true)])[0]);
                assert_eq!(rig.report.kv_bytes_read * 4, rig.report.kv_bytes_dense * 3);
                assert_eq!((rig.report.counts[0].attn_run, rig.report.counts[0].attn_total), (6, 8));
                out
            };
            assert!(run(false) == run(true), "{dtype:?} {}", isa.name());
        }
    }
}

#[test]
fn pages_outside_the_window_are_not_read() {
    let spec = ModelSpec { window: Some(20), ..llama(DType::F32, 2, 64, (8, 4), 16, 64) };
    let src = Synthetic::new(spec);
    let run = |poison: bool| {
        let mut rig = Rig::new(&src, &Setup::default());
        let id = rig.add(&prompt(4, 101), DENSE);
        rig.run(&[(id, 100, false)]);
        if poison {
            // Position 100 sees tokens 81 to 100: pages 5 and 6.
            let old: [u32; 5] = rig.seqs[id].pages[..5].try_into().unwrap();
            for page in old {
                (0..8).for_each(|i| poison_page(&mut rig.kv, i / 4, page, i % 4));
            }
        }
        bits(&rig.run(&[(id, 1, true)])[0])
    };
    assert!(run(false) == run(true));
}

#[test]
fn oracle_and_random_need_no_router() {
    let spec = llama(DType::BF16, 3, 64, (8, 4), 16, 64);
    let src = Synthetic::new(spec);
    let setting = SeqSetting { attn_density: Some(0.5), mlp: MlpMode::Dense };
    let with = |source, threads| {
        let options = Options { source, ..Options::default() };
        let mut rig = Rig::new(&src, &Setup { options, threads, ..Setup::default() });
        let out = alone(&mut rig, &prompt(2, 40), 5, 40, setting);
        (out, rig.report.counts[0])
    };
    let (oracle, counts) = with(Source::Oracle, 1);
    assert_eq!(counts.attn_run, counts.attn_total, "the oracle computes everything");
    assert!(oracle == with(Source::Oracle, 4).0);
    let (one, counts) = with(Source::Random { seed: 1 }, 1);
    assert_eq!((counts.attn_run, counts.attn_total), (8, 12));
    assert!(one == with(Source::Random { seed: 1 }, 2).0);
    assert!(one != with(Source::Random { seed: 2 }, 2).0 && one != oracle);
}

#[test]
fn int8_weights_stay_close() {
    for (name, spec) in models(DType::BF16) {
        let src = Synthetic::new(spec);
        let exact = Setup { isa: Isa::all().last().unwrap(), ..Setup::default() };
        let i8 = WeightOptions { dtype: Some(DType::I8) };
        for isa in Isa::all() {
            let a = alone(&mut Rig::new(&src, &exact), &prompt(1, 20), 1, 20, DENSE);
            let mut rig = Rig::new(&src, &Setup { isa, weights: i8, ..Setup::default() });
            let b = alone(&mut rig, &prompt(1, 20), 1, 20, DENSE);
            let f = |v: &[u32]| v.iter().map(|&b| f64::from(f32::from_bits(b))).collect::<Vec<_>>();
            let (a, b) = (f(&a[1]), f(&b[1]));
            let rms = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
            let far = rms(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / rms(&mut a.iter().copied());
            assert!(far < 0.06, "{name} {}: {far}", isa.name());
        }
    }
}

#[test]
fn loading_can_be_cancelled_and_bad_steps_are_refused() {
    use crate::backend::Backend;
    use crate::error::Status;
    let src = Synthetic::new(opt(DType::BF16, 3, 6, 20, 107));
    let cpu = super::Cpu::new(2).unwrap();
    for n in 0..8 {
        let mut calls = 0;
        let mut cancel = |_, _| {
            calls += 1;
            i32::from(calls > n)
        };
        let e = cpu.upload(&src, WeightOptions::default(), &mut cancel).err().unwrap();
        assert_eq!(e.status, Status::E_CANCELLED);
    }
    let e = cpu.upload(&src, WeightOptions { dtype: Some(DType::F32) }, &mut |_, _| 0).err().unwrap();
    assert_eq!(e.status, Status::E_UNSUPPORTED);
    let mut rig = Rig::new(&src, &Setup::default());
    let id = rig.add(&prompt(1, 20), DENSE);
    type Break = fn(&mut crate::backend::Step);
    let breaks: [Break; 7] = [
        |s| s.tokens[0] = 9999,
        |s| s.positions[3] = 7777,
        |s| s.pages[1] = 9999,
        |s| s.seqs[0].n_pages = 1,
        |s| s.seqs[0].first_row = 1,
        |s| s.logit_rows[0] = 99,
        |s| s.seqs[0].n_rows = 19,
    ];
    for (i, bad) in breaks.into_iter().enumerate() {
        rig.seqs[id].done = 0;
        rig.fill(&[(id, 20, false)]);
        bad(&mut rig.step);
        assert_eq!(rig.try_go().unwrap_err().status, Status::E_INVALID, "{i}");
    }
}

/// A file's tensors, widened to f32.
struct Widened(Shards);

impl TensorSource for Widened {
    fn names(&self) -> &[String] {
        self.0.names()
    }
    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.info(name).map(|info| TensorInfo { dtype: DType::F32, ..info })
    }
    fn require(&self, name: &str) -> Result<TensorInfo> {
        self.0.require(name).map(|info| TensorInfo { dtype: DType::F32, ..info })
    }
    fn read(&self, name: &str, offset: u64, dst: &mut [u8]) -> Result<()> {
        let stored = self.0.require(name)?.dtype;
        let mut bytes = vec![0; dst.len() / 4 * stored.size()];
        self.0.read(name, offset / 4 * stored.size() as u64, &mut bytes)?;
        let mut values = vec![0.0; dst.len() / 4];
        widen(stored, &bytes, &mut values);
        dst.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(d, v)| *d = v.to_le_bytes());
        Ok(())
    }
    fn metadata(&self, key: &str) -> Option<&str> {
        self.0.metadata(key)
    }
}

/// MLP routers stored in bf16 are kept in int8, and choose what the same routers choose that are
/// stored, and so kept, in f32.
#[test]
fn mlp_routers_in_int8_choose_the_same_neurons() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let limits = FileLimits::default();
    let src = model::load(&fixtures.join("opt-tiny"), &limits).unwrap();
    let shards = || Shards::open(&fixtures.join("opt-tiny/routers.safetensors"), &limits).unwrap();
    let kept: [(DType, Box<dyn TensorSource>); 2] =
        [(DType::I8, Box::new(shards())), (DType::F32, Box::new(Widened(shards())))];
    let mut rigs = kept.map(|(dtype, file)| {
        let file =
            RouterFile::new(file, &limits, src.spec(), &Fingerprint::of_spec(src.spec()), true).unwrap();
        let rig = Rig::new(&src, &Setup { routers: Some(&file), ..Setup::default() });
        for layer in &rig.routers.as_ref().unwrap().layers {
            let (down, up) = layer.mlp.as_ref().unwrap();
            assert_eq!((down.dtype, up.dtype), (dtype, dtype));
        }
        rig
    });
    let text = std::fs::read(fixtures.join("test_windows.u16")).unwrap();
    let text = text.as_chunks::<2>().0.iter().map(|b| u32::from(u16::from_le_bytes(*b)));
    let tokens: Vec<u32> = text.take(160).collect();
    let setting = SeqSetting { attn_density: Some(1.0), mlp: MlpMode::Invariant };
    let ids = rigs.each_mut().map(|rig| rig.add(&tokens, setting));
    let (mut both, mut of, mut most) = (0, 0, 0);
    for step in 0..129 {
        let n = if step == 0 { 32 } else { 1 };
        let [int8, exact] = [0, 1].map(|i| {
            rigs[i].run(&[(ids[i], n, step > 0)]);
            if step > 0 { selected_neurons(&rigs[i].scratch) } else { Vec::new() }
        });
        assert_eq!(int8.len(), exact.len());
        both += int8.iter().filter(|n| exact.binary_search(n).is_ok()).count();
        of += exact.len();
        most = most.max(exact.len());
    }
    let recall = both as f64 / of as f64;
    assert!(most > 0 && most < src.spec().ffn_size as usize / 2, "{most} neurons chosen");
    // Measured: 0.993.
    assert!(recall >= 0.98, "recall {recall:.4}");
}
