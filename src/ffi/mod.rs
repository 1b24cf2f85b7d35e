//! The C ABI. Thin: each function guards, converts in, makes one call, converts out.
//!
//! The doc comments of everything `pub` in here are the text of `include/polar_sparsity.h`, which
//! cbindgen generates; they are written for readers of C. `tests/header.rs` compares the two.

#![allow(non_camel_case_types, reason = "the names are C's")]
#![allow(clippy::missing_safety_doc, reason = "the header's general rules are the contract of each function")]

// In the order of the header; the blank lines keep rustfmt from sorting them.
mod constants;

mod types;

mod version;

mod context;

mod log;

mod model;

mod tokenizer;

mod engine;

mod op_types;

mod op;

mod convert;
mod copy;
mod events;
mod guard;
mod handle;
mod op_convert;

#[cfg(any(test, feature = "fault"))]
pub mod fault;
#[cfg(test)]
mod tests;

pub use constants::*;
pub use context::*;
pub use engine::*;
pub use log::*;
pub use model::*;
pub use op::*;
pub use op_types::*;
pub use tokenizer::*;
pub use types::*;
pub use version::*;
