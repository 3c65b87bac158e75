//! The optimizer over the adapter's tensors.

use burn::tensor::{Tensor, backend::Backend};

use crate::ops::Kernels;
use crate::ops::adamw::{AdamWStep, adamw};

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
    /// Largest global norm of the gradients; 0 for no clipping.
    pub max_grad_norm: f64,
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

    /// Updates every tensor with gradients of this global norm, those of `loss_scale` times the loss, clipped to `max_grad_norm`;
    /// see [`adamw`].
    ///
    /// # Panics
    /// If the number of tensors differs from that at the start.
    pub fn update(
        &mut self,
        learning_rate: f64,
        parameters: Vec<&mut Tensor<B, 2>>,
        grads: Vec<Tensor<B, 2>>,
        norm: &Tensor<B, 1>,
        loss_scale: f64,
    ) where
        B: Kernels,
    {
        assert_eq!(parameters.len(), self.exp_avg.len(), "AdamW: number of parameters");
        assert_eq!(grads.len(), self.exp_avg.len(), "AdamW: number of gradients");
        self.n_updates += 1;
        let AdamWConfig { adam_beta1, adam_beta2, adam_epsilon, weight_decay, max_grad_norm } = self.config;
        let step = AdamWStep {
            learning_rate,
            beta1: adam_beta1,
            beta2: adam_beta2,
            epsilon: adam_epsilon,
            weight_decay,
            max_grad_norm,
            t: self.n_updates,
            loss_scale,
        };
        // Something stands in for each parameter meanwhile, so that nobody else holds it and it is updated in its place.
        let (slots, parameters): (Vec<_>, Vec<_>) = parameters
            .into_iter()
            .map(|slot| {
                let parameter = std::mem::replace(slot, norm.clone().reshape([1, 1]));
                (slot, parameter)
            })
            .unzip();
        let moments = [&mut self.exp_avg, &mut self.exp_avg_sq].map(std::mem::take);
        let (parameters, moments) = adamw(parameters, grads, moments, norm.clone(), &step);
        [self.exp_avg, self.exp_avg_sq] = moments;
        for (slot, parameter) in slots.into_iter().zip(parameters) {
            *slot = parameter;
        }
    }
}
