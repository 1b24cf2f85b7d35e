//! A GPU through NVIDIA's driver, loaded at run time: primary context, one stream, one module.
//!
//! The primary context is pushed at each entry and popped on the way out, so a host's own current
//! context is left as it was. The device is never reset.

use super::device::Device;
use super::launch::Launch;
use super::library::{Library, WORKSPACE};
use super::module::{Module, missing_kernels};
use super::params::{LinearParams, Ptr};
use crate::dtype::DType;
use crate::error::{Error, Result, Status};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::c_int;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

#[cfg(polar_kernels)]
pub(super) static FATBIN: Option<&[u8]> = Some(include_bytes!(env!("POLAR_FATBIN")));
#[cfg(not(polar_kernels))]
pub(super) static FATBIN: Option<&[u8]> = None;

/// Oldest CUDA version a driver must speak: the one the kernels were compiled with.
const CUDA_NEEDED: c_int = 13000;

/// A GPU.
pub struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: Option<Module>,
    name: String,
    multiprocessors: u32,
    shared_per_block: u32,
    library: Option<Library>,
    workspace: u64,
}

// SAFETY: driver handles may be used from any thread; every call makes the context current itself.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver serialises work on one stream.
unsafe impl Sync for Driver {}

/// Makes a context current for a scope.
struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        let mut old = null_mut();
        // SAFETY: pops what `Driver::enter` pushed on this thread.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut old) };
    }
}

pub(super) fn check(what: impl Display, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let code = result as i32;
    let status = match code {
        2 => Status::E_DEVICE_NOMEM,
        100 | 101 => Status::E_NO_DRIVER,
        // Errors that stay until the process ends.
        214 | 700 | 702 | 708..=720 | 999 => Status::E_DEVICE_LOST,
        _ => Status::E_DEVICE,
    };
    let mut text: *const std::ffi::c_char = std::ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or null for an unknown code.
    let name = unsafe {
        let _ = sys::cuGetErrorName(result, &mut text);
        if text.is_null() { "unknown".into() } else { std::ffi::CStr::from_ptr(text).to_string_lossy() }
    };
    let mut error = Error::new(status, format!("{what}: {name} ({code})"));
    error.device_code = code;
    Err(error)
}

/// Why no CUDA device can be used in this process, or how many there are.
pub fn count() -> Result<u32> {
    if FATBIN.is_none() {
        return Err(Error::unsupported("CUDA: this build has no kernels"));
    }
    with_driver(|| {
        // SAFETY: looks for the library; loads nothing that could fail later.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::new(
                Status::E_NO_DRIVER,
                "CUDA: no NVIDIA driver library (libcuda) was found",
            ));
        }
        let (mut version, mut n) = (0, 0);
        // SAFETY: plain queries into local variables.
        unsafe {
            match sys::cuInit(0) {
                CUresult::CUDA_ERROR_NO_DEVICE => {
                    return Err(Error::new(Status::E_NO_DRIVER, "CUDA: the driver finds no GPU"));
                }
                started => check("CUDA: the driver does not start", started)
                    .map_err(|e| Error { status: Status::E_NO_DRIVER, ..e })?,
            }
            check("CUDA: driver version", sys::cuDriverGetVersion(&mut version))?;
            check("CUDA: devices", sys::cuDeviceGetCount(&mut n))?;
        }
        if version < CUDA_NEEDED {
            return Err(Error::new(
                Status::E_NO_DRIVER,
                format!(
                    "CUDA: the driver speaks CUDA {}.{}, {}.{} is needed",
                    version / 1000,
                    version % 1000 / 10,
                    CUDA_NEEDED / 1000,
                    CUDA_NEEDED % 1000 / 10
                ),
            ));
        }
        Ok(n as u32)
    })
}

/// Runs what calls the driver. Its functions are looked up when they are called; a missing one panics.
pub(super) fn with_driver<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        let why = "CUDA: the driver library lacks a function that CUDA 13.0 has";
        Err(Error::new(Status::E_NO_DRIVER, why))
    })
}

/// A device the driver lists.
#[derive(Clone, Debug)]
pub struct Found {
    /// Model name.
    pub name: String,
    /// `10 * major + minor`.
    pub compute_capability: u32,
    /// Bytes of memory.
    pub memory_total: u64,
    /// Identifier, as `nvidia-smi -L` prints it.
    pub uuid: String,
    /// Why it cannot be used, if it cannot.
    pub unusable: Option<String>,
}

