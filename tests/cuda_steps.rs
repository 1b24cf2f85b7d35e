//! What surrounds the kernels of a CUDA step: rows filled up to buckets, recorded programs, tables that
//! are copied while the host goes on, failures in the middle, no allocation. On the host executor; with
//! the feature `cuda` and POLAR_TEST_GPU=1 the cases that need nothing of it run on the first GPU.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

#[cfg(feature = "cuda")]
#[path = "cuda_kernels/gpu.rs"]
mod gpu;
#[path = "support/host_device.rs"]
mod host_device;
mod rig;

use host_device::Host;
use polar_sparsity::Status;
use polar_sparsity::backend::cuda::Cuda;
use polar_sparsity::backend::cuda::device::{AnyDevice, Device};
use polar_sparsity::backend::cuda::heads::Units;
use polar_sparsity::backend::cuda::launch::Kernels;
use polar_sparsity::backend::cuda::tuning::Tuning;
use polar_sparsity::backend::{Backend, Limits, Sampled, WeightOptions};
use polar_sparsity::dtype::DType;
use polar_sparsity::engine::{EngineOn, EngineOptions, ModelOn};
use polar_sparsity::model::ModelSpec;
use polar_sparsity::sparsity::{MlpMode, Options, RouterFile, SeqSetting, Source};
use rig::specs::{llama, opt};
use rig::synthetic::{Rng, Synthetic, routers};
use rig::{DENSE, LIMITS, Rig, Setup, distance};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

struct Counting;

thread_local!(static ALLOCATED: Cell<u64> = const { Cell::new(0) });

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn any_device() -> Arc<AnyDevice> {
    any_device_of(3)
}

/// On the host with so many multiprocessors.
fn any_device_of(multiprocessors: u32) -> Arc<AnyDevice> {
    #[cfg(feature = "cuda")]
    if let Some(device) = gpu::chosen() {
        return Arc::new(AnyDevice(device));
    }
    let mut host = Host::new();
    host.multiprocessors = multiprocessors;
    Arc::new(AnyDevice(Box::new(host)))
}

fn spec() -> ModelSpec {
    opt(DType::BF16, 2, 4, 16, 72)
}

/// Attention routers, and of a ReLU model MLP routers. `K_l(B)`: a quarter of the neurons for one sequence, half for more.
fn router_file(spec: &ModelSpec) -> RouterFile {
    routers(
        spec,
        false,
        (!spec.activation.gated()).then_some(8),
        &[(1, spec.ffn_size / 4), (64, spec.ffn_size / 2)],
    )
}

const OPTIONS: Options = Options {
    attn_density: 0.0,
    mlp_density: 0.0,
    mlp_dense_above: 1.0,
    mlp_mode: None,
    source: Source::Router,
};

/// A rig of `limits` on `device`, with sequences of these settings.
fn rig<D: Device>(
    device: Arc<D>,
    records: bool,
    spec: &ModelSpec,
    limits: Limits,
    settings: &[SeqSetting],
) -> Rig<Cuda<D>> {
    let file = router_file(spec);
    let setup = Setup { routers: Some(&file), options: OPTIONS, limits, ..Setup::default() };
    let mut rig = Rig::on(Cuda::new(device, records), &Synthetic::new(spec.clone()), &setup);
    add(&mut rig, settings);
    rig
}

fn add<B: Backend>(rig: &mut Rig<B>, settings: &[SeqSetting]) {
    for (i, &setting) in settings.iter().enumerate() {
        let mut rng = Rng(99 + i as u64);
        let tokens: Vec<u32> = (0..200).map(|_| (rng.next() >> 20) as u32 % 256).collect();
        rig.add(&tokens, setting);
    }
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|r| r.iter().map(|v| v.to_bits()).collect()).collect()
}

fn set(density: f32, mlp: MlpMode) -> SeqSetting {
    SeqSetting { attn_density: Some(density), mlp }
}

