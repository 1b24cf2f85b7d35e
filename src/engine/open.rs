//! From paths to engines, whatever the backend: the only place that knows there is more than one.

use super::events::EventSink;
use super::gpu;
use super::on::{EngineOn, Estimate, ModelOn, RoutersOn};
use super::types::{Delivered, EngineOptions, Request, SeqId, Stats};
use crate::backend::cpu::{Cpu, Isa};
use crate::backend::{Backend, WeightOptions};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::limits::Limits as FileLimits;
use crate::model::{self, Fingerprint, ModelSpec, Weights};
use crate::sparsity::{RouterFile, RouterInfo};
use std::path::Path;
use std::sync::Arc;

/// Which kind of device a context offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The best that works here.
    #[default]
    Auto,
    /// The host's processor.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

/// Options of a context.
#[derive(Clone, Debug, Default)]
pub struct ContextOptions {
    /// Devices to offer.
    pub backend: BackendChoice,
    /// Threads of the CPU backend, the caller's included; 0 = all cores.
    pub threads: u32,
    /// Instruction set of the CPU backend; `None` = the best this machine has. For tests.
    pub isa: Option<Isa>,
    /// GPUs take the vendor library's first proposal for a product instead of timing several kernels: the
    /// same one in every process.
    pub untimed_products: bool,
    /// What files may ask for.
    pub limits: FileLimits,
}

/// A device of a context.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its kind; never `Auto`.
    pub backend: BackendChoice,
    /// Its number among its kind.
    pub ordinal: u32,
    /// `10 * major + minor`; 0 for a processor.
    pub compute_capability: u32,
    /// Bytes of memory.
    pub memory_total: u64,
    /// Bytes free now.
    pub memory_free: u64,
    /// Whether a model can be loaded on it.
    pub usable: bool,
    /// Its name, or why it is not usable.
    pub name: String,
    /// Identifier, empty for a processor.
    pub uuid: String,
}

/// Devices and limits. Shared by everything made from it.
pub struct Context {
    cpu: Arc<Cpu>,
    limits: FileLimits,
    choice: BackendChoice,
    #[cfg(feature = "cuda")]
    gpus: gpu::Gpus,
}

impl Context {
    /// Starts the CPU backend's pool.
    pub fn new(options: &ContextOptions) -> Result<Context> {
        if options.backend == BackendChoice::Cuda {
            gpu::count()?;
        }
        Ok(Context {
            cpu: Arc::new(Cpu::with_isa(options.isa.unwrap_or_else(Isa::best), options.threads as usize)?),
            limits: options.limits.clone(),
            choice: options.backend,
            #[cfg(feature = "cuda")]
            gpus: gpu::Gpus::new(options.untimed_products),
        })
    }

    /// What models can be loaded on, and what cannot be used and why.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>> {
        let mut devices = Vec::new();
        if self.choice != BackendChoice::Cuda {
            devices.push(DeviceInfo {
                backend: BackendChoice::Cpu,
                ordinal: 0,
                compute_capability: 0,
                memory_total: crate::sys::alloc::total().unwrap_or(0),
                memory_free: self.cpu.free_memory()?,
                usable: true,
                name: self.cpu.caps().name,
                uuid: String::new(),
            });
        }
        if self.choice != BackendChoice::Cpu {
            devices.extend(gpu::devices());
        }
        Ok(devices)
    }

    /// The device of that index, if a model can be loaded there.
    fn device(&self, index: u32) -> Result<DeviceInfo> {
        let mut devices = self.devices()?;
        let n = devices.len();
        if index as usize >= n {
            return Err(Error::invalid(format!("device is {index}, the context has {n}")));
        }
        let device = devices.swap_remove(index as usize);
        if device.usable { Ok(device) } else { Err(Error::unsupported(device.name)) }
    }

    /// What files may ask for.
    pub fn limits(&self) -> &FileLimits {
        &self.limits
    }
}

