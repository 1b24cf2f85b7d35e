//! Products of many rows through cuBLASLt, where the library is found. It is optional: without it our
//! own kernels do them, prompts more slowly.
//!
//! When a shape is first met, the library's proposals and our own kernel are timed and the fastest is
//! kept until the process ends: a shape's bits do not change within a process, but another process may
//! choose otherwise. Sums are f32 either way. Where another kernel runs beside a product, both are timed together, and of
//! proposals that are about as fast one that leaves room for its blocks is taken: one that was 4 % faster alone, on all
//! multiprocessors, made steps of 64 sequences of OPT-6.7B 2 % slower on an H200, which a contest does not always show.

use super::device::Product;
use super::params::LinearParams;
use crate::dtype::DType;
use crate::error::{Error, Result, Status};
use cudarc::cublaslt::sys::{self, cublasStatus_t};
use cudarc::driver::sys::CUdeviceptr;
use std::collections::HashMap;
use std::ffi::c_void;
use std::panic::catch_unwind;
use std::ptr::null_mut;
use std::sync::Mutex;

/// Device memory the library may use, bytes; NVIDIA's advice for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;

/// Shape of a product: rows, n, k, whether the matrix is stored `[k, n]`, f16; whether something runs beside it.
type Key = (u32, u32, u32, bool, bool, bool);

/// Descriptors and algorithm of one shape.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    weights: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library on one device.
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: CUdeviceptr,
    /// What does each shape; `None`: our own kernel.
    plans: Mutex<HashMap<Key, Option<Plan>>>,
    contests: Mutex<Vec<Choice>>,
}

/// How a product's kernel was chosen: microseconds of each with cold caches, infinite where it did not
/// run.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Rows of x.
    pub rows: u32,
    /// Columns of the result.
    pub n: u32,
    /// Length of the sums.
    pub k: u32,
    /// The matrix is stored `[k, n]`.
    pub transposed: bool,
    /// Timed together with what runs beside it.
    pub beside: bool,
    /// The library's first proposal.
    pub first_us: f32,
    /// The one of them that is best.
    pub best_us: f32,
    /// Share of the device that one takes, by the library's estimate.
    pub best_waves: f32,
    /// Our own kernel.
    pub own_us: f32,
    /// Our own kernel was taken.
    pub own: bool,
}

/// Starts something.
pub(super) type Work<'a> = dyn Fn() -> Result<()> + 'a;

/// How kernels are compared.
pub(super) struct Contest<'a> {
    /// Microseconds of what a closure starts.
    pub(super) time: &'a dyn Fn(&Work<'_>) -> Result<f32>,
    /// Starts our own kernel for the same product, if that competes.
    pub(super) own: Option<&'a Work<'a>>,
    /// Share of the device that what runs beside it takes; 0: nothing does.
    pub(super) beside: f32,
}

/// An algorithm, and how often over its blocks fill the device.
type Proposal = (sys::cublasLtMatmulAlgo_t, f32);

/// Algorithms asked for.
const PROPOSALS: usize = 8;

/// What our own kernel gains beside its own time, microseconds: it starts before the kernel in front
/// of it ends, and so does the kernel behind it. In steps of OPT-6.7B on an H200 with the up product by either: at 1 and
/// 8 rows 5.5 to 6, at 32 2.5.
fn early_start(rows: u32) -> f32 {
    if rows <= 16 { 5.0 } else { 2.0 }
}

// SAFETY: cuBLASLt handles and descriptors may be used from any thread; plans are behind a lock.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

fn check(what: &str, status: cublasStatus_t) -> Result<()> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let mut error = Error::new(Status::E_DEVICE, format!("cuBLASLt, {what}: {status:?}"));
    error.device_code = status as i32;
    Err(error)
}

impl Library {
    /// The library, or `None` where it is not installed. The device's context is current; `workspace`
    /// holds [`WORKSPACE`] bytes for as long as this lives.
    pub(super) fn open(workspace: CUdeviceptr) -> Option<Library> {
        let made = catch_unwind(|| {
            // SAFETY: looks for the library, then makes a handle into a local variable.
            unsafe {
                if !sys::is_culib_present() {
                    return None;
                }
                let mut handle = null_mut();
                (sys::cublasLtCreate(&mut handle) == cublasStatus_t::CUBLAS_STATUS_SUCCESS).then_some(handle)
            }
        });
        let handle = made.ok().flatten()?;
        Some(Library { handle, workspace, plans: Mutex::default(), contests: Mutex::default() })
    }

