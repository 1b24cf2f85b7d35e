//! A device that runs the kernels on the CPU: `cuda/host` compiled with g++, loaded once.
//! Memory is host memory, filled with NaN bytes and surrounded by them.

use polar_sparsity::backend::cuda::device::Device;
use polar_sparsity::backend::cuda::launch::{Launch, NAMES};
use polar_sparsity::backend::cuda::params::{LinearParams, Ptr};
use polar_sparsity::dtype::DType;
use polar_sparsity::{Error, Result};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

type LaunchFn = unsafe extern "C" fn(*const c_char, u32, u32, u32, u32, u32, *const c_void) -> c_int;
type SizesFn = unsafe extern "C" fn(*mut u32) -> c_int;

struct Library {
    launch: LaunchFn,
    sizes: SizesFn,
}

/// The executor runs one kernel at a time.
static RUNNING: Mutex<()> = Mutex::new(());

fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/host");
        let out =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels_host_{}.so", std::process::id()));
        let done = Command::new("g++")
            .args(["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-o"])
            .arg(&out)
            .args([root.join("kernels_host.cpp"), root.join("executor.cpp")])
            .status()
            .expect("g++ is needed to run the kernels on the CPU");
        assert!(done.success(), "g++ could not compile cuda/host");
        let path = CString::new(out.to_str().unwrap()).unwrap();
        // SAFETY: a library just built from this repository; its two functions have these types.
        let library = unsafe {
            let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!handle.is_null(), "cannot load {}", out.display());
            let symbol = |name: &std::ffi::CStr| {
                let at = libc::dlsym(handle, name.as_ptr());
                assert!(!at.is_null(), "no symbol {name:?}");
                at
            };
            Library {
                launch: std::mem::transmute::<*mut c_void, LaunchFn>(symbol(c"polar_host_launch")),
                sizes: std::mem::transmute::<*mut c_void, SizesFn>(symbol(c"polar_host_sizes")),
            }
        };
        let _ = std::fs::remove_file(&out);
        library
    })
}

/// Sizes of the parameter structs as C++ sees them.
pub fn sizes() -> Vec<usize> {
    let mut out = [0u32; 64];
    // SAFETY: the function writes fewer than 64 sizes.
    let n = unsafe { (library().sizes)(out.as_mut_ptr()) };
    out[..n as usize].iter().map(|&s| s as usize).collect()
}

const GUARD: usize = 4096;

/// A launch and its parameters.
type Recorded = (Launch, Vec<u8>);

/// The device.
pub struct Host {
    memory: Mutex<HashMap<u64, Vec<u8>>>,
    recording: Mutex<Option<Vec<Recorded>>>,
    programs: Mutex<HashMap<u64, Vec<Recorded>>>,
    /// Order of threads and blocks: 0 in order, else shuffled by this seed.
    pub seed: AtomicU32,
    pub multiprocessors: u32,
    /// Bytes that `free_memory` speaks of before anything is taken.
    pub capacity: AtomicU64,
    /// Bytes taken now.
    pub taken: AtomicU64,
}

impl Host {
    pub fn new() -> Host {
        Host {
            memory: Mutex::default(),
            recording: Mutex::default(),
            programs: Mutex::default(),
            seed: AtomicU32::new(0),
            multiprocessors: 3,
            capacity: AtomicU64::new(1 << 30),
            taken: AtomicU64::new(0),
        }
    }

    fn run(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        let name = CString::new(NAMES[launch.kernel.0 as usize]).unwrap();
        let aligned: Vec<u64> = params
            .chunks(8)
            .map(|c| {
                let mut word = [0; 8];
                word[..c.len()].copy_from_slice(c);
                u64::from_le_bytes(word)
            })
            .collect();
        let _one = RUNNING.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: the parameters point into memory of this device, as the kernel expects; a kernel
        // that reads outside it is what the tests look for.
        let status = unsafe {
            (library().launch)(
                name.as_ptr(),
                launch.grid.0,
                launch.grid.1,
                launch.threads,
                launch.shared,
                self.seed.load(Ordering::Relaxed),
                aligned.as_ptr().cast(),
            )
        };
        match status {
            0 => Ok(()),
            1 => Err(Error::unsupported(format!("no kernel {name:?}"))),
            _ => Err(Error::invalid(format!("kernel {name:?}: threads wait for ever"))),
        }
    }
}

impl Device for Host {
    fn name(&self) -> String {
        "host executor".into()
    }
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }
    fn shared_per_block(&self) -> u32 {
        227 * 1024
    }
    fn free_memory(&self) -> Result<u64> {
        Ok(self.capacity.load(Ordering::Relaxed).saturating_sub(self.taken.load(Ordering::Relaxed)))
    }
    fn alloc(&self, bytes: u64) -> Result<Ptr> {
        let memory = vec![0xffu8; bytes as usize + 2 * GUARD];
        let at = (memory.as_ptr() as u64 + GUARD as u64 / 2).next_multiple_of(256);
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        self.memory.lock().unwrap().insert(at, memory);
        Ok(Ptr(at))
    }
    fn free(&self, at: Ptr) {
        let memory = self.memory.lock().unwrap().remove(&at.0).expect("freed twice");
        self.taken.fetch_sub((memory.len() - 2 * GUARD) as u64, Ordering::Relaxed);
    }
    fn copy_in(&self, to: Ptr, from: &[u8]) -> Result<()> {
        // SAFETY: `to` lies in memory this device gave, long enough by the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.0 as *mut u8, from.len()) };
        Ok(())
    }
    fn copy_out(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }
    fn zero(&self, at: Ptr, bytes: u64) -> Result<()> {
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::write_bytes(at.0 as *mut u8, 0, bytes as usize) };
        Ok(())
    }
    fn start(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        if let Some(list) = self.recording.lock().unwrap().as_mut() {
            list.push((*launch, params.to_vec()));
            return Ok(());
        }
        self.run(launch, params)
    }
    fn product(&self, _: &LinearParams, _: bool, _: DType) -> Result<bool> {
        Ok(false)
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    fn finished(&self, _: u64) -> Result<bool> {
        Ok(true)
    }
    fn record(&self) -> Result<bool> {
        *self.recording.lock().unwrap() = Some(Vec::new());
        Ok(true)
    }
    fn recorded(&self) -> Result<u64> {
        let list = self.recording.lock().unwrap().take().unwrap_or_default();
        let mut programs = self.programs.lock().unwrap();
        let id = programs.len() as u64 + 1;
        programs.insert(id, list);
        Ok(id)
    }
    fn replay(&self, program: u64) -> Result<()> {
        let list = self.programs.lock().unwrap().get(&program).cloned().unwrap_or_default();
        list.iter().try_for_each(|(launch, params)| self.run(launch, params))
    }
    fn forget(&self, program: u64) {
        self.programs.lock().unwrap().remove(&program);
    }
}
