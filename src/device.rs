//! Devices: what is there, which one a run takes, and whether it works.
//!
//! Adapters are found with wgpu itself, through the one graphics API that burn's wgpu backend uses on this system (Vulkan, on macOS
//! Metal). Other APIs are never loaded: they would list the same GPUs again and write noise to headless terminals.

mod adapter;
mod cuda;
mod guard;
mod room;
mod self_test;

use std::fmt;
use std::str::FromStr;

use burn::cubecl::Runtime;
use burn_wgpu::{WgpuDevice, WgpuRuntime};

pub use adapter::{Adapter, DeviceType, adapters, api};
#[cfg(feature = "cuda")]
pub use cuda::driver_and_compiler;
pub use cuda::{CudaGpu, CudaGpus, Missing, gpus};
pub use guard::{doing, guard};
pub use room::peak_resident;
pub use self_test::self_test;

use crate::error::{Error, Result};

/// What `--device` takes in this build.
const NAMES: &str = match cfg!(feature = "cuda") {
    true => "auto, cpu, wgpu, wgpu:0, …, cuda, cuda:0, …",
    false => "auto, cpu, wgpu, wgpu:0, …",
};
/// Where there is more.
const WHERE_CUDA_IS: &str = match cfg!(feature = "cuda") {
    true => "",
    false => "; cuda, cuda:0, … are of a build with `--features cuda`",
};

/// What `--device` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceRequest {
    /// `auto`: the best GPU, else the CPU.
    Auto,
    /// `cpu`
    Cpu,
    /// `wgpu` or `wgpu:i`, with the index that `orpo-wgpu devices` lists.
    Wgpu(Option<usize>),
    /// `cuda` or `cuda:i`
    Cuda(Option<usize>),
}

impl FromStr for DeviceRequest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, index) = match text.split_once(':') {
            Some((kind, index)) => (kind, Some(index)),
            None => (text, None),
        };
        match (kind.to_ascii_lowercase().as_str(), index.map(str::parse)) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Cpu),
            ("wgpu", None) => Ok(Self::Wgpu(None)),
            ("wgpu", Some(Ok(index))) => Ok(Self::Wgpu(Some(index))),
            ("cuda", None) => Ok(Self::Cuda(None)),
            ("cuda", Some(Ok(index))) => Ok(Self::Cuda(Some(index))),
            _ => Err(Error::config(format!("--device `{text}`: expected {NAMES}"))
                .with_hint(format!("`orpo-wgpu devices` lists what is there{WHERE_CUDA_IS}"))),
        }
    }
}

/// A device to compute on. As text it is what `--device` knows it by.
#[derive(Debug, Clone, PartialEq)]
pub enum DeviceChoice {
    /// The CPU backend.
    Cpu,
    /// A GPU (or a software adapter) through wgpu.
    Wgpu {
        /// Its name in burn.
        device: WgpuDevice,
        /// What is known of it.
        adapter: Box<Adapter>,
    },
    /// An NVIDIA GPU through CUDA.
    #[cfg(feature = "cuda")]
    Cuda(CudaGpu),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Wgpu { adapter, .. } => write!(f, "wgpu:{}", adapter.index),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => write!(f, "cuda:{}", gpu.index),
        }
    }
}

impl DeviceChoice {
    /// The device in words: `the CPU`, or the adapter's name and API.
    pub fn describe(&self) -> String {
        match self {
            Self::Cpu => "the CPU".to_owned(),
            Self::Wgpu { adapter, .. } => format!("{}, {}", adapter.name, adapter.api),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => format!("{}, CUDA", gpu.name),
        }
    }

    /// Whether it computes in `f16`.
    pub fn computes_f16(&self) -> bool {
        match self {
            Self::Cpu => false,
            Self::Wgpu { adapter, .. } => adapter.f16,
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.computes_f16(),
        }
    }

    /// Whether it computes in `bf16`, which neither WGSL nor the CPU's kernels know.
    pub fn computes_bf16(&self) -> bool {
        match self {
            Self::Cpu | Self::Wgpu { .. } => false,
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.computes_bf16(),
        }
    }

    /// Whether it is a processor behind a GPU's interface.
    pub fn is_software(&self) -> bool {
        matches!(self, Self::Wgpu { adapter, .. } if adapter.device_type == DeviceType::Software)
    }

