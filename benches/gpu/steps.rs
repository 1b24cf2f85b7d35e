//! Whole decode steps of real shapes with random weights: dense and Polar, through the backend's own
//! path (tables, recorded step, token fetch), without a scheduler.

use crate::floor::{Floor, Selective, terms};
use crate::models::{Model, RANK, all};
use crate::timing::{Gpu, number};
use polar_sparsity::backend::cuda::driver::Driver;
use polar_sparsity::backend::cuda::tuning::Tuning;
use polar_sparsity::backend::cuda::{Cuda, CudaRouters, CudaWeights};
use polar_sparsity::backend::decode::{Run, enqueue};
use polar_sparsity::backend::{Backend, History, Limits, PAGE_TOKENS, Report, SeqStep, Step};
use polar_sparsity::sample::Params;
use polar_sparsity::sparsity::{MlpMode, Options, Policy, SeqDemand, SeqSetting};
use std::sync::Arc;
use std::time::Instant;

/// Arguments that make steps with another choice between equivalent launches.
pub(crate) const TUNINGS: &[&str] = &[
    "tuning:serial",
    "tuning:unmade",
    "tuning:small",
    "tuning:parts",
    "tuning:apart",
    "tuning:side",
    "tuning:single",
    "tuning:whole",
];

/// Begins an argument that names the points to run.
pub(crate) const ONLY: &str = "only:";

/// What those arguments say.
fn tuning() -> Tuning {
    let wants = |what: &str| std::env::args().any(|a| a.strip_prefix("tuning:") == Some(what));
    Tuning {
        beside: !wants("serial"),
        made: !wants("unmade"),
        large: !wants("small"),
        activated: !wants("parts"),
        along: !wants("apart"),
        choose: !wants("side"),
        clusters: !wants("single"),
        heads: !wants("whole"),
    }
}

/// Whether an argument `only:64x2048,…` names this batch and context, or there is none; batches of 2 and 4 have to be named.
fn named(batch: u32, context: u32) -> bool {
    let point = format!("{batch}x{context}");
    let mut lists = std::env::args().filter_map(|a| a.strip_prefix(ONLY).map(str::to_owned)).peekable();
    if lists.peek().is_none() {
        !matches!(batch, 2 | 4)
    } else {
        lists.any(|l| l.split(',').any(|p| p == point))
    }
}

struct Greedy;

impl History for Greedy {
    fn id(&self, slot: u32) -> u64 {
        u64::from(slot) + 1
    }
    fn tokens(&self, _: u32) -> (&[u32], usize) {
        (&[], 0)
    }
    fn params(&self, _: u32) -> &Params {
        &Params::GREEDY
    }
}

/// Steps before a setting is timed: it is launched, then recorded, then replayed; and at least this long, since
/// a GPU that was idle takes a while to reach the clocks it has in service.
const WARM_UP: usize = 3;
const WARM_UP_MS: u128 = 150;
/// The same for a model's first setting, which follows the long hot steps of the model before.
const FIRST_WARM_UP_MS: u128 = 600;
const TIMED: usize = 15;

/// Median of whole steps, and of the host's part of them, milliseconds.
struct Times {
    step: f64,
    host: f64,
}

