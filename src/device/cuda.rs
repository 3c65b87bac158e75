//! NVIDIA GPUs through CUDA: those of this machine, or what it lacks for them.
//!
//! The program is linked to nothing of CUDA. When it runs it needs the driver, NVRTC, which compiles its kernels, and the header files
//! that these include.

use serde::Serialize;

/// An NVIDIA GPU that CUDA computes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CudaGpu {
    /// Its place in CUDA's list: `--device cuda:{index}`.
    pub index: usize,
    /// The device's name, as its driver spells it.
    pub name: String,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// The compute capability, major and minor.
    pub compute_capability: (u32, u32),
}

impl CudaGpu {
    /// Whether it computes in `f16`, on tensor cores: from Volta on.
    pub fn computes_f16(&self) -> bool {
        self.compute_capability >= (7, 0)
    }

    /// Whether it computes in `bf16`: from Ampere on.
    pub fn computes_bf16(&self) -> bool {
        self.compute_capability >= (8, 0)
    }

    /// Its name in burn.
    #[cfg(feature = "cuda")]
    pub fn device(&self) -> burn_cuda::CudaDevice {
        burn_cuda::CudaDevice::new(self.index)
    }

    /// The largest tensor: cubecl's largest page.
    pub fn shard_bytes(&self) -> u64 {
        self.memory_bytes / 4
    }
}

/// What is missing for CUDA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What there is not; all of it.
    pub problem: String,
    /// How to come by it.
    pub hint: String,
}

/// The GPUs, or why there are none.
pub type CudaGpus = Result<Vec<CudaGpu>, Missing>;

/// Lists the GPUs that CUDA computes on; at least one, or what is missing.
///
/// # Errors
/// If this build has no CUDA, or the machine lacks the driver, a GPU, NVRTC or the headers.
#[cfg(not(feature = "cuda"))]
pub fn gpus() -> CudaGpus {
    Err(Missing {
        problem: "this build has no CUDA".to_owned(),
        hint: "`cargo build --release --features cuda` builds it in; --device wgpu runs NVIDIA GPUs without"
            .to_owned(),
    })
}

#[cfg(feature = "cuda")]
pub use found::{driver_and_compiler, gpus};

#[cfg(feature = "cuda")]
mod found {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::PathBuf;

    use burn::cubecl::cuda::install;
    use cudarc::driver::result::{self as driver, DriverError};
    use cudarc::driver::sys::{self, CUdevice_attribute};
    use cudarc::nvrtc;

    use super::{CudaGpu, CudaGpus, Missing};

    const DRIVER: &str = "install NVIDIA's driver; on Debian `apt-get install nvidia-driver`, on Ubuntu \
                          `ubuntu-drivers install`; --device wgpu and cpu need none";
    const TOOLKIT: &str = "install CUDA 12 or, but for Volta, 13, of which NVRTC and header files are used, or these alone with pip, as \
                           README tells under CUDA; where it is not in /usr/local/cuda, CUDA_PATH names its folder and LD_LIBRARY_PATH \
                           that of NVRTC";

    /// Of CUDA's parts for the runtime and, for tensor cores, for its compiler.
    const HEADERS: [&str; 3] = ["cuda_runtime.h", "cuda_fp16.h", "crt/mma.h"];

    /// See the function of this name without the feature.
    ///
    /// # Errors
    /// If the machine lacks the driver, a GPU, NVRTC or the headers.
    pub fn gpus() -> CudaGpus {
        // cudarc panics over a library that lacks a symbol, as that of a very old driver may.
        catch_unwind(AssertUnwindSafe(find)).unwrap_or_else(|_| {
            let problem = "the NVIDIA driver lacks functions of CUDA 12.8".to_owned();
            Err(Missing { problem, hint: "update the driver".to_owned() })
        })
    }

