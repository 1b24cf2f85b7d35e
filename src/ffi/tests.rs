//! What follows a panic: through the C functions, on a real engine.

use super::fault::polar_test_panic_at;
use super::*;
use crate::error::Status;
use std::ptr::{null, null_mut};

/// Objects of one test, freed at its end.
struct World {
    ctx: *mut polar_context,
    model: *mut polar_model,
}

impl World {
    fn new() -> World {
        let mut options = copy::zeroed::<polar_context_options>();
        let (mut ctx, mut model) = (null_mut(), null_mut());
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden/opt_f32");
        // SAFETY: every pointer is to a live local, or NULL where that is allowed.
        unsafe {
            polar_context_options_init(&mut options, size_of::<polar_context_options>());
            options.threads = 2;
            assert_eq!(polar_context_create(&options, &mut ctx, null_mut()), 0);
            let load = polar_model_load(
                ctx,
                path.as_ptr().cast(),
                path.len(),
                null(),
                None,
                null_mut(),
                &mut model,
                null_mut(),
            );
            assert_eq!(load, 0);
        }
        World { ctx, model }
    }

    fn engine(&self) -> *mut polar_engine {
        let mut engine = null_mut();
        // SAFETY: as above.
        let status = unsafe { polar_engine_create(self.model, null(), null(), &mut engine, null_mut()) };
        assert_eq!(status, 0);
        engine
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once.
        unsafe {
            polar_model_free(self.model);
            polar_context_free(self.ctx);
        }
    }
}

fn submit(engine: *mut polar_engine) -> polar_status {
    // SAFETY: all zero is a valid request.
    let zero: polar_request = unsafe { std::mem::zeroed() };
    let request = polar_request { n_tokens: 2, max_new_tokens: 2, ..zero };
    let mut id = 0;
    // SAFETY: the arrays have the lengths given.
    unsafe { polar_engine_submit(engine, &request, 1, [5, 6].as_ptr(), 2, &mut id, null_mut()) }
}

fn step(engine: *mut polar_engine) -> polar_status {
    let mut n = 0;
    // SAFETY: no room for events, which is allowed.
    unsafe {
        polar_engine_step(engine, u64::MAX, null_mut(), 0, &mut n, null_mut(), 0, null_mut(), null_mut())
    }
}

fn health(engine: *mut polar_engine) -> polar_health {
    let mut stats =
        polar_stats { struct_size: size_of::<polar_stats>() as u32, ..copy::zeroed::<polar_stats>() };
    // SAFETY: live handle, live local.
    assert_eq!(unsafe { polar_engine_stats(engine, &mut stats, null_mut()) }, 0);
    stats.health
}

#[test]
fn a_panic_kills_its_engine_and_nothing_else() {
    let world = World::new();
    let (sick, well) = (world.engine(), world.engine());
    assert_eq!(submit(sick), 0);
    polar_test_panic_at(1);
    assert_eq!(step(sick), Status::E_PANIC.0);
    // Every later call says so, except stats and free.
    assert_eq!(step(sick), Status::E_PANIC.0);
    assert_eq!(submit(sick), Status::E_PANIC.0);
    assert_eq!(health(sick), POLAR_HEALTH_DEAD);
    assert_eq!(health(well), POLAR_HEALTH_OK);
    assert_eq!(submit(well), 0);
    assert_eq!(step(well), Status::TRUNCATED.0);
    // SAFETY: live handles, freed once.
    unsafe {
        polar_engine_free(sick);
        polar_engine_free(well);
    }
}

#[test]
fn a_panic_while_loading_leaves_the_context_usable() {
    let world = World::new();
    let mut info = polar_device_info {
        struct_size: size_of::<polar_device_info>() as u32,
        ..copy::zeroed::<polar_device_info>()
    };
    for n in 1..=2 {
        polar_test_panic_at(n);
        let mut failed = 0;
        for _ in 0..3 {
            // SAFETY: live handle, live local.
            let status = unsafe { polar_device_get(world.ctx, 0, &mut info, null_mut()) };
            failed += i32::from(status == Status::E_PANIC.0);
        }
        assert_eq!(failed, 1);
    }
}

#[test]
fn the_panic_is_in_the_log_with_its_place() {
    let world = World::new();
    let engine = world.engine();
    polar_test_panic_at(1);
    assert_eq!(step(engine), Status::E_PANIC.0);
    let (mut text, mut len) = ([0u8; 8192], 0);
    // SAFETY: live handles, arrays of the lengths given; the engine is freed once.
    unsafe {
        let (buf, cap) = (text.as_mut_ptr().cast(), text.len());
        assert_eq!(polar_log_drain(world.ctx, buf, cap, &mut len, null_mut(), null_mut()), 0);
        polar_engine_free(engine);
    }
    let text = String::from_utf8_lossy(&text[..len]);
    assert!(text.contains("error: ") && text.contains("fault.rs:"), "{text}");
}
