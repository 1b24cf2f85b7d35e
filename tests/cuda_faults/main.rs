//! A device that refuses memory, rejects a launch or fails in any call: the call says so, nothing is
//! lost, and the next try gives what it would have given. On the host executor; with the feature `cuda`
//! and POLAR_TEST_GPU=1 on the first GPU, where `process` adds what only a real one can do.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "a test")]
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "figures and what was skipped")]

#[path = "../support/faulty_device.rs"]
mod faulty_device;
#[cfg(feature = "cuda")]
#[path = "../cuda_kernels/gpu.rs"]
mod gpu;
#[path = "../support/host_device.rs"]
mod host_device;
#[cfg(feature = "cuda")]
mod process;
#[path = "../support/mod.rs"]
mod support;

use faulty_device::Faulty;
use polar_sparsity::backend::Backend;
use polar_sparsity::backend::cuda::Cuda;
use polar_sparsity::backend::cuda::device::{AnyDevice, Device};
use polar_sparsity::engine::{EngineOn, EngineOptions, FOREVER, Health, ModelOn, Request, RoutersOn, SeqId};
use polar_sparsity::format::Limits;
use polar_sparsity::model::{Weights, load};
use polar_sparsity::sample::Params;
use polar_sparsity::sparsity::{MlpMode, RouterFile};
use polar_sparsity::{Result, Status};
use std::sync::Arc;
use support::{Collect, golden_dir, request};

/// With routers of both kinds.
const CASE: &str = "opt_f32";
const TAGS: u64 = 3;

fn on_gpu() -> bool {
    std::env::var_os("POLAR_TEST_GPU").is_some()
}

fn device() -> Arc<Faulty> {
    #[cfg(feature = "cuda")]
    if let Some(device) = gpu::chosen() {
        return Arc::new(Faulty::new(AnyDevice(device)));
    }
    Arc::new(Faulty::new(AnyDevice(Box::new(host_device::Host::new()))))
}

/// A model, its routers and an engine on a device.
fn engine<D: Device>(device: &Arc<D>) -> Result<EngineOn<Cuda<D>>> {
    let backend = Arc::new(Cuda::new(Arc::clone(device), true));
    let checkpoint = load(&golden_dir(CASE), &Limits::default())?;
    let weights = backend.upload(&checkpoint, Default::default(), &mut |_, _| 0)?;
    let path = golden_dir(CASE).join("routers.safetensors");
    let file =
        RouterFile::open(&path, &Limits::default(), checkpoint.spec(), checkpoint.fingerprint(), false)?;
    let routers = backend.upload_routers(checkpoint.spec(), &file)?;
    let model = ModelOn::new(backend, weights);
    let routers = RoutersOn::new(&model, routers, file.info().clone());
    let mut options =
        EngineOptions { max_batch: 4, step_tokens: 24, kv_bytes: 1 << 20, ..Default::default() };
    options.sparsity.mlp_dense_above = 1.0;
    EngineOn::new(&model, Some(&routers), &options)
}

/// Requests that decode beside each other: attention sparse, MLP sparse, and one that samples.
fn submit<B: Backend>(engine: &EngineOn<B>) -> Result<()> {
    let tokens: Vec<i32> = (3..40).collect();
    let mut sampled = Params::GREEDY;
    (sampled.temperature, sampled.top_k, sampled.seed) = (0.8, 12, 5);
    let requests: Vec<Request> = (0..TAGS)
        .map(|i| Request {
            user_tag: i,
            attn_density: 0.5,
            mlp_mode: Some(if i == 0 { MlpMode::Invariant } else { MlpMode::Reference }),
            params: if i == 2 { sampled } else { Params::GREEDY },
            ..request(i as usize, 9 + 4 * i as usize, 6)
        })
        .collect();
    engine.submit(&requests, &tokens, &mut [SeqId::default(); TAGS as usize])
}