    /// What the speed of a kernel depends on besides the GPU, in words: the driver, where the system tells of it, the newest CUDA that
    /// it knows, and the compiler.
    pub fn driver_and_compiler() -> String {
        let (mut cuda, mut major, mut minor) = (0, 0, 0);
        #[expect(unsafe_code, reason = "cudarc has no other functions for them")]
        // SAFETY: they write these numbers, and leave them alone where they fail.
        unsafe {
            let _ = sys::cuDriverGetVersion(&raw mut cuda);
            let _ = nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor);
        }
        let driver = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
        let driver = driver.lines().next().unwrap_or_default();
        format!("{driver} CUDA {cuda} NVRTC {major}.{minor}").trim_start().to_owned()
    }

    fn find() -> CudaGpus {
        #[expect(unsafe_code, reason = "loading a library runs its initialisers")]
        // SAFETY: they are NVIDIA's own, which every use of CUDA runs.
        let (has_driver, has_nvrtc) = unsafe { (sys::is_culib_present(), nvrtc::sys::is_culib_present()) };
        let gpus = match has_driver.then(list) {
            None => Err("there is no NVIDIA driver (libcuda)".to_owned()),
            Some(Err(error)) => Err(format!("the NVIDIA driver does not answer: {error}")),
            Some(Ok(gpus)) if gpus.is_empty() => Err("CUDA finds no GPU".to_owned()),
            Some(Ok(gpus)) => Ok(gpus),
        };
        let no_nvrtc = "there is no NVRTC of CUDA 12 or 13 (libnvrtc), which compiles the kernels";
        let toolkit = [(!has_nvrtc).then(|| no_nvrtc.to_owned()), missing_header(install::cuda_path())];
        all_of(gpus, &toolkit.into_iter().flatten().collect::<Vec<_>>())
    }

    /// What is missing of the headers in CUDA's folder.
    fn missing_header(cuda: Option<PathBuf>) -> Option<String> {
        let Some(cuda) = cuda else {
            return Some("there are no CUDA headers, which the kernels need".to_owned());
        };
        let header = HEADERS.iter().find(|header| !cuda.join("include").join(header).exists())?;
        Some(format!("{} has no include/{header}, which the kernels need", cuda.display()))
    }

    /// The GPUs, where nothing of the toolkit is missing; else all that is missing, so that it can be installed at once.
    fn all_of(gpus: Result<Vec<CudaGpu>, String>, toolkit: &[String]) -> CudaGpus {
        let driver = match gpus {
            Ok(gpus) if toolkit.is_empty() => return Ok(gpus),
            gpus => gpus.err(),
        };
        let problems: Vec<String> = driver.iter().chain(toolkit).cloned().collect();
        let hints = [driver.map(|_| DRIVER), (!toolkit.is_empty()).then_some(TOOLKIT)];
        let hints: Vec<&str> = hints.into_iter().flatten().collect();
        Err(Missing { problem: problems.join("; "), hint: hints.join("; ") })
    }

    fn list() -> Result<Vec<CudaGpu>, DriverError> {
        driver::init()?;
        let n_gpus = driver::device::get_count()?;
        (0..n_gpus).map(describe).collect()
    }

    fn describe(ordinal: i32) -> Result<CudaGpu, DriverError> {
        let device = driver::device::get(ordinal)?;
        #[expect(unsafe_code, reason = "cudarc asks for a device's properties by its bare handle")]
        // SAFETY: the handle is the one that the driver gave for this ordinal.
        let (memory_bytes, major, minor) = unsafe {
            let attribute = |attribute| driver::device::get_attribute(device, attribute);
            (
                driver::device::total_mem(device)? as u64,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            )
        };
        Ok(CudaGpu {
            index: ordinal.unsigned_abs() as usize,
            name: driver::device::get_name(device)?,
            memory_bytes,
            compute_capability: (major.unsigned_abs(), minor.unsigned_abs()),
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn all_that_is_missing_is_told_at_once() {
            let toolkit = ["no NVRTC", "no headers"].map(str::to_owned);
            let missing = all_of(Err("no driver".to_owned()), &toolkit).unwrap_err();
            assert_eq!(missing.problem, "no driver; no NVRTC; no headers");
            assert_eq!(missing.hint, format!("{DRIVER}; {TOOLKIT}"));
            let missing = all_of(Ok(Vec::new()), &toolkit[1..]).unwrap_err();
            assert_eq!((missing.problem.as_str(), missing.hint.as_str()), ("no headers", TOOLKIT));
            assert_eq!(all_of(Ok(Vec::new()), &[]), Ok(Vec::new()));
        }
    }
}
