//! A runtime on wgpu's devices that has no engine of its own.

use burn::cubecl::Runtime;
use burn::cubecl::client::ComputeClient;
use burn::cubecl::device::DeviceId;
use burn::cubecl::ir::TargetProperties;
use burn::cubecl::server::ComputeServer;
use burn::cubecl::zspace::{Shape, Strides};
use burn_cubecl::CubeBackend;
use burn_wgpu::{WgpuDevice, WgpuRuntime};
use orpo_wgpu::ops::engine::Engine;

pub(crate) type PlainBackend = CubeBackend<Plain, f32, i32, u32>;

#[derive(Debug, Clone)]
pub(crate) struct Plain;

impl Engine for Plain {}

impl Runtime for Plain {
    type Compiler = <WgpuRuntime as Runtime>::Compiler;
    type Server = <WgpuRuntime as Runtime>::Server;
    type Device = WgpuDevice;

    fn client(device: &WgpuDevice) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        "plain"
    }

    fn max_cube_count() -> (u32, u32, u32) {
        WgpuRuntime::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        WgpuRuntime::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        WgpuRuntime::target_properties()
    }

    fn enumerate_devices(type_id: u16, info: &<Self::Server as ComputeServer>::Info) -> Vec<DeviceId> {
        WgpuRuntime::enumerate_devices(type_id, info)
    }
}
