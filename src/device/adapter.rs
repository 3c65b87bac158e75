//! The adapters of this machine, in the order in which wgpu lists them.

use std::fmt;

use burn_wgpu::WgpuDevice;
use burn_wgpu::graphics::{AutoGraphicsApi, GraphicsApi};
use serde::Serialize;
use wgpu::{CooperativeMatrixProperties, Features};

/// What kind of machine computes, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceType {
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares the CPU's memory.
    Integrated,
    /// A GPU of a virtual machine's host.
    Virtual,
    /// The driver does not say.
    Other,
    /// The CPU, behind a GPU's API.
    Software,
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Discrete => "discrete GPU",
            Self::Integrated => "integrated GPU",
            Self::Virtual => "virtual GPU",
            Self::Other => "unknown kind",
            Self::Software => "software",
        })
    }
}

impl From<wgpu::DeviceType> for DeviceType {
    fn from(device_type: wgpu::DeviceType) -> Self {
        match device_type {
            wgpu::DeviceType::DiscreteGpu => Self::Discrete,
            wgpu::DeviceType::IntegratedGpu => Self::Integrated,
            wgpu::DeviceType::VirtualGpu => Self::Virtual,
            wgpu::DeviceType::Cpu => Self::Software,
            wgpu::DeviceType::Other => Self::Other,
        }
    }
}

/// A device that wgpu can compute on. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Adapter {
    /// Its place in wgpu's list: `--device wgpu:{index}`.
    pub index: usize,
    /// The device's name, as its driver spells it.
    pub name: String,
    /// `Vulkan` or `Metal`.
    pub api: String,
    /// The driver's name and version.
    pub driver: String,
    /// What kind of machine computes.
    pub device_type: DeviceType,
    /// The largest heap of the device's own memory, where it can be told.
    pub memory_bytes: Option<u64>,
    /// The largest buffer.
    pub max_buffer_size: u64,
    /// The largest part of a buffer that a kernel sees.
    pub max_storage_buffer_binding_size: u64,
    /// Whether kernels may compute in 16-bit floats.
    pub f16: bool,
    /// Smallest and largest number of threads that run in step and exchange values, where kernels may use them.
    pub subgroups: Option<(u32, u32)>,
    /// Matrix shapes of the device's matrix units (tensor cores), `{m}x{n}x{k} {input}->{output}`.
    pub cooperative_matrices: Vec<String>,
    /// The vendor's PCI id.
    pub vendor_id: u32,
    /// The device's PCI id.
    pub device_id: u32,
    /// Its name in burn; none for an adapter that burn cannot name.
    #[serde(skip)]
    pub device: Option<WgpuDevice>,
}

impl Adapter {
    /// The largest tensor that fits one buffer and one binding.
    pub fn shard_bytes(&self) -> u64 {
        self.max_storage_buffer_binding_size.min(self.max_buffer_size)
    }

    /// An adapter of which nothing is known.
    pub(crate) fn unknown() -> Self {
        Self {
            index: 0,
            name: String::new(),
            api: api(),
            driver: String::new(),
            device_type: DeviceType::Other,
            memory_bytes: None,
            max_buffer_size: 1 << 30,
            max_storage_buffer_binding_size: 1 << 27,
            f16: false,
            subgroups: None,
            cooperative_matrices: Vec::new(),
            vendor_id: 0,
            device_id: 0,
            device: None,
        }
    }
}

/// The graphics API that burn's wgpu backend uses on this system: `Vulkan` or `Metal`.
pub fn api() -> String {
    format!("{:?}", AutoGraphicsApi::backend())
}

/// Lists the adapters of this machine; none is an empty list.
pub fn adapters() -> Vec<Adapter> {
    let backends = wgpu::Backends::from(AutoGraphicsApi::backend());
    let descriptor =
        wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() };
    let instance = wgpu::Instance::new(descriptor);
    let found = pollster::block_on(instance.enumerate_adapters(backends));
    let types: Vec<DeviceType> = found.iter().map(|adapter| adapter.get_info().device_type.into()).collect();
    found
        .iter()
        .enumerate()
        .map(|(index, adapter)| describe(adapter, index, wgpu_device(&types, index)))
        .collect()
}

fn describe(adapter: &wgpu::Adapter, index: usize, device: Option<WgpuDevice>) -> Adapter {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let driver = [info.driver.trim(), info.driver_info.trim()].into_iter().filter(|part| !part.is_empty());
    Adapter {
        index,
        name: info.name,
        api: format!("{:?}", info.backend),
        driver: driver.collect::<Vec<_>>().join(" "),
        device_type: info.device_type.into(),
        memory_bytes: memory_bytes(adapter),
        max_buffer_size: limits.max_buffer_size,
        max_storage_buffer_binding_size: limits.max_storage_buffer_binding_size,
        f16: features.contains(Features::SHADER_F16),
        subgroups: features
            .contains(Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size)),
        cooperative_matrices: adapter.cooperative_matrix_properties().iter().map(shape).collect(),
        vendor_id: info.vendor,
        device_id: info.device,
        device,
    }
}

