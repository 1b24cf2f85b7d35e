//! The CUDA backend: what a step's stages launch, on a [`device::Device`].
//!
//! The stages know kernels by name ([`launch`]) and their parameters ([`params`]); the device is a
//! trait, so the same stages run on a GPU through the driver and, in tests, on the host executor of
//! `cuda/host`, which runs the same kernel sources on the CPU.
//!
//! Weights, activations and cache are bf16 or f16 as the model is stored (f32 models become bf16);
//! sums and the residual stream are f32.

mod buckets;
mod cut;
pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
pub mod heads;
pub mod launch;
#[cfg(feature = "cuda")]
mod library;
pub mod line;
mod memory;
#[cfg(feature = "cuda")]
mod module;
mod neurons;
pub mod ops;
pub mod params;
#[cfg(feature = "cuda")]
mod probe;
mod product;
mod program;
mod projection;
mod routers;
pub mod sampling;
mod scratch;
mod shape;
#[cfg(feature = "cuda")]
mod side;
mod stages;
#[cfg(feature = "cuda")]
mod stopwatch;
mod tables;
pub mod tuning;
mod weights;

pub use routers::CudaRouters;
pub use scratch::CudaScratch;
pub use weights::CudaWeights;

use super::{
    Backend, Caps, Footprint, History, Limits, Live, NO_LOGITS, Progress, Report, Site, Step, WeightOptions,
};
use crate::error::{Error, Result};
use crate::model::{ModelSpec, Weights};
use crate::sparsity::router::RouterFile;
use crate::sparsity::{Counts, Rule, Source};
use device::Device;
use memory::Memory;
use params::Ptr;
use sampling::Request;
use shape::Shape;
use std::sync::Arc;
use tuning::Tuning;

/// The backend on one device.
pub struct Cuda<D: Device> {
    device: Arc<D>,
    records: bool,
    tuning: Tuning,
}

/// Pages of all layers.
pub struct CudaKv<D: Device> {
    memory: Memory<D>,
    layer_bytes: u64,
    pages: usize,
}

impl<D: Device> CudaKv<D> {
    fn layer(&self, layer: usize) -> Ptr {
        self.memory.at.offset(self.layer_bytes * layer as u64)
    }
}

impl<D: Device> Cuda<D> {
    /// A backend on `device`; `records`: repeated decode steps become recorded programs.
    pub fn new(device: Arc<D>, records: bool) -> Cuda<D> {
        Cuda { device, records, tuning: Tuning::default() }
    }

    /// With other choices between equivalent launches, for measurements.
    pub fn tuned(self, tuning: Tuning) -> Cuda<D> {
        Cuda { tuning, ..self }
    }

    /// The device.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// Random contents for every page: for benchmarks.
    pub fn fill_random(&self, w: &CudaWeights<D>, kv: &mut CudaKv<D>) -> Result<()> {
        let count = kv.layer_bytes * w.shape.layers as u64 / 2;
        let fill = params::FillParams { at: kv.memory.at, count, seed: 3, scale: 1.0, offset: 0.0 };
        device::start(&*self.device, &w.kernels.fill(w.shape.dtype)?, &fill)
    }

    /// Counts of what this step runs, from its plan: selections keep as many units as planned.
    fn count(w: &CudaWeights<D>, s: &mut CudaScratch<D>, step: &Step) {
        let (units, ffn) = (w.spec.num_kv_heads, u64::from(w.spec.ffn_size));
        let piece = s.shape.layer_page_bytes() / s.shape.kv_heads as u64;
        let layers = s.shape.layers as u64;
        s.counts.fill(Counts::default());
        s.kv_bytes = (0, 0);
        for layer in 0..s.shape.layers {
            let rule = step.plan.mlp_rule(layer);
            for (i, seq) in step.seqs.iter().enumerate().take_while(|(_, q)| q.decode) {
                let c = &mut s.counts[i];
                c.attn_run += u64::from(step.plan.attn_k(layer, i));
                c.mlp_run += match rule.of(seq.mlp) {
                    Rule::TopK(k) if !w.spec.activation.gated() => u64::from(k).min(ffn),
                    _ => ffn,
                };
            }
        }
        for (c, seq) in s.counts.iter_mut().zip(&step.seqs).take_while(|(_, q)| q.decode) {
            (c.attn_total, c.mlp_total) = (layers * u64::from(units), layers * ffn);
            let first = w.spec.window.map_or(0, |n| seq.context.saturating_sub(n));
            let bytes = u64::from((seq.context - 1) / 16 + 1 - first / 16) * piece;
            s.kv_bytes.0 += c.attn_run * bytes;
            s.kv_bytes.1 += c.attn_total * bytes;
        }
    }
}

