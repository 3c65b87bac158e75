//! What a device does at most, measured.

use std::time::Instant;

use burn::tensor::{DType, Distribution, FloatDType, Tensor};

use crate::device::DeviceChoice;
use crate::error::Result;
use crate::ops::lora_linear::lora_linear;
use crate::ops::read::wait;
use crate::ops::{Kernels, matrix_units_are_off};

/// What a device can do at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The best matrix product.
    pub product: Product,
    /// Bytes a second between memory and kernels.
    pub bytes: f64,
}

/// A matrix product as it was measured.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Floating-point operations a second.
    pub flops: f64,
    /// Whose it is, in words.
    pub by: &'static str,
}

/// The device's limits as this program can reach them: the best of its own products and burn's, and an addition of two long vectors.
///
/// # Errors
/// If the device fails.
pub fn measure_limits<B: Kernels>(dtype: DType, choice: &DeviceChoice, device: &B::Device) -> Result<Limits> {
    let length = if is_slow(choice) { 1 << 23 } else { 1 << 26 };
    let product = best_product::<B>(dtype, choice, device)?;
    let long = |_| Tensor::<B, 2>::ones([1, length], device);
    let (a, b) = (long(0), long(1));
    let addition = best_seconds::<B>(device, || a.clone() + b.clone())?;
    Ok(Limits { product, bytes: 3.0 * (length * size_of::<f32>()) as f64 / addition })
}

/// The best product of two square matrices, of this program's and burn's.
///
/// # Errors
/// If the device fails.
pub fn best_product<B: Kernels>(dtype: DType, choice: &DeviceChoice, device: &B::Device) -> Result<Product> {
    let n = square(choice);
    let random = |rows: usize| {
        let tensor = Tensor::<B, 2>::random([rows, n], Distribution::Normal(0.0, 1.0), device);
        tensor.cast(FloatDType::from(dtype))
    };
    let (x, w) = (random(n), random(n));
    let ours = best_seconds::<B>(device, || lora_linear(x.clone(), w.clone(), None, None))?;
    // burn takes matrix units wherever it finds some.
    let may_burn = dtype == DType::F32 || !matrix_units_are_off();
    let burn = match may_burn {
        true => best_seconds::<B>(device, || x.clone().matmul(w.clone().transpose()))?,
        false => f64::INFINITY,
    };
    let (seconds, by) = if ours <= burn { (ours, "this program's own") } else { (burn, "burn's") };
    Ok(Product { flops: 2.0 * (n as f64).powi(3) / seconds, by })
}

/// Rows and columns of the matrices of [`best_product`].
pub fn square(choice: &DeviceChoice) -> usize {
    if is_slow(choice) { 1024 } else { 4096 }
}

fn is_slow(choice: &DeviceChoice) -> bool {
    *choice == DeviceChoice::Cpu || choice.is_software()
}

/// The seconds that one of these launches takes.
fn best_seconds<B: Kernels>(device: &B::Device, launch: impl Fn() -> Tensor<B, 2>) -> Result<f64> {
    per_launch(|launches| {
        wait::<B>(device)?;
        let started = Instant::now();
        for _ in 0..launches {
            drop(launch());
        }
        wait::<B>(device)?;
        Ok(started.elapsed().as_secs_f64())
    })
}

/// The shortest span that is timed: long beside the wait for the device at its end.
const LEAST_SECONDS: f64 = 0.01;
const MAX_LAUNCHES: u32 = 100;
/// How long a device computes before it is timed: a GPU that waited for a compiler has slowed its clock down.
const WARM_UP_SECONDS: f64 = 0.3;

/// The best time of a few that a launch takes, of a function that gives the seconds of so many launches and a wait.
fn per_launch(mut seconds: impl FnMut(u32) -> Result<f64>) -> Result<f64> {
    // The first compiles the kernel.
    seconds(1)?;
    let first = seconds(1)?;
    let launches = |seconds: f64| (LEAST_SECONDS / seconds).ceil().clamp(1.0, f64::from(MAX_LAUNCHES)) as u32;
    let (mut warm, mut spent) = (first, first);
    while spent < WARM_UP_SECONDS {
        let launches = launches(warm);
        let span = seconds(launches)?;
        warm = warm.min(span / f64::from(launches));
        spent += span;
    }
    let launches = launches(warm);
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        best = best.min(seconds(launches)? / f64::from(launches));
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_the_device_is_no_part_of_a_launch() {
        // A launch of 0.2 ms and a wait of 0.1 ms.
        let mut calls = Vec::new();
        let fast = per_launch(|launches| {
            calls.push(launches);
            Ok(1e-4 + f64::from(launches) * 2e-4)
        });
        assert!((fast.unwrap() / 2e-4 - 1.0).abs() < 0.02, "{calls:?}");
        let mut n_slow = 0;
        let slow = per_launch(|launches| {
            n_slow += launches;
            Ok(f64::from(launches))
        });
        assert_eq!((slow.unwrap(), n_slow), (1.0, 6), "one that takes a second is not launched in vain");
    }
}
