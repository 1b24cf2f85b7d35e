//! The operating system: files, memory, threads, clock, fork. The only module that talks to libc.

pub mod ahead;
pub mod alloc;
pub mod clock;
pub mod file;
pub mod fork;
pub mod pool;
pub mod split;
