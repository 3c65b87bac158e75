//! Metrics of rows that are not learned from.

use super::accumulate::upload;
use super::checks::check_finite;
use super::metrics::StepMetrics;
use super::step::evaluate;
use crate::data::batch::LossCompat;
use crate::data::tokenize::TokenizedPair;
use crate::error::Result;
use crate::model::Llama;
use crate::ops::Kernels;
use crate::ops::read::read;

/// How rows are evaluated; names as in [`TrainSettings`](super::TrainSettings).
#[derive(Debug, Clone, Copy)]
pub struct Evaluation {
    /// Weight of the odds-ratio term.
    pub beta: f32,
    /// Whose loss is computed.
    pub loss_compat: LossCompat,
    /// Pairs that are computed at a time.
    pub batch_size: usize,
    /// Steps that the model was trained for, which an error names.
    pub step: usize,
}

impl Evaluation {
    /// Metrics of the rows, of which there is at least one: every batch counts as many times as it has rows, as `Trainer.evaluate` averages
    /// the loss.
    ///
    /// `may_go_on` is asked before each batch, with the number of rows that are done; where it says no there are no metrics.
    ///
    /// # Errors
    /// If a loss is not finite, or the device fails.
    ///
    /// # Panics
    /// If `batch_size` is 0.
    pub fn run<B: Kernels>(
        &self,
        model: &Llama<B>,
        rows: &[TokenizedPair],
        may_go_on: &dyn Fn(usize) -> bool,
    ) -> Result<Option<StepMetrics>> {
        let mut metrics = Vec::with_capacity(rows.len());
        let indices: Vec<usize> = (0..rows.len()).collect();
        for indices in indices.chunks(self.batch_size) {
            if !may_go_on(metrics.len()) {
                return Ok(None);
            }
            let stats = evaluate(model, upload(model, rows, indices, self.loss_compat));
            let batch = StepMetrics::from_stats(&read(stats)?, self.beta);
            check_finite(self.step, "eval_loss", batch.loss, rows, indices)?;
            metrics.extend(vec![batch; indices.len()]);
        }
        Ok(Some(StepMetrics::mean(&metrics)))
    }
}