/// Options of loading a model or routers.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Index into [`Context::devices`].
    pub device: u32,
    /// `None` = as stored; `Some(DType::I8)` = int8 with a scale per row.
    pub weight_dtype: Option<DType>,
    /// Refuse weights that hold NaN or infinity.
    pub check_finite: bool,
    /// Accept routers whose weight hashes differ from the model's (shapes still must fit).
    pub ignore_fingerprint: bool,
}

/// One line per backend; the rest of the file does not know which.
macro_rules! on_each {
    ($kind:ident, $value:expr, $inner:ident => $body:expr) => {
        match $value {
            $kind::Cpu($inner) => $body,
            #[cfg(feature = "cuda")]
            $kind::Cuda($inner) => $body,
        }
    };
}

enum AnyModel {
    Cpu(ModelOn<Cpu>),
    #[cfg(feature = "cuda")]
    Cuda(ModelOn<gpu::Gpu>),
}

enum AnyRouters {
    Cpu(RoutersOn<Cpu>),
    #[cfg(feature = "cuda")]
    Cuda(RoutersOn<gpu::Gpu>),
}

enum AnyEngine {
    Cpu(EngineOn<Cpu>),
    #[cfg(feature = "cuda")]
    Cuda(EngineOn<gpu::Gpu>),
}

/// An immutable model on a device.
pub struct Model {
    on: AnyModel,
    fingerprint: Fingerprint,
    limits: FileLimits,
    device_name: String,
}

impl Model {
    /// Loads a Hugging Face folder. `progress` gets bytes done and in all; non-zero cancels.
    pub fn load(
        ctx: &Context,
        path: &Path,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64) -> i32,
    ) -> Result<Model> {
        let device = ctx.device(options.device)?;
        let how = model::LoadOptions { check_finite: options.check_finite };
        let checkpoint = model::load_with(path, &ctx.limits, how)?;
        let weights = WeightOptions { dtype: options.weight_dtype };
        let on = match device.backend {
            #[cfg(feature = "cuda")]
            BackendChoice::Cuda => {
                let backend = ctx.gpus.open(device.ordinal)?;
                let weights = backend.upload(&checkpoint, weights, progress)?;
                AnyModel::Cuda(ModelOn::new(backend, weights))
            }
            _ => {
                let weights = ctx.cpu.upload(&checkpoint, weights, progress)?;
                AnyModel::Cpu(ModelOn::new(Arc::clone(&ctx.cpu), weights))
            }
        };
        Ok(Model {
            on,
            fingerprint: checkpoint.fingerprint().clone(),
            limits: ctx.limits.clone(),
            device_name: device.name.clone(),
        })
    }

    /// What a model, its routers and an engine would take; opens the files, loads nothing.
    pub fn estimate(
        ctx: &Context,
        path: &Path,
        routers: Option<&Path>,
        options: &LoadOptions,
        engine: &EngineOptions,
    ) -> Result<Estimate> {
        let device = ctx.device(options.device)?;
        let checkpoint = model::load_with(path, &ctx.limits, model::LoadOptions::default())?;
        let (spec, ignore) = (checkpoint.spec(), options.ignore_fingerprint);
        let open = |p| RouterFile::open(p, &ctx.limits, spec, checkpoint.fingerprint(), ignore);
        let routers = routers.map(open).transpose()?;
        let weights = WeightOptions { dtype: options.weight_dtype };
        match device.backend {
            #[cfg(feature = "cuda")]
            BackendChoice::Cuda => {
                Estimate::new(&*ctx.gpus.open(device.ordinal)?, spec, weights, routers.as_ref(), engine)
            }
            _ => Estimate::new(&*ctx.cpu, spec, weights, routers.as_ref(), engine),
        }
    }

    /// Its plain numbers.
    pub fn spec(&self) -> &ModelSpec {
        on_each!(AnyModel, &self.on, m => m.spec())
    }

    /// Bytes of its weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        on_each!(AnyModel, &self.on, m => m.weight_bytes())
    }

    /// The device's name.
    pub fn device_name(&self) -> &str {
        &self.device_name
    }
}

