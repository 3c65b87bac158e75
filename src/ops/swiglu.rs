//! SwiGLU: `h = silu(gate) · up`, `silu(x) = x σ(x)` (arXiv:2002.05202), in `f32`.
//!
//! Backward, with `σ = σ(gate)`: `dup = dh · gate σ` and `dgate = dh · up · σ (1 + gate (1 − σ))`.

use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::backend::Backend;

use super::{Kernels, cast, to_f32};

/// Computes `silu(gate) · up`.
///
/// # Shapes
/// - all: `[tokens, intermediate]`, in one dtype
///
/// # Panics
/// If the shapes differ.
pub fn swiglu<B: Kernels>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    assert_eq!(gate.dims(), up.dims(), "swiglu: shapes of gate and up");
    B::swiglu_forward(gate, up)
}

/// Computes `(dgate, dup)` from the output's gradient; shapes as [`swiglu`].
///
/// # Panics
/// If the shapes differ.
pub fn swiglu_backward<B: Kernels>(
    dh: Tensor<B, 2>,
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    assert_eq!(gate.dims(), up.dims(), "swiglu: shapes of gate and up");
    assert_eq!(gate.dims(), dh.dims(), "swiglu: shape of the gradient");
    B::swiglu_backward(dh, gate, up)
}

/// [`swiglu`] in plain burn tensors. Differentiable by burn's own autodiff.
pub fn swiglu_reference<B: Backend>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    let dtype = gate.dtype();
    cast(silu(to_f32(gate)) * to_f32(up), dtype)
}

/// [`swiglu_backward`] in plain burn tensors.
pub fn swiglu_backward_reference<B: Backend>(
    dh: Tensor<B, 2>,
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let dtype = gate.dtype();
    let (dh, gate, up) = (to_f32(dh), to_f32(gate), to_f32(up));
    let sigmoid = sigmoid(gate.clone());
    let dgate = dh.clone() * up * sigmoid.clone() * (gate.clone() * (-sigmoid.clone() + 1.0) + 1.0);
    (cast(dgate, dtype), cast(dh * gate * sigmoid, dtype))
}
