//! The CUDA backend: what a step's stages launch, on a [`device::Device`].
//!
//! The stages know kernels by name ([`launch`]) and their parameters ([`params`]); the device is a
//! trait, so the same stages run on a GPU through the driver and, in tests, on the host executor of
//! `cuda/host`, which runs the same kernel sources on the CPU.

pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
pub mod launch;
mod memory;
pub mod params;
mod shape;
mod weights;
