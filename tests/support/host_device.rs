//! A device that runs the kernels on the CPU: `cuda/host` compiled with g++, loaded once.
//! Memory is host memory, filled with NaN bytes and surrounded by them. Copies from and to `alloc_host`
//! memory are made as late as a GPU might make them: before the next launch, or when waited for.

use polar_sparsity::backend::cuda::device::{self, Device, Product};
use polar_sparsity::backend::cuda::launch::{Launch, NAMES, find};
use polar_sparsity::backend::cuda::params::{LinearParams, Ptr};
use polar_sparsity::dtype::DType;
use polar_sparsity::{Error, Result, Status};
use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

#[allow(clippy::duplicate_mod, reason = "some test programs have it once more, in support")]
#[path = "root.rs"]
mod root;
pub use root::root;

type LaunchFn = unsafe extern "C" fn(*const c_char, u32, u32, u32, u32, u32, u32, *const c_void) -> c_int;
type LateFn = unsafe extern "C" fn(*const c_void, u64);
type SizesFn = unsafe extern "C" fn(*mut u32) -> c_int;

type RacesFn = unsafe extern "C" fn() -> *const c_char;

/// The executor with some kernels.
pub struct Library {
    launch: LaunchFn,
    late: LateFn,
    sizes: SizesFn,
    races: RacesFn,
    /// Its file, which may have no name any more.
    file: File,
    /// Lines that were looked up.
    found: Mutex<HashMap<u64, String>>,
    /// It runs one kernel at a time.
    running: Mutex<()>,
}

/// Kernels that ran with the race detector.
static WATCHED: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());

/// Names of the kernels that this process has run with the race detector.
pub fn watched() -> BTreeSet<&'static str> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// How kernels are compiled for the race detector.
const WATCHING: &[&str] = &["-g1", "-fsanitize=thread"];

/// The executor, with the race detector (`cuda/host/races.h`) or without.
fn library(races: bool) -> &'static Library {
    static LIBRARIES: [OnceLock<Library>; 2] = [const { OnceLock::new() }; 2];
    LIBRARIES[usize::from(races)].get_or_init(|| {
        let host = root().join("cuda/host");
        build(&host.join("kernels_host.cpp"), if races { WATCHING } else { &[] })
    })
}

const NO_COMPILER: &str = "g++ is needed to run the kernels on the CPU";

/// A number for what a library is made of: every file of `cuda`, `kernels`, how they are compiled, and by what.
fn ingredients(kernels: &Path, flags: &[&str]) -> u64 {
    let folders = [root().join("cuda"), root().join("cuda/host")];
    let entries = folders.iter().flat_map(|f| std::fs::read_dir(f).unwrap());
    let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).filter(|p| p.is_file()).collect();
    files.sort();
    files.push(kernels.to_path_buf());
    let mut h = DefaultHasher::new();
    for file in files {
        (&file, std::fs::read(&file).unwrap()).hash(&mut h);
    }
    let version = Command::new("g++").arg("--version").output().expect(NO_COMPILER);
    (flags, version.stdout).hash(&mut h);
    h.finish()
}

