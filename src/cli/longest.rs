//! The longest micro-batch, tried before the first step: a run that would die of memory dies at its start.

use std::time::Instant;

use burn::tensor::Tensor;

use super::budget::{Budget, Case};
use crate::data::batch::Batch;
use crate::device::{self, DeviceChoice, size};
use crate::error::Result;
use crate::lora;
use crate::model::Llama;
use crate::ops::read::read;
use crate::ops::{Kernels, profile};
use crate::train::step::{DeviceBatch, forward_backward};
use crate::words::thousands;

/// The share of the CPU's memory from which on a prediction is worth a trial.
///
/// On a GPU the trial compiles what the first step would compile, and takes as long as one micro-batch. On the CPU the longest pair can
/// take minutes, and where it is far from filling the machine's memory that tells nothing.
const CPU_SHARE: f64 = 0.25;

/// Whether the longest micro-batch is tried ahead of a run.
pub fn is_worth_it(case: &Case<'_>, budget: &Budget) -> bool {
    let is_near = |memory: u64| budget.memory.total() as f64 >= CPU_SHARE * memory as f64;
    *case.choice != DeviceChoice::Cpu || case.memory.is_some_and(is_near)
}

/// Runs the batch forward and backward, and forgets what came out; the model stays as it is. Returns what there is to say.
///
/// # Errors
/// If the device fails.
pub fn try_longest<B: Kernels>(
    model: &Llama<B>,
    batch: &Batch,
    beta: f32,
    budget: &Budget,
    accumulates: bool,
    choice: &DeviceChoice,
) -> Result<String> {
    let rows = match batch.locations.as_slice() {
        [row] => format!("row {row}"),
        [row, others @ ..] => format!("rows {row} and {} more", others.len()),
        [] => return Ok("no row".to_owned()),
    };
    device::doing(format!("the longest micro-batch ({rows}), tried ahead of the run"));
    let started = Instant::now();
    // A step has besides: both moments, the adapter as it began, and gradients that wait.
    let n_copies = if accumulates { 4 } else { 3 };
    let copies = (0..n_copies).flat_map(|_| lora::parameters(model));
    let besides: Vec<Tensor<B, 2>> = copies.map(|adapter| adapter.zeros_like()).collect();
    let step = || forward_backward(model, DeviceBatch::new(model, batch), beta, 1.0, budget.keep);
    let (gradients, peak_bytes) = profile::watch_memory(step);
    read(gradients.stats)?;
    drop((gradients.lora, besides));
    let seconds = started.elapsed().as_secs_f64();
    let predicted = budget.memory.total() as u64;
    let memory = peak_bytes.map_or_else(String::new, |peak| {
        let off = 100.0 * (predicted as f64 / peak as f64 - 1.0);
        let held = size(choice.memory_bytes());
        format!(
            ": {} in tensors at the fullest, {} predicted ({off:+.1} %), {held} held by the allocator",
            size(peak),
            size(predicted)
        )
    });
    Ok(format!("{rows} ({} tokens) fits{memory}, {seconds:.1} s", thousands(batch.n_tokens())))
}
