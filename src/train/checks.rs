//! What ends a run that goes wrong.

use burn::tensor::Tensor;

use super::accumulate::locations;
use crate::data::tokenize::TokenizedPair;
use crate::error::{Error, Result};
use crate::ops::Kernels;
use crate::ops::read::read;
use crate::words::{counted, first_of};

/// How many of a step's rows an error names.
const SHOWN_ROWS: usize = 16;

/// Checks a quantity that was computed from these of the rows, after so many steps.
pub(super) fn check_finite(
    n_steps: usize,
    quantity: &'static str,
    value: f64,
    rows: &[TokenizedPair],
    indices: &[usize],
) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let rows = first_of(&locations(rows, indices), SHOWN_ROWS).join(", ");
    Err(Error::NonFinite { step: n_steps, quantity, value, rows })
}

/// Steps `first_step` to `step` that moved nothing, of which some were skipped, have trained nothing, whatever the log says.
pub(super) fn check_moved<B: Kernels>(
    step: usize,
    first_step: usize,
    n_skipped: usize,
    before: &[Tensor<B, 2>],
    after: &[Tensor<B, 2>],
) -> Result<()> {
    let moved = before.iter().zip(after).map(|(b, a)| (a.clone() - b.clone()).abs().max());
    let moved = read(Tensor::cat(moved.collect(), 0).max())?[0];
    if !moved.is_finite() {
        let rows = "the step's update".to_owned();
        return Err(Error::NonFinite { step, quantity: "the adapter", value: moved.into(), rows });
    }
    if moved > 0.0 {
        return Ok(());
    }
    if n_skipped > 0 {
        let (steps, were) = (counted(n_skipped, "step"), if n_skipped == 1 { "was" } else { "were" });
        let problem = format!(
            "{steps} {were} skipped, as gradients overflowed fp16, and the others had a learning rate of 0"
        );
        let hint = "a lower --fp16_init_scale, more steps for the scale to fall, or --dtype fp32";
        return Err(Error::Unchanged { problem, hint });
    }
    let problem =
        format!("{} at learning rates too small for its weights", counted(step - first_step, "step"));
    Err(Error::Unchanged { problem, hint: "raise --learning_rate" })
}
