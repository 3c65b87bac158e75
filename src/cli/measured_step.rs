//! A training step on random weights, to be timed.

use std::time::Instant;

use burn::tensor::Tensor;

use crate::config::TrainArgs;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::lora;
use crate::model::Llama;
use crate::model::llama::KeepPlan;
use crate::ops::Kernels;
use crate::ops::adamw::grad_norm;
use crate::ops::read::{read, wait};
use crate::train::optim::AdamW;
use crate::train::step::{DeviceBatch, Gradients, forward_backward};

/// A model with its optimizer and the batch that every step takes.
pub(super) struct MeasuredStep<B: Kernels> {
    /// The adapter as it began, which a run keeps to see whether it has learnt anything.
    _initial: Vec<Tensor<B, 2>>,
    model: Llama<B>,
    batch: Batch,
    /// That of the next step, prefetched as in a run.
    prefetched: Option<DeviceBatch<B>>,
    keep: KeepPlan,
    optimizer: AdamW<B>,
    beta: f32,
    learning_rate: f64,
}

impl<B: Kernels> MeasuredStep<B> {
    pub(super) fn new(model: Llama<B>, batch: Batch, keep: KeepPlan) -> Self {
        let initial = lora::parameters(&model);
        let settings = TrainArgs::default();
        let optimizer = AdamW::new(settings.adamw(), &initial);
        let prefetched = Some(DeviceBatch::new(&model, &batch));
        let TrainArgs { beta, learning_rate, .. } = settings;
        Self {
            _initial: initial,
            model,
            batch,
            prefetched,
            keep,
            optimizer,
            beta: beta as f32,
            learning_rate,
        }
    }

    /// Seconds of a micro-batch that others of its step follow, before which nothing is updated.
    pub(super) fn timed_micro_batch(&mut self) -> Result<f64> {
        let started = Instant::now();
        let grads = self.forward_backward();
        self.prefetch();
        read(grads.stats)?;
        wait::<B>(&self.model.device())?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn forward_backward(&mut self) -> Gradients<B> {
        let batch = self.prefetched.take().expect("the step before has prefetched the batch");
        forward_backward(&self.model, batch, self.beta, 1.0, self.keep)
    }

    fn prefetch(&mut self) {
        self.prefetched = Some(DeviceBatch::new(&self.model, &self.batch));
    }

    /// Seconds of one whole step.
    pub(super) fn timed(&mut self) -> Result<f64> {
        let started = Instant::now();
        let grads = self.forward_backward();
        let norm = grad_norm(&grads.lora);
        self.optimizer.update(self.learning_rate, lora::tensors_mut(&mut self.model), grads.lora, &norm, 1.0);
        self.prefetch();
        let stats = read(grads.stats)?;
        let norm = read(norm)?;
        wait::<B>(&self.model.device())?;
        if let Some(value) = stats.iter().chain(&norm).find(|value| !value.is_finite()) {
            let rows = "random weights".to_owned();
            return Err(Error::NonFinite {
                step: self.optimizer.n_updates,
                quantity: "a figure",
                value: f64::from(*value),
                rows,
            });
        }
        Ok(started.elapsed().as_secs_f64())
    }
}

/// The middle one of these times, or the mean of the two in the middle.
pub(super) fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    if times.len() % 2 == 1 { times[middle] } else { f64::midpoint(times[middle - 1], times[middle]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 9.0]), 3.0);
        assert_eq!(median(&mut [5.0]), 5.0);
    }
}
