//! How much memory there is for a run.

use super::{Adapter, DeviceChoice};

impl DeviceChoice {
    /// The device's memory in bytes, where it can be told; of the CPU, what the system can give without swapping.
    pub fn total_memory(&self) -> Option<u64> {
        match self {
            Self::Cpu => available(&std::fs::read_to_string("/proc/meminfo").ok()?),
            Self::Wgpu { adapter, .. } => adapter.memory_bytes,
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Some(gpu.memory_bytes),
        }
    }

    /// A GPU that is not here: it computes in `f16`, and has buffers of 2 GiB.
    pub fn elsewhere(memory_bytes: u64) -> Self {
        let device = burn_wgpu::WgpuDevice::DefaultDevice;
        let buffer = (1 << 31) - 1;
        let adapter = Adapter {
            name: "a GPU that is not here".to_owned(),
            memory_bytes: Some(memory_bytes),
            max_buffer_size: buffer,
            max_storage_buffer_binding_size: buffer,
            f16: true,
            ..Adapter::unknown()
        };
        Self::Wgpu { device, adapter: Box::new(adapter) }
    }
}

/// The most bytes that the process has had resident, where the system tells; else what it has.
pub fn peak_resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    field(&status, "VmHWM:").unwrap_or_else(|| DeviceChoice::Cpu.memory_bytes())
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    field(meminfo, "MemAvailable:")
}

/// A line of so many KiB that begins with this name, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24640524 kB\nMemFree:         1000 kB\nMemAvailable:   22020096 kB\n";
        assert_eq!(available(text), Some(21 << 30));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }
}
