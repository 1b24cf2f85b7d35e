//! Logits of the CPU backend against transformers, for every family, dtype and instruction set.

#![allow(clippy::unwrap_used, reason = "a test stops at errors")]

mod rig;

use polar_sparsity::backend::cpu::Isa;
use polar_sparsity::dtype::DType;
use polar_sparsity::format::{Limits as FileLimits, Shards, TensorSource};
use polar_sparsity::model::{Checkpoint, Weights, load};
use polar_sparsity::sparsity::{MlpMode, Options, RouterFile, SeqSetting};
use rig::{DENSE, Rig, Setup};
use std::path::{Path, PathBuf};

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden");
    let mut out: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("golden.json").exists())
        .collect();
    out.sort();
    assert!(out.len() > 10);
    out
}

struct Golden {
    name: String,
    dir: PathBuf,
    facts: serde_json::Value,
    arrays: Shards,
    model: Checkpoint,
}

impl Golden {
    fn open(dir: &Path) -> Golden {
        let facts = std::fs::read_to_string(dir.join("golden.json")).unwrap();
        Golden {
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            dir: dir.to_path_buf(),
            facts: serde_json::from_str(&facts).unwrap(),
            arrays: raw(&dir.join("golden.safetensors")),
            model: load(dir, &FileLimits::default()).unwrap(),
        }
    }

    fn tokens(&self, prompt: usize, what: &str) -> Vec<u32> {
        let list = self.facts["prompts"][prompt][what].as_array().unwrap();
        list.iter().map(|v| v.as_u64().unwrap() as u32).collect()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.read(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let info = self.arrays.info(name).unwrap_or_else(|| panic!("{} {name}", self.name));
        let mut bytes = vec![0; info.shape.checked_bytes(info.dtype).unwrap()];
        self.arrays.read(name, 0, &mut bytes).unwrap();
        bytes
    }

    /// Largest distance allowed from the f32 logits.
    fn tolerance(&self) -> f32 {
        if self.model.spec().dtype == DType::F32 {
            return 2e-4;
        }
        self.facts["max_abs_diff_dtype_vs_f32"].as_f64().unwrap() as f32
    }
}

fn raw(path: &Path) -> Shards {
    Shards::open(path, &FileLimits::default()).unwrap()
}

fn worst(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0, |a, b| if b.is_nan() { f32::NAN } else { a.max(b) })
}

#[test]
fn dense_logits_of_every_family() {
    let mut report = String::new();
    for dir in cases() {
        let g = Golden::open(&dir);
        for isa in Isa::all() {
            let mut rig = Rig::new(&g.model, &Setup { isa, ..Setup::default() });
            let vocab = g.model.spec().vocab_size as usize;
            let mut far = 0.0f32;
            for p in 0..3 {
                let mut tokens = g.tokens(p, "tokens");
                let n = tokens.len();
                tokens.extend(g.tokens(p, "forced"));
                let id = rig.add(&tokens, DENSE);
                let want = g.floats(&format!("p{p}.prefill_logits_f32"));
                let got = rig.run(&[(id, n, false)]);
                far = far.max(worst(&got[0], &want[want.len() - vocab..]));
                let want = g.floats(&format!("p{p}.decode_logits_f32"));
                for want in want.chunks_exact(vocab) {
                    let got = rig.run(&[(id, 1, true)]);
                    let d = worst(&got[0], want);
                    far = if d.is_nan() { f32::INFINITY } else { far.max(d) };
                }
            }
            report += &format!("{} {}: {far} of {}\n", g.name, isa.name(), g.tolerance());
            assert!(far <= g.tolerance(), "{report}");
        }
    }
}

#[test]
fn sparse_logits_follow_the_reference() {
    for dir in cases() {
        let g = Golden::open(&dir);
        for v in g.facts["sparse"].as_array().unwrap() {
            let file = g.dir.join(v["routers"].as_str().unwrap());
            let limits = FileLimits::default();
            let spec = g.model.spec();
            let file = RouterFile::open(&file, &limits, spec, g.model.fingerprint(), false).unwrap();
            let density = v["attention_density"].as_f64().unwrap_or(1.0) as f32;
            let batched = v["batched"].as_bool().unwrap();
            let mlp = if v["mlp"].is_null() { MlpMode::Dense } else { MlpMode::Reference };
            let setting = SeqSetting { attn_density: Some(density), mlp };
            let options = Options { mlp_dense_above: 1.0, ..Options::default() };
            for isa in Isa::all() {
                let setup = Setup { isa, routers: Some(&file), options, ..Setup::default() };
                let mut rig = Rig::new(&g.model, &setup);
                sparse_case(&g, v["name"].as_str().unwrap(), batched, setting, &mut rig);
            }
        }
    }
}

fn sparse_case(g: &Golden, name: &str, batched: bool, setting: SeqSetting, rig: &mut Rig) {
    let vocab = g.model.spec().vocab_size as usize;
    for p in 0..3 {
        let mut tokens = g.tokens(p, "tokens");
        let n = tokens.len();
        tokens.extend(g.tokens(p, "forced"));
        let id = rig.add(&tokens, setting);
        rig.run(&[(id, n, false)]);
    }
    let check = |got: &[f32], want: &[f32], p: usize, s: usize| {
        let far = worst(got, want);
        assert!(far <= 2e-4, "{} {name} prompt {p} step {s}: {far}", g.name);
    };
    if batched {
        let want = g.floats(&format!("sparse.{name}.logits"));
        for (s, want) in want.chunks_exact(3 * vocab).enumerate() {
            let got = rig.run(&[(0, 1, true), (1, 1, true), (2, 1, true)]);
            for p in 0..3 {
                check(&got[p], &want[p * vocab..(p + 1) * vocab], p, s);
            }
        }
        return;
    }
    for p in 0..3 {
        let want = g.floats(&format!("sparse.{name}.p{p}.logits"));
        for (s, want) in want.chunks_exact(vocab).enumerate() {
            let got = rig.run(&[(p, 1, true)]);
            check(&got[0], want, p, s);
            // One sequence alone: its own rule is the reference rule, up to the positive part.
            assert!(rig.report.counts[0].attn_run <= rig.report.counts[0].attn_total);
        }
    }
}