/// A step of `n` rows in a bucket of more gives the bits of a step that is exactly as large.
#[test]
fn padding_changes_no_bit() {
    use MlpMode::{Dense, Invariant, Reference};
    let cases: [(&str, Vec<SeqSetting>); 4] = [
        ("dense", vec![DENSE; 3]),
        ("reference", vec![set(0.5, Reference); 5]),
        ("invariant", vec![set(0.5, Invariant); 3]),
        (
            "mixed",
            vec![set(0.5, Reference), DENSE, set(0.25, Invariant), set(1.0, Reference), set(0.5, Dense)],
        ),
    ];
    for spec in [spec(), llama(DType::BF16, 2, 64, (4, 2), 16, 48)] {
        let gated = spec.activation.gated();
        for (name, settings) in &cases {
            if gated && *name != "dense" {
                continue;
            }
            let n = settings.len();
            // At its limits a step is not filled up.
            let exact = Limits { max_batch: n, max_rows: n, ..LIMITS };
            let device = any_device();
            let mut padded = rig(Arc::clone(&device), true, &spec, LIMITS, settings);
            let mut whole = rig(device, false, &spec, exact, settings);
            let mut both = |work: &[(usize, usize, bool)], what: &str| {
                let (a, b) = (padded.run(work), whole.run(work));
                assert_eq!(bits(&a), bits(&b), "{name}, {what}");
                let tokens = |r: &[Sampled]| r.iter().map(|s| s.token).collect::<Vec<_>>();
                assert_eq!(tokens(&padded.report.sampled), tokens(&whole.report.sampled), "{name}, {what}");
                assert_eq!(padded.report.nan_scores, 0);
                assert_eq!(padded.report.counts, whole.report.counts);
            };
            // Prompts of different lengths, in chunks that fill the step; then decoding beside a chunk.
            for i in 0..n {
                for _ in 0..=i {
                    both(&[(i, n, false)], "prompt");
                }
            }
            let beside: Vec<_> = (0..n - 1).map(|i| (i, 1, i + 2 < n)).collect();
            both(&beside, "decoding beside a prompt");
            for round in 0..4 {
                let all: Vec<_> = (0..n).map(|i| (i, 1, true)).collect();
                both(&all, &format!("decoding {round}"));
            }
        }
    }
}

/// Steps of one and of two sequences that leave out heads nobody keeps say what those that do not say, launched, recorded and
/// replayed, at any density.
#[test]
fn heads_left_out_of_the_products_change_nothing_but_rounding() {
    // Chosen in the product; in the kernel that follows it.
    for spec in [opt(DType::BF16, 2, 5, 128, 72), llama(DType::BF16, 2, 256, (16, 8), 64, 48)] {
        let settings = [set(0.4, MlpMode::Dense), set(0.6, MlpMode::Reference), set(1.0, MlpMode::Dense)];
        let file = router_file(&spec);
        let setup = Setup { routers: Some(&file), options: OPTIONS, ..Setup::default() };
        let mut rigs = [true, false].map(|heads| {
            let device = any_device_of(8);
            let cuda = Cuda::new(device, true).tuned(Tuning { heads, ..Tuning::default() });
            let mut rig = Rig::on(cuda, &Synthetic::new(spec.clone()), &setup);
            add(&mut rig, &settings);
            rig
        });
        let (heads, kv_heads, hd) = (spec.num_heads, spec.num_kv_heads, spec.head_dim);
        let device = any_device_of(8);
        let kernels = Kernels::for_device(DType::BF16, hd, heads / kv_heads, &*device).unwrap();
        let units = Units { count: kv_heads, width: heads / kv_heads * hd };
        assert_eq!([2, 3].map(|rows| kernels.leaves_out((rows, rows), units)), [device.warpgroups(), false]);
        let mut both = |work: &[(usize, usize, bool)]| {
            let [a, b] = rigs.each_mut().map(|rig| (rig.run(work), rig.report.counts.clone()));
            assert_eq!(a.1, b.1, "{work:?}");
            for (a, b) in a.0.iter().zip(&b.0) {
                let d = distance(a, b);
                assert!(d <= 1e-2, "{work:?}: {d:.2e}");
            }
        };
        for i in 0..3 {
            both(&[(i, 5 + 20 * i, false)]);
        }
        for _ in 0..3 {
            (0..3).for_each(|i| both(&[(i, 1, true)]));
            both(&[(0, 1, true), (1, 1, true)]);
        }
    }
}

