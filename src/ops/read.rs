//! Where the host waits for the device.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::error::{Error, Result};

/// Reads a tensor's values, row by row.
///
/// # Errors
/// [`Error::Device`] with what the device says, also of the work before. Whoever guards that work names the device and what to do.
pub fn read<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>> {
    let device = tensor.device();
    let data = tensor.try_into_data().map_err(|error| failed::<B>(&device, &error))?;
    data.convert::<f32>().into_vec().map_err(|error| failed::<B>(&device, &error))
}

/// Waits until everything launched is done.
///
/// # Errors
/// As [`read`].
pub fn wait<B: Backend>(device: &B::Device) -> Result<()> {
    B::sync(device).map_err(|error| failed::<B>(device, &error))
}

fn failed<B: Backend>(device: &B::Device, error: &dyn std::fmt::Display) -> Error {
    Error::Device { device: format!("{device:?}"), problem: error.to_string(), hint: None }
}
