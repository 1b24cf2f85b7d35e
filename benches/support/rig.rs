//! A model of real shapes on the CPU backend, stepped without scheduler or files: what a decode step
//! costs at a given batch, context and density.

use super::random::Random;
use super::routers;
use polar_sparsity::Result;
use polar_sparsity::backend::cpu::Cpu;
use polar_sparsity::backend::decode::{Run, enqueue};
use polar_sparsity::backend::{
    Backend, History, Limits, NO_LOGITS, PAGE_TOKENS, Report, SeqStep, Step, WeightOptions,
};
use polar_sparsity::model::{Activation, ModelSpec};
use polar_sparsity::sample::Params;
use polar_sparsity::sparsity::{MlpMode, Options, Policy, RouterInfo, SeqDemand, SeqSetting};
use std::time::Instant;

/// One model, its routers, one cache.
pub struct Rig {
    pub cpu: Cpu,
    pub weights: <Cpu as Backend>::Weights,
    routers: <Cpu as Backend>::Routers,
    info: RouterInfo,
    spec: ModelSpec,
    /// Bytes of weights that a step reads: all of them, less an embedding table that is not also
    /// the head.
    read: u64,
    /// Bytes of the MLP routers.
    mlp_routers: u64,
}

/// A cache and scratch for batches up to a size.
pub struct Cache {
    kv: <Cpu as Backend>::Kv,
    scratch: <Cpu as Backend>::Scratch,
    limits: Limits,
    report: Report,
}

/// What a step is asked to be.
#[derive(Clone, Copy)]
pub struct Shape {
    pub batch: usize,
    pub context: usize,
    pub attn_density: f32,
    pub mlp: MlpMode,
}

impl Rig {
    pub fn new(spec: ModelSpec, threads: u32, mlp_share: f64, options: WeightOptions) -> Result<Rig> {
        let cpu = Cpu::new(threads as usize)?;
        let weights = cpu.upload(&Random::new(spec.clone()), options, &mut |_, _| 0)?;
        let file = routers::random(&spec, mlp_share)?;
        let routers = cpu.upload_routers(&spec, &file)?;
        let attention =
            routers::random(&ModelSpec { activation: Activation::SiluGated, ..spec.clone() }, mlp_share)?;
        let bytes = |file| Ok(cpu.footprint(&spec, options, Some(file), None)?.routers);
        let mlp_routers = bytes(&file)? - bytes(&attention)?;
        let table = u64::from(spec.vocab_size) * u64::from(spec.hidden_size) * 2;
        // An int8 head is a matrix of its own beside the table.
        let read = cpu.weight_bytes(&weights) - if options.dtype.is_some() { table } else { 0 };
        Ok(Rig { cpu, weights, routers, info: file.info().clone(), spec, read, mlp_routers })
    }

    pub fn cache(&self, batch: usize, context: usize, rows: usize) -> Result<Cache> {
        let limits = Limits {
            max_batch: batch,
            max_rows: rows.max(batch),
            pages: batch * context.div_ceil(PAGE_TOKENS),
            max_context: context,
        };
        let mut kv = self.cpu.kv(&self.weights, &limits)?;
        kv.fill();
        let scratch = self.cpu.scratch(&self.weights, Some(&self.routers), &limits)?;
        Ok(Cache { kv, scratch, limits, report: Report::with_limits(&limits)? })
    }

    pub fn kv_bytes(&self, batch: usize, context: usize) -> u64 {
        self.cpu.page_bytes(&self.weights) * (batch * context.div_ceil(PAGE_TOKENS)) as u64
    }

    /// A decode step: every sequence has `context` tokens after it.
    pub fn decode(&self, shape: Shape) -> Result<Step> {
        let limits = Limits {
            max_batch: shape.batch,
            max_rows: shape.batch,
            pages: shape.batch * shape.context.div_ceil(PAGE_TOKENS),
            max_context: shape.context,
        };
        let mut step = Step::with_limits(&limits, self.spec.num_layers as usize)?;
        let pages = shape.context.div_ceil(PAGE_TOKENS);
        let setting = SeqSetting { attn_density: Some(shape.attn_density), mlp: shape.mlp };
        let mut demands = Vec::new();
        for i in 0..shape.batch {
            step.tokens.push(1 + i as u32);
            step.positions.push(shape.context as u32 - 1);
            step.logit_rows.push(i as u32);
            let first_page = step.pages.len() as u32;
            // Pages of different sequences interleave, as they do after a while of serving.
            step.pages.extend((0..pages).map(|p| (p * shape.batch + i) as u32));
            step.seqs.push(seq(i as u32, 1, shape.context as u32, first_page, pages as u32, true, shape.mlp));
            demands.push(SeqDemand { setting, context: shape.context as u32 });
        }
        self.policy()?.fill(&mut step.plan, &demands);
        Ok(step)
    }