/// `16x16x16 f16->f32`
fn shape(properties: &CooperativeMatrixProperties) -> String {
    let CooperativeMatrixProperties { m_size, n_size, k_size, ab_type, cr_type, .. } = properties;
    format!("{m_size}x{n_size}x{k_size} {ab_type:?}->{cr_type:?}")
        .replace('F', "f")
        .replace('I', "i")
        .replace('U', "u")
}

/// The name that burn finds an adapter by: cubecl counts the adapters of each type, and takes an adapter of unknown type for a
/// missing one of a known type.
fn wgpu_device(types: &[DeviceType], index: usize) -> Option<WgpuDevice> {
    let count = |wanted: DeviceType| types.iter().filter(|t| **t == wanted).count();
    let n_before = types[..index].iter().filter(|t| **t == types[index]).count();
    match types[index] {
        DeviceType::Discrete => Some(WgpuDevice::DiscreteGpu(n_before)),
        DeviceType::Integrated => Some(WgpuDevice::IntegratedGpu(n_before)),
        DeviceType::Virtual => Some(WgpuDevice::VirtualGpu(n_before)),
        DeviceType::Software => (n_before == 0).then_some(WgpuDevice::Cpu),
        DeviceType::Other => [
            (DeviceType::Virtual, WgpuDevice::VirtualGpu(n_before)),
            (DeviceType::Integrated, WgpuDevice::IntegratedGpu(n_before)),
            (DeviceType::Discrete, WgpuDevice::DiscreteGpu(n_before)),
        ]
        .into_iter()
        .find(|(known, _)| count(*known) <= n_before)
        .map(|(_, device)| device),
    }
}

/// The largest device-local heap: some drivers list a small window onto it again, so a sum would count it twice.
#[cfg(not(target_os = "macos"))]
fn memory_bytes(adapter: &wgpu::Adapter) -> Option<u64> {
    const DEVICE_LOCAL: u32 = 1;
    #[expect(unsafe_code, reason = "wgpu has no safe way to ask for the size of a device's memory")]
    // SAFETY: the device is only asked for its properties, through the instance that it came from and that is alive here.
    let memory = unsafe {
        let hal = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        hal.shared_instance().raw_instance().get_physical_device_memory_properties(hal.raw_physical_device())
    };
    let heaps = memory.memory_heaps.iter().take(memory.memory_heap_count as usize);
    heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
}

/// Apple's GPUs share the machine's memory.
#[cfg(target_os = "macos")]
fn memory_bytes(_: &wgpu::Adapter) -> Option<u64> {
    let output = std::process::Command::new("sysctl").args(["-n", "hw.memsize"]).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok().map(working_set)
}

/// What Metal recommends that a GPU hold of so much shared memory, `recommendedMaxWorkingSetSize`: about two thirds of machines with up to
/// 32 GiB and three quarters of larger ones'. Beyond it the system takes memory away from the GPU.
#[cfg(any(target_os = "macos", test))]
fn working_set(memory_bytes: u64) -> u64 {
    if memory_bytes <= 32 << 30 { memory_bytes / 3 * 2 } else { memory_bytes / 4 * 3 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_has_two_thirds_or_three_quarters_of_the_memory_that_it_shares() {
        assert_eq!([24, 64].map(|gib| working_set(gib << 30)), [16 << 30, 48 << 30]);
    }

    #[test]
    fn burn_counts_adapters_by_type() {
        use DeviceType::*;
        let types = [Software, Discrete, Other, Discrete, Software, Other];
        let devices: Vec<_> = (0..types.len()).map(|i| wgpu_device(&types, i)).collect();
        let expected = [
            Some(WgpuDevice::Cpu),
            Some(WgpuDevice::DiscreteGpu(0)),
            Some(WgpuDevice::VirtualGpu(0)),
            Some(WgpuDevice::DiscreteGpu(1)),
            None,
            Some(WgpuDevice::VirtualGpu(1)),
        ];
        assert_eq!(devices, expected);
        // Two virtual GPUs would be found first.
        assert_eq!(wgpu_device(&[Virtual, Other], 1), Some(WgpuDevice::IntegratedGpu(0)));
    }

    #[test]
    fn shapes_are_spelled_as_in_the_field() {
        let (ab_type, cr_type) = (wgpu::CooperativeScalarType::F16, wgpu::CooperativeScalarType::F32);
        let properties = CooperativeMatrixProperties {
            m_size: 16,
            n_size: 8,
            k_size: 4,
            ab_type,
            cr_type,
            saturating_accumulation: false,
        };
        assert_eq!(shape(&properties), "16x8x4 f16->f32");
    }
}
