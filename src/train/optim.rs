//! AdamW over the adapter's tensors and clipping by the global norm, both in `f32` as PyTorch computes them.

use burn::tensor::{Tensor, backend::Backend};

use crate::error::{Error, Result};

/// AdamW's settings, in the names of Hugging Face's `TrainingArguments`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub adam_beta1: f64,
    /// Decay of the second moment.
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
    /// Decoupled decay, times the learning rate.
    pub weight_decay: f64,
}

/// AdamW (arXiv:1711.05101; `torch.optim.AdamW`): first and second moment of every tensor, in the tensors' order.
#[derive(Debug, Clone)]
pub struct AdamW<B: Backend> {
    config: AdamWConfig,
    /// Updates made.
    pub n_updates: usize,
    /// First moments.
    pub exp_avg: Vec<Tensor<B, 2>>,
    /// Second moments.
    pub exp_avg_sq: Vec<Tensor<B, 2>>,
}

impl<B: Backend> AdamW<B> {
    /// An optimizer at rest for these tensors.
    pub fn new(config: AdamWConfig, parameters: &[Tensor<B, 2>]) -> Self {
        let zeros = || parameters.iter().map(|p| Tensor::zeros(p.dims(), &p.device())).collect();
        Self { config, n_updates: 0, exp_avg: zeros(), exp_avg_sq: zeros() }
    }

    /// Updates every tensor:
    ///
    /// `m ← β1 m + (1 − β1) g`, `v ← β2 v + (1 − β2) g²`, `p ← p (1 − lr · decay) − lr · m̂ / (√v̂ + ε)` with the moments divided by
    /// `1 − βᵗ`.
    ///
    /// # Panics
    /// If the number of tensors differs from that at the start.
    pub fn update(
        &mut self,
        learning_rate: f64,
        parameters: Vec<Tensor<B, 2>>,
        grads: Vec<Tensor<B, 2>>,
    ) -> Vec<Tensor<B, 2>> {
        assert_eq!(parameters.len(), self.exp_avg.len(), "AdamW: number of parameters");
        assert_eq!(grads.len(), self.exp_avg.len(), "AdamW: number of gradients");
        self.n_updates += 1;
        let AdamWConfig { adam_beta1: beta1, adam_beta2: beta2, adam_epsilon, weight_decay } = self.config;
        let correction1 = 1.0 - beta1.powi(self.n_updates as i32);
        let correction2 = 1.0 - beta2.powi(self.n_updates as i32);
        let moments = self.exp_avg.iter_mut().zip(&mut self.exp_avg_sq);
        let updated = parameters.into_iter().zip(grads).zip(moments).map(|((p, g), (m, v))| {
            *m = m.clone() * beta1 + g.clone() * (1.0 - beta1);
            *v = v.clone() * beta2 + g.clone() * g * (1.0 - beta2);
            let denominator = v.clone().sqrt() / correction2.sqrt() + adam_epsilon;
            p * (1.0 - learning_rate * weight_decay) - m.clone() / denominator * (learning_rate / correction1)
        });
        updated.collect()
    }
}

/// Scales the gradients so that their global norm is at most `max_norm`, and returns that norm before clipping
/// (`torch.nn.utils.clip_grad_norm_`: the factor is `max_norm / (norm + 1e-6)`, at most 1). A `max_norm` of 0 leaves them as they are.
///
/// # Errors
/// If the norm cannot be read from the device.
pub fn clip_grad_norm<B: Backend>(
    grads: Vec<Tensor<B, 2>>,
    max_norm: f64,
) -> Result<(Vec<Tensor<B, 2>>, f64)> {
    let squares = grads.iter().map(|g| (g.clone() * g.clone()).sum()).collect();
    let norm = f64::from(read(Tensor::cat(squares, 0).sum().sqrt())?[0]);
    let factor = if max_norm > 0.0 { max_norm / (norm + 1e-6) } else { 1.0 };
    let clipped = if factor < 1.0 { grads.into_iter().map(|g| g * factor).collect() } else { grads };
    Ok((clipped, norm))
}

/// Reads a tensor's values; the one place where a step waits for the device.
///
/// # Errors
/// What the device says, also of the kernels launched before.
pub fn read<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>> {
    let device = format!("{:?}", tensor.device());
    let failed = |problem: String| Error::Device {
        device,
        problem,
        hint: Some("try --device cpu; a full device: lower --max_length or --batch_size".to_owned()),
    };
    match tensor.try_into_data() {
        Ok(data) => {
            data.convert::<f32>().into_vec().map_err(|e| failed(format!("gave unreadable data: {e:?}")))
        }
        Err(e) => Err(failed(format!("failed: {e:?}"))),
    }
}
