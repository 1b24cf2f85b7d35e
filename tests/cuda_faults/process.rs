//! What only a real GPU does: faults that end a device for its process, kernels that never end, and a
//! host with a context and stream of its own. Run with POLAR_TEST_GPU=1; those that end their process's
//! device or never return run in a child. The kernels at fault are PTX, assembled by the driver, so
//! nothing of the kind is in the library.

use super::{engine, on_gpu, run, submit, whole};
use crate::support::Collect;
use cudarc::driver::sys::{self, CUresult};
use polar_sparsity::Status;
use polar_sparsity::backend::cuda::driver::Driver;
use polar_sparsity::engine::{FOREVER, Health, SeqId};
use std::ffi::c_void;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

const PTX: &std::ffi::CStr = c"
.version 7.0
.target sm_80
.address_size 64
.visible .entry trap_now() { trap; }
.visible .entry bad_address()
{
    .reg .b64 %a; .reg .b32 %v;
    mov.b64 %a, 64;
    mov.b32 %v, 1;
    st.global.b32 [%a], %v;
    ret;
}
.visible .entry spin(.param .b64 flag)
{
    .reg .b64 %a; .reg .b32 %v; .reg .pred %p;
    ld.param.b64 %a, [flag];
again:
    ld.volatile.global.b32 %v, [%a];
    setp.eq.b32 %p, %v, 0;
    @%p bra again;
    ret;
}
";

/// What the child runs, named in its environment.
const CHILD: &str = "POLAR_TEST_CHILD";
/// The child's last line.
const DONE: &str = "child: all is as promised";
/// The library waits ten seconds for work that does not end before it leaks what that uses.
const PATIENCE: Duration = Duration::from_secs(25);

fn skipped(name: &str) -> bool {
    if !on_gpu() {
        eprintln!("{name}: skipped, it needs a GPU and POLAR_TEST_GPU=1");
    }
    !on_gpu()
}

fn ok(what: &str, result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS, "{what}");
}

/// Runs test `name` of this program again as a child that does `what`; the child must say that all is as
/// promised within `limit`, and is ended then.
fn child(name: &str, what: &str, limit: Duration) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, what)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let output = child.stdout.take().unwrap();
    let (sender, receiver) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if line.contains(DONE) {
                let _ = sender.send(());
            }
        }
    });
    let said = receiver.recv_timeout(limit);
    // A process whose kernel spins need not end by itself.
    let _ = child.kill();
    let _ = child.wait();
    let _ = reader.join();
    assert!(said.is_ok(), "{what}: the child broke off or took over {limit:?}");
}

fn in_child() -> Option<String> {
    std::env::var(CHILD).ok()
}

/// Makes the device's primary context current for good on this thread, as programs that use the CUDA
/// runtime do, and loads the kernels at fault.
struct Own {
    module: sys::CUmodule,
}

impl Own {
    fn new() -> Own {
        let (mut device, mut context, mut module) = (0, null_mut(), null_mut());
        // SAFETY: `Driver::open` has initialised the driver; out-parameters are local.
        unsafe {
            ok("device", sys::cuDeviceGet(&mut device, 0));
            ok("primary context", sys::cuDevicePrimaryCtxRetain(&mut context, device));
            ok("current", sys::cuCtxSetCurrent(context));
            ok("PTX", sys::cuModuleLoadData(&mut module, PTX.as_ptr().cast::<c_void>()));
        }
        Own { module }
    }

    /// Starts one thread of a kernel on the driver's stream.
    fn start(&self, driver: &Driver, kernel: &std::ffi::CStr, mut argument: u64) {
        let mut function = null_mut();
        let mut arguments = [(&raw mut argument).cast::<c_void>()];
        let stream = driver.stream() as sys::CUstream;
        // SAFETY: the kernel takes one 64-bit parameter or none.
        unsafe {
            ok("kernel", sys::cuModuleGetFunction(&mut function, self.module, kernel.as_ptr()));
            let arguments = arguments.as_mut_ptr();
            ok("launch", sys::cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, null_mut()));
        }
    }
}

/// A word that host and device see.
fn flag() -> *mut u32 {
    let mut at = null_mut();
    // SAFETY: the current context is the primary one; the memory lives until the process ends.
    unsafe {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        ok("host memory", sys::cuMemHostAlloc(&mut at, 64, flags));
        at.cast::<u32>().write_volatile(0);
    }
    at.cast()
}

