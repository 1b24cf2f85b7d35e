//! The operating system: files, memory, threads, clock, fork. The only module that talks to libc.

pub mod alloc;
pub mod file;
pub mod pool;
pub mod split;
