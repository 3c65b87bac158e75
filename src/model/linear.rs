//! A linear layer with its adapter.

use burn::tensor::{Tensor, backend::Backend};

use crate::ops::Kernels;
use crate::ops::lora_linear::{
    InputGrad, Lora, LoraLinearGrads, lora_linear, lora_linear_backward, lora_rank_r,
};
use crate::ops::quantize::Weight;

/// A linear layer without bias: a frozen weight and, where one is attached, a LoRA adapter.
#[derive(Debug, Clone)]
pub struct Linear<B: Backend> {
    /// `[out, in]`, as the checkpoint stores it.
    pub weight: Weight<B>,
    /// The trainable part.
    pub lora: Option<Lora<B>>,
}

/// What a layer computes.
#[derive(Debug, Clone)]
pub struct LinearOutput<B: Backend> {
    /// `[tokens, out]`
    pub y: Tensor<B, 2>,
    /// The adapter's rank-r tensor, `[tokens, r]`.
    pub s: Option<Tensor<B, 2>>,
}

impl<B: Backend> Linear<B> {
    /// A layer without adapter.
    pub fn frozen(weight: Weight<B>) -> Self {
        Self { weight, lora: None }
    }
}

impl<B: Kernels> Linear<B> {
    /// Applies the layer: `[tokens, in] -> [tokens, out]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> LinearOutput<B> {
        let (y, s) = lora_linear(x, self.weight.to_dense(), self.lora.as_ref(), None);
        LinearOutput { y, s }
    }

    /// Applies the layer and adds the residual, `[tokens, out]`.
    pub fn forward_onto(&self, x: Tensor<B, 2>, residual: Tensor<B, 2>) -> LinearOutput<B> {
        let (y, s) = lora_linear(x, self.weight.to_dense(), self.lora.as_ref(), Some(residual));
        LinearOutput { y, s }
    }

    /// The rank-r tensor alone.
    pub fn rank_r(&self, x: Tensor<B, 2>) -> Option<Tensor<B, 2>> {
        self.lora.as_ref().map(|lora| lora_rank_r(x, lora))
    }

    /// The gradients, from that of the output and what forward was given and gave.
    pub fn backward(
        &self,
        dy: Tensor<B, 2>,
        x: Tensor<B, 2>,
        s: Option<Tensor<B, 2>>,
        input: InputGrad<B>,
    ) -> LoraLinearGrads<B> {
        lora_linear_backward(dy, x, self.weight.to_dense(), self.lora.as_ref(), s, input)
    }
}
