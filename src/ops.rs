//! The operations that this project brings along: each has one file here and one test of the same name, and so have its shaders and
//! its group of the bench, where it has them.
//!
//! An op's file holds the formula and its source, the public function, a `_reference` of the same signature in plain
//! burn tensors and the backward; `wgpu.rs` holds the launches. Two traits connect them:
//!
//! - [`Kernels`] is what a *runtime* brings: forward and backward of every op as separate calls, without autodiff.
//!   wgpu launches the project's WGSL; the CPU keeps the default bodies, which are the references.
//! - [`Ops`] is what *model code* needs: ops to be called with and without autodiff. Every runtime has it through its
//!   kernels, and `Autodiff` over a runtime records a step whose backward calls the kernels again.

pub mod lora_linear;
pub mod orpo_loss;
pub mod token_logps;

pub mod kernel;
mod wgpu;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_flex::Flex;

use lora_linear::{LoraGrads, LoraPrimitive};
use orpo_loss::{PairSpan, orpo_loss_backward_reference, orpo_loss_reference};

/// Forward and backward of every op on one runtime, without autodiff. The default bodies are the references.
pub trait Kernels: Backend {
    /// `(y, s)` of [`lora_linear`](lora_linear::lora_linear); `s: [tokens, r]` is there exactly when `lora` is.
    fn lora_linear_forward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        lora: Option<LoraPrimitive<Self>>,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>) {
        lora_linear::forward_reference::<Self>(x, weight, lora)
    }

    /// The adapter's gradients, from `dy: [tokens, out]`, `x: [tokens, in]` and the saved `s: [tokens, r]`.
    fn lora_linear_backward_lora(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        s: FloatTensor<Self>,
        lora: LoraPrimitive<Self>,
    ) -> LoraGrads<Self> {
        lora_linear::backward_lora_reference::<Self>(dy, x, s, lora)
    }

    /// `dx = dy W + ds A`, `[tokens, in]`; without an adapter `dy W`.
    fn lora_linear_backward_input(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        ds_a: Option<(FloatTensor<Self>, FloatTensor<Self>)>,
    ) -> FloatTensor<Self> {
        lora_linear::backward_input_reference::<Self>(dy, weight, ds_a)
    }

    /// The statistics of [`orpo_loss`](orpo_loss::orpo_loss): `[pairs, 5]` from `logps: [entries]`.
    fn orpo_loss_forward(logps: FloatTensor<Self>, pairs: &[PairSpan]) -> FloatTensor<Self> {
        orpo_loss_reference::<Self>(logps, pairs)
    }

    /// The loss's derivative by every entry's log-probability, `[entries]`.
    fn orpo_loss_backward(
        stats: FloatTensor<Self>,
        pairs: &[PairSpan],
        beta: f32,
        grad_scale: f32,
    ) -> FloatTensor<Self> {
        orpo_loss_backward_reference::<Self>(stats, pairs, beta, grad_scale)
    }
}

impl Kernels for Flex {}

/// The ops that model code calls, with or without autodiff.
pub trait Ops: Backend {
    /// See [`lora_linear`](lora_linear::lora_linear).
    fn lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        lora: Option<LoraPrimitive<Self>>,
    ) -> FloatTensor<Self>;
}

impl<B: Kernels> Ops for B {
    fn lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        lora: Option<LoraPrimitive<Self>>,
    ) -> FloatTensor<Self> {
        B::lora_linear_forward(x, weight, lora).0
    }
}

impl<B: Kernels, C: CheckpointStrategy> Ops for Autodiff<B, C> {
    fn lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        lora: Option<LoraPrimitive<Self>>,
    ) -> FloatTensor<Self> {
        lora_linear::lora_linear_autodiff::<B, C>(x, weight, lora)
    }
}
