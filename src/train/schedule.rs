//! The learning rate as a pure function of the step.

use serde::{Deserialize, Serialize};

/// How the rate falls after the warm-up; names as in Hugging Face's `lr_scheduler_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LrSchedulerType {
    /// Stays.
    Constant,
    /// Falls on a line to zero.
    Linear,
    /// Falls on half a cosine to zero.
    #[default]
    Cosine,
}

/// A schedule over a run of `max_steps` optimizer steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The rate after the warm-up.
    pub learning_rate: f64,
    /// The shape.
    pub kind: LrSchedulerType,
    /// Steps of the warm-up.
    pub warmup_steps: usize,
    /// Steps of the run.
    pub max_steps: usize,
}

impl Schedule {
    /// The rate of an optimizer step, counted from 0 (transformers, `optimization.py`): step `k` of a warm-up of `n` uses `k / n` of the
    /// rate, so the first uses 0.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.max_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / decay_steps as f64).min(1.0);
        self.learning_rate
            * match self.kind {
                LrSchedulerType::Constant => 1.0,
                LrSchedulerType::Linear => 1.0 - progress,
                LrSchedulerType::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_transformers() {
        // get_{constant,linear,cosine}_schedule_with_warmup of 10 steps with 2 of warm-up, lr 1.
        let expected = [
            (LrSchedulerType::Constant, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
            (LrSchedulerType::Linear, [0.0, 0.5, 1.0, 0.875, 0.5, 0.125]),
            (LrSchedulerType::Cosine, [0.0, 0.5, 1.0, 0.961_939_766_255_643, 0.5, 0.038_060_233_744_357]),
        ];
        for (kind, rates) in expected {
            let schedule = Schedule { learning_rate: 1.0, kind, warmup_steps: 2, max_steps: 10 };
            for (step, rate) in [0, 1, 2, 3, 6, 9].into_iter().zip(rates) {
                assert!(
                    (schedule.at(step) - rate).abs() < 1e-12,
                    "{kind:?} at {step}: {}",
                    schedule.at(step)
                );
            }
        }
    }
}