    /// Starts the product on `stream` if its shape was met before, within `with_side`; false: our own kernel has to.
    pub(super) fn known(
        &self,
        of: &Product<'_>,
        stream: *mut c_void,
        with_side: &dyn Fn(&Work<'_>) -> Result<()>,
    ) -> Result<Option<bool>> {
        let plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        match plans.get(&key(of)) {
            Some(Some(plan)) => {
                with_side(&|| self.start(plan, &plan.algorithm, of.params, stream)).map(|()| Some(true))
            }
            Some(None) => Ok(Some(false)),
            None => Ok(None),
        }
    }

    /// Chooses who does products of this shape, and starts this one as [`Library::known`] does. Without
    /// a contest the library's first proposal is taken.
    pub(super) fn choose(
        &self,
        of: &Product<'_>,
        stream: *mut c_void,
        contest: Option<&Contest<'_>>,
        with_side: &dyn Fn(&Work<'_>) -> Result<()>,
    ) -> Result<bool> {
        let key = key(of);
        let plan = self.fastest(key, of.params, stream, contest)?;
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        // Should another thread have chosen meanwhile, its choice stands.
        let plan = plans.entry(key).or_insert(plan);
        match plan {
            Some(plan) => with_side(&|| self.start(plan, &plan.algorithm, of.params, stream)).map(|()| true),
            None => Ok(false),
        }
    }

    /// The contests so far, in their order.
    pub(super) fn choices(&self) -> Vec<Choice> {
        self.contests.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Forgets every choice.
    pub(super) fn forget(&mut self) {
        self.plans.get_mut().unwrap_or_else(|e| e.into_inner()).clear();
    }

    fn fastest(
        &self,
        key: Key,
        p: &LinearParams,
        stream: *mut c_void,
        contest: Option<&Contest<'_>>,
    ) -> Result<Option<Plan>> {
        let mut plan = Plan::new(key)?;
        let mut proposals = [None; PROPOSALS];
        self.propose(&plan, &mut proposals)?;
        let Some((likeliest, _)) = proposals[0] else { return Ok(None) };
        plan.algorithm = likeliest;
        let Some(contest) = contest else { return Ok(Some(plan)) };
        // A proposal that does not run takes for ever.
        let timed: Vec<Timed> = proposals
            .iter()
            .flatten()
            .map(|(algorithm, waves)| {
                let us = (contest.time)(&|| self.start(&plan, algorithm, p, stream));
                Timed { us: us.unwrap_or(f32::INFINITY), waves: *waves }
            })
            .collect();
        let taken = best_of(&timed, contest.beside);
        let (Timed { us: first_us, .. }, Timed { us: best, waves: best_waves }) = (timed[0], timed[taken]);
        if let Some((algorithm, _)) = proposals.iter().flatten().nth(taken) {
            plan.algorithm = *algorithm;
        }
        let own_us = contest.own.map_or(Ok(f32::INFINITY), contest.time)?;
        let (rows, n, k, transposed, _, beside) = key;
        let own = own_us < best + early_start(rows);
        let choice =
            Choice { rows, n, k, transposed, beside, first_us, best_us: best, best_waves, own_us, own };
        self.contests.lock().unwrap_or_else(|e| e.into_inner()).push(choice);
        Ok((!own).then_some(plan))
    }

    fn start(
        &self,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        p: &LinearParams,
        stream: *mut c_void,
    ) -> Result<()> {
        let (one, zero) = (1f32, 0f32);
        // SAFETY: descriptors are alive, addresses hold the shapes they say, scalars are f32 on the host
        // as the operation was made for.
        check("product", unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.operation,
                (&raw const one).cast(),
                p.w.0 as *const c_void,
                plan.weights,
                p.x.0 as *const c_void,
                plan.x,
                (&raw const zero).cast(),
                p.out.0 as *const c_void,
                plan.out,
                p.out.0 as *mut c_void,
                plan.out,
                algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        })
    }

    /// The library's proposals, the likeliest first.
    fn propose(&self, plan: &Plan, out: &mut [Option<Proposal>; PROPOSALS]) -> Result<()> {
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let mut preference = null_mut();
        let bytes = WORKSPACE;
        let mut found = 0;
        // SAFETY: out-parameters are local, the results' array holds as many as are asked for, and zero
        // bytes are a valid value of that plain struct.
        let results = unsafe {
            let mut results: [sys::cublasLtMatmulHeuristicResult_t; PROPOSALS] = std::mem::zeroed();
            check("preference", sys::cublasLtMatmulPreferenceCreate(&mut preference))?;
            let status = sys::cublasLtMatmulPreferenceSetAttribute(
                preference,
                P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            );
            if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
                // An error here means that it has none.
                let _ = sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle,
                    plan.operation,
                    plan.weights,
                    plan.x,
                    plan.out,
                    plan.out,
                    preference,
                    PROPOSALS as i32,
                    results.as_mut_ptr(),
                    &mut found,
                );
            }
            let _ = sys::cublasLtMatmulPreferenceDestroy(preference);
            check("workspace", status)?;
            results
        };
        let usable = results[..(found.max(0) as usize).min(PROPOSALS)]
            .iter()
            .filter(|r| r.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS && r.workspaceSize <= WORKSPACE);
        for (to, result) in out.iter_mut().zip(usable) {
            *to = Some((result.algo, result.wavesCount));
        }
        Ok(())
    }
}