    /// The largest tensor that the device takes, in bytes; burn never splits one.
    pub fn shard_bytes(&self) -> usize {
        match self {
            Self::Cpu => isize::MAX as usize,
            Self::Wgpu { adapter, .. } => {
                usize::try_from(adapter.shard_bytes()).unwrap_or(isize::MAX as usize)
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => usize::try_from(gpu.shard_bytes()).unwrap_or(isize::MAX as usize),
        }
    }

    /// Memory held for tensors on the device (in use, or kept for the next ones); on the CPU the process's resident memory, to which
    /// the pages of memory-mapped files that were read count. 0 where it cannot be told.
    pub fn memory_bytes(&self) -> u64 {
        match self {
            Self::Cpu => memory_stats::memory_stats().map_or(0, |stats| stats.physical_mem as u64),
            Self::Wgpu { device, .. } => reserved::<WgpuRuntime>(device),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => reserved::<burn::cubecl::cuda::CudaRuntime>(&gpu.device()),
        }
    }
}

fn reserved<R: Runtime>(device: &R::Device) -> u64 {
    R::client(device).memory_usage().map_or(0, |usage| usage.bytes_reserved)
}

/// What [`select`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Selected {
    /// The device.
    pub choice: DeviceChoice,
    /// Why it is not a GPU, where the user might expect one.
    pub note: Option<String>,
}

/// Finds the device that `--device` names.
///
/// # Errors
/// [`Error::Config`] for text that is no device, [`Error::Device`] for a device that is not there or not in this build.
pub fn select(text: &str) -> Result<Selected> {
    match text.parse()? {
        // Asked for the CPU, no driver is so much as loaded.
        DeviceRequest::Cpu => Ok(Selected { choice: DeviceChoice::Cpu, note: None }),
        DeviceRequest::Cuda(index) => take_cuda(index, &gpus()),
        // Nor is CUDA's, asked for wgpu.
        DeviceRequest::Wgpu(index) => take_wgpu(index, &adapters()),
        DeviceRequest::Auto => {
            let gpus = gpus();
            // Nor is Vulkan, where CUDA is taken.
            let adapters = if gpus.is_ok() { Vec::new() } else { adapters() };
            select_from(DeviceRequest::Auto, &gpus, &adapters)
        }
    }
}

/// [`select`] among these GPUs and adapters.
///
/// # Errors
/// As [`select`].
pub fn select_from(request: DeviceRequest, gpus: &CudaGpus, adapters: &[Adapter]) -> Result<Selected> {
    match request {
        DeviceRequest::Cpu => Ok(Selected { choice: DeviceChoice::Cpu, note: None }),
        DeviceRequest::Cuda(index) => take_cuda(index, gpus),
        DeviceRequest::Auto if gpus.is_ok() => take_cuda(None, gpus),
        DeviceRequest::Auto => match best(adapters) {
            Some(adapter) if adapter.device_type != DeviceType::Software => take(adapter),
            other => Ok(Selected { choice: DeviceChoice::Cpu, note: Some(why_cpu(other)) }),
        },
        DeviceRequest::Wgpu(index) => take_wgpu(index, adapters),
    }
}

/// The adapter of that number, or the best.
fn take_wgpu(index: Option<usize>, adapters: &[Adapter]) -> Result<Selected> {
    let (found, name) = match index {
        None => (best(adapters), "wgpu".to_owned()),
        Some(index) => (adapters.iter().find(|adapter| adapter.index == index), format!("wgpu:{index}")),
    };
    found.map_or_else(|| Err(missing(&name, adapters)), take)
}

/// The GPU of this index, without one the first.
fn take_cuda(index: Option<usize>, gpus: &CudaGpus) -> Result<Selected> {
    let fails = |problem: String, hint: &str| Error::Device {
        device: index.map_or_else(|| "cuda".to_owned(), |index| format!("cuda:{index}")),
        problem,
        hint: Some(hint.to_owned()),
    };
    let gpus = gpus.as_ref().map_err(|missing| fails(missing.problem.clone(), &missing.hint))?;
    let found = || gpus.iter().map(|gpu| format!("cuda:{} ({})", gpu.index, gpu.name)).collect::<Vec<_>>();
    let gpu = gpus.iter().find(|gpu| index.is_none_or(|index| gpu.index == index)).ok_or_else(|| {
        let problem = format!("there is no such GPU, only {}", found().join(", "));
        fails(problem, "`orpo-wgpu devices` lists what is there")
    })?;
    take_gpu(gpu)
}

