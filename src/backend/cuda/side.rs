//! The side stream of a GPU: work that runs beside the main stream between a fork and a join.
//!
//! One thread at a time has it. Work of others goes to the main stream in line, so engines on several
//! threads share a device without waiting for each other. A thread that records has it until the recording has
//! ended: from its first fork on the stream belongs to that recording, between forks too, and what another thread
//! does with it then can crash the driver.

use super::driver::this_thread;
use super::probe::check;
use crate::error::Result;
use cudarc::driver::sys::{self, CUstream};
use std::cell::Cell;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Which of a thread's two streams a launch goes to.
#[derive(Clone, Copy)]
pub(super) enum Lane {
    Main,
    Side,
}

thread_local! {
    /// This thread's next launch on the lane comes right after a wait for the other one.
    static IN_ORDER: [Cell<bool>; 2] = const { [Cell::new(false), Cell::new(false)] };
    /// This thread's side work went to the main stream since the last join.
    static IN_LINE: Cell<bool> = const { Cell::new(false) };
}

impl Lane {
    /// Whether the launch that comes now must be in order; asks once.
    pub(super) fn takes_order(self) -> bool {
        IN_ORDER.with(|next| next[self as usize].replace(false))
    }

    fn order_next(self) {
        IN_ORDER.with(|next| next[self as usize].set(true));
    }
}

/// See the module. Every call with the device's context current.
pub(super) struct Side {
    stream: CUstream,
    /// Of the fork and of the join.
    events: [sys::CUevent; 2],
    /// The thread that has it, 0: none.
    owner: AtomicUsize,
    /// That thread has forked and not joined since; it has the side for a recording. Both its own to change.
    forked: AtomicBool,
    kept: AtomicBool,
}

impl Side {
    /// Before there is a context.
    pub(super) fn none() -> Side {
        Side {
            stream: null_mut(),
            events: [null_mut(); 2],
            owner: AtomicUsize::new(0),
            forked: AtomicBool::new(false),
            kept: AtomicBool::new(false),
        }
    }

    /// Makes stream and events in the current context.
    pub(super) fn create(&mut self) -> Result<()> {
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: out-parameters are local or this object's own; `destroy` gives back what was made.
        unsafe {
            // The side's few blocks go first where both streams have some waiting: it is the longer chain.
            check("CUDA stream priorities", sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
            check("CUDA stream", sys::cuStreamCreateWithPriority(&mut self.stream, non_blocking, greatest))?;
            for event in &mut self.events {
                check("CUDA event", sys::cuEventCreate(event, untimed))?;
            }
        }
        Ok(())
    }

    /// Lets side work start after what is on `main` so far, if no other thread has any.
    pub(super) fn fork(&self, main: CUstream) -> Result<()> {
        let kept = self.is_mine() && self.kept.load(Ordering::Relaxed);
        if !kept && !self.take() {
            return Ok(());
        }
        Lane::Side.order_next();
        self.forked.store(true, Ordering::Relaxed);
        meet(main, self.events[0], self.stream).inspect_err(|_| self.leave())
    }

    /// Takes the side for a recording, from before it begins until [`Side::let_go`]; false: another thread has it.
    pub(super) fn keep(&self) -> bool {
        let taken = self.take();
        if taken {
            self.kept.store(true, Ordering::Relaxed);
        }
        taken
    }

    /// Once the recording has ended.
    pub(super) fn let_go(&self) {
        if self.is_mine() {
            self.kept.store(false, Ordering::Relaxed);
            self.leave();
        }
    }

    fn take(&self) -> bool {
        self.owner.compare_exchange(0, this_thread(), Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// After a join.
    fn leave(&self) {
        self.forked.store(false, Ordering::Relaxed);
        if !self.kept.load(Ordering::Relaxed) {
            self.owner.store(0, Ordering::Release);
        }
    }

    /// Where this thread's side work goes.
    pub(super) fn lane(&self, main: CUstream) -> (CUstream, Lane) {
        if self.has_forked() {
            return (self.stream, Lane::Side);
        }
        IN_LINE.set(true);
        (main, Lane::Main)
    }

    /// What comes next on `main` waits for the side work, and its first launch is in order; `early`: in a recording that
    /// launch, of a kernel that waits by itself, may come before the side's last kernel ends.
    pub(super) fn join(&self, main: CUstream, early: bool) -> Result<()> {
        let (mine, in_line) = (self.has_forked(), IN_LINE.replace(false));
        let met_early = if mine && early && !in_line { meet_early(self.stream, main) } else { Ok(false) };
        if (mine || in_line) && !matches!(met_early, Ok(true)) {
            Lane::Main.order_next();
        }
        if !mine {
            return Ok(());
        }
        let met =
            met_early.and_then(|met| if met { Ok(()) } else { meet(self.stream, self.events[1], main) });
        self.leave();
        met
    }

    /// Whether this thread's side work goes to the side.
    fn has_forked(&self) -> bool {
        self.is_mine() && self.forked.load(Ordering::Relaxed)
    }

    fn is_mine(&self) -> bool {
        self.owner.load(Ordering::Relaxed) == this_thread()
    }

    /// # Safety
    /// Nothing uses stream or events any more; called once, in their context.
    pub(super) unsafe fn destroy(&self) {
        // SAFETY: made by `create`, or null; see above.
        unsafe {
            if !self.stream.is_null() {
                let _ = sys::cuStreamSynchronize(self.stream);
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
            for event in self.events.into_iter().filter(|e| !e.is_null()) {
                let _ = sys::cuEventDestroy_v2(event);
            }
        }
    }
}

/// What comes next on `second` waits for what is on `first` so far.
fn meet(first: CUstream, event: sys::CUevent, second: CUstream) -> Result<()> {
    // SAFETY: streams and event are of the current context; in a capture both become edges of the graph.
    unsafe {
        check("CUDA event", sys::cuEventRecord(event, first))?;
        check("CUDA event", sys::cuStreamWaitEvent(second, event, 0))
    }
}

/// The same in a recording, as an edge that lets what comes next start as soon as the last kernel on `first` lets it.
/// False: there is no recording, or no such edge.
fn meet_early(first: CUstream, second: CUstream) -> Result<bool> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut id, mut graph, mut nodes, mut edges, mut count) = (0, null_mut(), null(), null(), 0);
    // SAFETY: out-parameters are local; the nodes are the capture's, and only copied.
    unsafe {
        let info = sys::cuStreamGetCaptureInfo_v3(
            first,
            &mut status,
            &mut id,
            &mut graph,
            &mut nodes,
            &mut edges,
            &mut count,
        );
        check("graph capture", info)?;
        if status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE || count != 1 {
            return Ok(false);
        }
        let mut last = *nodes;
        let edge = sys::CUgraphEdgeData {
            from_port: sys::CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC as u8,
            to_port: 0,
            type_: sys::CUgraphDependencyType::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8,
            reserved: [0; 5],
        };
        let add = sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_ADD_CAPTURE_DEPENDENCIES as u32;
        check("graph edge", sys::cuStreamUpdateCaptureDependencies_v2(second, &mut last, &edge, 1, add))?;
    }
    Ok(true)
}