/// Immutable routers of one model.
pub struct Routers {
    on: AnyRouters,
}

impl Routers {
    /// Loads a router file and checks that it was made for `model`.
    pub fn load(model: &Model, path: &Path, options: &LoadOptions) -> Result<Routers> {
        let spec = model.spec();
        let file =
            RouterFile::open(path, &model.limits, spec, &model.fingerprint, options.ignore_fingerprint)?;
        let info = file.info().clone();
        let on = match &model.on {
            AnyModel::Cpu(m) => {
                AnyRouters::Cpu(RoutersOn::new(m, m.backend().upload_routers(spec, &file)?, info))
            }
            #[cfg(feature = "cuda")]
            AnyModel::Cuda(m) => {
                AnyRouters::Cuda(RoutersOn::new(m, m.backend().upload_routers(spec, &file)?, info))
            }
        };
        Ok(Routers { on })
    }

    /// What the file says.
    pub fn info(&self) -> &RouterInfo {
        on_each!(AnyRouters, &self.on, r => r.info())
    }
}

/// Scheduler, KV cache and one model.
pub struct Engine(AnyEngine);

impl Engine {
    /// Takes all the memory the engine will use.
    pub fn new(model: &Model, routers: Option<&Routers>, options: &EngineOptions) -> Result<Engine> {
        #[cfg(feature = "cuda")]
        let other_device = || Error::invalid("the routers were loaded for a model on another device");
        let engine = match (&model.on, routers.map(|r| &r.on)) {
            (AnyModel::Cpu(m), None) => AnyEngine::Cpu(EngineOn::new(m, None, options)?),
            (AnyModel::Cpu(m), Some(AnyRouters::Cpu(r))) => {
                AnyEngine::Cpu(EngineOn::new(m, Some(r), options)?)
            }
            #[cfg(feature = "cuda")]
            (AnyModel::Cuda(m), None) => AnyEngine::Cuda(EngineOn::new(m, None, options)?),
            #[cfg(feature = "cuda")]
            (AnyModel::Cuda(m), Some(AnyRouters::Cuda(r))) => {
                AnyEngine::Cuda(EngineOn::new(m, Some(r), options)?)
            }
            #[cfg(feature = "cuda")]
            _ => return Err(other_device()),
        };
        Ok(Engine(engine))
    }

    /// See [`EngineOn::submit`].
    pub fn submit(&self, requests: &[Request], tokens: &[i32], out: &mut [SeqId]) -> Result<()> {
        on_each!(AnyEngine, &self.0, e => e.submit(requests, tokens, out))
    }

    /// See [`EngineOn::cancel`].
    pub fn cancel(&self, ids: &[SeqId]) -> Result<()> {
        on_each!(AnyEngine, &self.0, e => e.cancel(ids))
    }

    /// See [`EngineOn::push_token`].
    pub fn push_token(&self, id: SeqId, token: i32) -> Result<()> {
        on_each!(AnyEngine, &self.0, e => e.push_token(id, token))
    }

    /// See [`EngineOn::stats`].
    pub fn stats(&self) -> Stats {
        on_each!(AnyEngine, &self.0, e => e.stats())
    }

    /// See [`EngineOn::begin`].
    pub fn begin(&self) -> Result<()> {
        on_each!(AnyEngine, &self.0, e => e.begin())
    }

    /// See [`EngineOn::finish`].
    pub fn finish(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        on_each!(AnyEngine, &self.0, e => e.finish(timeout_ns, sink))
    }

    /// See [`EngineOn::step`].
    pub fn step(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        on_each!(AnyEngine, &self.0, e => e.step(timeout_ns, sink))
    }

    /// See [`EngineOn::logits`].
    pub fn logits(&self, id: SeqId, out: &mut [f32]) -> Result<usize> {
        on_each!(AnyEngine, &self.0, e => e.logits(id, out))
    }

    /// See [`EngineOn::kill`].
    pub fn kill(&self) {
        on_each!(AnyEngine, &self.0, e => e.kill());
    }
}
