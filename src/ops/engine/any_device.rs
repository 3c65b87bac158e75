//! For tests of an engine's kernels that run on every device: what is around the products of those that few devices have.

use burn::tensor::{Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use burn_wgpu::{Wgpu, WgpuDevice, WgpuRuntime};

use crate::ops::gpu::{input, tensor};

/// An adapter, software or not, which there has to be where `ORPO_WGPU_SKIP_GPU=1` does not leave these tests out.
pub(super) fn device() -> Option<WgpuDevice> {
    let is_left_out = std::env::var("ORPO_WGPU_SKIP_GPU").is_ok_and(|value| value == "1");
    if is_left_out {
        eprintln!("LEFT OUT: a kernel's test, as ORPO_WGPU_SKIP_GPU=1 says");
    }
    (!is_left_out).then(WgpuDevice::default)
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
