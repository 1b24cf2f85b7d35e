//! The operator level: kernels on the host's device pointers, page tables and streams.

use super::constants::polar_status;
use super::guard::{guard, guard_free};
use super::op_convert as convert;
use super::op_types::*;
use super::types::polar_error;
use super::{copy, handle};
use crate::engine::ops::{Launcher, OpLibrary, Ops};
use crate::error::{Result, Status};
use crate::sys::fork;
use std::ffi::c_void;

/// Tells the bytes of workspace that an operator needs.
fn workspace<C: copy::Extensible, O>(
    (library, op, bytes, err): (*const polar_op_library, *const C, *mut u64, *mut polar_error),
    convert: fn(&C) -> Result<O>,
    needed: fn(&Ops, &O) -> Result<u64>,
) -> polar_status {
    guard(err, |call| {
        let ops = call.op_library(library)?.ops();
        let out = copy::out(bytes, "bytes")?;
        out.write(needed(ops, &convert(&copy::required(op)?)?)?);
        Ok(Status::OK)
    })
}

/// Starts an operator's kernels on a stream of the host.
fn start<C: copy::Extensible, O>(
    (library, op, stream, err): (*const polar_op_library, *const C, *mut c_void, *mut polar_error),
    convert: fn(&C) -> Result<O>,
    run: fn(&Ops, &O, &dyn Launcher) -> Result<()>,
) -> polar_status {
    guard(err, |call| {
        let library = call.op_library(library)?;
        let op = convert(&copy::required(op)?)?;
        library.on(stream, |ops, launcher| run(ops, &op, launcher))?;
        Ok(Status::OK)
    })
}

/// Loads the kernels into the CUDA context that is current on this thread, whichever it is; hosts of the
/// CUDA runtime (torch too) have one after their first call. The context is the host's: it is not
/// changed, synchronised or kept alive.
///
/// This and everything that starts with `polar_op_` needs no `polar_context`. After this call operators
/// allocate nothing, load nothing and wait for nothing, so they may be captured into the host's graphs.
///
/// Threads: any with a current context. Ownership: `*out` is the caller's, to be freed with
/// `polar_op_library_free`.
/// Errors: `POLAR_E_INVALID` (no current context), `POLAR_E_UNSUPPORTED` (a build without kernels, or none
/// for this GPU), `POLAR_E_NO_DRIVER`, `POLAR_E_NOMEM`, `POLAR_E_DEVICE_NOMEM`, `POLAR_E_DEVICE`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_library_create(
    out: *mut *mut polar_op_library,
    err: *mut polar_error,
) -> polar_status {
    guard(err, |_| {
        let out = copy::out(out, "out")?;
        fork::watch()?;
        out.write(handle::create(OpLibrary::of_thread()?)?);
        Ok(Status::OK)
    })
}

/// Unloads the kernels. Before that the host waits for their work and destroys graphs that hold them;
/// its context still exists. NULL does nothing.
///
/// Threads: any, whatever context is current; must not race with a call on this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn polar_op_library_free(library: *mut polar_op_library) {
    guard_free(|| handle::free(library));
}

/// Bytes of device memory that `polar_op_attention_plan` and `polar_op_attention_run` need as
/// `op->workspace`. Depends on the sizes only; addresses are not looked at. One workspace serves all
/// layers that keep the same number of heads, one after another.
///
/// Threads: any, at any time. Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_LIMIT`,
/// `POLAR_E_UNSUPPORTED` (no kernel for this shape).
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_attention_workspace(
    library: *const polar_op_library,
    op: *const polar_op_attention,
    bytes: *mut u64,
    err: *mut polar_error,
) -> polar_status {
    workspace((library, op, bytes, err), convert::attention, Ops::attention_workspace)
}

