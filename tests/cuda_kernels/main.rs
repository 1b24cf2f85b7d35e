//! The CUDA kernels' logic on the CPU, against f64 references: every kernel on small shapes, with NaN
//! in every byte that must not be read, in several orders of threads and blocks. With the feature `cuda`
//! and POLAR_TEST_GPU=1 the same cases run on the first GPU.
#![allow(unreachable_pub, dead_code, clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

mod activated;
mod attention;
mod bench;
#[cfg(feature = "cuda")]
mod gpu;
mod heads;
#[path = "../support/host_device.rs"]
mod host_device;
mod linear;
mod linear_bytes;
mod ops;
mod ops_mlp;
mod prefill;
mod races;
mod router;
mod rows;
mod sampling;
mod selection;

use bench::Bench;

#[test]
fn parameter_structs_have_the_same_size_in_rust_and_cpp() {
    assert_eq!(host_device::sizes(), polar_sparsity::backend::cuda::params::sizes());
}

/// Runs a case in program order and in two shuffled orders; results must be the same bits.
fn orders(mut case: impl FnMut(&Bench) -> Vec<u8>) {
    let first = case(&Bench::new(0));
    for seed in [1, 77] {
        assert!(case(&Bench::new(seed)) == first, "the result depends on the order of threads");
    }
}