/// After a fault that stays: the step says so, the engine too, everything else still returns.
fn a_lost_device(kernel: &std::ffi::CStr) {
    let driver = Arc::new(Driver::open(0).unwrap());
    let own = Own::new();
    let lost = engine(&driver).unwrap();
    submit(&lost).unwrap();
    let mut sink = Collect::default();
    lost.step(FOREVER, &mut sink).unwrap();
    own.start(&driver, kernel, 0);
    let error = lost.step(FOREVER, &mut sink).expect_err("the device is lost");
    assert_eq!(error.status, Status::E_DEVICE_LOST, "{error}");
    assert!(error.device_code != 0, "{error}");
    assert_eq!(lost.stats().health, Health::DeviceLost, "in the same call");
    for _ in 0..3 {
        assert_eq!(lost.step(FOREVER, &mut sink).expect_err("still").status, Status::E_DEVICE_LOST);
    }
    assert_eq!(lost.submit(&[], &[], &mut []).expect_err("still").status, Status::E_DEVICE_LOST);
    assert_eq!(lost.cancel(&[]).expect_err("still").status, Status::E_DEVICE_LOST);
    let start = Instant::now();
    drop(lost);
    drop(driver);
    assert!(start.elapsed() < Duration::from_secs(5), "giving back took {:?}", start.elapsed());
    // The rest of the process goes on: another device than the GPU, for one.
    let cpu = crate::support::context(1);
    let model = crate::support::load_model(&cpu, super::CASE);
    let engine = crate::support::engine(&model, None, |_| {});
    engine.submit(&[crate::support::request(0, 4, 4)], &[5, 6, 7, 8], &mut [SeqId::default()]).unwrap();
    assert_eq!(crate::support::outputs(&crate::support::run(&engine)).len(), 1);
    // A new engine on the lost device is refused, with the same status.
    let again = Driver::open(0).map(Arc::new).and_then(|d| super::engine(&d)).err().expect("refused");
    eprintln!("afterwards: {again}");
}

#[test]
fn a_trap_or_a_bad_address_loses_the_device_and_nothing_else() {
    const NAME: &str = "process::a_trap_or_a_bad_address_loses_the_device_and_nothing_else";
    if skipped(NAME) {
        return;
    }
    match in_child().as_deref() {
        None => {
            child(NAME, "trap", Duration::from_secs(60));
            child(NAME, "address", Duration::from_secs(60));
            return;
        }
        Some("trap") => a_lost_device(c"trap_now"),
        _ => a_lost_device(c"bad_address"),
    }
    println!("{DONE}");
}

#[test]
fn a_kernel_that_does_not_end_makes_steps_pending_and_release_bounded() {
    const NAME: &str = "process::a_kernel_that_does_not_end_makes_steps_pending_and_release_bounded";
    if skipped(NAME) {
        return;
    }
    match in_child().as_deref() {
        None => {
            child(NAME, "late", Duration::from_secs(60));
            child(NAME, "never", Duration::from_secs(60) + PATIENCE);
            return;
        }
        Some("late") => late(),
        _ => never(),
    }
    println!("{DONE}");
}

/// The kernel ends after all: the step does too, with what it would have given.
fn late() {
    let driver = Arc::new(Driver::open(0).unwrap());
    let want = whole(&driver).unwrap();
    let own = Own::new();
    let flag = flag();
    let slow = engine(&driver).unwrap();
    submit(&slow).unwrap();
    slow.begin().unwrap();
    own.start(&driver, c"spin", flag as u64);
    let mut sink = Collect::default();
    for timeout_ns in [0, 1_000_000, 200_000_000] {
        let start = Instant::now();
        assert_eq!(slow.finish(timeout_ns, &mut sink).unwrap().status, Status::PENDING);
        assert!(start.elapsed() < Duration::from_secs(2), "{timeout_ns} ns took {:?}", start.elapsed());
    }
    assert_eq!(slow.begin().expect_err("in flight").status, Status::E_BUSY);
    assert_eq!(slow.stats().health, Health::Ok);
    // SAFETY: the word is ours, and the device reads it volatile.
    unsafe { flag.write_volatile(1) };
    slow.finish(FOREVER, &mut sink).unwrap();
    let first: Vec<_> =
        sink.events.iter().filter(|e| e.is_output).filter_map(|e| Some((e.user_tag, e.token?))).collect();
    let rest = run_rest(&slow);
    assert_eq!([first, rest].concat(), want);
}

