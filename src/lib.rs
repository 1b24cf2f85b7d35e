//! Batched LLM decoding with Polar Sparsity, behind a stable C ABI.
//!
//! The path of a user: a context, a model (a Hugging Face folder), its routers, an engine; then
//! submit requests, step, and read events until done. The C functions are in [`ffi`]; the same
//! path in Rust starts at [`engine::Engine`].
//!
//! Modules import one way: `ffi → engine → {sched, kv, sample, sparsity, model, backend}`, and
//! `tests/layers.rs` holds them to it.

pub mod backend;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod ffi;
pub mod format;
pub mod kv;
pub mod log;
pub mod model;
pub mod sample;
pub mod sched;
pub mod sparsity;
pub mod sys;
pub mod tensor;
#[cfg(feature = "text")]
pub mod text;

pub use error::{Error, Result, Status};

// Test helpers shared with `tests/` name the crate as its users do.
#[cfg(test)]
extern crate self as polar_sparsity;