/// The programs are one per bucket and kind of step: lengths, pages, how full the bucket is, how many
/// sequences are in which MLP mode and which densities they have change none.
#[test]
fn one_program_serves_a_bucket() {
    use MlpMode::{Dense, Invariant, Reference};
    let modes = [Reference, Invariant, Reference, Dense, Reference, Invariant, Reference, Reference];
    let settings: Vec<_> = (0..8).map(|i| set([0.25, 0.5, 0.75, 1.0][i % 4], modes[i])).collect();
    let device = Arc::new(Host::new());
    let mut r = rig(Arc::clone(&device), true, &spec(), LIMITS, &settings);
    for i in 0..8 {
        r.run(&[(i, 3 + 5 * i, false)]);
    }
    let (mut sizes, mut rng) = (vec![5, 6, 7, 8, 5, 7], Rng(3));
    for round in 0..12 {
        let n = if round < sizes.len() { sizes[round] } else { 5 + rng.next() as usize % 4 };
        let first = rng.next() as usize % 8;
        let work: Vec<_> = (0..n).map(|i| ((first + i) % 8, 1, true)).collect();
        let before = device.launches.load(Ordering::Relaxed);
        r.run(&work);
        // The first of a kind runs, the second is recorded; all later ones are replays.
        let launched = device.launches.load(Ordering::Relaxed) - before;
        assert_eq!(launched > 0, round == 0, "round {round}: {launched} launches");
    }
    sizes.clear();
    assert_eq!(device.recordings.load(Ordering::Relaxed), 1);
    assert_eq!(device.replays.load(Ordering::Relaxed), 11);
    // Another bucket is another program; programs end with their engine.
    for _ in 0..3 {
        r.run(&[(0, 1, true), (1, 1, true), (2, 1, true)]);
    }
    assert_eq!(device.programs(), 2);
    drop(r);
    assert_eq!(device.programs(), 0);
}

/// Sequences come, decode and go at random; each step's logits are those of a device that records
/// nothing, bit for bit, and of the CPU backend within rounding.
#[test]
fn a_batch_that_moves_follows_the_cpu() {
    for seed in 1..4 {
        let spec = if seed == 2 { llama(DType::BF16, 2, 64, (4, 2), 16, 48) } else { spec() };
        let sparse = seed == 3;
        let settings: Vec<_> = (0..20)
            .map(|i| match (sparse, i % 3) {
                (false, _) => DENSE,
                (true, 0) => set(0.5, MlpMode::Reference),
                (true, 1) => set(0.25, MlpMode::Invariant),
                (true, _) => set(0.75, MlpMode::Dense),
            })
            .collect();
        let device = any_device();
        let mut fast = rig(Arc::clone(&device), true, &spec, LIMITS, &settings);
        let mut plain = rig(device, false, &spec, LIMITS, &settings);
        let mut cpu = Rig::new(&Synthetic::new(spec.clone()), &Setup::default());
        add(&mut cpu, &settings);
        let mut rng = Rng(1000 + seed);
        let mut below = |n: usize| (rng.next() >> 20) as usize % n;
        let (mut running, mut next) = (vec![], 0);
        let mut worst = 0.0f64;
        for _ in 0..24 {
            if next < settings.len() && running.len() < 12 && below(2) == 0 {
                running.push((next, false));
                next += 1;
            }
            if running.len() > 1 && below(6) == 0 {
                let (gone, _): (usize, bool) = running.remove(below(running.len()));
                for (pages, free) in [
                    (&mut fast.seqs[gone].pages, &mut fast.free),
                    (&mut plain.seqs[gone].pages, &mut plain.free),
                    (&mut cpu.seqs[gone].pages, &mut cpu.free),
                ] {
                    free.append(pages);
                }
            }
            let mut work: Vec<_> = running.iter().filter(|s| s.1).map(|s| (s.0, 1, true)).collect();
            for s in running.iter_mut().filter(|s| !s.1) {
                work.push((s.0, 1 + below(40), false));
                s.1 = true;
            }
            if work.is_empty() {
                continue;
            }
            let (a, b) = (fast.run(&work), plain.run(&work));
            assert_eq!(bits(&a), bits(&b), "{work:?}");
            if !sparse {
                for (got, want) in a.iter().zip(cpu.run(&work)) {
                    let square = |x: f32| f64::from(x) * f64::from(x);
                    let error: f64 = got.iter().zip(&want).map(|(g, w)| square(g - w)).sum();
                    worst = worst.max((error / want.iter().map(|&w| square(w)).sum::<f64>()).sqrt());
                }
            }
        }
        eprintln!("seed {seed}: {worst:.1e} from the CPU");
        assert!(worst < 3e-2, "seed {seed}: {worst:.1e} from the CPU");
    }
}