fn layer_of<D: Device>(w: &CudaWeights<D>, layer: usize) -> Result<()> {
    if layer < w.layers.len() { Ok(()) } else { Err(Error::invalid(format!("layer {layer}"))) }
}

impl<D: Device> Backend for Cuda<D> {
    type Weights = CudaWeights<D>;
    type Routers = CudaRouters<D>;
    type Kv = CudaKv<D>;
    type Scratch = CudaScratch<D>;

    fn caps(&self) -> Caps {
        Caps {
            name: format!("cuda {}", self.device.name()),
            asynchronous: true,
            oracle: false,
            mlp_break_even: neurons::break_even,
        }
    }

    fn free_memory(&self) -> Result<u64> {
        self.device.free_memory()
    }

    fn footprint(
        &self,
        spec: &ModelSpec,
        options: WeightOptions,
        routers: Option<&RouterFile>,
        limits: Option<&Limits>,
    ) -> Result<Footprint> {
        let shape = Shape::new(spec, options.dtype)?;
        let kernels = shape.kernels(&*self.device)?;
        let (layers, routers) = match routers {
            Some(file) => routers::router_places(&*self.device, &shape, file.info(), Ptr::NULL)?,
            None => (Vec::new(), 0),
        };
        Ok(Footprint {
            weights: weights::bytes(spec, &shape)?,
            routers,
            page: shape.layer_page_bytes() * shape.layers as u64,
            scratch: match limits {
                Some(limits) => scratch::bytes(&shape, &kernels, &layers, limits, &spec.position),
                None => 0,
            },
        })
    }

    fn upload(
        &self,
        src: &dyn Weights,
        options: WeightOptions,
        progress: Progress<'_>,
    ) -> Result<Self::Weights> {
        CudaWeights::upload(&self.device, src, options.dtype, progress)
    }

