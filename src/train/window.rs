//! What has happened since the last line of the log.

use std::time::{Duration, Instant};

use super::metrics::StepMetrics;

/// The steps that the next line of the log is about.
#[derive(Default)]
pub(super) struct Window {
    /// Of every micro-batch.
    pub(super) metrics: Vec<StepMetrics>,
    /// Of every step.
    pub(super) losses: Vec<f64>,
    /// Of every sequence, without padding.
    pub(super) n_tokens: usize,
    /// Tokens of the steps that tell nothing of the others' speed, and what these took in seconds.
    left_out: (usize, f64),
    /// The most bytes in tensors, where the device tells.
    pub(super) peak_bytes: Option<u64>,
    /// When its first step began.
    pub(super) started: Option<Instant>,
    /// Seconds in evaluations and saves.
    pub(super) paused_s: f64,
}

impl Window {
    pub(super) fn starting_now() -> Self {
        Self { started: Some(Instant::now()), ..Self::default() }
    }

    /// Micro-batches count the same, as TRL logs its metrics; for the loss steps do, as `Trainer` logs it.
    pub(super) fn mean(&self) -> StepMetrics {
        let loss = self.losses.iter().sum::<f64>() / self.losses.len() as f64;
        StepMetrics { loss, ..StepMetrics::mean(&self.metrics) }
    }

    pub(super) fn leave_out(&mut self, n_tokens: usize, elapsed: Duration) {
        self.left_out.0 += n_tokens;
        self.left_out.1 += elapsed.as_secs_f64();
    }

    /// Of all steps where all of them are left out: nothing else is known.
    pub(super) fn tokens_per_second(&self) -> f64 {
        let elapsed_s = self.started.map_or(0.0, |at| at.elapsed().as_secs_f64()) - self.paused_s;
        let (n_tokens, elapsed_s) = match self.left_out {
            (n_tokens, seconds) if n_tokens < self.n_tokens => {
                (self.n_tokens - n_tokens, elapsed_s - seconds)
            }
            _ => (self.n_tokens, elapsed_s),
        };
        if elapsed_s > 0.0 { n_tokens as f64 / elapsed_s } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_and_profiled_steps_are_no_part_of_the_speed() {
        let started = Instant::now().checked_sub(Duration::from_secs(10));
        let mut window = Window { n_tokens: 900, started, paused_s: 4.0, ..Window::default() };
        let speed = |window: &Window| window.tokens_per_second().round();
        assert_eq!(speed(&window), 150.0);
        window.leave_out(500, Duration::from_secs(4));
        assert_eq!(speed(&window), 200.0);
        window.leave_out(400, Duration::from_secs(1));
        assert_eq!(speed(&window), 150.0, "nothing else is known");
    }
}
