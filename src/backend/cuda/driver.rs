//! A GPU through NVIDIA's driver, loaded at run time: primary context, one stream, one module, and a
//! second stream that work is only ever recorded on, so that a recording takes nothing that another
//! thread starts meanwhile.
//!
//! The primary context is pushed at each entry and popped on the way out, so a host's own current
//! context is left as it was. The device is never reset.

use super::device::{Device, Product};
use super::launch::Launch;
pub use super::library::Choice;
use super::library::{Contest, Library, WORKSPACE, Work};
use super::module::{Module, has_warpgroups, missing_kernels};
use super::params::Ptr;
pub use super::probe::{Found, count, describe};
use super::probe::{check, with_driver};
use super::side::{Lane, Side};
use super::stopwatch::Flush;
use crate::error::{Error, Result, Status};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::c_int;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Most rows of a product whose kernel is chosen by time; more are bound by arithmetic, where the
/// library's first proposal is good and a comparison would hold up a prompt.
const TIMED_ROWS: u32 = 256;

/// How long giving back waits for work under way, ns. Work that takes longer is taken for stuck: what it
/// may use is leaked, since the driver would wait for it without end.
const RELEASE_WAIT_NS: u64 = 10_000_000_000;

/// A GPU.
pub struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    recorder: sys::CUstream,
    /// The thread that records, 0: none.
    recording: AtomicUsize,
    side: Side,
    module: Option<Module>,
    name: String,
    multiprocessors: u32,
    warpgroups: bool,
    shared_per_block: u32,
    library: Option<Library>,
    workspace: u64,
    /// Products are chosen by time.
    timed: bool,
    /// Work did not end within [`RELEASE_WAIT_NS`].
    stuck: AtomicBool,
}

/// Some number of this thread, not 0.
pub(super) fn this_thread() -> usize {
    thread_local!(static HERE: u8 = const { 0 });
    HERE.with(|here| &raw const *here as usize)
}

// SAFETY: driver handles may be used from any thread; every call makes the context current itself.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver serialises work on one stream.
unsafe impl Sync for Driver {}

/// Makes a context current for a scope.
pub(super) struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        let mut old = null_mut();
        // SAFETY: pops what `Driver::enter` pushed on this thread.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut old) };
    }
}

impl Driver {
    /// Opens device `ordinal`.
    pub fn open(ordinal: u32) -> Result<Driver> {
        with_driver(|| Driver::open_device(ordinal))
    }

    fn open_device(ordinal: u32) -> Result<Driver> {
        let n = count()?;
        if ordinal >= n {
            return Err(Error::invalid(format!("CUDA device {ordinal}: the driver lists {n}")));
        }
        let mut driver = Driver {
            device: 0,
            context: null_mut(),
            stream: null_mut(),
            recorder: null_mut(),
            recording: AtomicUsize::new(0),
            side: Side::none(),
            module: None,
            name: String::new(),
            multiprocessors: 0,
            warpgroups: false,
            shared_per_block: 0,
            library: None,
            workspace: 0,
            timed: true,
            stuck: AtomicBool::new(false),
        };
        // SAFETY: out-parameters are local; the context is retained before use, and `Drop` releases
        // what was made, also when a later call fails.
        unsafe {
            check("CUDA device", sys::cuDeviceGet(&mut driver.device, ordinal as c_int))?;
            let mut name = [0 as std::ffi::c_char; 128];
            check("CUDA device name", sys::cuDeviceGetName(name.as_mut_ptr(), 127, driver.device))?;
            driver.name = std::ffi::CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
            use sys::CUdevice_attribute as A;
            let major = driver.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = driver.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            let capability = (10 * major + minor) as u32;
            if let Some(why) = missing_kernels(capability) {
                return Err(Error::unsupported(format!("{}: {why}", driver.name)));
            }
            driver.warpgroups = has_warpgroups(capability);
            driver.multiprocessors = driver.attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
            driver.shared_per_block =
                driver.attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
            let mut context = null_mut();
            check("CUDA context", sys::cuDevicePrimaryCtxRetain(&mut context, driver.device))?;
            driver.context = context;
            let _entered = driver.enter()?;
            let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("CUDA stream", sys::cuStreamCreate(&mut driver.stream, non_blocking))?;
            check("CUDA stream", sys::cuStreamCreate(&mut driver.recorder, non_blocking))?;
            driver.side.create()?;
            driver.module = Some(Module::load(&driver.name, driver.shared_per_block, major >= 9)?);
            check("cuBLASLt's workspace", sys::cuMemAlloc_v2(&mut driver.workspace, WORKSPACE))?;
            driver.library = Library::open(driver.workspace);
        }
        Ok(driver)
    }