    fn spec<'a>(&self, w: &'a Self::Weights) -> &'a ModelSpec {
        &w.spec
    }

    fn weight_bytes(&self, w: &Self::Weights) -> u64 {
        w.bytes
    }

    fn upload_routers(&self, spec: &ModelSpec, file: &RouterFile) -> Result<Self::Routers> {
        CudaRouters::upload(&self.device, spec, file)
    }

    fn page_bytes(&self, w: &Self::Weights) -> u64 {
        w.shape.layer_page_bytes() * w.shape.layers as u64
    }

    fn check_room(&self, w: &Self::Weights, r: Option<&Self::Routers>, limits: &Limits) -> Result<()> {
        let pages = self.page_bytes(w).saturating_mul(limits.pages as u64);
        let layers = r.map_or(&[][..], |r| &r.layers);
        let scratch = scratch::bytes(&w.shape, &w.kernels, layers, limits, &w.spec.position);
        memory::check_room(&*self.device, "KV pages and activations", pages.saturating_add(scratch))
    }

    fn kv(&self, w: &Self::Weights, limits: &Limits) -> Result<Self::Kv> {
        let layer_bytes = w.shape.layer_page_bytes().saturating_mul(limits.pages as u64);
        let bytes = layer_bytes.saturating_mul(w.shape.layers as u64);
        Ok(CudaKv { memory: Memory::zeroed(&self.device, bytes)?, layer_bytes, pages: limits.pages })
    }

    fn scratch(
        &self,
        w: &Self::Weights,
        r: Option<&Self::Routers>,
        limits: &Limits,
    ) -> Result<Self::Scratch> {
        let mut scratch = CudaScratch::new(&self.device, w, r, limits)?;
        scratch.kernels.tuning = self.tuning;
        Ok(scratch)
    }

    fn begin(&self, w: &Self::Weights, s: &mut Self::Scratch, step: &Step) -> Result<()> {
        // A host that gave up in the middle of a step left a recording open.
        self.stop_recording(s);
        s.check(step)?;
        if step.plan.source == Source::Oracle {
            return Err(Error::unsupported("selection by oracle on a CUDA device"));
        }
        s.tables.send(step, &s.kernels, w.spec.num_kv_heads, w.spec.window)?;
        s.sampling.clear()?;
        s.neurons_selected = None;
        s.heads_selected = None;
        Self::count(w, s, step);
        self.choose_mode(w, s, step)
    }

    fn embed(&self, w: &Self::Weights, s: &mut Self::Scratch, _: &Step) -> Result<()> {
        self.stage(s, |s| self.run_embed(w, s))
    }

    fn project(
        &self,
        w: &Self::Weights,
        r: Option<&Self::Routers>,
        kv: &mut Self::Kv,
        s: &mut Self::Scratch,
        step: &Step,
        layer: usize,
    ) -> Result<()> {
        self.stage(s, |s| {
            layer_of(w, layer)?;
            if s.limits.pages > kv.pages {
                return Err(Error::invalid(format!(
                    "the engine was made for {} pages, the cache has {}",
                    s.limits.pages, kv.pages
                )));
            }
            self.run_project(w, r, kv, s, step, layer)
        })
    }

    fn route(
        &self,
        _: &Self::Routers,
        s: &mut Self::Scratch,
        _: &Step,
        layer: usize,
        site: Site,
    ) -> Result<()> {
        self.stage(s, |s| self.run_route(s, layer, site))
    }

    fn select(&self, s: &mut Self::Scratch, step: &Step, layer: usize, site: Site) -> Result<()> {
        self.stage(s, |s| self.run_select(s, step, layer, site))
    }

    fn attend(
        &self,
        w: &Self::Weights,
        kv: &mut Self::Kv,
        s: &mut Self::Scratch,
        step: &Step,
        layer: usize,
        live: Live,
    ) -> Result<()> {
        self.stage(s, |s| {
            layer_of(w, layer)?;
            self.run_attend(w, kv, s, step, layer, live)
        })
    }

    fn mlp(
        &self,
        w: &Self::Weights,
        s: &mut Self::Scratch,
        step: &Step,
        layer: usize,
        live: Live,
    ) -> Result<()> {
        self.stage(s, |s| {
            layer_of(w, layer)?;
            self.run_mlp(w, s, step, layer, live)
        })
    }

    fn logits(&self, w: &Self::Weights, s: &mut Self::Scratch, _: &Step) -> Result<()> {
        self.stage(s, |s| self.run_logits(w, s))?;
        self.finish_recording(s)
    }

    fn sample(&self, s: &mut Self::Scratch, step: &Step, history: &dyn History) -> Result<()> {
        for seq in step.seqs.iter().filter(|q| q.sample && q.logits != NO_LOGITS) {
            let (tokens, prompt_len) = history.tokens(seq.slot);
            s.sampling.add(&Request {
                row: seq.logits as usize,
                sequence: history.id(seq.slot),
                tokens,
                prompt_len,
                params: history.params(seq.slot),
            })?;
        }
        s.sampling.run(s.buffers.logits)
    }

    fn end(&self, s: &mut Self::Scratch, _: &Step, report: &mut Report) -> Result<()> {
        report.clear();
        s.sampling.fetch()
    }

    fn poll(&self, s: &mut Self::Scratch, step: &Step, report: &mut Report, timeout_ns: u64) -> Result<bool> {
        if !self.device.finished(timeout_ns)? {
            return Ok(false);
        }
        report.clear();
        s.sampling.report(step.logit_rows.len(), report);
        report.counts.extend_from_slice(&s.counts[..step.seqs.len()]);
        (report.kv_bytes_read, report.kv_bytes_dense) = s.kv_bytes;
        Ok(true)
    }

    fn read_logits(&self, s: &mut Self::Scratch, index: usize, out: &mut [f32]) -> Result<()> {
        if index >= s.limits.max_batch || out.len() > s.shape.vocab {
            return Err(Error::invalid(format!("logits {index}: {} values asked for", out.len())));
        }
        // SAFETY: f32s as bytes, any bytes are valid f32s.
        let bytes = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), 4 * out.len()) };
        self.device.copy_out(bytes, s.buffers.logits.offset((4 * index * s.shape.vocab) as u64))
    }
}
