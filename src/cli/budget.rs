//! What a run's longest step takes of the device's memory, and what of the forward pass there is room for.

use crate::data::batch::{Batch, LossCompat, pack};
use crate::data::tokenize::TokenizedPair;
use crate::device::DeviceChoice;
use crate::model::Llama;
use crate::model::llama::Keep;
use crate::ops::Kernels;
use crate::train::cost::{StepMemory, StepShape};
use crate::train::plan::Plan;

/// The share of a device's memory that a run may be predicted to fill: drivers, displays and fragments take the rest.
const USABLE: f64 = 0.85;

/// What is kept for backward, and the memory that the longest step is predicted to take.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// What of each layer is kept.
    pub keep: Keep,
    /// The prediction.
    pub memory: StepMemory,
}

impl Budget {
    /// Keeps everything without gradient checkpointing; with it, what attention computed as well as each layer's input, where the
    /// device is known to have room for it.
    pub fn new<B: Kernels>(
        model: &Llama<B>,
        rank: usize,
        rows: &[TokenizedPair],
        plan: &Plan,
        gradient_checkpointing: bool,
        choice: &DeviceChoice,
    ) -> Self {
        let batch = longest_batch(rows, plan.batch_size);
        let logits_bytes = model.lm_head.logits_bytes(batch.rows.len());
        let accumulates = plan.gradient_accumulation_steps > 1;
        let predict = |keep| {
            let shape = StepShape::of(&batch, rank, model.precision, keep, accumulates, logits_bytes);
            Self { keep, memory: StepMemory::of(&model.config, &shape) }
        };
        if !gradient_checkpointing {
            return predict(Keep::All);
        }
        let more = predict(Keep::Attention);
        let room = choice.device_memory().map(|bytes| bytes as f64 * USABLE);
        match room {
            Some(room) if more.memory.total() as f64 <= room => more,
            _ => predict(Keep::Input),
        }
    }
}

/// The micro-batch of the longest pairs.
fn longest_batch(rows: &[TokenizedPair], batch_size: usize) -> Batch {
    let mut pairs: Vec<&TokenizedPair> = rows.iter().collect();
    pairs.sort_by_key(|pair| std::cmp::Reverse(pair.prompt.len() + pair.chosen.len() + pair.rejected.len()));
    pack(&pairs[..batch_size.min(pairs.len())], LossCompat::Trl)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::dataset::Location;

    #[test]
    fn the_longest_pairs_make_the_longest_batch() {
        let pair = |n: u32| TokenizedPair {
            prompt: vec![1; n as usize],
            chosen: vec![2, 3],
            rejected: vec![4, 5],
            location: Location { path: Path::new("rows.jsonl").into(), line: n as usize },
        };
        let rows: Vec<_> = [3, 9, 1, 7].map(pair).into();
        let lines = |batch: &Batch| batch.locations.iter().map(|l| l.line).collect::<Vec<_>>();
        assert_eq!(lines(&longest_batch(&rows, 2)), [9, 7]);
        assert_eq!(lines(&longest_batch(&rows, 9)).len(), 4);
    }
}