/// Whatever launch of a step fails, recorded or not, the next step runs as if nothing had happened.
#[test]
fn a_failed_step_leaves_no_open_recording() {
    let settings = vec![set(0.5, MlpMode::Reference); 3];
    let all: Vec<_> = (0..3).map(|i| (i, 1, true)).collect();
    let want = {
        let mut r = rig(Arc::new(Host::new()), true, &spec(), LIMITS, &settings);
        (0..3).for_each(|i| drop(r.run(&[(i, 4 + i, false)])));
        (0..4).map(|_| bits(&r.run(&all))).collect::<Vec<_>>()
    };
    // Steps of the trace: the first runs plainly, the second records, the third replays.
    for failing in 0..3 {
        // Every fifth launch: they repeat from layer to layer.
        for k in (0..).step_by(5) {
            let mut survived = false;
            let device = Arc::new(Host::new());
            let mut r = rig(Arc::clone(&device), true, &spec(), LIMITS, &settings);
            (0..3).for_each(|i| drop(r.run(&[(i, 4 + i, false)])));
            for (round, want) in want.iter().enumerate() {
                if round == failing {
                    r.fill(&all);
                    device.fail_in.store(k, Ordering::Relaxed);
                    let done = r.try_go();
                    survived = device.fail_in.swap(-1, Ordering::Relaxed) >= 0;
                    assert_eq!(done.is_ok(), survived);
                    assert!(!device.is_recording(), "step {failing}, launch {k}");
                    (0..3).for_each(|i| r.seqs[i].done -= 1);
                }
                assert_eq!(bits(&r.run(&all)), *want, "round {round}, step {failing}, launch {k}");
            }
            if survived {
                // A replay is one launch, the other steps many.
                assert!(if failing == 2 { k == 5 } else { k > 20 }, "step {failing}: {k} launches");
                break;
            }
        }
    }
}

/// Every kind of step, recorded or not: no allocation on the host.
#[test]
fn a_steady_step_allocates_nothing() {
    for mlp in [MlpMode::Dense, MlpMode::Reference, MlpMode::Invariant] {
        for records in [true, false] {
            let device = Arc::new(Host::new());
            let mut r = rig(Arc::clone(&device), records, &spec(), LIMITS, &[set(0.5, mlp); 5]);
            (0..5).for_each(|i| drop(r.run(&[(i, 33, false)])));
            let work: Vec<_> = (0..5).map(|i| (i, 1, true)).collect();
            // What launches would allocate is the executor's, so they do nothing from here on.
            device.idle.store(true, Ordering::Relaxed);
            for round in 0..6 {
                r.fill(&work);
                let before = ALLOCATED.with(Cell::get);
                r.go();
                let count = ALLOCATED.with(Cell::get) - before;
                // The second step is recorded, which is not steady.
                assert!(round < 2 || count == 0, "{mlp:?}, records {records}, step {round}: {count}");
            }
        }
    }
}

/// What a CUDA device cannot do is said when a model is loaded or an engine made.
#[test]
fn what_is_not_built_is_refused_in_a_sentence() {
    let device = any_device();
    let cuda = || Cuda::new(Arc::clone(&device), true);
    let load = |spec: ModelSpec, dtype: Option<DType>| {
        let done = cuda().upload(&Synthetic::new(spec), WeightOptions { dtype }, &mut |_, _| 0);
        done.err().map(|e| (e.status, e.message.into_owned()))
    };
    let refused = |spec: ModelSpec, dtype: Option<DType>, words: &[&str]| {
        let (status, message) = load(spec, dtype).expect("an error");
        assert_eq!(status, Status::E_UNSUPPORTED, "{message}");
        for word in words {
            assert!(message.contains(word), "no {word} in: {message}");
        }
    };
    refused(spec(), Some(DType::I8), &["int8", "CUDA"]);
    refused(spec(), Some(DType::F32), &["float32", "CUDA"]);
    refused(llama(DType::BF16, 1, 512, (2, 2), 288, 48), None, &["head size 288", "CUDA", "256"]);
    refused(llama(DType::BF16, 1, 60, (4, 2), 15, 48), None, &["hidden size 60", "CUDA", "8"]);
    refused(llama(DType::BF16, 1, 16_392, (4, 2), 16, 48), None, &["hidden size 16392", "CUDA", "16384"]);
    refused(llama(DType::BF16, 1, 64, (34, 2), 16, 48), None, &["17 query heads"]);
    assert_eq!(load(spec(), None), None);
    // What a model was stored as may also be asked for.
    assert_eq!(load(spec(), Some(DType::BF16)), None);

    let model = ModelOn::new(
        Arc::new(cuda()),
        cuda().upload(&Synthetic::new(spec()), WeightOptions::default(), &mut |_, _| 0).unwrap(),
    );
    let mut options = EngineOptions { max_context: 64, max_batch: 4, ..EngineOptions::default() };
    assert!(EngineOn::new(&model, None, &options).is_ok());
    options.sparsity.source = Source::Oracle;
    let error = EngineOn::new(&model, None, &options).err().unwrap();
    assert_eq!(error.status, Status::E_UNSUPPORTED);
    assert!(error.message.contains("oracle"), "{error}");
}