#[cfg(feature = "cuda")]
fn take_gpu(gpu: &CudaGpu) -> Result<Selected> {
    Ok(Selected { choice: DeviceChoice::Cuda(gpu.clone()), note: None })
}

#[cfg(not(feature = "cuda"))]
fn take_gpu(gpu: &CudaGpu) -> Result<Selected> {
    unreachable!("a build without CUDA lists no GPU such as {}", gpu.name)
}

/// The first of the best kind: discrete, integrated, virtual, unknown, software.
fn best(adapters: &[Adapter]) -> Option<&Adapter> {
    adapters.iter().filter(|adapter| adapter.device.is_some()).min_by_key(|adapter| adapter.device_type)
}

fn take(adapter: &Adapter) -> Result<Selected> {
    let device = adapter.device.clone().ok_or_else(|| Error::Device {
        device: format!("wgpu:{}", adapter.index),
        problem: format!("{} is a second software adapter, and only the first can be used", adapter.name),
        hint: Some("the environment variable VK_DRIVER_FILES leaves Vulkan drivers out".to_owned()),
    })?;
    let is_software = adapter.device_type == DeviceType::Software;
    let note = is_software.then(|| {
        format!(
            "wgpu:{} is {} in software: --device cpu is many times as fast, and starts without compiling kernels",
            adapter.index, adapter.api
        )
    });
    Ok(Selected { choice: DeviceChoice::Wgpu { device, adapter: Box::new(adapter.clone()) }, note })
}

fn why_cpu(software: Option<&Adapter>) -> String {
    match software {
        Some(adapter) => {
            let Adapter { name, api, .. } = adapter;
            format!("the CPU, since there is no GPU but {name}, which is {api} in software and slower")
        }
        None => format!("the CPU, since no GPU with a {} driver was found", api()),
    }
}

fn missing(device: &str, adapters: &[Adapter]) -> Error {
    let found: Vec<String> = adapters.iter().map(|a| format!("wgpu:{} ({})", a.index, a.name)).collect();
    let problem = match found.is_empty() {
        true => format!("there is no adapter with a {} driver", api()),
        false => format!("there is no such adapter, only {}", found.join(", ")),
    };
    let hint = if found.is_empty() { NO_ADAPTER } else { "`orpo-wgpu devices` lists what is there" };
    Error::Device { device: device.to_owned(), problem, hint: Some(hint.to_owned()) }
}

