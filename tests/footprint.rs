//! What an estimate says is what is taken, byte by byte, on both backends and for every family; and a
//! device whose memory is too small says so, with both numbers, before it gives any away.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "a test")]

#[path = "support/host_device.rs"]
mod host_device;

use host_device::Host;
use polar_sparsity::Status;
use polar_sparsity::backend::cpu::Cpu;
use polar_sparsity::backend::cuda::Cuda;
use polar_sparsity::backend::{Backend, Footprint, Limits, WeightOptions};
use polar_sparsity::dtype::DType;
use polar_sparsity::engine::{EngineOn, EngineOptions, ModelOn};
use polar_sparsity::format::Limits as FileLimits;
use polar_sparsity::model::{Checkpoint, Weights, load};
use polar_sparsity::sparsity::RouterFile;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const LIMITS: Limits = Limits { max_batch: 5, max_rows: 37, pages: 11, max_context: 64 };
const STORED: WeightOptions = WeightOptions { dtype: None };

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name)
}

fn model(name: &str) -> Checkpoint {
    load(&folder(name), &FileLimits::default()).unwrap()
}

fn routers(name: &str, model: &Checkpoint) -> Option<RouterFile> {
    let path = folder(name).join("routers.safetensors");
    let open = || RouterFile::open(&path, &FileLimits::default(), model.spec(), model.fingerprint(), false);
    path.is_file().then(|| open().unwrap())
}

fn every_model() -> Vec<String> {
    let entries = std::fs::read_dir(folder("")).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|n| folder(n).join("model.safetensors").is_file()).collect();
    names.push("llama_sharded_f32".into());
    names
}

fn on_host() -> Cuda<Host> {
    Cuda::new(Arc::new(Host::new()), true)
}

/// Leaves `bytes` free.
fn leave(cuda: &Cuda<Host>, bytes: u64) {
    cuda.device().capacity.store(taken(cuda) + bytes, Ordering::Relaxed);
}

fn taken(cuda: &Cuda<Host>) -> u64 {
    cuda.device().taken.load(Ordering::Relaxed)
}

#[test]
fn a_cuda_device_gives_what_was_estimated() {
    for name in every_model() {
        let (cuda, model) = (on_host(), model(&name));
        let file = routers(&name, &model);
        let said = cuda.footprint(model.spec(), STORED, file.as_ref(), Some(&LIMITS)).unwrap();
        let w = cuda.upload(&model, STORED, &mut |_, _| 0).unwrap();
        assert_eq!((said.weights, said.weights), (taken(&cuda), cuda.weight_bytes(&w)), "{name}: weights");
        let r = file.as_ref().map(|f| cuda.upload_routers(model.spec(), f).unwrap());
        assert_eq!(said.routers, taken(&cuda) - said.weights, "{name}: routers");
        let before = taken(&cuda);
        let kv = cuda.kv(&w, &LIMITS).unwrap();
        assert_eq!(said.page * LIMITS.pages as u64, taken(&cuda) - before, "{name}: pages");
        assert_eq!(said.page, cuda.page_bytes(&w));
        let before = taken(&cuda);
        let scratch = cuda.scratch(&w, r.as_ref(), &LIMITS).unwrap();
        assert_eq!(said.scratch, taken(&cuda) - before, "{name}: scratch");
        drop((w, r, kv, scratch));
        assert_eq!(taken(&cuda), 0, "{name}");
    }
}

#[test]
fn the_processor_gives_what_was_estimated() {
    let cpu = Cpu::new(2).unwrap();
    for name in every_model() {
        let model = model(&name);
        let file = routers(&name, &model);
        for options in [STORED, WeightOptions { dtype: Some(DType::I8) }] {
            let said = cpu.footprint(model.spec(), options, file.as_ref(), Some(&LIMITS)).unwrap();
            let w = cpu.upload(&model, options, &mut |_, _| 0).unwrap();
            assert_eq!(said.weights, cpu.weight_bytes(&w), "{name} {options:?}: weights");
            assert_eq!(said.page, cpu.page_bytes(&w), "{name}: a page");
            assert!(said.scratch > 0, "{name}: scratch");
            let none = cpu.footprint(model.spec(), options, None, None).unwrap();
            assert_eq!(none, Footprint { routers: 0, scratch: 0, ..said });
            // Attention routers become f32, so their bytes may double; rows are filled up.
            let stored = file
                .as_ref()
                .map_or(0, |_| std::fs::metadata(folder(&name).join("routers.safetensors")).unwrap().len());
            assert!(said.routers <= 4 * stored && (said.routers > 0) == file.is_some(), "{name}: routers");
        }
    }
}

/// Tries `action` with one byte less than it needs: the message names both numbers, nothing is taken.
#[track_caller]
fn one_byte_short<T>(cuda: &Cuda<Host>, needed: u64, action: impl Fn() -> polar_sparsity::Result<T>) -> T {
    let before = taken(cuda);
    leave(cuda, needed - 1);
    let error = action().err().expect("too little memory");
    assert_eq!(error.status, Status::E_DEVICE_NOMEM, "{error}");
    let both = format!("{needed} bytes are needed, {} are free on host executor", needed - 1);
    assert!(error.message.contains(&both), "{error}: not {both}");
    assert_eq!(taken(cuda), before, "something was taken");
    leave(cuda, needed);
    action().expect("enough")
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_taken() {
    let cuda = Arc::new(on_host());
    let model = model("opt_f32");
    let file = routers("opt_f32", &model).unwrap();
    // While a model loads, a piece of it is turned beside it.
    let piece = 16 << 20;
    let plain = cuda.footprint(model.spec(), STORED, Some(&file), None).unwrap();
    let w = one_byte_short(&cuda, plain.weights + piece, || cuda.upload(&model, STORED, &mut |_, _| 0));
    drop(one_byte_short(&cuda, plain.routers, || cuda.upload_routers(model.spec(), &file)));

    let pages = 2;
    let options =
        EngineOptions { max_batch: 4, kv_bytes: plain.page * pages as u64, ..EngineOptions::default() };
    let limits = Limits { max_batch: 4, max_rows: 512, pages, max_context: pages * 16 };
    assert!(limits.max_context <= model.spec().max_positions as usize, "{limits:?}");
    let said = cuda.footprint(model.spec(), STORED, None, Some(&limits)).unwrap();
    let needed = said.page * pages as u64 + said.scratch;
    let on = ModelOn::new(Arc::clone(&cuda), w);
    one_byte_short(&cuda, needed, || EngineOn::new(&on, None, &options));
}
