//! Products of many rows through cuBLASLt, where the library is found. It is optional: without it the
//! tiled kernel does them, more slowly.

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

/// Shape of a product: rows, n, k, whether the matrix is stored `[k, n]`, f16.
type Key = (u32, u32, u32, bool, bool);

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
    plans: Mutex<HashMap<Key, Option<Plan>>>,
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
        Some(Library { handle, workspace, plans: Mutex::default() })
    }

    /// Starts the product on `stream`; false: the library has no algorithm for it.
    pub(super) fn product(
        &self,
        p: &LinearParams,
        transposed: bool,
        dtype: DType,
        stream: *mut c_void,
    ) -> Result<bool> {
        let key = (p.rows, p.n, p.k, transposed, dtype == DType::F16);
        let mut plans = self.plans.lock().unwrap_or_else(|e| e.into_inner());
        if !plans.contains_key(&key) {
            let plan = self.plan(key)?;
            plans.insert(key, plan);
        }
        let Some(Some(plan)) = plans.get(&key) else { return Ok(false) };
        let (one, zero) = (1f32, 0f32);
        // SAFETY: descriptors are alive, addresses hold the shapes they say, scalars are f32 on the host
        // as the operation was made for.
        let status = unsafe {
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
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        };
        check("product", status)?;
        Ok(true)
    }

    /// The library counts columns first, so `out` is n x rows, from `w` (transposed unless stored
    /// `[k, n]`) and `x` k x rows.
    fn plan(&self, (rows, n, k, transposed, half): Key) -> Result<Option<Plan>> {
        use sys::cublasLtMatmulDescAttributes_t as D;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        use sys::cudaDataType as T;
        let element = if half { T::CUDA_R_16F } else { T::CUDA_R_16BF };
        let (rows, n, k) = (u64::from(rows), u64::from(n), u64::from(k));
        let mut plan = Plan {
            operation: null_mut(),
            weights: null_mut(),
            x: null_mut(),
            out: null_mut(),
            // SAFETY: an opaque plain struct that the heuristic overwrites.
            algorithm: unsafe { std::mem::zeroed() },
        };
        // SAFETY: every out-parameter is local or a field of `plan`; attribute sizes match their types.
        // On an early error the few descriptors made so far are lost, as at the end of the process.
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
            let mut preference = null_mut();
            check("preference", sys::cublasLtMatmulPreferenceCreate(&mut preference))?;
            let bytes = WORKSPACE;
            check(
                "workspace",
                sys::cublasLtMatmulPreferenceSetAttribute(
                    preference,
                    P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    (&raw const bytes).cast(),
                    size_of::<usize>(),
                ),
            )?;
            let mut found = 0;
            let mut best: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation,
                plan.weights,
                plan.x,
                plan.out,
                plan.out,
                preference,
                1,
                &mut best,
                &mut found,
            );
            let _ = sys::cublasLtMatmulPreferenceDestroy(preference);
            if status != cublasStatus_t::CUBLAS_STATUS_SUCCESS || found == 0 {
                destroy(&plan);
                return Ok(None);
            }
            plan.algorithm = best.algo;
        }
        Ok(Some(plan))
    }
}

/// # Safety
/// The plan's descriptors were made by the library and are not used again.
unsafe fn destroy(plan: &Plan) {
    // SAFETY: see above.
    unsafe {
        let _ = sys::cublasLtMatmulDescDestroy(plan.operation);
        for layout in [plan.weights, plan.x, plan.out] {
            let _ = sys::cublasLtMatrixLayoutDestroy(layout);
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        let plans = std::mem::take(self.plans.get_mut().unwrap_or_else(|e| e.into_inner()));
        // SAFETY: the handles are this object's own, and no work of theirs is under way: the driver
        // waits for the stream first.
        unsafe {
            for plan in plans.values().flatten() {
                destroy(plan);
            }
            let _ = sys::cublasLtDestroy(self.handle);
        }
    }
}
