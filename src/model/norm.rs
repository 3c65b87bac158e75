//! RMSNorm.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use burn_autodiff::Autodiff;

/// Normalizes the last dimension by its root mean square: `y = x / sqrt(mean(x²) + eps) · weight` (arXiv:1910.07467), in `f32`.
#[derive(Debug, Clone)]
pub struct RmsNorm<B: Backend> {
    /// `[hidden]`, frozen.
    pub weight: Tensor<B, 1>,
    /// `rms_norm_eps`
    pub eps: f64,
}

impl<B: Backend> RmsNorm<B> {
    /// Normalizes every row.
    ///
    /// # Shapes
    /// - `x`, output: `[tokens, hidden]`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let mean_square = (x.clone() * x.clone()).mean_dim(1);
        x * (mean_square + self.eps).sqrt().recip() * self.weight.clone().unsqueeze()
    }

    /// The same norm under autodiff, frozen.
    pub fn lift(&self) -> RmsNorm<Autodiff<B>> {
        RmsNorm { weight: Tensor::from_inner(self.weight.clone()), eps: self.eps }
    }
}