/// `kernels` compiled with the executor: once for all test programs, in 20 seconds.
fn compiled(kernels: &Path, flags: &[&str]) -> PathBuf {
    static BUILDS: AtomicU32 = AtomicU32::new(0);
    let folder = option_env!("CARGO_TARGET_TMPDIR").map_or_else(std::env::temp_dir, PathBuf::from);
    std::fs::create_dir_all(&folder).unwrap();
    let name = kernels.file_stem().unwrap().to_str().unwrap();
    let stem = format!("{name}-{}-", if flags.is_empty() { "plain" } else { "watched" });
    let done = folder.join(format!("{stem}{:016x}.so", ingredients(kernels, flags)));
    if done.is_file() {
        return done;
    }
    for entry in std::fs::read_dir(&folder).unwrap().flatten() {
        // Of older sources. What a program has loaded stays with it.
        let file = entry.file_name();
        if file.to_str().is_some_and(|f| f.starts_with(&stem) && f.ends_with(".so")) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let own = format!("{stem}{}-{}", std::process::id(), BUILDS.fetch_add(1, Ordering::Relaxed));
    let [object, out] = ["o", "part"].map(|end| folder.join(format!("{own}.{end}")));
    let compile = |arguments: &mut Command| {
        let command = arguments.args(["-std=c++20", "-fPIC", "-Wno-unknown-pragmas"]);
        let status = command.status().expect(NO_COMPILER);
        assert!(status.success(), "g++ could not compile cuda/host: {command:?}");
    };
    // Two steps, since the executor itself is not to be watched.
    compile(Command::new("g++").args(["-O1", "-c"]).args(flags).arg(kernels).arg("-o").arg(&object));
    let executor =
        ["executor.cpp", "memory.cpp", "races.cpp"].map(|file| root().join("cuda/host").join(file));
    compile(Command::new("g++").args(["-O2", "-shared"]).arg(&object).args(executor).arg("-o").arg(&out));
    let _ = std::fs::remove_file(object);
    // Whole or not there, whoever else builds it.
    std::fs::rename(out, &done).unwrap();
    done
}

/// Loads `kernels`, compiled with the executor.
fn build(kernels: &Path, flags: &[&str]) -> Library {
    let out = compiled(kernels, flags);
    let path = CString::new(out.to_str().unwrap()).unwrap();
    // SAFETY: a library built from this repository; its functions have these types.
    unsafe {
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        assert!(!handle.is_null(), "cannot load {}", out.display());
        let symbol = |name: &CStr| {
            let at = libc::dlsym(handle, name.as_ptr());
            assert!(!at.is_null(), "no symbol {name:?}");
            at
        };
        Library {
            launch: std::mem::transmute::<*mut c_void, LaunchFn>(symbol(c"polar_host_launch")),
            late: std::mem::transmute::<*mut c_void, LateFn>(symbol(c"polar_host_late")),
            sizes: std::mem::transmute::<*mut c_void, SizesFn>(symbol(c"polar_host_sizes")),
            races: std::mem::transmute::<*mut c_void, RacesFn>(symbol(c"polar_host_races")),
            file: File::open(&out).unwrap(),
            found: Mutex::default(),
            running: Mutex::new(()),
        }
    }
}

impl Library {
    /// Kernels of a file of its own, with the race detector.
    pub fn watching(kernels: &Path) -> Library {
        build(kernels, WATCHING)
    }

    /// Runs a kernel of which no block reads or writes outside of what `params` point to.
    pub fn launch(
        &self,
        name: &str,
        launch: &Launch,
        seed: u32,
        late: &[(Ptr, u64)],
        params: &[u8],
    ) -> Result<()> {
        let c_name = CString::new(name).unwrap();
        let aligned: Vec<u64> = params
            .chunks(8)
            .map(|c| {
                let mut word = [0; 8];
                word[..c.len()].copy_from_slice(c);
                u64::from_le_bytes(word)
            })
            .collect();
        let _one = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the parameters point into memory of the caller, as the kernel expects; a kernel
        // that reads outside it is what the tests look for.
        let status = unsafe {
            for (at, bytes) in late {
                (self.late)(at.0 as *const c_void, *bytes);
            }
            let (x, y) = launch.grid;
            let params = aligned.as_ptr().cast();
            let status = (self.launch)(
                c_name.as_ptr(),
                x,
                y,
                launch.threads,
                launch.shared,
                launch.cluster,
                seed,
                params,
            );
            (self.late)(std::ptr::null(), 0);
            status
        };
        match status {
            0 => Ok(()),
            1 => Err(Error::unsupported(format!("no kernel {name:?}"))),
            3 => {
                Err(Error::invalid(format!("kernel {name:?}: a block does not wait for the kernels before")))
            }
            4 => Err(Error::invalid(format!("kernel {name:?}: races: {}", self.race()))),
            5 => Err(Error::invalid(format!(
                "kernel {name:?}: {} blocks of {} threads in clusters of {}",
                launch.grid.0, launch.threads, launch.cluster
            ))),
            _ => Err(Error::invalid(format!("kernel {name:?}: threads wait for ever"))),
        }
    }

    /// What the detector found in the last launch, with lines of the source.
    fn race(&self) -> String {
        // SAFETY: a text that stays until the next launch, by the one who launched.
        let race = unsafe { CStr::from_ptr((self.races)()) }.to_str().unwrap();
        let places = race.split("[+").skip(1).filter_map(|rest| rest.split(']').next());
        let lines: Vec<String> = places.map(|at| self.lines(u64::from_str_radix(at, 16).unwrap())).collect();
        format!("{race}: {}", lines.join("; "))
    }

    /// Lines of the source that a call returns to, the innermost first: `a.cuh:12 b.cu:34`.
    fn lines(&self, address: u64) -> String {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.entry(address).or_insert_with(|| self.look_up(address)).clone()
    }

    fn look_up(&self, address: u64) -> String {
        let file = format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd());
        let call = format!("{:x}", address.saturating_sub(1));
        let found = Command::new("addr2line").args(["-s", "-i", "-e", &file, &call]).output();
        let found = found.expect("addr2line is needed to name a race").stdout;
        String::from_utf8_lossy(&found)
            .split_whitespace()
            .filter(|l| l.contains(':'))
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// Sizes of the parameter structs as C++ sees them.
pub fn sizes() -> Vec<usize> {
    let mut out = [0u32; 64];
    // SAFETY: the function writes fewer than 64 sizes.
    let n = unsafe { (library(false).sizes)(out.as_mut_ptr()) };
    out[..n as usize].iter().map(|&s| s as usize).collect()
}

const GUARD: usize = 4096;

/// A launch and its parameters.
type Recorded = (Launch, Vec<u8>);

/// What a device is told to do.
#[derive(Clone)]
enum Entry {
    Main(Recorded),
    Beside(Recorded),
    Fork,
    Join,
}

/// Side work that may run, and the order in which it does: with seed 0 when the main stream waits for it,
/// else whenever a coin says so.
#[derive(Default)]
struct Side {
    forked: bool,
    waiting: std::collections::VecDeque<Recorded>,
    coin: u32,
}

impl Side {
    fn heads(&mut self) -> bool {
        self.coin = self.coin.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.coin >> 31 == 1
    }
}

/// The device.
pub struct Host {
    memory: Mutex<HashMap<u64, Vec<u8>>>,
    recording: Mutex<Option<Vec<Entry>>>,
    programs: Mutex<HashMap<u64, Vec<Entry>>>,
    side: Mutex<Side>,
    host_memory: Mutex<HashMap<usize, Vec<u64>>>,
    /// Copies under way: to, from, bytes.
    copies: Mutex<Vec<(usize, usize, usize)>>,
    /// Launches that were not recorded, recordings begun, programs run.
    pub launches: AtomicU32,
    pub recordings: AtomicU32,
    pub replays: AtomicU32,
    /// Launches and replays until one fails; below zero: never.
    pub fail_in: AtomicI64,
    /// Launches do nothing: for what surrounds them.
    pub idle: AtomicBool,
    /// Order of threads and blocks: 0 in order, else shuffled by this seed.
    pub seed: AtomicU32,
    /// Whether kernels run with the race detector.
    pub races: AtomicBool,
    pub multiprocessors: u32,
    /// Whether it has the kernels of compute capability 9.0.
    pub warpgroups: bool,
    /// Bytes that `free_memory` speaks of before anything is taken.
    pub capacity: AtomicU64,
    /// Bytes taken now.
    pub taken: AtomicU64,
    /// Memory that the kernels before each launch are still writing: address and bytes.
    pub late: Late,
    /// Whether `product` does what a vendor's library would.
    pub library: bool,
}

pub type Late = Arc<Mutex<Vec<(Ptr, u64)>>>;

impl Host {
    pub fn new() -> Host {
        Host {
            memory: Mutex::default(),
            recording: Mutex::default(),
            programs: Mutex::default(),
            host_memory: Mutex::default(),
            copies: Mutex::default(),
            launches: AtomicU32::new(0),
            recordings: AtomicU32::new(0),
            replays: AtomicU32::new(0),
            fail_in: AtomicI64::new(-1),
            idle: AtomicBool::new(false),
            side: Mutex::default(),
            seed: AtomicU32::new(0),
            races: AtomicBool::new(false),
            multiprocessors: 3,
            warpgroups: true,
            capacity: AtomicU64::new(1 << 30),
            taken: AtomicU64::new(0),
            late: Late::default(),
            library: false,
        }
    }

    /// Whether a recording is open.
    pub fn is_recording(&self) -> bool {
        self.recording.lock().unwrap().is_some()
    }

    /// Programs kept.
    pub fn programs(&self) -> usize {
        self.programs.lock().unwrap().len()
    }

    fn finish_copies(&self) {
        for (to, from, bytes) in self.copies.lock().unwrap().drain(..) {
            // SAFETY: both ends live, by the trait's contract.
            unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        }
    }

    fn fails(&self) -> Result<()> {
        if self.fail_in.load(Ordering::Relaxed) >= 0 && self.fail_in.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(Error::new(polar_sparsity::Status::E_DEVICE, "a launch that was to fail"));
        }
        Ok(())
    }

    fn fits(&self, launch: &Launch) -> Result<()> {
        if launch.shared > self.shared_per_block() {
            return Err(Error::new(Status::E_DEVICE, format!("{} bytes of shared memory", launch.shared)));
        }
        self.fails()
    }

    /// Notes what is to be done, or does it.
    fn take(&self, entry: Entry) -> Result<()> {
        if self.idle.load(Ordering::Relaxed) {
            return Ok(());
        }
        if let Some(list) = self.recording.lock().unwrap().as_mut() {
            list.push(entry);
            return Ok(());
        }
        if let Entry::Main(_) | Entry::Beside(_) = entry {
            self.finish_copies();
            self.launches.fetch_add(1, Ordering::Relaxed);
        }
        self.act(&entry)
    }

    fn act(&self, entry: &Entry) -> Result<()> {
        let seed = self.seed.load(Ordering::Relaxed);
        let mut side = self.side.lock().unwrap();
        match entry {
            Entry::Fork => {
                assert!(!side.forked, "a fork in a fork");
                side.forked = true;
                side.coin ^= seed;
            }
            Entry::Beside(work) if side.forked => side.waiting.push_back(work.clone()),
            Entry::Beside((launch, params)) => self.run(launch, params)?,
            Entry::Join => {
                while let Some((launch, params)) = side.waiting.pop_front() {
                    self.run(&launch, &params)?;
                }
                side.forked = false;
            }
            Entry::Main((launch, params)) => {
                while seed != 0 && !side.waiting.is_empty() && side.heads() {
                    let (launch, params) = side.waiting.pop_front().unwrap();
                    self.run(&launch, &params)?;
                }
                self.run(launch, params)?;
            }
        }
        Ok(())
    }

    fn run(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        let name = NAMES[launch.kernel.0 as usize];
        let races = self.races.load(Ordering::Relaxed);
        if races {
            WATCHED.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
        }
        let late = self.late.lock().unwrap();
        library(races).launch(name, launch, self.seed.load(Ordering::Relaxed), &late, params)
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
    fn warpgroups(&self) -> bool {
        self.warpgroups
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
    fn alloc_host(&self, bytes: usize) -> Result<NonNull<u8>> {
        let mut memory = vec![u64::MAX; bytes.div_ceil(16) * 2];
        let at = NonNull::new(memory.as_mut_ptr().cast::<u8>()).unwrap();
        self.host_memory.lock().unwrap().insert(at.as_ptr() as usize, memory);
        Ok(at)
    }
    fn free_host(&self, at: NonNull<u8>) {
        self.finish_copies();
        assert!(self.host_memory.lock().unwrap().remove(&(at.as_ptr() as usize)).is_some(), "freed twice");
    }
    fn send(&self, to: Ptr, from: &[u8]) -> Result<()> {
        self.copies.lock().unwrap().push((to.0 as usize, from.as_ptr() as usize, from.len()));
        Ok(())
    }
    fn fetch(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        self.copies.lock().unwrap().push((to.as_mut_ptr() as usize, from.0 as usize, to.len()));
        Ok(())
    }
    fn mark(&self, old: u64) -> Result<u64> {
        Ok(old.max(1))
    }
    fn reached(&self, _: u64) -> Result<()> {
        self.finish_copies();
        Ok(())
    }
    fn unmark(&self, _: u64) {}
    fn copy_in(&self, to: Ptr, from: &[u8]) -> Result<()> {
        self.finish_copies();
        // SAFETY: `to` lies in memory this device gave, long enough by the caller's contract.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.0 as *mut u8, from.len()) };
        Ok(())
    }
    fn copy_out(&self, to: &mut [u8], from: Ptr) -> Result<()> {
        self.finish_copies();
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }
    fn zero(&self, at: Ptr, bytes: u64) -> Result<()> {
        self.finish_copies();
        // SAFETY: as in `copy_in`.
        unsafe { std::ptr::write_bytes(at.0 as *mut u8, 0, bytes as usize) };
        Ok(())
    }
    fn start(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        self.fits(launch)?;
        if self.idle.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.take(Entry::Main((*launch, params.to_vec())))
    }
    fn fork(&self) -> Result<()> {
        self.take(Entry::Fork)
    }
    fn start_beside(&self, launch: &Launch, params: &[u8]) -> Result<()> {
        self.fits(launch)?;
        if self.idle.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.take(Entry::Beside((*launch, params.to_vec())))
    }
    fn join_early(&self) -> Result<()> {
        self.join()
    }
    fn join(&self) -> Result<()> {
        self.take(Entry::Join)
    }
    fn product(&self, of: &Product<'_>) -> Result<bool> {
        if !self.library {
            return Ok(false);
        }
        let &Product { params: p, transposed, dtype, beside, .. } = of;
        let (layout, t) =
            (if transposed { "nn" } else { "nt" }, if dtype == DType::F16 { "f16" } else { "bf16" });
        let name = format!("linear_tile_{layout}_{t}");
        let kernel = find(&name).expect("a kernel");
        let grid = (p.rows.div_ceil(128), p.n.div_ceil(128));
        let launch = Launch::new(kernel, grid, 256, 3 * (128 + 128) * 64 * 2);
        if let Some((launch, params)) = beside {
            self.fork()?;
            self.start_beside(launch, params)?;
        }
        device::start(self, &launch, &LinearParams { splits: 1, ..*p })?;
        if beside.is_some() {
            self.join()?;
        }
        Ok(true)
    }
    fn synchronize(&self) -> Result<()> {
        self.finish_copies();
        Ok(())
    }
    fn finished(&self, _: u64) -> Result<bool> {
        self.finish_copies();
        Ok(true)
    }
    fn record(&self) -> Result<bool> {
        self.recordings.fetch_add(1, Ordering::Relaxed);
        let before = self.recording.lock().unwrap().replace(Vec::new());
        assert!(before.is_none(), "a recording within a recording");
        Ok(true)
    }
    fn recorded(&self, _: bool) -> Result<u64> {
        self.join()?;
        let list = self.recording.lock().unwrap().take().unwrap_or_default();
        let id = u64::from(self.recordings.load(Ordering::Relaxed));
        self.programs.lock().unwrap().insert(id, list);
        Ok(id)
    }
    fn unrecord(&self) {
        *self.recording.lock().unwrap() = None;
    }
    fn replay(&self, program: u64) -> Result<()> {
        self.fails()?;
        self.finish_copies();
        self.replays.fetch_add(1, Ordering::Relaxed);
        let list = self.programs.lock().unwrap().get(&program).cloned();
        let list = list.expect("a program that was recorded and not forgotten");
        // Side work may start at the fork: move it there.
        let mut order: Vec<Entry> = Vec::new();
        let mut fork = None;
        for entry in list {
            match entry {
                Entry::Fork => fork = Some(order.len() + 1),
                Entry::Join => fork = None,
                Entry::Beside(_) => {
                    if let Some(at) = fork.as_mut() {
                        order.insert(*at, entry);
                        *at += 1;
                        continue;
                    }
                }
                Entry::Main(_) => {}
            }
            order.push(entry);
        }
        assert!(fork.is_none(), "a program ends with side work open");
        order.iter().try_for_each(|entry| self.act(entry))
    }
    fn forget(&self, program: u64) {
        self.programs.lock().unwrap().remove(&program);
    }
}
