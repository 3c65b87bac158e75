//! Forward and backward of one packed batch.
//!
//! The layers run outside autodiff, each layer's input is kept, and backward runs each layer once more under autodiff, from the last
//! to the first, dropping its tape as soon as its gradients are out: activations of one layer live at a time. Without gradient
//! checkpointing the tapes of the forward pass are kept instead and nothing is run twice.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use burn_autodiff::Autodiff;

use super::metrics::StepMetrics;
use super::optim::read;
use crate::data::batch::Batch;
use crate::error::Result;
use crate::model::attention::AttentionLayout;
use crate::model::{DecoderLayer, Llama};
use crate::ops::orpo_loss::{orpo_loss, orpo_loss_backward};
use crate::ops::token_logps::{Expected, token_logps, token_logps_backward};
use crate::ops::{Kernels, Ops};

/// What of the forward pass is kept for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradientCheckpointing {
    /// Each layer's input; the layer runs again in backward.
    PerLayer,
    /// Every activation.
    Off,
}

/// A layer's part of the forward pass.
enum Kept<B: Backend> {
    Input(Tensor<B, 2>),
    Tape(Tape<B>),
}

/// One layer's run under autodiff.
struct Tape<B: Backend> {
    layer: DecoderLayer<Autodiff<B>>,
    input: Tensor<Autodiff<B>, 2>,
    output: Tensor<Autodiff<B>, 2>,
}

/// Runs a batch forward and backward.
///
/// Returns its metrics and the gradients of `grad_scale · loss`, in the order of [`crate::lora::tensors`].
///
/// # Errors
/// If the device fails.
pub fn forward_backward<B: Kernels>(
    model: &Llama<B>,
    batch: &Batch,
    beta: f32,
    grad_scale: f32,
    checkpointing: GradientCheckpointing,
) -> Result<(StepMetrics, Vec<Tensor<B, 2>>)> {
    let layout = attention_layout(model, batch);
    let tracked_layout = layout.lift();
    // Below the first layer with an adapter there is nothing to learn, so nothing is kept for backward.
    let has_adapter =
        |layer: &DecoderLayer<B>| layer.linears().iter().any(|(_, linear)| linear.lora.is_some());
    let n_frozen = model.layers.iter().position(has_adapter).unwrap_or(model.layers.len());
    let (frozen, adapted) = model.layers.split_at(n_frozen);
    let mut x = frozen.iter().fold(model.embed(&batch.tokens), |x, layer| layer.forward(x, &layout));
    let mut kept = Vec::with_capacity(adapted.len());
    for layer in adapted {
        match checkpointing {
            GradientCheckpointing::PerLayer => {
                kept.push(Kept::Input(x.clone()));
                x = layer.forward(x, &layout);
            }
            GradientCheckpointing::Off => {
                let tape = record(layer, x, &tracked_layout, !kept.is_empty());
                x = tape.output.clone().inner();
                kept.push(Kept::Tape(tape));
            }
        }
    }

    // Only the scored rows meet the final norm and the head.
    let top = Tensor::<Autodiff<B>, 2>::from_inner(x).require_grad();
    let hidden = model.norm.lift().forward(top.clone().select(0, row_indices(batch, &model.device())));
    let forward = token_logps(hidden.clone().inner(), &model.lm_head, &batch.entries, Expected::Keep);
    let loss = orpo_loss(forward.logps.clone(), &batch.pairs);
    let dlogps = orpo_loss_backward(&loss, &batch.pairs, beta, grad_scale);
    let dhidden = token_logps_backward(dlogps, forward, &model.lm_head, &batch.entries);
    let grads = backward(hidden, dhidden);
    let mut dx = top.grad(&grads).expect("the top of the layers is tracked");

    let mut lora_grads = Vec::with_capacity(adapted.len());
    for (i, (layer, kept)) in adapted.iter().zip(kept).enumerate().rev() {
        let tape = match kept {
            Kept::Input(x) => record(layer, x, &tracked_layout, i > 0),
            Kept::Tape(tape) => tape,
        };
        let grads = backward(tape.output, dx.clone());
        lora_grads.push(layer_grads(&tape.layer, &grads));
        if let Some(below) = tape.input.grad(&grads) {
            dx = below;
        }
    }
    let metrics = StepMetrics::from_stats(&read(loss.stats)?, beta);
    Ok((metrics, lora_grads.into_iter().rev().flatten().collect()))
}

/// Runs a batch forward only and returns its metrics.
///
/// # Errors
/// If the device fails.
pub fn evaluate<B: Kernels>(model: &Llama<B>, batch: &Batch, beta: f32) -> Result<StepMetrics> {
    let layout = attention_layout(model, batch);
    let x = model.layers.iter().fold(model.embed(&batch.tokens), |x, layer| layer.forward(x, &layout));
    let hidden = model.norm.forward(x.select(0, row_indices(batch, &model.device())));
    let forward = token_logps(hidden, &model.lm_head, &batch.entries, Expected::Skip);
    let loss = orpo_loss(forward.logps, &batch.pairs);
    Ok(StepMetrics::from_stats(&read(loss.stats)?, beta))
}

fn record<B: Kernels>(
    layer: &DecoderLayer<B>,
    x: Tensor<B, 2>,
    layout: &AttentionLayout<Autodiff<B>>,
    input_needs_grad: bool,
) -> Tape<B> {
    let layer = layer.lift();
    let input = Tensor::<Autodiff<B>, 2>::from_inner(x).set_require_grad(input_needs_grad);
    let output = layer.forward(input.clone(), layout);
    Tape { layer, input, output }
}

/// Backward from `output` with the gradient `doutput`: that of `Σ output · doutput`.
fn backward<B: Kernels>(
    output: Tensor<Autodiff<B>, 2>,
    doutput: Tensor<B, 2>,
) -> <Autodiff<B> as burn::tensor::backend::AutodiffBackend>::Gradients {
    (output * Tensor::from_inner(doutput)).sum().backward()
}

fn layer_grads<B: Kernels>(
    layer: &DecoderLayer<Autodiff<B>>,
    grads: &<Autodiff<B> as burn::tensor::backend::AutodiffBackend>::Gradients,
) -> Vec<Tensor<B, 2>> {
    let adapters = layer.linears().into_iter().filter_map(|(_, linear)| linear.lora.as_ref());
    let grad = |t: &Tensor<Autodiff<B>, 2>| t.grad(grads).expect("every adapter takes part in its layer");
    adapters.flat_map(|lora| [grad(&lora.a), grad(&lora.b)]).collect()
}

fn attention_layout<B: Ops>(model: &Llama<B>, batch: &Batch) -> AttentionLayout<B> {
    let blocks: Vec<_> = batch.segments.iter().map(|segment| segment.start..segment.end()).collect();
    AttentionLayout::new(
        &model.config,
        &batch.positions,
        &blocks,
        |i, j| batch.attends(i, j),
        &model.device(),
    )
}

fn row_indices<B: Backend>(batch: &Batch, device: &B::Device) -> Tensor<B, 1, Int> {
    let rows: Vec<i32> = batch.rows.iter().map(|&row| row as i32).collect();
    Tensor::from_data(TensorData::new(rows, [batch.rows.len()]), device)
}
