//! Drives a backend step by step, without an engine: sequences, pages, plans.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "a test stops at errors")]

pub mod specs;
pub mod synthetic;

use polar_sparsity::backend::cpu::{Cpu, Isa};
use polar_sparsity::backend::decode::{Run, enqueue};
use polar_sparsity::backend::{
    Backend, History, Limits, NO_LOGITS, PAGE_TOKENS, Report, SeqStep, Step, WeightOptions,
};
use polar_sparsity::model::Weights;
use polar_sparsity::sample::Params;
use polar_sparsity::sparsity::{MlpMode, Options, Policy, RouterFile, SeqDemand, SeqSetting};

pub struct Seq {
    pub tokens: Vec<u32>,
    pub done: usize,
    pub pages: Vec<u32>,
    pub setting: SeqSetting,
    pub params: Params,
    /// Leading tokens that count as prompt when sampling.
    pub prompt: usize,
}

pub struct Rig<B: Backend = Cpu> {
    pub backend: B,
    pub weights: B::Weights,
    pub routers: Option<B::Routers>,
    pub kv: B::Kv,
    pub scratch: B::Scratch,
    pub policy: Policy,
    pub step: Step,
    pub report: Report,
    pub seqs: Vec<Seq>,
    pub free: Vec<u32>,
}

pub const DENSE: SeqSetting = SeqSetting { attn_density: Some(1.0), mlp: MlpMode::Dense };

struct Histories<'a>(&'a [Seq]);

impl History for Histories<'_> {
    fn id(&self, slot: u32) -> u64 {
        u64::from(slot) + 1
    }
    fn tokens(&self, slot: u32) -> (&[u32], usize) {
        let seq = &self.0[slot as usize];
        (&seq.tokens[..seq.done], seq.prompt)
    }
    fn params(&self, slot: u32) -> &Params {
        &self.0[slot as usize].params
    }
}

/// `||got - want|| / ||want||`.
pub fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (error / want.iter().map(|&w| square(w)).sum::<f64>()).sqrt()
}

pub struct Setup<'a> {
    pub isa: Isa,
    pub threads: usize,
    pub weights: WeightOptions,
    pub routers: Option<&'a RouterFile>,
    pub options: Options,
    pub limits: Limits,
}

pub const LIMITS: Limits = Limits { max_batch: 16, max_rows: 256, pages: 256, max_context: 512 };

impl Default for Setup<'_> {
    fn default() -> Self {
        Setup {
            isa: Isa::best(),
            threads: 2,
            weights: WeightOptions::default(),
            routers: None,
            options: Options::default(),
            limits: LIMITS,
        }
    }
}

impl Rig {
    pub fn new(src: &dyn Weights, setup: &Setup<'_>) -> Rig {
        Rig::on(Cpu::with_isa(setup.isa, setup.threads).unwrap(), src, setup)
    }
}

impl<B: Backend> Rig<B> {
    pub fn on(backend: B, src: &dyn Weights, setup: &Setup<'_>) -> Rig<B> {
        let weights = backend.upload(src, setup.weights, &mut |_, _| 0).unwrap();
        let routers = setup.routers.map(|r| backend.upload_routers(src.spec(), r).unwrap());
        let limits = setup.limits;
        let kv = backend.kv(&weights, &limits).unwrap();
        let scratch = backend.scratch(&weights, routers.as_ref(), &limits).unwrap();
        let info = setup.routers.map(|r| r.info().clone());
        let bytes = backend.weight_bytes(&weights);
        let policy =
            Policy::new(src.spec(), info, setup.options, bytes, backend.page_bytes(&weights) / 16).unwrap();
        Rig {
            step: Step::with_limits(&limits, src.spec().num_layers as usize).unwrap(),
            report: Report::with_limits(&limits).unwrap(),
            // Scattered, so that nothing can rely on neighbours.
            free: (0..limits.pages as u32).map(|i| i * 7 % limits.pages as u32).collect(),
            backend,
            weights,
            routers,
            kv,
            scratch,
            policy,
            seqs: Vec::new(),
        }
    }

    pub fn add(&mut self, tokens: &[u32], setting: SeqSetting) -> usize {
        self.seqs.push(Seq {
            tokens: tokens.to_vec(),
            done: 0,
            pages: Vec::new(),
            setting,
            params: Params::GREEDY,
            prompt: tokens.len(),
        });
        self.seqs.len() - 1
    }

    /// One step over `(sequence, tokens, decode)`, decoding ones first. Logits of each one's last row.
    pub fn run(&mut self, work: &[(usize, usize, bool)]) -> Vec<Vec<f32>> {
        self.fill(work);
        self.go();
        let vocab = self.backend.spec(&self.weights).vocab_size as usize;
        (0..work.len())
            .map(|i| {
                let mut out = vec![0.0; vocab];
                self.backend.read_logits(&mut self.scratch, i, &mut out).unwrap();
                out
            })
            .collect()
    }

    pub fn fill(&mut self, work: &[(usize, usize, bool)]) {
        let step = &mut self.step;
        step.clear();
        let mut demands = Vec::new();
        for (i, &(id, n, decode)) in work.iter().enumerate() {
            let seq = &mut self.seqs[id];
            let context = seq.done + n;
            while seq.pages.len() * PAGE_TOKENS < context {
                seq.pages.push(self.free.pop().expect("a free page"));
            }
            let first_row = step.tokens.len() as u32;
            step.tokens.extend_from_slice(&seq.tokens[seq.done..context]);
            step.positions.extend(seq.done as u32..context as u32);
            step.seqs.push(SeqStep {
                slot: id as u32,
                first_row,
                n_rows: n as u32,
                context: context as u32,
                first_page: step.pages.len() as u32,
                n_pages: seq.pages.len() as u32,
                decode,
                mlp: if decode { seq.setting.mlp } else { MlpMode::Dense },
                logits: i as u32,
                sample: true,
            });
            step.pages.extend_from_slice(&seq.pages);
            step.logit_rows.push(step.tokens.len() as u32 - 1);
            if decode {
                demands.push(SeqDemand { setting: seq.setting, context: context as u32 });
            }
            seq.done = context;
        }
        assert_ne!(NO_LOGITS, 0);
        self.policy.fill(&mut step.plan, &demands);
    }

    pub fn go(&mut self) {
        self.try_go().unwrap();
    }

    pub fn try_go(&mut self) -> polar_sparsity::Result<()> {
        let mut run = Run {
            backend: &self.backend,
            weights: &self.weights,
            routers: self.routers.as_ref(),
            kv: &mut self.kv,
            scratch: &mut self.scratch,
        };
        enqueue(&mut run, &self.step, &Histories(&self.seqs), &mut self.report)?;
        let done = self.backend.poll(&mut self.scratch, &self.step, &mut self.report, u64::MAX)?;
        assert!(done);
        Ok(())
    }
}
