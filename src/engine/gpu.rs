//! The GPUs of a context: what can be used and why not, and each opened once.

use super::open::{BackendChoice, DeviceInfo};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, driver};
#[cfg(not(feature = "cuda"))]
use crate::error::Error;
use crate::error::Result;
#[cfg(feature = "cuda")]
use std::sync::{Arc, Mutex};

/// The backend of a GPU.
#[cfg(feature = "cuda")]
pub(super) type Gpu = Cuda<driver::Driver>;

/// Devices opened so far, by ordinal.
#[cfg(feature = "cuda")]
pub(super) struct Gpus {
    untimed_products: bool,
    opened: Mutex<Vec<(u32, Arc<Gpu>)>>,
}

#[cfg(feature = "cuda")]
impl Gpus {
    /// None opened.
    pub(super) fn new(untimed_products: bool) -> Gpus {
        Gpus { untimed_products, opened: Mutex::default() }
    }

    /// Device `ordinal`, shared by all models of the context.
    pub(super) fn open(&self, ordinal: u32) -> Result<Arc<Gpu>> {
        let mut opened = self.opened.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, gpu)) = opened.iter().find(|o| o.0 == ordinal) {
            return Ok(Arc::clone(gpu));
        }
        let mut driver = driver::Driver::open(ordinal)?;
        driver.time_products(!self.untimed_products);
        let gpu = Arc::new(Cuda::new(Arc::new(driver), true));
        opened.push((ordinal, Arc::clone(&gpu)));
        Ok(gpu)
    }
}

/// How many GPUs the driver lists, or why none can be used.
#[cfg(feature = "cuda")]
pub(super) fn count() -> Result<u32> {
    driver::count()
}

/// How many GPUs the driver lists, or why none can be used.
#[cfg(not(feature = "cuda"))]
pub(super) fn count() -> Result<u32> {
    Err(Error::unsupported("this build has no CUDA backend"))
}

/// Every GPU, or one entry that says why there is none.
pub(super) fn devices() -> Vec<DeviceInfo> {
    match count() {
        Ok(n) if n > 0 => (0..n).map(device).collect(),
        Ok(_) => vec![unusable(0, "CUDA: the driver finds no GPU".into())],
        Err(error) => vec![unusable(0, error.message.into_owned())],
    }
}

/// One GPU. Free memory is not known before it is opened: the total stands for it.
#[cfg(feature = "cuda")]
fn device(ordinal: u32) -> DeviceInfo {
    match driver::describe(ordinal) {
        Ok(found) => DeviceInfo {
            backend: BackendChoice::Cuda,
            ordinal,
            compute_capability: found.compute_capability,
            memory_total: found.memory_total,
            memory_free: found.memory_total,
            usable: found.unusable.is_none(),
            name: match found.unusable {
                Some(why) => format!("{}: {why}", found.name),
                None => found.name,
            },
            uuid: found.uuid,
        },
        Err(error) => unusable(ordinal, error.message.into_owned()),
    }
}

#[cfg(not(feature = "cuda"))]
fn device(ordinal: u32) -> DeviceInfo {
    unusable(ordinal, "this build has no CUDA backend".into())
}

fn unusable(ordinal: u32, why: String) -> DeviceInfo {
    DeviceInfo {
        backend: BackendChoice::Cuda,
        ordinal,
        compute_capability: 0,
        memory_total: 0,
        memory_free: 0,
        usable: false,
        name: why,
        uuid: String::new(),
    }
}