/// How a proposal did: microseconds, and how often over its blocks fill the device.
#[derive(Clone, Copy)]
struct Timed {
    us: f32,
    waves: f32,
}

/// A proposal that leaves room for what runs beside it may take so much longer than the fastest.
const ROOM_IS_WORTH: f32 = 1.05;

/// Which proposal to take: the fastest, or, beside what takes a share `beside` of the device, the fastest that leaves room
/// for it, if that is about as fast. There is at least one.
fn best_of(timed: &[Timed], beside: f32) -> usize {
    let fastest = |of: &dyn Fn(&Timed) -> bool| {
        let all = timed.iter().enumerate().filter(|(_, t)| of(t));
        all.min_by(|a, b| a.1.us.total_cmp(&b.1.us)).map(|(i, _)| i)
    };
    let best = fastest(&|_| true).unwrap_or(0);
    let limit = ROOM_IS_WORTH * timed[best].us;
    let roomy = |t: &Timed| t.us <= limit && t.waves + beside <= 1.0;
    (beside > 0.0).then(|| fastest(&roomy)).flatten().unwrap_or(best)
}

fn key(of: &Product<'_>) -> Key {
    let p = of.params;
    (p.rows, p.n, p.k, of.transposed, of.dtype == DType::F16, of.beside.is_some())
}

impl Plan {
    /// The library counts columns first, so `out` is n x rows, from `w` (transposed unless stored
    /// `[k, n]`) and `x` k x rows.
    fn new((rows, n, k, transposed, half, _): Key) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        use sys::cudaDataType as T;
        let element = if half { T::CUDA_R_16F } else { T::CUDA_R_16BF };
        let (rows, n, k) = (u64::from(rows), u64::from(n), u64::from(k));
        let mut plan = Plan {
            operation: null_mut(),
            weights: null_mut(),
            x: null_mut(),
            out: null_mut(),
            // SAFETY: an opaque plain struct, replaced by a proposal before it is used.
            algorithm: unsafe { std::mem::zeroed() },
        };
        // SAFETY: every out-parameter is local or a field of `plan`; attribute sizes match their types.
        unsafe {
            let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
            check("operation", sys::cublasLtMatmulDescCreate(&mut plan.operation, sums, T::CUDA_R_32F))?;
            let transpose: i32 = if transposed { 0 } else { 1 };
            check(
                "transposition",
                sys::cublasLtMatmulDescSetAttribute(
                    plan.operation,
                    D::CUBLASLT_MATMUL_DESC_TRANSA,
                    (&raw const transpose).cast(),
                    size_of::<i32>(),
                ),
            )?;
            let (r, c) = if transposed { (n, k) } else { (k, n) };
            check("weights", sys::cublasLtMatrixLayoutCreate(&mut plan.weights, element, r, c, r as i64))?;
            check("input", sys::cublasLtMatrixLayoutCreate(&mut plan.x, element, k, rows, k as i64))?;
            check(
                "output",
                sys::cublasLtMatrixLayoutCreate(&mut plan.out, T::CUDA_R_32F, n, rows, n as i64),
            )?;
        }
        Ok(plan)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by the library for this plan alone; null where making one failed. No
        // work uses descriptors once `cublasLtMatmul` has returned.
        unsafe {
            if !self.operation.is_null() {
                let _ = sys::cublasLtMatmulDescDestroy(self.operation);
            }
            for layout in [self.weights, self.x, self.out].into_iter().filter(|l| !l.is_null()) {
                let _ = sys::cublasLtMatrixLayoutDestroy(layout);
            }
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // Plans end before the handle.
        self.forget();
        // SAFETY: the handle is this object's own, and no work of it is under way: the driver waits
        // for the stream first.
        let _ = unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beside_another_kernel_a_product_that_leaves_room_is_taken_if_it_is_about_as_fast() {
        let of = |timed: &[(f32, f32)], beside| {
            let timed: Vec<_> = timed.iter().map(|&(us, waves)| Timed { us, waves }).collect();
            best_of(&timed, beside)
        };
        let four = [(40.5, 0.73), (40.0, 0.97), (41.0, 0.73), (90.0, 0.2)];
        assert_eq!(of(&four, 0.0), 1);
        assert_eq!(of(&four, 0.2), 0);
        // Too slow, no room for it, none at all.
        assert_eq!(of(&four, 0.5), 1);
        assert_eq!(of(&[(43.0, 0.73), (40.0, 0.97)], 0.2), 1);
        assert_eq!(of(&four, 1.5), 1);
        // One that does not run.
        assert_eq!(of(&[(f32::INFINITY, 0.1), (40.0, 0.97)], 0.2), 1);
        assert_eq!(of(&[(f32::INFINITY, 0.1)], 0.2), 0);
    }
}
