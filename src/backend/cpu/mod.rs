//! The CPU backend.
mod matrix;
mod load;
pub(crate) mod simd;