    /// A prefill step of one prompt.
    pub fn prefill(&self, tokens: usize) -> Result<Step> {
        let pages = tokens.div_ceil(PAGE_TOKENS);
        let limits = Limits { max_batch: 1, max_rows: tokens, pages, max_context: tokens };
        let mut step = Step::with_limits(&limits, self.spec.num_layers as usize)?;
        step.tokens.extend((0..tokens as u32).map(|t| 1 + t * 7 % 1000));
        step.positions.extend(0..tokens as u32);
        step.pages.extend(0..pages as u32);
        step.logit_rows.push(tokens as u32 - 1);
        let mut only = seq(0, tokens as u32, tokens as u32, 0, pages as u32, false, MlpMode::Dense);
        (only.first_row, only.logits) = (0, 0);
        step.seqs.push(only);
        self.policy()?.fill(&mut step.plan, &[]);
        Ok(step)
    }

    fn policy(&self) -> Result<Policy> {
        let options = Options { mlp_dense_above: 1.0, ..Options::default() };
        let page = self.cpu.page_bytes(&self.weights);
        let weights = self.cpu.weight_bytes(&self.weights);
        Policy::new(&self.spec, Some(self.info.clone()), options, weights, page / PAGE_TOKENS as u64)
    }

    /// Runs a step; seconds.
    pub fn run(&self, cache: &mut Cache, step: &Step) -> Result<f64> {
        assert!(
            step.tokens.len() <= cache.limits.max_rows
                && step.pages.iter().all(|&p| (p as usize) < cache.limits.pages)
        );
        let mut run = Run {
            backend: &self.cpu,
            weights: &self.weights,
            routers: Some(&self.routers),
            kv: &mut cache.kv,
            scratch: &mut cache.scratch,
        };
        cache.report.clear();
        let start = Instant::now();
        enqueue(&mut run, step, &Greedy, &mut cache.report)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Seconds that the attention stage of layer 1 takes in a step, output projection included.
    pub fn attend(&self, cache: &mut Cache, step: &Step, sparse: bool) -> Result<f64> {
        use polar_sparsity::backend::{Live, Site};
        let (b, w, s) = (&self.cpu, &self.weights, &mut cache.scratch);
        b.begin(w, s, step)?;
        b.embed(w, s, step)?;
        b.project(w, None, &mut cache.kv, s, step, 1)?;
        let live = if sparse {
            b.route(&self.routers, s, step, 1, Site::Attn)?;
            b.select(s, step, 1, Site::Attn)?;
            Live::Selected
        } else {
            Live::All
        };
        let start = Instant::now();
        b.attend(w, &mut cache.kv, s, step, 1, live)?;
        let seconds = start.elapsed().as_secs_f64();
        b.end(s, step, &mut cache.report)?;
        Ok(seconds)
    }

    /// Milliseconds of each stage of a dense step, summed over the layers: project, attend, mlp,
    /// logits.
    pub fn stages(&self, cache: &mut Cache, step: &Step) -> Result<[f64; 4]> {
        use polar_sparsity::backend::Live;
        let (b, w, s) = (&self.cpu, &self.weights, &mut cache.scratch);
        let mut spent = [0.0; 4];
        let mut timed = |stage: usize, f: &mut dyn FnMut() -> Result<()>| -> Result<()> {
            let start = Instant::now();
            f()?;
            spent[stage] += start.elapsed().as_secs_f64() * 1e3;
            Ok(())
        };
        b.begin(w, s, step)?;
        b.embed(w, s, step)?;
        for layer in 0..self.spec.num_layers as usize {
            timed(0, &mut || b.project(w, None, &mut cache.kv, s, step, layer))?;
            timed(1, &mut || b.attend(w, &mut cache.kv, s, step, layer, Live::All))?;
            timed(2, &mut || b.mlp(w, s, step, layer, Live::All))?;
        }
        timed(3, &mut || b.logits(w, s, step))?;
        b.end(s, step, &mut cache.report)?;
        Ok(spent)
    }

    /// Bytes the last step had to read: weights that ran, and KV that attention read.
    pub fn bytes(&self, cache: &Cache) -> u64 {
        let r = &cache.report;
        let (run, total) = r.counts.iter().fold((0, 0), |(a, b), c| (a + c.mlp_run, b + c.mlp_total));
        let mut bytes = self.read + r.kv_bytes_read;
        if run < total {
            // Skipped neurons' rows of both matrices, and what the MLP routers read instead.
            let spec = &self.spec;
            let matrices =
                2 * u64::from(spec.ffn_size) * u64::from(spec.hidden_size) * 2 * u64::from(spec.num_layers);
            bytes =
                bytes - matrices + (matrices as f64 * run as f64 / total as f64) as u64 + self.mlp_routers;
        }
        bytes
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }
}

fn seq(
    i: u32,
    n_rows: u32,
    context: u32,
    first_page: u32,
    n_pages: u32,
    decode: bool,
    mlp: MlpMode,
) -> SeqStep {
    SeqStep {
        slot: i,
        first_row: i,
        n_rows,
        context,
        first_page,
        n_pages,
        decode,
        mlp,
        logits: if decode { i } else { NO_LOGITS },
        sample: true,
    }
}

struct Greedy;

impl History for Greedy {
    fn id(&self, slot: u32) -> u64 {
        u64::from(slot) + 1
    }
    fn tokens(&self, _slot: u32) -> (&[u32], usize) {
        (&[], 0)
    }
    fn params(&self, _slot: u32) -> &Params {
        &Params::GREEDY
    }
}