/// What the driver says of device `ordinal`, without opening it.
pub fn describe(ordinal: u32) -> Result<Found> {
    if ordinal >= count()? {
        return Err(Error::invalid(format!("CUDA device {ordinal}: the driver lists fewer")));
    }
    use sys::CUdevice_attribute as A;
    let (mut device, mut total, mut name) = (0, 0, [0 as std::ffi::c_char; 128]);
    // SAFETY: `count` has initialised the driver; queries into local variables of the right sizes.
    unsafe {
        check("CUDA device", sys::cuDeviceGet(&mut device, ordinal as c_int))?;
        check("CUDA device name", sys::cuDeviceGetName(name.as_mut_ptr(), 127, device))?;
        check("CUDA device memory", sys::cuDeviceTotalMem_v2(&mut total, device))?;
        let mut uuid: sys::CUuuid = std::mem::zeroed();
        check("CUDA device identifier", sys::cuDeviceGetUuid_v2(&mut uuid, device))?;
        let attribute = |which| {
            let mut value = 0;
            check("CUDA device attribute", sys::cuDeviceGetAttribute(&mut value, which, device))
                .map(|()| value)
        };
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let hex: String = uuid.bytes.iter().map(|b| format!("{:02x}", *b as u8)).collect();
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        Ok(Found {
            name: std::ffi::CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
            compute_capability: (10 * major + minor) as u32,
            memory_total: total as u64,
            uuid: format!("GPU-{}", parts.join("-")),
            unusable: missing_kernels((10 * major + minor) as u32),
        })
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
            module: None,
            name: String::new(),
            multiprocessors: 0,
            shared_per_block: 0,
            library: None,
            workspace: 0,
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
            if let Some(why) = missing_kernels((10 * major + minor) as u32) {
                return Err(Error::unsupported(format!("{}: {why}", driver.name)));
            }
            driver.multiprocessors = driver.attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
            driver.shared_per_block =
                driver.attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
            let mut context = null_mut();
            check("CUDA context", sys::cuDevicePrimaryCtxRetain(&mut context, driver.device))?;
            driver.context = context;
            let _entered = driver.enter()?;
            let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("CUDA stream", sys::cuStreamCreate(&mut driver.stream, non_blocking))?;
            driver.module = Some(Module::load(&driver.name, driver.shared_per_block, major >= 9)?);
            check("cuBLASLt's workspace", sys::cuMemAlloc_v2(&mut driver.workspace, WORKSPACE))?;
            driver.library = Library::open(driver.workspace);
        }
        Ok(driver)
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

    fn enter(&self) -> Result<Entered> {
        // SAFETY: the context is retained for as long as `self` lives.
        check("CUDA context", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        Ok(Entered)
    }

    /// The stream, for hosts that queue their own work beside it.
    pub fn stream(&self) -> u64 {
        self.stream as u64
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

impl Drop for Driver {
    fn drop(&mut self) {
        if self.context.is_null() {
            return;
        }
        if let Ok(_entered) = self.enter() {
            // SAFETY: the handles are this object's own, and nothing uses them any more.
            unsafe {
                if !self.stream.is_null() {
                    let _ = sys::cuStreamSynchronize(self.stream);
                    let _ = sys::cuStreamDestroy_v2(self.stream);
                }
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
        if let Ok(_entered) = self.enter() {
            // SAFETY: `at` came from `alloc`; kernels that use it were started before on the stream,
            // and the driver waits for them.
            let _ = unsafe { sys::cuMemFree_v2(at.0) };
        }
    }

    fn copy_in(&self, to: Ptr, from: &[u8]) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: `from` is valid host memory; pageable memory is staged before the call returns.
        check("copy to the device", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, from.as_ptr().cast(), from.len(), self.stream)
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

    fn zero(&self, at: Ptr, bytes: u64) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the range was allocated by this device.
        check("zero memory", unsafe { sys::cuMemsetD8Async(at.0, 0, bytes as usize, self.stream) })
    }

    fn start(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        let _entered = self.enter()?;
        let module = self.module.as_ref().ok_or_else(|| Error::invalid("the kernels are not loaded"))?;
        // SAFETY: this device's context is current and the stream its own.
        unsafe { module.launch(launch, params, self.stream, true) }
    }

    fn product(&self, params: &LinearParams, transposed: bool, dtype: DType) -> Result<bool> {
        let _entered = self.enter()?;
        match &self.library {
            Some(library) => library.product(params, transposed, dtype, self.stream.cast()),
            None => Ok(false),
        }
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
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this object's own.
        check("graph capture", unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) })?;
        Ok(true)
    }

    fn recorded(&self) -> Result<u64> {
        let _entered = self.enter()?;
        let (mut graph, mut exec) = (null_mut(), null_mut());
        // SAFETY: ends the capture that `record` began; the graph is destroyed once instantiated.
        unsafe {
            check("graph capture", sys::cuStreamEndCapture(self.stream, &mut graph))?;
            let made = check("graph", sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0));
            let _ = sys::cuGraphDestroy(graph);
            made?;
        }
        Ok(exec as u64)
    }

    fn replay(&self, program: u64) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: `program` came from `recorded` and was not forgotten.
        check("graph launch", unsafe { sys::cuGraphLaunch(program as sys::CUgraphExec, self.stream) })
    }

    fn forget(&self, program: u64) {
        if let Ok(_entered) = self.enter() {
            // SAFETY: as in `replay`; it is not used again.
            let _ = unsafe { sys::cuGraphExecDestroy(program as sys::CUgraphExec) };
        }
    }
}
