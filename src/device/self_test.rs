//! Whether a device computes at all, before work is given to it.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};

use super::guard::first_cause;
use super::{DeviceChoice, guard};
use crate::error::{Error, Result};

/// Runs one small kernel of a known result, so that a driver that does not work is an error before any work is done.
///
/// The product in `dtype` of two matrices of small whole numbers, which every device computes without rounding.
///
/// # Errors
/// [`Error::Device`] if the device does not start, fails or computes something else.
pub fn self_test<B: Backend>(device: &B::Device, choice: &DeviceChoice, dtype: DType) -> Result<()> {
    const ROWS: usize = 24;
    const INNER: usize = 40;
    let number = |i: usize| (i * 7 % 11) as f32 - 5.0;
    let matrix = |rows: usize, columns: usize| (0..rows * columns).map(number).collect::<Vec<f32>>();
    let (a, b) = (matrix(ROWS, INNER), matrix(INNER, ROWS));
    let expected = (0..ROWS * ROWS)
        .map(|i| (0..INNER).map(|k| a[i / ROWS * INNER + k] * b[k * ROWS + i % ROWS]).sum::<f32>());
    let fails = |problem: String| Error::Device {
        device: choice.to_string(),
        problem: format!("{problem} in its self-test"),
        hint: Some("update the GPU's driver, or pass --device cpu".to_owned()),
    };
    let data = guard("self-test", choice, || {
        let tensor = |values: Vec<f32>, shape| {
            let data = TensorData::new(values, shape).convert_dtype(dtype);
            Tensor::<B, 2>::from_data(data, (device, dtype))
        };
        let [a, b] = [tensor(a.clone(), [ROWS, INNER]), tensor(b.clone(), [INNER, ROWS])];
        // Not by a product of burn's, which would be one on matrix units: those are held to a result of their own.
        let product = (a.unsqueeze_dim::<3>(2) * b.unsqueeze::<3>()).sum_dim(1);
        product.try_into_data().map_err(|e| fails(first_cause(&e.to_string())))
    })?;
    let got = data
        .convert::<f32>()
        .into_vec::<f32>()
        .map_err(|e| fails(format!("gives unreadable data ({e:?})")))?;
    match got.into_iter().zip(expected).find(|(got, expected)| got != expected) {
        None => Ok(()),
        Some((got, expected)) => Err(fails(format!("computes {got} where {expected} is right"))),
    }
}
