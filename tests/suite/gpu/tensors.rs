//! Tensors of reproducible numbers, the same on every backend.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use half::{bf16, f16};

pub(crate) use super::on::stored_types;
use crate::support::Numbers;

/// Numbers in `[-size, size)`, stored in `dtype`.
pub(crate) fn random<B: Backend, const D: usize>(
    numbers: &mut Numbers,
    shape: [usize; D],
    size: f32,
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, D> {
    stored(numbers.vec(shape.iter().product(), size), shape, dtype, device)
}

/// These numbers, stored in `dtype`, to which they are rounded here: backends do not agree on what lies in the middle.
pub(crate) fn stored<B: Backend, const D: usize>(
    mut values: Vec<f32>,
    shape: [usize; D],
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, D> {
    for value in &mut values {
        *value = match dtype {
            DType::F16 => f16::from_f32(*value).to_f32(),
            DType::BF16 => bf16::from_f32(*value).to_f32(),
            _ => *value,
        };
    }
    let tensor = Tensor::from_data(TensorData::new(values, shape), device);
    if dtype == DType::F32 { tensor } else { tensor.cast(FloatDType::from(dtype)) }
}

/// The tensor's values, whatever they are stored in.
pub(crate) fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().to_vec().expect("the values are f32")
}

/// The bits of the tensor's values.
pub(crate) fn bits<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

/// Central differences of a function of some numbers by each of them.
pub(crate) fn central_differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f32> {
    let step = 1e-5;
    let at = |i: usize, change: f64| {
        let mut x = x.to_vec();
        x[i] += change;
        f(&x)
    };
    (0..x.len()).map(|i| ((at(i, step) - at(i, -step)) / (2.0 * step)) as f32).collect()
}
