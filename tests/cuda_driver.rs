//! What a machine without a usable GPU is told, in a sentence and without a panic.
#![cfg(feature = "cuda")]

use polar_sparsity::Status;
use polar_sparsity::backend::cuda::driver;
use polar_sparsity::engine::{BackendChoice, Context, ContextOptions};

#[test]
fn no_gpu_is_an_error_with_a_reason() {
    if driver::count().is_ok_and(|n| n > 0) {
        return; // there is one
    }
    if let Err(error) = driver::count() {
        let known = [Status::E_NO_DRIVER, Status::E_UNSUPPORTED, Status::E_DEVICE];
        assert!(known.contains(&error.status), "{error}");
        assert!(error.message.contains("CUDA"), "{error}");
    }
    let refused = driver::Driver::open(0).err();
    assert!(refused.is_some_and(|e| e.status.is_error() && !e.message.is_empty()));
}

#[test]
fn the_context_lists_the_processor_and_says_why_there_is_no_gpu() {
    let context = Context::new(&ContextOptions::default()).expect("a context");
    let devices = context.devices().expect("devices");
    assert!(devices[0].usable && devices[0].backend == BackendChoice::Cpu);
    for device in &devices[1..] {
        assert_eq!(device.backend, BackendChoice::Cuda);
        assert!(!device.name.is_empty());
    }
    let only = Context::new(&ContextOptions { backend: BackendChoice::Cuda, ..ContextOptions::default() });
    assert_eq!(only.is_ok(), driver::count().is_ok());
}
