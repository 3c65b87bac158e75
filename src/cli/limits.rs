//! What a device does at most, measured.

use std::time::Instant;

use burn::tensor::{DType, Distribution, FloatDType, Tensor};

use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::ops::Kernels;
use crate::ops::lora_linear::lora_linear;

/// What a device can do at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Floating-point operations a second in a matrix product.
    pub flops: f64,
    /// Bytes a second between memory and kernels.
    pub bytes: f64,
}

/// The device's limits as this program can reach them: the best of its own products and burn's, and an addition of two long vectors.
///
/// # Errors
/// If the device fails.
pub fn measure_limits<B: Kernels>(dtype: DType, choice: &DeviceChoice, device: &B::Device) -> Result<Limits> {
    let length = if is_slow(choice) { 1 << 23 } else { 1 << 26 };
    let flops = best_product::<B>(dtype, choice, device)?;
    let long = |_| Tensor::<B, 2>::ones([1, length], device);
    let (a, b) = (long(0), long(1));
    let addition = best_seconds::<B>(device, || a.clone() + b.clone())?;
    Ok(Limits { flops, bytes: 3.0 * (length * size_of::<f32>()) as f64 / addition })
}

/// Floating-point operations a second in the best product of two square matrices, of this program's and burn's.
///
/// # Errors
/// If the device fails.
pub fn best_product<B: Kernels>(dtype: DType, choice: &DeviceChoice, device: &B::Device) -> Result<f64> {
    let n = square(choice);
    let random = |rows: usize| {
        let tensor = Tensor::<B, 2>::random([rows, n], Distribution::Normal(0.0, 1.0), device);
        tensor.cast(FloatDType::from(dtype))
    };
    let (x, w) = (random(n), random(n));
    let ours = best_seconds::<B>(device, || lora_linear(x.clone(), w.clone(), None, None).0)?;
    let burn = best_seconds::<B>(device, || x.clone().matmul(w.clone().transpose()))?;
    Ok(2.0 * (n as f64).powi(3) / ours.min(burn))
}

/// Rows and columns of the matrices of [`best_product`].
pub fn square(choice: &DeviceChoice) -> usize {
    if is_slow(choice) { 1024 } else { 4096 }
}

fn is_slow(choice: &DeviceChoice) -> bool {
    *choice == DeviceChoice::Cpu || choice.is_software()
}

/// The shortest of a few runs, in seconds.
fn best_seconds<B: Kernels>(device: &B::Device, f: impl Fn() -> Tensor<B, 2>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        wait::<B>(device)?;
        let started = Instant::now();
        let result = f();
        wait::<B>(device)?;
        best = best.min(started.elapsed().as_secs_f64());
        drop(result);
    }
    Ok(best)
}

/// Waits until everything launched is done.
///
/// # Errors
/// If the device fails.
pub fn wait<B: Kernels>(device: &B::Device) -> Result<()> {
    B::sync(device).map_err(|e| Error::Device {
        device: format!("{device:?}"),
        problem: format!("failed: {e:?}"),
        hint: None,
    })
}