/// Steps to the end; a step that fails is tried again. Tokens by tag and how many steps failed.
fn run<B: Backend>(engine: &EngineOn<B>, mut before_step: impl FnMut()) -> (Vec<(u64, u32)>, usize) {
    let (mut tokens, mut failed, mut finished) = (vec![], 0, 0);
    loop {
        before_step();
        let mut sink = Collect::default();
        match engine.step(FOREVER, &mut sink) {
            Ok(d) if d.status == Status::IDLE => break,
            Ok(_) => {}
            Err(e) => {
                assert_eq!(e.status, Status::E_DEVICE, "{e}");
                assert!(sink.events.is_empty(), "a failed step delivers nothing");
                failed += 1;
            }
        }
        finished += sink.events.iter().filter(|e| e.finished.is_some()).count();
        tokens
            .extend(sink.events.iter().filter(|e| e.is_output).filter_map(|e| Some((e.user_tag, e.token?))));
    }
    assert_eq!(finished as u64, TAGS, "one FINISHED event per request");
    let stats = engine.stats();
    assert_eq!((stats.kv_pages_free, stats.health), (stats.kv_pages_total, Health::Ok));
    (tokens, failed)
}

fn whole<D: Device>(device: &Arc<D>) -> Result<Vec<(u64, u32)>> {
    let engine = engine(device)?;
    submit(&engine)?;
    Ok(run(&engine, || {}).0)
}

#[test]
fn every_refused_device_allocation_is_survived() {
    let device = device();
    let want = whole(&device).unwrap();
    assert_eq!(device.live(), 0, "all device memory is given back");
    let mut refused = 0;
    for k in 0.. {
        device.alloc.set(k);
        match engine(&device) {
            Err(e) => assert_eq!(e.status, Status::E_DEVICE_NOMEM, "allocation {k}: {e}"),
            Ok(engine) => {
                assert!(device.alloc.clear(), "allocation {k} was refused and nobody noticed");
                // A steady step allocates nothing.
                let before = device.allocations();
                submit(&engine).unwrap();
                assert!(run(&engine, || {}).0 == want, "tokens differ after {k} refused allocations");
                assert_eq!(device.allocations(), before, "steps take no device memory");
                break;
            }
        }
        refused += 1;
        assert_eq!(device.live(), 0, "allocation {k}: device memory is given back");
    }
    eprintln!("{refused} allocations refused in turn");
    assert!(refused > 3);
    assert_eq!(device.live(), 0);
}

#[test]
fn a_load_that_fails_in_any_device_call_gives_everything_back() {
    let device = device();
    let before = device.calls();
    drop(engine(&device).unwrap());
    let calls = device.calls() - before;
    // Loading is mostly copies of a kind; a prime stride meets every kind.
    let stride = if on_gpu() { 1 } else { 7 };
    for k in (0..calls).step_by(stride) {
        device.call.set(k);
        let error = engine(&device).err().unwrap_or_else(|| panic!("call {k} failed and nobody noticed"));
        assert_eq!(error.status, Status::E_DEVICE, "call {k}: {error}");
        assert_eq!(device.live(), 0, "call {k}");
    }
    eprintln!("{calls} device calls in a load");
}

/// Each step first fails at some call, then is tried again: prompts, first steps, recorded ones.
fn failing_steps(arm: impl Fn(&Faulty, u64), clear: impl Fn(&Faulty) -> bool) {
    let device = device();
    let want = whole(&device).unwrap();
    let engine = engine(&device).unwrap();
    let (passes, stride) = if on_gpu() { (200, 1) } else { (3, 5) };
    let (mut failed, mut k) = (0, 0);
    for pass in 0..passes {
        submit(&engine).unwrap();
        let mut failing = false;
        let (tokens, n) = run(&engine, || {
            clear(&device);
            failing = !failing;
            if failing {
                // A step that is replayed has few calls, one that is launched many.
                arm(&device, if pass % 2 == 0 { k % 9 } else { k % 67 });
                k += stride;
            }
        });
        clear(&device);
        assert!(tokens == want, "pass {pass}: tokens differ after {n} failed steps");
        failed += n;
    }
    eprintln!("{failed} failed steps");
    assert!(failed > passes, "too few of the failures happened");
    drop(engine);
    assert_eq!(device.live(), 0);
}

#[test]
fn a_step_that_fails_in_any_device_call_changes_nothing() {
    failing_steps(|d, k| d.call.set(k), |d| d.call.clear());
}

#[test]
fn a_rejected_launch_fails_its_step_only() {
    failing_steps(|d, k| d.launch.set(k), |d| d.launch.clear());
}
