//! Requests in, events out: the scheduler, the KV pages and one model on one backend.
//!
//! [`open`] goes from paths to engines; `inbox` is where other threads meet an engine, `driver`
//! who steps it, `core` what a step is.

mod core;
mod driver;
mod events;
mod gpu;
mod inbox;
mod on;
mod open;
pub mod ops;
mod seq;
mod types;

pub use driver::FOREVER;
pub use events::EventSink;
pub use on::{EngineOn, Estimate, ModelOn, RoutersOn};
pub use open::{BackendChoice, Context, ContextOptions, DeviceInfo, Engine, LoadOptions, Model, Routers};
pub use types::{Delivered, EngineOptions, Event, FinishReason, Health, Request, SeqId, Stats, TopLogprob};