    /// How products' kernels were chosen so far; empty without cuBLASLt.
    pub fn product_choices(&self) -> Vec<Choice> {
        self.library.as_ref().map_or_else(Vec::new, Library::choices)
    }

    /// Whether cuBLASLt was found.
    pub fn has_library(&self) -> bool {
        self.library.is_some()
    }

    /// # Safety
    /// `cuInit` has succeeded and `self.device` is a device.
    unsafe fn attribute(&self, which: sys::CUdevice_attribute) -> Result<c_int> {
        let mut value = 0;
        // SAFETY: a query into a local variable; see above.
        check("CUDA device attribute", unsafe { sys::cuDeviceGetAttribute(&mut value, which, self.device) })?;
        Ok(value)
    }

    pub(super) fn enter(&self) -> Result<Entered> {
        // SAFETY: the context is retained for as long as `self` lives.
        check("CUDA context", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        Ok(Entered)
    }

    fn launch(&self, (stream, lane): (sys::CUstream, Lane), launch: &Launch, params: &[u8]) -> Result<()> {
        let _entered = self.enter()?;
        // A kernel may start before the one before it ends; every one of ours waits by itself. But it waits
        // for that one only: right after a wait for the other stream the launch itself has to be in order.
        let early = !lane.takes_order();
        let module = self.module.as_ref().ok_or_else(|| Error::invalid("the kernels are not loaded"))?;
        // SAFETY: this device's context is current and the stream its own.
        unsafe { module.launch(launch, params, stream, early) }
    }

    /// Where this thread's work goes now.
    fn current(&self) -> sys::CUstream {
        if self.recording.load(Ordering::Relaxed) == this_thread() { self.recorder } else { self.stream }
    }

    /// The capture has ended, or did not begin.
    fn end_recording(&self) {
        self.side.let_go();
        self.recording.store(0, Ordering::Release);
    }

    /// With `false`, a shape's product is done by cuBLASLt's first proposal, untimed: slower at some
    /// shapes, but a model's bits do not depend on what was faster in this process. Products chosen so
    /// far are forgotten.
    pub fn time_products(&mut self, timed: bool) {
        self.timed = timed;
        if let Some(library) = &mut self.library {
            library.forget();
        }
    }

    /// Whether nothing under way can use what is about to be given back; waits once, and for a bounded time.
    fn is_quiet(&self) -> bool {
        let wait = if self.stuck.load(Ordering::Relaxed) { 0 } else { RELEASE_WAIT_NS };
        // An error means that nothing runs any more.
        let quiet = !matches!(self.finished(wait), Ok(false));
        self.stuck.store(!quiet, Ordering::Relaxed);
        quiet
    }

    /// The stream, for hosts that queue their own work beside it.
    pub fn stream(&self) -> u64 {
        self.stream as u64
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.context.is_null() || (!self.stream.is_null() && !self.is_quiet()) {
            // Destroying the library's handle would wait for the device.
            std::mem::forget(self.library.take());
            return;
        }
        if let Ok(_entered) = self.enter() {
            // SAFETY: the handles are this object's own, and nothing uses them any more.
            unsafe {
                if !self.stream.is_null() {
                    let _ = sys::cuStreamSynchronize(self.stream);
                    let _ = sys::cuStreamDestroy_v2(self.stream);
                }
                if !self.recorder.is_null() {
                    let _ = sys::cuStreamDestroy_v2(self.recorder);
                }
                self.side.destroy();
                self.library = None;
                if self.workspace != 0 {
                    let _ = sys::cuMemFree_v2(self.workspace);
                }
                if let Some(module) = &mut self.module {
                    module.unload();
                }
            }
        }
        // SAFETY: pairs with the retain in `open`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Device for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn shared_per_block(&self) -> u32 {
        self.shared_per_block
    }

    fn warpgroups(&self) -> bool {
        self.warpgroups
    }

    fn free_memory(&self) -> Result<u64> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: a query into local variables.
        check("CUDA memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free as u64)
    }

    fn alloc(&self, bytes: u64) -> Result<Ptr> {
        let _entered = self.enter()?;
        let mut at = 0;
        // SAFETY: out-parameter is local.
        let result = unsafe { sys::cuMemAlloc_v2(&mut at, bytes.max(1) as usize) };
        check(format_args!("{bytes} bytes on {}", self.name), result)?;
        Ok(Ptr(at))
    }

    fn free(&self, at: Ptr) {
        if self.is_quiet()
            && let Ok(_entered) = self.enter()
        {
            // SAFETY: `at` came from `alloc`; kernels that use it were started before on the stream,
            // and have ended.
            let _ = unsafe { sys::cuMemFree_v2(at.0) };
        }
    }

    fn copy_in(&self, to: Ptr, from: &[u8]) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: `from` is valid host memory; pageable memory is staged before the call returns.
        check("copy to the device", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), self.current())
        })
    }

    fn copy_out(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: `to` is valid until the synchronisation that follows.
        unsafe {
            check(
                "copy from the device",
                sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), self.stream),
            )?;
            check("copy from the device", sys::cuStreamSynchronize(self.stream))
        }
    }

    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>> {
        let _entered = self.enter()?;
        let mut at = null_mut();
        // SAFETY: out-parameter is local.
        let result = unsafe { sys::cuMemHostAlloc(&mut at, bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) };
        check(format_args!("{bytes} bytes of page-locked host memory"), result)?;
        NonNull::new(at.cast()).ok_or_else(|| Error::new(Status::E_DEVICE, "page-locked host memory: null"))
    }

    fn free_host(&self, at: NonNull<u8>) {
        if self.is_quiet()
            && let Ok(_entered) = self.enter()
        {
            // SAFETY: `at` came from `alloc_host`; copies that use it have ended.
            let _ = unsafe { sys::cuMemFreeHost(at.as_ptr().cast()) };
        }
    }

    fn send(&self, to: Ptr, from: &[u8]) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: page-locked memory that stays until a mark behind this is reached.
        check("copy to the device", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), self.current())
        })
    }

    fn fetch(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: page-locked memory that stays until the device has finished.
        check("copy from the device", unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), self.current())
        })
    }

    fn mark(&self, old: u64) -> Result<u64> {
        let _entered = self.enter()?;
        let mut event = old as sys::CUevent;
        let plain = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: an event made here, or by an earlier call and not dropped since.
        unsafe {
            if event.is_null() {
                check("CUDA event", sys::cuEventCreate(&mut event, plain))?;
            }
            let set = check("CUDA event", sys::cuEventRecord(event, self.stream));
            if set.is_err() && old == 0 {
                let _ = sys::cuEventDestroy_v2(event);
            }
            set?;
        }
        Ok(event as u64)
    }

    fn reached(&self, mark: u64) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: `mark` made it, and it was not dropped.
        check("device work", unsafe { sys::cuEventSynchronize(mark as sys::CUevent) })
    }

    fn unmark(&self, mark: u64) {
        if let Ok(_entered) = self.enter() {
            // SAFETY: as in `reached`; it is not used again.
            let _ = unsafe { sys::cuEventDestroy_v2(mark as sys::CUevent) };
        }
    }

    fn zero(&self, at: Ptr, bytes: u64) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the range was allocated by this device.
        check("zero memory", unsafe { sys::cuMemsetD8Async(at.0, 0, bytes as usize, self.current()) })
    }

    fn start(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        self.launch((self.current(), Lane::Main), launch, params)
    }

    fn fork(&self) -> Result<()> {
        let _entered = self.enter()?;
        self.side.fork(self.current())
    }

    fn start_beside(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        self.launch(self.side.lane(self.current()), launch, params)
    }

    fn join(&self) -> Result<()> {
        let _entered = self.enter()?;
        self.side.join(self.current(), false)
    }

    fn join_early(&self) -> Result<()> {
        let _entered = self.enter()?;
        self.side.join(self.current(), true)
    }

    fn product(&self, of: &Product<'_>) -> Result<bool> {
        let _entered = self.enter()?;
        let Some(library) = &self.library else { return Ok(false) };
        let stream = self.current();
        let with_side = |product: &Work<'_>| match of.beside {
            None => product(),
            Some((launch, params)) => {
                self.fork()?;
                let started = self.start_beside(launch, params).and_then(|()| product());
                self.join_early().and(started)
            }
        };
        if let Some(known) = library.known(of, stream.cast(), &with_side)? {
            return Ok(known);
        }
        // A recording runs nothing, so nothing can be timed while it lasts.
        let timed = self.timed && stream == self.stream && of.params.rows <= TIMED_ROWS;
        let flush = timed.then(Flush::new);
        let time = |work: &Work<'_>| match &flush {
            Some(flush) => self.time_cold(flush, &|| with_side(work)),
            None => Ok(f32::INFINITY),
        };
        let start_own = of.own.map(|launch| move || super::device::start(self, launch, of.params));
        let beside = of.beside.map_or(0.0, |(launch, _)| {
            (launch.grid.0 * launch.grid.1) as f32 / self.multiprocessors() as f32
        });
        let contest = Contest { time: &time, own: start_own.as_ref().map(|f| f as &Work<'_>), beside };
        library.choose(of, stream.cast(), timed.then_some(&contest), &with_side)
    }

    fn synchronize(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the stream is this object's own.
        check("device work", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    fn finished(&self, timeout_ns: u64) -> Result<bool> {
        let _entered = self.enter()?;
        let start = Instant::now();
        loop {
            // SAFETY: the stream is this object's own.
            let result = unsafe { sys::cuStreamQuery(self.stream) };
            if result != CUresult::CUDA_ERROR_NOT_READY {
                check("device work", result)?;
                return Ok(true);
            }
            if start.elapsed() >= Duration::from_nanos(timeout_ns) {
                return Ok(false);
            }
            std::thread::yield_now();
        }
    }

    fn record(&self) -> Result<bool> {
        let _entered = self.enter()?;
        // One at a time, and not while another thread has side work: who comes second runs without recording.
        let free = self.recording.compare_exchange(0, this_thread(), Ordering::Acquire, Ordering::Relaxed);
        if free.is_err() {
            return Ok(false);
        }
        if !self.side.keep() {
            self.recording.store(0, Ordering::Release);
            return Ok(false);
        }
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is this object's own.
        let begun = check("graph capture", unsafe { sys::cuStreamBeginCapture_v2(self.recorder, mode) });
        if begun.is_err() {
            self.end_recording();
        }
        begun.map(|()| true)
    }

    fn recorded(&self, side_first: bool) -> Result<u64> {
        let _entered = self.enter()?;
        // A capture with a fork left open does not end.
        let joined = self.join();
        let (mut graph, mut exec) = (null_mut(), null_mut());
        // Without it the streams' priorities count for nothing in a graph.
        let by_node = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY.0;
        let flags = if side_first { by_node.into() } else { 0 };
        // SAFETY: ends the capture that `record` began; the graph is destroyed once instantiated, the
        // instance if it cannot be uploaded.
        unsafe {
            let ended = check("graph capture", sys::cuStreamEndCapture(self.recorder, &mut graph));
            self.end_recording();
            ended?;
            let made = joined
                .and_then(|()| check("graph", sys::cuGraphInstantiateWithFlags(&mut exec, graph, flags)));
            let _ = sys::cuGraphDestroy(graph);
            made?;
            // Else the first replay would pay for it.
            if let Err(error) = check("graph upload", sys::cuGraphUpload(exec, self.stream)) {
                let _ = sys::cuGraphExecDestroy(exec);
                return Err(error);
            }
        }
        Ok(exec as u64)
    }

    fn unrecord(&self) {
        if let Ok(_entered) = self.enter() {
            let mut graph = null_mut();
            // A capture with a fork left open does not end well; what is wrong with it no longer matters.
            let _ = self.join();
            // SAFETY: ends the capture that `record` began; a capture that something has broken gives
            // an error and no graph.
            unsafe {
                let _ = sys::cuStreamEndCapture(self.recorder, &mut graph);
                if !graph.is_null() {
                    let _ = sys::cuGraphDestroy(graph);
                }
            }
        }
        self.end_recording();
    }

    fn replay(&self, program: u64) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: `program` came from `recorded` and was not forgotten.
        check("graph launch", unsafe { sys::cuGraphLaunch(program as sys::CUgraphExec, self.stream) })
    }

    fn forget(&self, program: u64) {
        if self.is_quiet()
            && let Ok(_entered) = self.enter()
        {
            // SAFETY: as in `replay`; it is not used again.
            let _ = unsafe { sys::cuGraphExecDestroy(program as sys::CUgraphExec) };
        }
    }
}
