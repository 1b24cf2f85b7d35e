//! From paths to engines, whatever the backend: the only place that knows there is more than one.

use super::events::EventSink;
use super::on::{EngineOn, ModelOn, RoutersOn};
use super::types::{Delivered, EngineOptions, Request, SeqId, Stats};
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, WeightOptions};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::limits::Limits as FileLimits;
use crate::model::{self, Fingerprint, ModelSpec};
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
}

impl Context {
    /// Starts the CPU backend's pool.
    pub fn new(options: &ContextOptions) -> Result<Context> {
        if options.backend == BackendChoice::Cuda {
            return Err(no_cuda());
        }
        Ok(Context {
            cpu: Arc::new(Cpu::new(options.threads as usize)?),
            limits: options.limits.clone(),
            choice: options.backend,
        })
    }

    /// What models can be loaded on, and what cannot be used and why.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>> {
        let mut devices = vec![DeviceInfo {
            backend: BackendChoice::Cpu,
            ordinal: 0,
            compute_capability: 0,
            memory_total: crate::sys::alloc::total().unwrap_or(0),
            memory_free: self.cpu.free_memory()?,
            usable: true,
            name: self.cpu.caps().name,
            uuid: String::new(),
        }];
        if self.choice == BackendChoice::Auto {
            devices.push(DeviceInfo {
                backend: BackendChoice::Cuda,
                ordinal: 0,
                compute_capability: 0,
                memory_total: 0,
                memory_free: 0,
                usable: false,
                name: no_cuda().message.into_owned(),
                uuid: String::new(),
            });
        }
        Ok(devices)
    }

    /// What files may ask for.
    pub fn limits(&self) -> &FileLimits {
        &self.limits
    }
}

fn no_cuda() -> Error {
    Error::unsupported("this build has no CUDA kernels")
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

/// An immutable model on a device.
pub struct Model {
    on: ModelOn<Cpu>,
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
        let devices = ctx.devices()?;
        let Some(device) = devices.get(options.device as usize) else {
            return Err(Error::invalid(format!(
                "device is {}, the context has {}",
                options.device,
                devices.len()
            )));
        };
        if device.backend != BackendChoice::Cpu {
            return Err(Error::unsupported(device.name.clone()));
        }
        let how = model::LoadOptions { check_finite: options.check_finite };
        let checkpoint = model::load_with(path, &ctx.limits, how)?;
        let weights = ctx.cpu.upload(&checkpoint, WeightOptions { dtype: options.weight_dtype }, progress)?;
        Ok(Model {
            on: ModelOn::new(Arc::clone(&ctx.cpu), weights),
            fingerprint: checkpoint.fingerprint().clone(),
            limits: ctx.limits.clone(),
            device_name: device.name.clone(),
        })
    }

    /// Its plain numbers.
    pub fn spec(&self) -> &ModelSpec {
        self.on.spec()
    }

    /// Bytes of its weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.on.weight_bytes()
    }

    /// The device's name.
    pub fn device_name(&self) -> &str {
        &self.device_name
    }
}

/// Immutable routers of one model.
pub struct Routers {
    on: RoutersOn<Cpu>,
}

impl Routers {
    /// Loads a router file and checks that it was made for `model`.
    pub fn load(model: &Model, path: &Path, options: &LoadOptions) -> Result<Routers> {
        let spec = model.spec();
        let file =
            RouterFile::open(path, &model.limits, spec, &model.fingerprint, options.ignore_fingerprint)?;
        let info = file.info().clone();
        let routers = model.on.backend().upload_routers(spec, &file)?;
        Ok(Routers { on: RoutersOn::new(&model.on, routers, info) })
    }

    /// What the file says.
    pub fn info(&self) -> &RouterInfo {
        self.on.info()
    }
}

/// Scheduler, KV cache and one model.
pub struct Engine(EngineOn<Cpu>);

impl Engine {
    /// Takes all the memory the engine will use.
    pub fn new(model: &Model, routers: Option<&Routers>, options: &EngineOptions) -> Result<Engine> {
        EngineOn::new(&model.on, routers.map(|r| &r.on), options).map(Engine)
    }

    /// See [`EngineOn::submit`].
    pub fn submit(&self, requests: &[Request], tokens: &[i32], out: &mut [SeqId]) -> Result<()> {
        self.0.submit(requests, tokens, out)
    }

    /// See [`EngineOn::cancel`].
    pub fn cancel(&self, ids: &[SeqId]) -> Result<()> {
        self.0.cancel(ids)
    }

    /// See [`EngineOn::push_token`].
    pub fn push_token(&self, id: SeqId, token: i32) -> Result<()> {
        self.0.push_token(id, token)
    }

    /// See [`EngineOn::stats`].
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// See [`EngineOn::begin`].
    pub fn begin(&self) -> Result<()> {
        self.0.begin()
    }

    /// See [`EngineOn::finish`].
    pub fn finish(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        self.0.finish(timeout_ns, sink)
    }

    /// See [`EngineOn::step`].
    pub fn step(&self, timeout_ns: u64, sink: &mut dyn EventSink) -> Result<Delivered> {
        self.0.step(timeout_ns, sink)
    }

    /// See [`EngineOn::logits`].
    pub fn logits(&self, id: SeqId, out: &mut [f32]) -> Result<usize> {
        self.0.logits(id, out)
    }

    /// See [`EngineOn::kill`].
    pub fn kill(&self) {
        self.0.kill();
    }
}
