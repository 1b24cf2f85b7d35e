//! A steady step allocates nothing.

mod rig;

use polar_sparsity::dtype::DType;
use polar_sparsity::sparsity::{MlpMode, SeqSetting};
use rig::specs::opt;
use rig::synthetic::{Synthetic, routers};
use rig::{Rig, Setup};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_steady_step_allocates_nothing() {
    let spec = opt(DType::BF16, 3, 6, 20, 107);
    let file = routers(&spec, false, Some(9), &[(1, 31), (64, 60)]);
    let src = Synthetic::new(spec);
    for mlp in [MlpMode::Dense, MlpMode::Reference, MlpMode::Invariant] {
        let mut rig = Rig::new(&src, &Setup { threads: 3, routers: Some(&file), ..Setup::default() });
        let setting = SeqSetting { attn_density: Some(0.5), mlp };
        let work: Vec<_> = (0..5).map(|_| (rig.add(&[7; 60], setting), 1, true)).collect();
        for &(id, ..) in &work {
            rig.run(&[(id, 33, false)]);
        }
        for round in 0..4 {
            rig.fill(&work);
            let before = COUNT.load(Ordering::SeqCst);
            rig.go();
            let after = COUNT.load(Ordering::SeqCst);
            // Threads allocate their own start-up, which may fall into the first step.
            assert!(round == 0 || before == after, "{mlp:?} round {round}: {} allocations", after - before);
        }
    }
}