fn run_rest(engine: &polar_sparsity::engine::EngineOn<super::Cuda<Driver>>) -> Vec<(u64, u32)> {
    let mut tokens = vec![];
    loop {
        let mut sink = Collect::default();
        if engine.step(FOREVER, &mut sink).unwrap().status == Status::IDLE {
            return tokens;
        }
        tokens
            .extend(sink.events.iter().filter(|e| e.is_output).filter_map(|e| Some((e.user_tag, e.token?))));
    }
}

/// The kernel never ends: the host can still ask, cancel and give everything up in bounded time.
fn never() {
    let driver = Arc::new(Driver::open(0).unwrap());
    let own = Own::new();
    let flag = flag();
    let stuck = engine(&driver).unwrap();
    submit(&stuck).unwrap();
    stuck.begin().unwrap();
    own.start(&driver, c"spin", flag as u64);
    let mut sink = Collect::default();
    assert_eq!(stuck.finish(100_000_000, &mut sink).unwrap().status, Status::PENDING);
    stuck.cancel(&[SeqId(1)]).unwrap();
    assert_eq!(stuck.finish(100_000_000, &mut sink).unwrap().status, Status::PENDING);
    let start = Instant::now();
    drop(stuck);
    eprintln!("the engine given up after {:.1?}", start.elapsed());
    drop(driver);
    eprintln!("given up after {:.1?}", start.elapsed());
    assert!(start.elapsed() < PATIENCE, "giving up took {:?}", start.elapsed());
}

#[test]
fn a_host_keeps_its_context_and_its_stream() {
    if skipped("process::a_host_keeps_its_context_and_its_stream") {
        return;
    }
    let want = whole(&Arc::new(Driver::open(0).unwrap())).unwrap();
    for primary in [false, true] {
        let (mut device, mut host, mut stream, mut memory) = (0, null_mut(), null_mut(), 0);
        let words = 1 << 20;
        // SAFETY: out-parameters are local; the driver was initialised by `Driver::open`.
        unsafe {
            ok("device", sys::cuDeviceGet(&mut device, 0));
            if primary {
                ok("primary context", sys::cuDevicePrimaryCtxRetain(&mut host, device));
                ok("current", sys::cuCtxPushCurrent_v2(host));
            } else {
                ok("context", sys::cuCtxCreate_v4(&mut host, null_mut(), 0, device));
            }
            ok("stream", sys::cuStreamCreate(&mut stream, 0));
            ok("memory", sys::cuMemAlloc_v2(&mut memory, 4 * words));
        }
        let current = || {
            let mut now = null_mut();
            // SAFETY: as above.
            ok("current", unsafe { sys::cuCtxGetCurrent(&mut now) });
            now
        };
        // The host's own work, before, between and after ours.
        let works = |value: u32| {
            let mut back = vec![0u32; words];
            // SAFETY: the memory holds so many words; the copy is waited for.
            unsafe {
                ok("fill", sys::cuMemsetD32Async(memory, value, words, stream));
                let to = back.as_mut_ptr().cast();
                ok("copy", sys::cuMemcpyDtoHAsync_v2(to, memory, 4 * words, stream));
                ok("wait", sys::cuStreamSynchronize(stream));
            }
            assert!(back.iter().all(|&w| w == value), "the host's stream gives its own results");
        };
        let unchanged = |what: &str| assert_eq!(current(), host, "{what}: the host's context is current");
        works(1);
        let driver = Arc::new(Driver::open(0).unwrap());
        unchanged("open");
        let ours = engine(&driver).unwrap();
        unchanged("load");
        works(2);
        submit(&ours).unwrap();
        let (tokens, _) = run(&ours, || {
            unchanged("step");
            works(3);
        });
        assert!(tokens == want);
        drop(ours);
        drop(driver);
        unchanged("release");
        works(4);
        // SAFETY: made above, used no more.
        unsafe {
            ok("free", sys::cuMemFree_v2(memory));
            ok("stream", sys::cuStreamDestroy_v2(stream));
            if primary {
                let mut popped = null_mut();
                ok("pop", sys::cuCtxPopCurrent_v2(&mut popped));
                ok("release", sys::cuDevicePrimaryCtxRelease_v2(device));
            } else {
                ok("destroy", sys::cuCtxDestroy_v2(host));
            }
        }
    }
}

#[test]
fn two_engines_on_two_threads_do_not_disturb_each_other() {
    if skipped("process::two_engines_on_two_threads_do_not_disturb_each_other") {
        return;
    }
    let driver = Arc::new(Driver::open(0).unwrap());
    let want = whole(&driver).unwrap();
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                for round in 0..20 {
                    assert!(whole(&driver).unwrap() == want, "round {round}: tokens differ");
                }
            });
        }
    });
}
