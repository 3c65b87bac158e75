//! The micro-batches of an optimizer step.

use std::time::Instant;

use burn::tensor::Tensor;

use super::TrainSettings;
use super::metrics::StepMetrics;
use super::step::{DeviceBatch, forward_backward};
use super::window::Window;
use crate::data::batch::{LossCompat, pack};
use crate::data::dataset::Location;
use crate::data::tokenize::TokenizedPair;
use crate::error::Result;
use crate::model::Llama;
use crate::ops::Kernels;
use crate::ops::adamw::add_grads;
use crate::ops::read::read;

/// Forward and backward of a step's micro-batches, of which the first may be prefetched: their mean gradient, times the loss scale, and
/// each one's statistics.
pub(super) fn accumulate<B: Kernels>(
    model: &Llama<B>,
    rows: &[TokenizedPair],
    micro_batches: &[Vec<usize>],
    mut prefetched: Option<DeviceBatch<B>>,
    settings: &TrainSettings,
    loss_scale: f64,
    window: &mut Window,
) -> (Vec<Tensor<B, 2>>, Vec<Tensor<B, 2>>) {
    window.started.get_or_insert_with(Instant::now);
    let grad_scale = (loss_scale / micro_batches.len() as f64) as f32;
    let mut total: Option<Vec<Tensor<B, 2>>> = None;
    let mut stats = Vec::with_capacity(micro_batches.len());
    for indices in micro_batches {
        let batch = prefetched.take().unwrap_or_else(|| upload(model, rows, indices, settings.loss_compat));
        window.n_tokens += batch.n_tokens();
        let grads = forward_backward(model, batch, settings.beta, grad_scale, settings.keep);
        stats.push(grads.stats);
        window.peak_bytes = window.peak_bytes.max(grads.peak_bytes);
        total = Some(match total {
            Some(total) => add_grads(total, grads.lora),
            None => grads.lora,
        });
    }
    (total.unwrap_or_default(), stats)
}

/// Reads what a step came to, once for all of it: the mean metrics of its micro-batches and the norm of its gradient as it came.
pub(super) fn read_step<B: Kernels>(
    stats: Vec<Tensor<B, 2>>,
    norm: Tensor<B, 1>,
    beta: f32,
    window: &mut Window,
) -> Result<(StepMetrics, f64)> {
    let lengths: Vec<usize> = stats.iter().map(|s| s.dims().iter().product()).collect();
    let flat = stats.into_iter().zip(&lengths).map(|(s, &n)| s.reshape([n]));
    let values = read(Tensor::cat(std::iter::once(norm).chain(flat).collect(), 0))?;
    let (norm, mut values) = (f64::from(values[0]), &values[1..]);
    let mut all = Vec::with_capacity(lengths.len());
    for n in lengths {
        let (stats, rest) = values.split_at(n);
        all.push(StepMetrics::from_stats(stats, beta));
        values = rest;
    }
    let mean = StepMetrics::mean(&all);
    window.metrics.extend(all);
    window.losses.push(mean.loss);
    Ok((mean, norm))
}

/// Where these rows stand.
pub(super) fn locations<'a>(rows: &'a [TokenizedPair], indices: &[usize]) -> Vec<&'a Location> {
    indices.iter().map(|&i| &rows[i].location).collect()
}

/// Packs these rows and sends them to the model's device.
pub(super) fn upload<B: Kernels>(
    model: &Llama<B>,
    rows: &[TokenizedPair],
    indices: &[usize],
    compat: LossCompat,
) -> DeviceBatch<B> {
    let pairs: Vec<&TokenizedPair> = indices.iter().map(|&i| &rows[i]).collect();
    DeviceBatch::new(model, &pack(&pairs, compat))
}
