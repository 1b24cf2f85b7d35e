//! Times of device work by the device's own clock.

use super::driver::Driver;
use super::library::Work;
use super::probe::check;
use crate::error::Result;
use cudarc::driver::sys;
use std::ptr::null_mut;

/// Memory larger than the caches, written to empty them; none where there is not that much.
pub(super) struct Flush(u64);

const FLUSH_BYTES: usize = 128 << 20;

impl Flush {
    /// The current context's.
    pub(super) fn new() -> Flush {
        let mut at = 0;
        // SAFETY: out-parameter is local; on an error it stays 0.
        let _ = unsafe { sys::cuMemAlloc_v2(&mut at, FLUSH_BYTES) };
        Flush(at)
    }

    fn run(&self, stream: sys::CUstream) -> Result<()> {
        if self.0 == 0 {
            return Ok(());
        }
        // SAFETY: the range was allocated above.
        check("flush", unsafe { sys::cuMemsetD8Async(self.0, 0, FLUSH_BYTES, stream) })
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        if self.0 != 0 {
            // SAFETY: allocated above, in the context that is still current.
            let _ = unsafe { sys::cuMemFree_v2(self.0) };
        }
    }
}

impl Driver {
    /// Microseconds of work on the stream, the caches cold: the median of a few runs.
    pub(super) fn time_cold(&self, flush: &Flush, work: &Work<'_>) -> Result<f32> {
        let mut runs = [0.0; 5];
        work()?;
        for us in &mut runs {
            flush.run(self.stream)?;
            *us = 1e3 * self.time(work)?;
        }
        runs.sort_by(f32::total_cmp);
        Ok(runs[runs.len() / 2])
    }

    /// Milliseconds that `work` takes on the device, by its own clock.
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f32> {
        let _entered = self.enter()?;
        let mut events = [null_mut(); 2];
        let mut ms = 0.0;
        // SAFETY: events are made and destroyed here, in this context; `cuEventElapsedTime_v2` exists
        // in every driver that `count` lets through.
        unsafe {
            for e in &mut events {
                check("CUDA event", sys::cuEventCreate(e, 0))?;
            }
            let run = || {
                check("CUDA event", sys::cuEventRecord(events[0], self.stream))?;
                work()?;
                check("CUDA event", sys::cuEventRecord(events[1], self.stream))?;
                check("CUDA event", sys::cuEventSynchronize(events[1]))?;
                check("CUDA event", sys::cuEventElapsedTime_v2(&mut ms, events[0], events[1]))
            };
            let done = run();
            for e in events {
                let _ = sys::cuEventDestroy_v2(e);
            }
            done?;
        }
        Ok(ms)
    }
}
