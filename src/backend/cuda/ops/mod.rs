//! Operators for hosts that own their weights and KV cache: what the C functions `polar_op_*` check and
//! launch. Sizes come from the host and lie in its structs; everything else (lengths, pages, what is
//! kept) is on the device and stays there, so a host may record these launches into a graph of its own.

mod attention;
#[cfg(feature = "cuda")]
pub mod context;
mod mlp;
mod select;

pub use attention::Attention;
pub use mlp::{Mlp, NeuronSelection};
pub use select::HeadSelection;

use super::launch::{Kernels, Launch};
use super::memory::Places;
use super::params::{Params, Ptr};
use crate::dtype::DType;
use crate::error::{Error, Result, try_with_capacity};
use std::cell::Cell;

/// Where operators launch: a stream of the host.
pub trait Launcher {
    /// Starts a kernel; `early`: possibly before the one ahead of it ends, for which it waits by itself.
    fn start(&self, launch: &Launch, params: &[u8], early: bool) -> Result<()>;
}

/// Types, head sizes and groups with kernels.
const DTYPES: [DType; 2] = [DType::BF16, DType::F16];
const HEAD_DIMS: [u32; 5] = [64, 80, 96, 128, 256];
const GROUPS: u32 = 16;
/// Most sequences or rows of a call.
const MAX_ROWS: u32 = 1 << 16;
/// Widest matrix side.
const MAX_WIDTH: u32 = 1 << 20;

/// The kernels for one GPU, found once.
pub struct Ops {
    kernels: Vec<Option<Kernels>>,
    multiprocessors: u32,
    shared_per_block: u32,
}

impl Ops {
    /// For a GPU with so many multiprocessors and so much shared memory for a block; whether it has products by
    /// warpgroups.
    pub fn new(multiprocessors: u32, shared_per_block: u32, warpgroups: bool) -> Result<Ops> {
        let mut kernels = try_with_capacity(DTYPES.len() * HEAD_DIMS.len() * GROUPS as usize, "kernels")?;
        for dtype in DTYPES {
            for head_dim in HEAD_DIMS {
                for group in 1..=GROUPS {
                    let found = Kernels::new(dtype, head_dim, group, multiprocessors, shared_per_block);
                    kernels.push(found.ok().map(|k| k.with_warpgroups(warpgroups)));
                }
            }
        }
        Ok(Ops { kernels, multiprocessors, shared_per_block })
    }

    /// The kernels for a shape, or why there are none.
    fn kernels(&self, dtype: DType, head_dim: u32, group: u32) -> Result<&Kernels> {
        let place = |dtypes: usize, dims: usize| {
            let group = group.checked_sub(1).filter(|g| *g < GROUPS)?;
            self.kernels[(dtypes * HEAD_DIMS.len() + dims) * GROUPS as usize + group as usize].as_ref()
        };
        let found =
            DTYPES.iter().position(|d| *d == dtype).zip(HEAD_DIMS.iter().position(|h| *h == head_dim));
        if let Some(kernels) = found.and_then(|(d, h)| place(d, h)) {
            return Ok(kernels);
        }
        Err(Kernels::new(dtype, head_dim, group, self.multiprocessors, self.shared_per_block)
            .err()
            .unwrap_or_else(|| Error::unsupported(format!("head size {head_dim}: no kernel"))))
    }

    /// The kernels that know no heads.
    fn rows(&self, dtype: DType) -> Result<&Kernels> {
        self.kernels(dtype, 64, 1)
    }
}

/// The launches of one call. The first waits, as any kernel does, for all that the host queued before
/// it; since those after it know that this is done, they may start early.
struct Queue<'a> {
    launcher: &'a dyn Launcher,
    started: Cell<bool>,
}

impl<'a> Queue<'a> {
    fn new(launcher: &'a dyn Launcher) -> Queue<'a> {
        Queue { launcher, started: Cell::new(false) }
    }

    /// The next launch waits too: what comes after it may use, before it waits by itself, what the
    /// launches up to now made.
    fn settle(&self) {
        self.started.set(false);
    }

    fn go<P: Params>(&self, launch: &Launch, params: &P) -> Result<()> {
        // SAFETY: `Params` are plain repr(C) structs; their bytes are read only.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const *params).cast::<u8>(), size_of::<P>()) };
        self.launcher.start(launch, bytes, self.started.replace(true))
    }
}

/// A workspace that the host gave, to be cut up from its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Workspace {
    /// Its address, a multiple of 256.
    pub at: Ptr,
    /// Its size.
    pub bytes: u64,
}

impl Workspace {
    /// Places from the workspace, once it is known to be large enough.
    fn places(self, needed: u64) -> Result<Places> {
        pointer("workspace", self.at, 256)?;
        if self.bytes < needed {
            return Err(Error::invalid(format!(
                "workspace_bytes is {}, this call needs {needed}",
                self.bytes
            )));
        }
        Ok(Places::from(self.at))
    }
}

/// What every operator has: sizes that are checked before anything else, and by them a workspace laid out.
trait Operator {
    /// What lies where in the workspace.
    type Layout;

    /// Checks what does not depend on addresses; the kernels for it.
    fn kernels<'a>(&self, ops: &'a Ops) -> Result<&'a Kernels>;

    /// Cuts a workspace up.
    fn layout(&self, k: &Kernels, p: &mut Places) -> Self::Layout;

    /// The host's.
    fn workspace(&self) -> Workspace;

    fn bytes(&self, k: &Kernels) -> u64 {
        let mut p = Places::from(Ptr::NULL);
        self.layout(k, &mut p);
        p.used()
    }

    /// Bytes of workspace it needs.
    fn needed(&self, ops: &Ops) -> Result<u64> {
        Ok(self.bytes(self.kernels(ops)?))
    }

    /// What lies where in the host's workspace, once it is known to be large enough.
    fn places(&self, k: &Kernels) -> Result<Self::Layout> {
        Ok(self.layout(k, &mut self.workspace().places(self.bytes(k))?))
    }
}

/// Floats that a product leaves.
fn sum_floats(splits: u32, rows: u32, columns: u32) -> usize {
    splits as usize * rows as usize * columns as usize
}

/// An address that must be there, a multiple of `align`.
fn pointer(name: &str, at: Ptr, align: u64) -> Result<()> {
    if at == Ptr::NULL {
        return Err(Error::invalid(format!("{name} is NULL")));
    }
    optional(name, at, align)
}

/// An address that may be missing.
fn optional(name: &str, at: Ptr, align: u64) -> Result<()> {
    if at.0.is_multiple_of(align) {
        return Ok(());
    }
    Err(Error::invalid(format!("{name} is at {:#x}, it must be a multiple of {align}", at.0)))
}

/// A number within `1..=most`.
fn count(name: &str, value: u32, most: u32) -> Result<()> {
    match value {
        0 => Err(Error::invalid(format!("{name} is 0"))),
        v if v <= most => Ok(()),
        v => Err(Error::limit(format!("{name} is {v}, at most {most} are supported"))),
    }
}

/// A width of rows that kernels copy 16 bytes at a time.
fn width(name: &str, value: u32) -> Result<()> {
    count(name, value, MAX_WIDTH)?;
    if value.is_multiple_of(8) {
        return Ok(());
    }
    Err(Error::invalid(format!("{name} is {value}, it must be a multiple of 8")))
}
