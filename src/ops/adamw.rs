//! AdamW over the adapter's tensors and their gradients' global norm, in `f32` as PyTorch computes them.
//!
//! ```text
//! norm = sqrt(Σ over all tensors of g²)          factor = min(1, max_grad_norm / (norm + 1e-6))     torch.nn.utils.clip_grad_norm_
//! g ← factor · g      m ← β1 m + (1 − β1) g      v ← β2 v + (1 − β2) g²                             arXiv:1711.05101
//! p ← p (1 − lr · decay) − lr · (m / (1 − β1ᵗ)) / (sqrt(v / (1 − β2ᵗ)) + ε)                          torch.optim.AdamW
//! ```
//!
//! The norm stays on the device, so that a step waits for it only once, at its end. A norm that is not finite leaves everything as
//! it is.

use burn::tensor::backend::Backend;
use burn::tensor::{Bool, Tensor};

use super::Kernels;

/// One step's settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// The step's learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled decay, times the learning rate.
    pub weight_decay: f64,
    /// Largest global norm of the gradients; 0 for no clipping.
    pub max_grad_norm: f64,
    /// The update's number, from 1: `t` of the bias corrections.
    pub t: usize,
}

/// Computes the global norm of the gradients, `[1]`.
///
/// # Panics
/// If there are none.
pub fn grad_norm<B: Kernels>(grads: &[Tensor<B, 2>]) -> Tensor<B, 1> {
    assert!(!grads.is_empty(), "grad_norm: no gradients");
    B::grad_norm(grads)
}

/// Updates one tensor: the parameter and its first and second moment.
///
/// # Shapes
/// - `parameter`, `grad`, `moments`: the same   - `norm`: `[1]`, of [`grad_norm`]
///
/// # Panics
/// If shapes differ.
pub fn adamw<B: Kernels>(
    parameter: Tensor<B, 2>,
    grad: Tensor<B, 2>,
    moments: [Tensor<B, 2>; 2],
    norm: Tensor<B, 1>,
    step: &AdamWStep,
) -> (Tensor<B, 2>, [Tensor<B, 2>; 2]) {
    for t in [&grad, &moments[0], &moments[1]] {
        assert_eq!(t.dims(), parameter.dims(), "adamw: shape against the parameter's");
    }
    B::adamw(parameter, grad, moments, norm, step)
}

/// [`grad_norm`] in plain burn tensors.
pub fn grad_norm_reference<B: Backend>(grads: &[Tensor<B, 2>]) -> Tensor<B, 1> {
    Tensor::cat(grads.iter().map(|g| (g.clone() * g.clone()).sum()).collect(), 0).sum().sqrt()
}

/// [`adamw`] in plain burn tensors.
pub fn adamw_reference<B: Backend>(
    parameter: Tensor<B, 2>,
    grad: Tensor<B, 2>,
    [m, v]: [Tensor<B, 2>; 2],
    norm: Tensor<B, 1>,
    step: &AdamWStep,
) -> (Tensor<B, 2>, [Tensor<B, 2>; 2]) {
    let &AdamWStep { learning_rate, beta1, beta2, epsilon, weight_decay, max_grad_norm, t } = step;
    let shape = parameter.dims();
    let is_finite: Tensor<B, 2, Bool> = norm.clone().is_finite().unsqueeze::<2>().expand(shape);
    let grad = match max_grad_norm > 0.0 {
        true => grad * ((norm + 1e-6).recip() * max_grad_norm).clamp_max(1.0).unsqueeze::<2>(),
        false => grad,
    };
    let correction1 = 1.0 - beta1.powi(t as i32);
    let correction2 = 1.0 - beta2.powi(t as i32);
    let new_m = m.clone() * beta1 + grad.clone() * (1.0 - beta1);
    let new_v = v.clone() * beta2 + grad.clone() * grad * (1.0 - beta2);
    let denominator = new_v.clone().sqrt() / correction2.sqrt() + epsilon;
    let updated = parameter.clone() * (1.0 - learning_rate * weight_decay)
        - new_m.clone() / denominator * (learning_rate / correction1);
    let chosen = |old: Tensor<B, 2>, new: Tensor<B, 2>| old.mask_where(is_finite.clone(), new);
    (chosen(parameter, updated), [chosen(m, new_m), chosen(v, new_v)])
}
