//! Which rows each step takes, as a pure function of the step.

use crate::data::draw::{Shuffle, epoch_order};

/// How a data set is cut into optimizer steps, as Hugging Face's `Trainer` does: micro-batches do not cross the end of an epoch, and the
/// last step of an epoch takes what is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Rows of the data set.
    pub n_rows: usize,
    /// Pairs of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: usize,
    /// The order of every epoch.
    pub shuffle: Shuffle,
}

impl Plan {
    fn micro_batches_per_epoch(&self) -> usize {
        self.n_rows.div_ceil(self.batch_size)
    }

    /// Optimizer steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.micro_batches_per_epoch().div_ceil(self.gradient_accumulation_steps)
    }

    /// The most pairs of an optimizer step: an epoch has no more than there are.
    pub fn pairs_of_step(&self) -> usize {
        self.n_rows.min(self.batch_size * self.gradient_accumulation_steps)
    }

    /// The rows of every micro-batch of an optimizer step, counted from 0.
    pub fn micro_batches(&self, step: usize) -> Vec<Vec<usize>> {
        let (epoch, step) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let order = epoch_order(self.n_rows, epoch, self.shuffle);
        let micro_batches = order.chunks(self.batch_size).map(<[usize]>::to_vec);
        micro_batches
            .skip(step * self.gradient_accumulation_steps)
            .take(self.gradient_accumulation_steps)
            .collect()
    }

    /// Epochs done after `n_steps` optimizer steps.
    pub fn epoch(&self, n_steps: usize) -> f64 {
        let (epoch, step) = (n_steps / self.steps_per_epoch(), n_steps % self.steps_per_epoch());
        epoch as f64
            + (step * self.gradient_accumulation_steps) as f64 / self.micro_batches_per_epoch() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_step_of_an_epoch_takes_what_is_left() {
        let plan = Plan { n_rows: 7, batch_size: 2, gradient_accumulation_steps: 3, shuffle: Shuffle::Off };
        assert_eq!(plan.steps_per_epoch(), 2);
        assert_eq!(plan.micro_batches(0), [vec![0, 1], vec![2, 3], vec![4, 5]]);
        assert_eq!(plan.micro_batches(1), [vec![6]]);
        assert_eq!(plan.micro_batches(2), plan.micro_batches(0));
        assert_eq!(plan.pairs_of_step(), 6);
        assert_eq!(Plan { n_rows: 5, ..plan }.pairs_of_step(), 5, "no more than there are");
        assert_eq!([1, 2, 3].map(|n| plan.epoch(n)), [0.75, 1.0, 1.75]);
    }

    #[test]
    fn a_shuffled_epoch_takes_every_row_once_and_differs_from_the_next() {
        let plan =
            Plan { n_rows: 50, batch_size: 4, gradient_accumulation_steps: 2, shuffle: Shuffle::Seeded(1) };
        let epoch = |e: usize| -> Vec<usize> {
            let steps = e * plan.steps_per_epoch()..(e + 1) * plan.steps_per_epoch();
            steps.flat_map(|step| plan.micro_batches(step)).flatten().collect()
        };
        let mut rows = epoch(0);
        assert_ne!(rows, epoch(1));
        assert_eq!(rows, epoch(0));
        rows.sort_unstable();
        assert_eq!(rows, (0..50).collect::<Vec<_>>());
    }
}
