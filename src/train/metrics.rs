//! What a run logs, in TRL's names.

use serde::Serialize;
use serde_json::{Map, Value};

/// The loss of one micro-batch and its parts; means over its pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct StepMetrics {
    /// `nll_loss − beta · log_odds_ratio`
    pub loss: f64,
    /// Negative log-likelihood, in nats a token.
    pub nll_loss: f64,
    /// `log σ(log_odds)`: negative, as TRL logs it under this name.
    pub log_odds_ratio: f64,
    /// Log odds of chosen over rejected.
    pub log_odds_chosen: f64,
    /// `beta ·` mean log-probability of the chosen response.
    #[serde(rename = "rewards/chosen")]
    pub rewards_chosen: f64,
    /// `beta ·` mean log-probability of the rejected response.
    #[serde(rename = "rewards/rejected")]
    pub rewards_rejected: f64,
    /// Share of pairs whose chosen response is the likelier.
    #[serde(rename = "rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// `rewards/chosen − rewards/rejected`
    #[serde(rename = "rewards/margins")]
    pub rewards_margins: f64,
    /// Mean log-probability of a chosen response token, nats.
    #[serde(rename = "logps/chosen")]
    pub logps_chosen: f64,
    /// Mean log-probability of a rejected response token, nats.
    #[serde(rename = "logps/rejected")]
    pub logps_rejected: f64,
}

impl StepMetrics {
    /// From the statistics of [`crate::ops::orpo_loss::OrpoLoss`], `[pairs, 5]` row by row.
    pub fn from_stats(stats: &[f32], beta: f32) -> Self {
        let beta = f64::from(beta);
        let rows: Vec<[f64; 5]> =
            stats.chunks_exact(5).map(|row| std::array::from_fn(|i| f64::from(row[i]))).collect();
        let mean = |f: &dyn Fn(&[f64; 5]) -> f64| rows.iter().map(f).sum::<f64>() / rows.len() as f64;
        let nll_loss = rows.iter().map(|row| row[0]).sum::<f64>();
        let (chosen, rejected) = (mean(&|row| row[1]), mean(&|row| row[2]));
        let log_odds_ratio = mean(&|row| row[4]);
        Self {
            loss: nll_loss - beta * log_odds_ratio,
            nll_loss,
            log_odds_ratio,
            log_odds_chosen: mean(&|row| row[3]),
            rewards_chosen: beta * chosen,
            rewards_rejected: beta * rejected,
            rewards_accuracies: mean(&|row| f64::from(u8::from(row[1] > row[2]))),
            rewards_margins: beta * (chosen - rejected),
            logps_chosen: chosen,
            logps_rejected: rejected,
        }
    }

    /// The mean of several micro-batches, each counting the same, as TRL takes it.
    pub fn mean(metrics: &[Self]) -> Self {
        let n = metrics.len() as f64;
        let mean = |f: fn(&Self) -> f64| metrics.iter().map(f).sum::<f64>() / n;
        Self {
            loss: mean(|m| m.loss),
            nll_loss: mean(|m| m.nll_loss),
            log_odds_ratio: mean(|m| m.log_odds_ratio),
            log_odds_chosen: mean(|m| m.log_odds_chosen),
            rewards_chosen: mean(|m| m.rewards_chosen),
            rewards_rejected: mean(|m| m.rewards_rejected),
            rewards_accuracies: mean(|m| m.rewards_accuracies),
            rewards_margins: mean(|m| m.rewards_margins),
            logps_chosen: mean(|m| m.logps_chosen),
            logps_rejected: mean(|m| m.logps_rejected),
        }
    }

    /// The fields as a JSON object, every name behind `prefix` (`eval_`).
    pub fn to_json(&self, prefix: &str) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => {
                fields.into_iter().map(|(k, v)| (format!("{prefix}{k}"), v)).collect()
            }
            _ => Map::new(),
        }
    }
}

/// What is added to a line of the log for training steps.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct StepTrace {
    /// Global norm of the gradients before clipping, of the last step.
    pub grad_norm: f64,
    /// The rate used for the last step.
    pub learning_rate: f64,
    /// Packed tokens a second since the last line.
    pub tokens_per_second: f64,
    /// The most that tensors took on the device since the last line, or the process's resident memory on the CPU.
    pub memory_bytes: u64,
    /// In fp16: what the last step's loss was multiplied with before backward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// In fp16: steps of the run so far whose gradients overflowed, and which were skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<usize>,
}
