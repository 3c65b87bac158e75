//! The gated MLP.

use burn::tensor::activation::silu;
use burn::tensor::{Tensor, backend::Backend};
use burn_autodiff::Autodiff;

use super::llama::Linear;
use crate::ops::Ops;

/// `down(silu(gate(x)) · up(x))` (SwiGLU, arXiv:2002.05202).
#[derive(Debug, Clone)]
pub struct Mlp<B: Backend> {
    /// `[hidden -> intermediate]`
    pub gate_proj: Linear<B>,
    /// `[hidden -> intermediate]`
    pub up_proj: Linear<B>,
    /// `[intermediate -> hidden]`
    pub down_proj: Linear<B>,
}

impl<B: Backend> Mlp<B> {
    /// Runs the block.
    ///
    /// # Shapes
    /// - `x`, output: `[tokens, hidden]`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2>
    where
        B: Ops,
    {
        let gate = silu(self.gate_proj.forward(x.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(x))
    }

    /// The same block under autodiff: frozen weights, tracked adapters.
    pub fn lift(&self) -> Mlp<Autodiff<B>> {
        Mlp {
            gate_proj: self.gate_proj.lift(),
            up_proj: self.up_proj.lift(),
            down_proj: self.down_proj.lift(),
        }
    }
}
