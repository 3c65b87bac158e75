//! Forward and backward of one packed batch.
//!
//! Forward keeps of each layer what [`KeepPlan`] says, at least its input; backward computes the rest again, layer by layer from the last
//! to the first, so that the activations of one layer live at a time. Nothing here waits for the device's results.

use burn::tensor::{Bool, Int, Tensor, TensorData, backend::Backend};

use crate::data::batch::Batch;
use crate::model::attention::AttentionLayout;
use crate::model::llama::KeepPlan;
use crate::model::{DecoderLayer, Llama};
use crate::ops::Kernels;
use crate::ops::orpo_loss::{orpo_loss, orpo_loss_backward};
use crate::ops::token_logps::{Expected, token_logps, token_logps_backward};

/// What a batch's forward and backward give.
#[derive(Debug, Clone)]
pub struct Gradients<B: Backend> {
    /// The statistics of [`orpo_loss`](crate::ops::orpo_loss), `[pairs, 5]`.
    pub stats: Tensor<B, 2>,
    /// The adapters' gradients, in the order of [`crate::lora::tensors`].
    pub lora: Vec<Tensor<B, 2>>,
    /// The most bytes in tensors in the head, while backward was in a layer, or at its end; where the device tells. What lives no longer
    /// than a launch is not among it.
    pub peak_bytes: Option<u64>,
}

/// A batch on the device, as forward reads it. To look up its embeddings and send them takes the host a while, in which the device
/// idles unless the batch is prefetched: made while the device is at work on the one before.
#[derive(Debug, Clone)]
pub struct DeviceBatch<B: Backend> {
    batch: Batch,
    /// `[tokens, hidden]`
    embedded: Tensor<B, 2>,
    layout: AttentionLayout<B>,
    /// The rows that are scored.
    rows: Tensor<B, 1, Int>,
    /// For each row its place among those, or any, `[tokens]`, and whether it has none, `[tokens, 1]`: to read by places is parallel where
    /// to add to rows need not be.
    places: Tensor<B, 1, Int>,
    is_unscored: Tensor<B, 2, Bool>,
}

impl<B: Kernels> DeviceBatch<B> {
    /// Uploads a batch for this model.
    pub fn new(model: &Llama<B>, batch: &Batch) -> Self {
        let device = model.device();
        let rows: Vec<i32> = batch.rows.iter().map(|&row| row as i32).collect();
        let (mut places, mut is_unscored) = (vec![0; batch.n_tokens()], vec![true; batch.n_tokens()]);
        for (place, &row) in batch.rows.iter().enumerate() {
            (places[row as usize], is_unscored[row as usize]) = (place as i32, false);
        }
        Self {
            embedded: model.embed(&batch.tokens),
            layout: AttentionLayout::new(&model.config, &batch.positions, batch.visible(), &device),
            rows: Tensor::from_data(TensorData::new(rows, [batch.rows.len()]), &device),
            places: Tensor::from_data(TensorData::new(places, [batch.n_tokens()]), &device),
            is_unscored: Tensor::from_data(TensorData::new(is_unscored, [batch.n_tokens(), 1]), &device),
            batch: batch.clone(),
        }
    }

    /// Tokens that are computed.
    pub fn n_tokens(&self) -> usize {
        self.batch.n_tokens()
    }
}

/// Runs a batch forward and backward; the gradients are those of `grad_scale · loss`.
pub fn forward_backward<B: Kernels>(
    model: &Llama<B>,
    batch: DeviceBatch<B>,
    beta: f32,
    grad_scale: f32,
    keep: impl Into<KeepPlan>,
) -> Gradients<B> {
    let device = model.device();
    let DeviceBatch { batch, embedded, layout, rows, places, is_unscored } = batch;
    // Below the first layer with an adapter there is nothing to learn, so nothing is kept for backward.
    let has_adapter =
        |layer: &DecoderLayer<B>| layer.linears().iter().any(|(_, linear)| linear.lora.is_some());
    let n_frozen = model.layers.iter().position(has_adapter).unwrap_or(model.layers.len());
    let (frozen, adapted) = model.layers.split_at(n_frozen);
    let mut x = frozen.iter().fold(embedded, |x, layer| layer.forward(x, &layout));
    let mut kept = Vec::with_capacity(adapted.len());
    let keep = keep.into();
    for (i, layer) in adapted.iter().enumerate() {
        let (y, layer_kept) = layer.forward_keeping(x, &layout, keep.of(i, adapted.len()));
        kept.push(layer_kept);
        x = y;
    }

    // Only the scored rows meet the final norm and the head.
    let x = x.select(0, rows);
    let hidden = model.norm.forward(x.clone());
    let forward = token_logps(hidden, &model.lm_head, &batch.entries, Expected::Keep);
    let loss = orpo_loss(forward.logps.clone(), &batch.pairs);
    let dlogps = orpo_loss_backward(&loss, &batch.pairs, beta, grad_scale);
    let mut peak_bytes = forward.peak_bytes;
    let dhidden = token_logps_backward(dlogps, forward, &model.lm_head, &batch.entries);
    peak_bytes = peak_bytes.max(B::bytes_in_use(&device));
    let dtop = model.norm.backward(dhidden, x, None);
    let mut dx = dtop.select(0, places).mask_fill(is_unscored, 0.0);

    let mut grads = Vec::with_capacity(adapted.len());
    for (i, (layer, kept)) in adapted.iter().zip(kept).enumerate().rev() {
        let activations = layer.recompute(kept, &layout);
        // Fullest while most layers wait for their turn, when the first of them is run again, or when most gradients are there.
        let n_again = keep.n_again(adapted.len());
        if i == 0 || i + 1 == n_again || i + 1 == adapted.len() {
            peak_bytes = peak_bytes.max(B::bytes_in_use(&device));
        }
        let (below, lora) = layer.backward(dx, activations, &layout, i > 0);
        grads.push(lora);
        let Some(below) = below else { break };
        dx = below;
    }
    // All gradients are there, as the optimizer finds them.
    peak_bytes = peak_bytes.max(B::bytes_in_use(&device));
    Gradients { stats: loss.stats, lora: grads.into_iter().rev().flatten().collect(), peak_bytes }
}

/// Runs a batch forward only and returns its statistics, `[pairs, 5]`.
pub fn evaluate<B: Kernels>(model: &Llama<B>, batch: DeviceBatch<B>) -> Tensor<B, 2> {
    let DeviceBatch { batch, embedded, layout, rows, .. } = batch;
    let x = model.layers.iter().fold(embedded, |x, layer| layer.forward(x, &layout));
    let hidden = model.norm.forward(x.select(0, rows));
    let forward = token_logps(hidden, &model.lm_head, &batch.entries, Expected::Skip);
    orpo_loss(forward.logps, &batch.pairs).stats
}
