//! Who runs: sequence ids and the policy. Pure: no clock, no lock, no backend, so that a trace can
//! be replayed.

pub mod policy;
mod slots;

pub use slots::Slots;
