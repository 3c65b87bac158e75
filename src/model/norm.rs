//! RMSNorm with its frozen weight.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};

use crate::ops::Kernels;
use crate::ops::rms_norm::{rms_norm, rms_norm_backward};

/// Normalizes every row of the residual stream by its root mean square; see [`rms_norm`].
#[derive(Debug, Clone)]
pub struct RmsNorm<B: Backend> {
    /// `[hidden]`, frozen, in `f32`.
    pub weight: Tensor<B, 1>,
    /// `rms_norm_eps`
    pub eps: f64,
    /// What the output is stored in.
    pub dtype: DType,
}

impl<B: Kernels> RmsNorm<B> {
    /// Normalizes every row, `[tokens, hidden] -> [tokens, hidden]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        rms_norm(x, self.weight.clone(), self.eps, self.dtype)
    }

    /// `sum` plus the gradient by `x`, from that of the output; `[tokens, hidden]` in `f32`.
    pub fn backward(&self, dy: Tensor<B, 2>, x: Tensor<B, 2>, sum: Option<Tensor<B, 2>>) -> Tensor<B, 2> {
        rms_norm_backward(dy, x, self.weight.clone(), self.eps, sum)
    }
}
