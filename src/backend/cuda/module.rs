//! The kernels as the driver holds them in one CUDA context: loaded once, looked up by place, launched
//! on any stream of that context.

use super::launch::{Launch, NAMES};
use super::probe::check;
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::{CString, c_int, c_void};
use std::ptr::null_mut;

/// The compiled kernels, if this build has any.
#[cfg(polar_kernels)]
pub(super) static FATBIN: Option<&[u8]> = Some(include_bytes!(env!("POLAR_FATBIN")));
/// The compiled kernels, if this build has any.
#[cfg(not(polar_kernels))]
pub(super) static FATBIN: Option<&[u8]> = None;

/// What they were compiled for: `80`, `90a`, …, and `ptx80` where the driver can compile for newer GPUs.
const ARCHS: &str = match option_env!("POLAR_FATBIN_ARCHS") {
    Some(archs) => archs,
    None => "",
};

/// Why a GPU of this compute capability (90 for 9.0) cannot run the kernels of this build, if it cannot.
pub(super) fn missing_kernels(capability: u32) -> Option<String> {
    let shown = format!("compute capability {}.{}", capability / 10, capability % 10);
    if capability < 80 {
        return Some(format!("{shown}, 8.0 is needed"));
    }
    let missing = !runs_on(ARCHS, capability);
    missing.then(|| format!("{shown}, this build has kernels for {ARCHS}"))
}

/// Whether a GPU of this compute capability runs code of this build that is for 9.0 alone.
pub(super) fn has_warpgroups(capability: u32) -> bool {
    capability == 90 && ARCHS.split_whitespace().any(|arch| arch == "90a")
}

fn runs_on(archs: &str, capability: u32) -> bool {
    archs.split_whitespace().any(|arch| {
        let number = |text: &str| text.parse().unwrap_or(u32::MAX);
        match (arch.strip_prefix("ptx"), arch.strip_suffix('a')) {
            (Some(oldest), _) => capability >= number(oldest),
            // Features of one GPU only.
            (_, Some(this)) => capability == number(this),
            // Later members of the same family too.
            _ => capability / 10 == number(arch) / 10 && capability >= number(arch),
        }
    })
}

/// Every kernel, in the context that was current when it was loaded.
pub(super) struct Module {
    handle: sys::CUmodule,
    functions: Vec<sys::CUfunction>,
    /// Kernels may be launched before their predecessor ends (compute capability 9.0 and up).
    starts_early: bool,
}

impl Module {
    /// Loads the kernels into the current context, whose device is called `name` and gives a block up to
    /// `shared_per_block` bytes of shared memory. Nothing is left to be loaded at the first launch, which
    /// may come while a host records a graph.
    pub(super) fn load(name: &str, shared_per_block: u32, starts_early: bool) -> Result<Module> {
        let image = FATBIN.ok_or_else(|| Error::unsupported("CUDA: this build has no kernels"))?;
        let mut module = Module { handle: null_mut(), functions: Vec::new(), starts_early };
        // SAFETY: out-parameters are local; the image is a whole fatbin; functions live as long as the
        // module, which is unloaded below if one is missing.
        unsafe {
            let loaded = sys::cuModuleLoadData(&mut module.handle, image.as_ptr().cast::<c_void>());
            if loaded == CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
                return Err(Error::unsupported(format!("{name}: this build has no kernels for it")));
            }
            check(format_args!("{name}: the kernels do not load"), loaded)?;
            if let Err(error) = module.find(shared_per_block) {
                module.unload();
                return Err(error);
            }
        }
        Ok(module)
    }

    /// # Safety
    /// The module is loaded in the current context.
    unsafe fn find(&mut self, shared_per_block: u32) -> Result<()> {
        use sys::CUfunction_attribute as F;
        for name in NAMES {
            let text = CString::new(*name).map_err(|_| Error::invalid("kernel name"))?;
            let mut function = null_mut();
            // SAFETY: see above; the name is terminated.
            unsafe {
                check(
                    format_args!("kernel {name}"),
                    sys::cuModuleGetFunction(&mut function, self.handle, text.as_ptr()),
                )?;
                for (what, value) in [
                    (F::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_per_block as c_int),
                    (F::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
                ] {
                    check(
                        format_args!("kernel {name}: shared memory"),
                        sys::cuFuncSetAttribute(function, what, value),
                    )?;
                }
                check(format_args!("kernel {name}"), sys::cuFuncLoad(function))?;
            }
            self.functions.push(function);
        }
        Ok(())
    }

    /// Starts a kernel on `stream`. `params` are the bytes of its parameter struct; `early`: where the
    /// device can, before the kernel ahead of it ends, for which every one of ours waits by itself.
    ///
    /// # Safety
    /// The context the module was loaded in is current and `stream` is one of its streams; `params`
    /// point to memory as the kernel expects it.
    pub(super) unsafe fn launch(
        &self,
        launch: &Launch,
        params: &[u8],
        stream: sys::CUstream,
        early: bool,
    ) -> Result<()> {
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: plain structs; zero is a valid value of every field.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if early && self.starts_early {
            attributes[0].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[0].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if launch.cluster > 1 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            let dimensions =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
            attributes[count].value.clusterDim = dimensions;
            count += 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid.0,
            gridDimY: launch.grid.1,
            gridDimZ: 1,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        // SAFETY: each kernel takes one struct by value, whose bytes `params` are; the driver copies
        // them before it returns.
        let result = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                self.functions[launch.kernel.0 as usize],
                arguments.as_mut_ptr(),
                null_mut(),
            )
        };
        check(format_args!("kernel {}", NAMES[launch.kernel.0 as usize]), result)
    }

    /// # Safety
    /// The module's context is current and no kernel of it is used any more.
    pub(super) unsafe fn unload(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: see above.
            let _ = unsafe { sys::cuModuleUnload(std::mem::replace(&mut self.handle, null_mut())) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_run_on_their_family_and_ptx_on_all_that_is_newer() {
        for (archs, runs, not) in [
            ("90a", &[90][..], &[80, 91, 100][..]),
            ("80", &[80, 86, 89], &[75, 90, 120]),
            ("100 120", &[100, 103, 120, 121], &[80, 90, 110]),
            ("80 90a 100 120 ptx80", &[80, 86, 89, 90, 91, 100, 110, 120, 130], &[75]),
            ("", &[], &[80, 90]),
        ] {
            assert!(runs.iter().all(|&c| runs_on(archs, c)), "{archs}");
            assert!(!not.iter().any(|&c| runs_on(archs, c)), "{archs}");
        }
        assert_eq!(missing_kernels(75).as_deref(), Some("compute capability 7.5, 8.0 is needed"));
    }
}
