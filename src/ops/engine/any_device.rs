//! For tests of an engine's kernels that run on every device: what is around the products of those that few devices have.

use std::sync::LazyLock;

use burn::tensor::{Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::graphics::{AutoGraphicsApi, GraphicsApi};
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};

use crate::left_out::left_out;
use crate::ops::gpu::{input, tensor};

/// The first adapter, software or not. None leaves the test out, which happens only where there is none and `ORPO_WGPU_SKIP_GPU=1`
/// allows it.
///
/// # Panics
/// If there is none and it was not allowed.
pub(super) fn device() -> Option<WgpuDevice> {
    static HAS_ADAPTER: LazyLock<bool> = LazyLock::new(|| {
        let backends = wgpu::Backends::from(AutoGraphicsApi::backend());
        let descriptor =
            wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() };
        !pollster::block_on(wgpu::Instance::new(descriptor).enumerate_adapters(backends)).is_empty()
    });
    if !*HAS_ADAPTER {
        let why = "no wgpu adapter; a software one will do";
        let is_allowed = std::env::var("ORPO_WGPU_SKIP_GPU").is_ok_and(|value| value == "1");
        assert!(is_allowed, "{why}; ORPO_WGPU_SKIP_GPU=1 leaves these tests out");
        left_out(why);
    }
    HAS_ADAPTER.then(WgpuDevice::default)
}

/// Numbers of 24 bits, and a matrix of them.
pub(super) fn random(
    seed: usize,
    shape: [usize; 2],
    device: &WgpuDevice,
) -> (Vec<f32>, CubeTensor<WgpuRuntime>) {
    let number = |i: usize| ((i * 7919 + seed * 13) % 10_007) as f32 / 1_000.7 - 5.0;
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(number).collect();
    (values.clone(), input(Tensor::<Wgpu, 2>::from_data(TensorData::new(values, shape), device)))
}

/// A matrix's entries.
pub(super) fn values(of: &CubeTensor<WgpuRuntime>) -> Vec<f32> {
    tensor::<WgpuRuntime, Wgpu, 2>(of.clone()).into_data().to_vec().expect("the values are f32")
}