/// `wanted`: names of models, all when empty; `few`: only the points that DESIGN's table names.
pub(crate) fn steps(gpu: &Gpu, wanted: &[String], few: bool) {
    let device = &gpu.device;
    println!(
        "model B S density | dense ms (host), over its floor | Polar ms (host), over its floor | ratio of what bytes allow, of the roofline's | Polar tokens/s"
    );
    for model in all() {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == model.name) {
            continue;
        }
        let cuda = Cuda::new(Arc::clone(device), true).tuned(tuning());
        let told = device.product_choices().len();
        let mut warm_up = FIRST_WARM_UP_MS;
        let weights = CudaWeights::random(device, &model.spec).unwrap();
        let info = model.routers();
        let routers = CudaRouters::random(device, &model.spec, &info).unwrap();
        for batch in [1u32, 2, 4, 8, 32, 64, 128, 256] {
            for context in [1024u32, 2048, 4096, 8192] {
                let planned = matches!((batch, context), (1, 1024) | (8, 2048) | (64, 2048) | (64, 8192));
                if context > model.spec.max_positions || (few && !planned) || !named(batch, context) {
                    continue;
                }
                let bytes = u64::from(batch) * u64::from(context / 16) * cuda.page_bytes(&weights);
                if bytes + (3 << 30) > cuda.free_memory().unwrap() {
                    continue;
                }
                point(gpu, &cuda, &weights, &routers, &model, batch, context, warm_up);
                warm_up = WARM_UP_MS;
            }
        }
        for c in device.product_choices().split_off(told) {
            println!(
                r#"{{"kind":"choice","model":"{}","rows":{},"n":{},"k":{},"transposed":{},"beside":{},"first_us":{:.1},"best_us":{:.1},"best_waves":{:.2},"own_us":{:.1},"own":{}}}"#,
                model.name,
                c.rows,
                c.n,
                c.k,
                c.transposed,
                c.beside,
                c.first_us,
                c.best_us,
                c.best_waves,
                c.own_us,
                c.own
            );
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "one call")]
fn point(
    gpu: &Gpu,
    cuda: &Cuda<Driver>,
    weights: &CudaWeights<Driver>,
    routers: &CudaRouters<Driver>,
    model: &Model,
    batch: u32,
    context: u32,
    warm_up: u128,
) {
    let pages = context.div_ceil(16) as usize * batch as usize;
    let limits =
        Limits { max_batch: batch as usize, max_rows: batch as usize, pages, max_context: context as usize };
    let mut kv = cuda.kv(weights, &limits).unwrap();
    cuda.fill_random(weights, &mut kv).unwrap();
    let mut scratch = cuda.scratch(weights, Some(routers), &limits).unwrap();
    let mut run = |density: f32, mlp: MlpMode| {
        let step = make(cuda, weights, model, &limits, batch, context, density, mlp);
        let mut report = Report::with_limits(&limits).unwrap();
        let (mut whole, mut host) = (vec![], vec![]);
        let mut program = 0;
        let began = Instant::now();
        let mut i = 0;
        while whole.len() < TIMED {
            let warm = i >= WARM_UP && began.elapsed().as_millis() >= warm_up;
            // The second step of a kind is recorded.
            if i == 1 {
                program = cuda.free_memory().unwrap();
            } else if i == 2 {
                program = program.saturating_sub(cuda.free_memory().unwrap());
            }
            let start = Instant::now();
            let mut r =
                Run { backend: cuda, weights, routers: Some(routers), kv: &mut kv, scratch: &mut scratch };
            enqueue(&mut r, &step, &Greedy, &mut report).unwrap();
            let enqueued = start.elapsed().as_secs_f64() * 1e3;
            assert!(cuda.poll(&mut scratch, &step, &mut report, u64::MAX).unwrap());
            if warm {
                whole.push(start.elapsed().as_secs_f64() * 1e3);
                host.push(enqueued);
            }
            i += 1;
        }
        let median = |v: &mut Vec<f64>| {
            v.sort_by(f64::total_cmp);
            v[v.len() / 2]
        };
        if program > 0 {
            println!("recorded step: {} KiB of device memory", program >> 10);
        }
        (Times { step: median(&mut whole), host: median(&mut host) }, report.kv_bytes_read as f64)
    };
    let (dense, kv_dense) = run(1.0, MlpMode::Dense);
    let relu = model.kept(1) < 1.0;
    let (polar, kv_polar) = run(model.density, if relu { MlpMode::Reference } else { MlpMode::Dense });
    let kept = model.kept(batch);
    let selective = (relu && kept < 0.8).then_some(Selective { kept, rank: RANK });
    let weight_bytes = cuda.weight_bytes(weights) as f64;
    let floor = |kv_bytes, mlp| {
        let terms = terms(&model.spec, batch, (weight_bytes, kv_bytes), mlp);
        Floor::new(&terms, gpu.ceiling, gpu.arithmetic)
    };
    let (floor_dense, floor_polar) = (floor(kv_dense, None), floor(kv_polar, selective));
    let roof_speedup = floor_dense.roof.zip(floor_polar.roof).map(|(dense, polar)| dense / polar);
    let tokens_s = f64::from(batch) / polar.step * 1e3;
    println!(
        "{:<13} {batch:>4} {context:>5} {:.3} | {:7.3} ({:.3}) {:.2} | {:7.3} ({:.3}) {:.2} | {:.2}x of {:.2}x, {} | {tokens_s:.0}",
        model.name,
        model.density,
        dense.step,
        dense.host,
        dense.step / floor_dense.bytes,
        polar.step,
        polar.host,
        polar.step / floor_polar.bytes,
        dense.step / polar.step,
        floor_dense.bytes / floor_polar.bytes,
        roof_speedup.map_or("-".into(), |x| format!("{x:.2}x")),
    );
    gpu.record(&format!(
        r#"{{"kind":"step","model":"{}","batch":{batch},"context":{context},"density":{},"dense_ms":{:.4},"polar_ms":{:.4},"speedup":{:.4},"floor_speedup":{:.4},"floor_ms":{:.4},"polar_floor_ms":{:.4},"roof_speedup":{},"roof_ms":{},"polar_roof_ms":{},"host_ms":{:.4},"tokens_s":{tokens_s:.1}}}"#,
        model.name,
        model.density,
        dense.step,
        polar.step,
        dense.step / polar.step,
        floor_dense.bytes / floor_polar.bytes,
        floor_dense.bytes,
        floor_polar.bytes,
        number(roof_speedup, 4),
        number(floor_dense.roof, 4),
        number(floor_polar.roof, 4),
        polar.host,
    ));
}

#[allow(clippy::too_many_arguments, reason = "one call")]
fn make(
    cuda: &Cuda<Driver>,
    weights: &CudaWeights<Driver>,
    model: &Model,
    limits: &Limits,
    batch: u32,
    context: u32,
    density: f32,
    mlp: MlpMode,
) -> Step {
    let mut step = Step::with_limits(limits, model.spec.num_layers as usize).unwrap();
    let pages = context.div_ceil(16);
    let mut demands = vec![];
    for i in 0..batch {
        step.tokens.push(1 + i);
        step.positions.push(context - 1);
        step.logit_rows.push(i);
        let first_page = step.pages.len() as u32;
        // Pages of different sequences interleave, as they do after a while of serving.
        step.pages.extend((0..pages).map(|p| p * batch + i));
        step.seqs.push(SeqStep {
            slot: i,
            first_row: i,
            n_rows: 1,
            context,
            first_page,
            n_pages: pages,
            decode: true,
            mlp,
            logits: i,
            sample: true,
        });
        demands.push(SeqDemand { setting: SeqSetting { attn_density: Some(density), mlp }, context });
    }
    let options = Options::default();
    let page = cuda.page_bytes(weights) / PAGE_TOKENS as u64;
    let policy = Policy::new(&model.spec, Some(model.routers()), options, cuda.weight_bytes(weights), page)
        .unwrap()
        .with_break_even(cuda.caps().mlp_break_even);
    policy.fill(&mut step.plan, &demands);
    step
}
