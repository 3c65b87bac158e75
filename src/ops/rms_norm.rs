//! RMSNorm: `y = x / sqrt(mean(x²) + eps) · weight` over the last dimension (arXiv:1910.07467), in `f32`.
//!
//! Backward, with `r = 1 / sqrt(mean(x²) + eps)` and `g = dy · weight`: `dx = r g − x r³ mean(g · x)`. The weight is frozen. What
//! the norm reads is the residual stream, so its gradient goes on top of the one that passes the norm by: `sum`.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use super::{Kernels, backward, cast, to_f32, tracked};

/// Normalizes every row by its root mean square.
///
/// # Shapes
/// - `x`: `[tokens, hidden]` in `f32`   - `weight`: `[hidden]` in `f32`   - output: `[tokens, hidden]` in `dtype`
///
/// # Panics
/// If the weight's length is not that of a row.
pub fn rms_norm<B: Kernels>(x: Tensor<B, 2>, weight: Tensor<B, 1>, eps: f64, dtype: DType) -> Tensor<B, 2> {
    check_shapes(&x, &weight);
    B::rms_norm_forward(x, weight, eps, dtype)
}

/// Computes `sum + ∂/∂x`, `[tokens, hidden]` in `f32`, from the gradient `dy` of the norm's output.
///
/// # Panics
/// If a shape differs from forward's.
pub fn rms_norm_backward<B: Kernels>(
    dy: Tensor<B, 2>,
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    eps: f64,
    sum: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    check_shapes(&x, &weight);
    for t in [Some(&dy), sum.as_ref()].into_iter().flatten() {
        assert_eq!(t.dims(), x.dims(), "rms_norm: shape of a gradient");
    }
    B::rms_norm_backward(dy, x, weight, eps, sum)
}

fn check_shapes<B: Backend>(x: &Tensor<B, 2>, weight: &Tensor<B, 1>) {
    assert_eq!(x.dims()[1], weight.dims()[0], "rms_norm: length of a row against the weight's");
}

/// [`rms_norm`] in plain burn tensors. Differentiable by burn's own autodiff.
pub fn rms_norm_reference<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    eps: f64,
    dtype: DType,
) -> Tensor<B, 2> {
    let x = to_f32(x);
    let mean_square = (x.clone() * x.clone()).mean_dim(1);
    cast(x * (mean_square + eps).sqrt().recip() * weight.unsqueeze(), dtype)
}

/// [`rms_norm_backward`] in plain burn tensors.
pub fn rms_norm_backward_reference<B: Backend>(
    dy: Tensor<B, 2>,
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    eps: f64,
    sum: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let x = tracked(x);
    let y = rms_norm_reference(x.clone(), Tensor::from_inner(weight), eps, DType::F32);
    let dx = x.grad(&backward(y, to_f32(dy))).expect("the input is tracked");
    match sum {
        Some(sum) => sum + dx,
        None => dx,
    }
}
