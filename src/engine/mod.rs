//! Requests in, events out: the scheduler, the KV pages and one model on one backend.

mod types;

pub use types::{Delivered, EngineOptions, Event, FinishReason, Health, Request, SeqId, Stats, TopLogprob};