/// Starts the kernel that shares the work of a decode step among the multiprocessors, from `seq_lens` and
/// `keep`, into the workspace. Once per step and workspace, before its first `polar_op_attention_run`: the
/// work does not depend on which heads won, nor on q, pages, output and `selected`, which are not looked at.
///
/// Threads: any in the library's context; one call at a time per workspace. Asynchronous on `stream`
/// (`CUstream` or `cudaStream_t`; NULL = the default stream).
/// Errors: `POLAR_E_INVALID`, `POLAR_E_ABI`, `POLAR_E_LIMIT`, `POLAR_E_UNSUPPORTED`, `POLAR_E_DEVICE`,
/// `POLAR_E_DEVICE_LOST`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_attention_plan(
    library: *const polar_op_library,
    op: *const polar_op_attention,
    stream: *mut c_void,
    err: *mut polar_error,
) -> polar_status {
    start((library, op, stream, err), convert::attention, Ops::attention_plan)
}

/// Starts the attention of one layer. The sizes, `window` and the workspace are those of the plan.
///
/// Threads: as `polar_op_attention_plan`. Errors: likewise.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_attention_run(
    library: *const polar_op_library,
    op: *const polar_op_attention,
    stream: *mut c_void,
    err: *mut polar_error,
) -> polar_status {
    start((library, op, stream, err), convert::attention, Ops::attention)
}

/// Bytes of device memory that `polar_op_head_selection_run` needs. Addresses are not looked at, except
/// for whether `logits` is 0.
///
/// Threads: as `polar_op_attention_workspace`. Errors: likewise.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_head_selection_workspace(
    library: *const polar_op_library,
    op: *const polar_op_head_selection,
    bytes: *mut u64,
    err: *mut polar_error,
) -> polar_status {
    workspace((library, op, bytes, err), convert::head_selection, Ops::head_selection_workspace)
}

/// Starts the router and its top-k: two kernels, one with `logits`.
///
/// Threads: as `polar_op_attention_plan`. Errors: likewise.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_head_selection_run(
    library: *const polar_op_library,
    op: *const polar_op_head_selection,
    stream: *mut c_void,
    err: *mut polar_error,
) -> polar_status {
    start((library, op, stream, err), convert::head_selection, Ops::head_selection)
}

/// Bytes of device memory that `polar_op_neuron_selection_run` needs. Addresses are not looked at, except
/// for whether `logits` is 0.
///
/// Threads: as `polar_op_attention_workspace`. Errors: likewise.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_neuron_selection_workspace(
    library: *const polar_op_library,
    op: *const polar_op_neuron_selection,
    bytes: *mut u64,
    err: *mut polar_error,
) -> polar_status {
    workspace((library, op, bytes, err), convert::neuron_selection, Ops::neuron_selection_workspace)
}

/// Starts the MLP router and its selection. It needs the layer's input only, so it may run on a stream
/// beside the attention.
///
/// Threads: as `polar_op_attention_plan`. Errors: likewise.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_neuron_selection_run(
    library: *const polar_op_library,
    op: *const polar_op_neuron_selection,
    stream: *mut c_void,
    err: *mut polar_error,
) -> polar_status {
    start((library, op, stream, err), convert::neuron_selection, Ops::neuron_selection)
}

/// Bytes of device memory that `polar_op_mlp_run` needs. Addresses are not looked at, except for whether
/// `index` is 0.
///
/// Threads: as `polar_op_attention_workspace`. Errors: likewise.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_mlp_workspace(
    library: *const polar_op_library,
    op: *const polar_op_mlp,
    bytes: *mut u64,
    err: *mut polar_error,
) -> polar_status {
    workspace((library, op, bytes, err), convert::mlp, Ops::mlp_workspace)
}

/// Starts the MLP: gathered up product, ReLU, gathered down product.
///
/// Threads: as `polar_op_attention_plan`. Errors: likewise.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn polar_op_mlp_run(
    library: *const polar_op_library,
    op: *const polar_op_mlp,
    stream: *mut c_void,
    err: *mut polar_error,
) -> polar_status {
    start((library, op, stream, err), convert::mlp, Ops::mlp)
}