/// A number of bytes for people: `139.8 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    let digits = usize::from(value.fract() > 0.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// How to come by an adapter.
pub const NO_ADAPTER: &str = "install the GPU's driver, with its Vulkan part; on Debian and Ubuntu `apt-get install libvulkan1 \
                              mesa-vulkan-drivers` serves AMD and Intel, and brings an adapter in software where there is no GPU";

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;

    fn adapter(index: usize, device_type: DeviceType, device: Option<WgpuDevice>) -> Adapter {
        Adapter { index, name: format!("{device_type:?} {index}"), device_type, device, ..Adapter::unknown() }
    }

    fn no_cuda() -> CudaGpus {
        Err(Missing { problem: "no driver".to_owned(), hint: "install it".to_owned() })
    }

    fn taken(request: &str, adapters: &[Adapter]) -> String {
        select_from(request.parse().unwrap(), &no_cuda(), adapters).unwrap().choice.to_string()
    }

    #[test]
    fn requests_are_parsed() {
        assert_eq!("WGPU:3".parse::<DeviceRequest>().unwrap(), DeviceRequest::Wgpu(Some(3)));
        assert_eq!("cuda".parse::<DeviceRequest>().unwrap(), DeviceRequest::Cuda(None));
        for text in ["", "gpu", "auto:0", "cpu:1", "wgpu:", "wgpu:-1", "wgpu:x"] {
            assert_eq!(text.parse::<DeviceRequest>().unwrap_err().exit_code(), 2, "{text}");
        }
        let error = "gpu".parse::<DeviceRequest>().unwrap_err();
        let says = format!("{error}; {}", error.hint().unwrap());
        assert!(says.contains("cuda:0"), "in a build with it or without: {says}");
    }

    #[test]
    fn auto_prefers_discrete_then_integrated_then_virtual_and_never_software() {
        let software = adapter(0, DeviceType::Software, Some(WgpuDevice::Cpu));
        let virtual_ = adapter(1, DeviceType::Virtual, Some(WgpuDevice::VirtualGpu(0)));
        let integrated = adapter(2, DeviceType::Integrated, Some(WgpuDevice::IntegratedGpu(0)));
        let discrete = adapter(3, DeviceType::Discrete, Some(WgpuDevice::DiscreteGpu(0)));
        let second = adapter(4, DeviceType::Discrete, Some(WgpuDevice::DiscreteGpu(1)));
        let all = [software, virtual_, integrated, discrete, second];
        assert_eq!(taken("auto", &all), "wgpu:3");
        assert_eq!(taken("auto", &all[..3]), "wgpu:2");
        assert_eq!(taken("auto", &all[..2]), "wgpu:1");
        assert_eq!(taken("wgpu", &all[..1]), "wgpu:0");
        assert_eq!(taken("wgpu:4", &all), "wgpu:4");
        assert_eq!(taken("cpu", &all), "cpu");
        for few in [&all[..1], &[]] {
            let selected = select_from(DeviceRequest::Auto, &no_cuda(), few).unwrap();
            assert_eq!(selected.choice, DeviceChoice::Cpu);
            assert!(selected.note.unwrap().contains("the CPU"), "a sentence says that the CPU computes");
        }
    }

    #[test]
    fn what_is_not_there_is_an_error_that_names_what_is() {
        let software =
            [adapter(0, DeviceType::Software, Some(WgpuDevice::Cpu)), adapter(1, DeviceType::Software, None)];
        let error = |request: &str, adapters: &[Adapter]| {
            select_from(request.parse().unwrap(), &no_cuda(), adapters).unwrap_err().to_string()
        };
        assert_eq!(
            error("wgpu:7", &software[..1]),
            "device wgpu:7: there is no such adapter, only wgpu:0 (Software 0)"
        );
        assert!(error("wgpu", &[]).contains("there is no adapter"), "no adapter at all");
        assert!(
            error("wgpu:1", &software).contains("second software adapter"),
            "burn cannot name the second"
        );
        assert_eq!(error("cuda:0", &software), "device cuda:0: no driver");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_how_to_build_it_in() {
        let error = select("cuda").unwrap_err();
        assert_eq!(error.to_string(), "device cuda: this build has no CUDA");
        assert!(error.hint().unwrap().contains("--features cuda"));
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn auto_prefers_cuda_where_it_is_whole() {
        let gpu = |index, major| CudaGpu {
            index,
            name: format!("GPU {index}"),
            memory_bytes: 16 << 30,
            compute_capability: (major, 5),
        };
        let gpus = Ok(vec![gpu(0, 7), gpu(1, 8)]);
        let discrete = [adapter(0, DeviceType::Discrete, Some(WgpuDevice::DiscreteGpu(0)))];
        let take = |request: &str| select_from(request.parse().unwrap(), &gpus, &discrete);
        let names = ["auto", "cuda", "cuda:1", "wgpu"].map(|request| take(request).unwrap().choice);
        assert_eq!(names.each_ref().map(ToString::to_string), ["cuda:0", "cuda:0", "cuda:1", "wgpu:0"]);
        assert_eq!(names.each_ref().map(DeviceChoice::computes_bf16), [false, false, true, false]);
        assert_eq!(names[0].shard_bytes(), 4 << 30);
        let error = take("cuda:2").unwrap_err().to_string();
        assert_eq!(error, "device cuda:2: there is no such GPU, only cuda:0 (GPU 0), cuda:1 (GPU 1)");
    }

    #[test]
    fn the_cpu_passes_its_self_test_and_knows_its_memory() {
        self_test::<burn_flex::Flex>(&Default::default(), &DeviceChoice::Cpu, DType::F32).unwrap();
        assert!(DeviceChoice::Cpu.memory_bytes() > 1 << 20, "a test needs more than a MiB");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(128 << 20), "128 MiB");
        assert_eq!(size((1 << 31) - 1), "2.0 GiB");
        assert_eq!(size(u64::MAX), "16 EiB");
    }
}
