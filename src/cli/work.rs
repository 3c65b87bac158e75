//! The work of a run, and how long it takes.

use burn_flex::Flex;
use burn_wgpu::Wgpu;

use super::budget::{Budget, Case, Rows, longest_pair};
use super::limits::{Product, best_product};
use super::measured_step::{MeasuredStep, median};
use super::precision;
use super::rows::plan_of;
use super::words::duration;
use crate::config::TrainArgs;
use crate::data::batch::{Batch, pack};
use crate::data::tokenize::TokenizedPair;
use crate::device::{self, DeviceChoice};
use crate::error::Result;
use crate::lora::{self, LoraConfig};
use crate::model::llama::{KeepPlan, LINEAR_NAMES};
use crate::model::{Llama, Precision};
use crate::train::cost::{StepFlops, StepMemory, StepShape};
use crate::words::{counted, thousands};

/// The share of the best product's rate that a step is taken to run at: norms, attention and the head come in between, and products of
/// few tokens are slow. `bench` came to 61 to 74 % on an H100, and on two cores to 49 to 79 % by the model (README).
const RATE: f64 = 0.5;
/// Pairs that are counted where the data set is not known.
const PAIRS: usize = 1000;
/// Seconds of a step by its operations up to which the CPU, which compiles nothing first, times one. A small model's step takes several
/// times as long as its operations say, as its products are too small to be fast.
const TIMED_SECONDS: f64 = 1.0;
/// The most bytes that such a step may take.
const TIMED_BYTES: usize = 1 << 30;
/// Steps that are timed, after one to warm up, which will do where it takes long.
const N_TIMED: usize = 3;

/// The work of a run.
pub(super) struct Work {
    /// It in words.
    pub(super) what: String,
    flops: f64,
    /// A micro-batch of pairs of middling length, and its operations.
    typical: (Batch, f64),
    keep: KeepPlan,
    precision: Precision,
}

impl Work {
    /// The work of a run over so many pairs, where that is known, with settings whose prediction this is.
    pub(super) fn of(
        args: &TrainArgs,
        case: &Case<'_>,
        n_pairs: Option<usize>,
        chosen: &Budget,
    ) -> Result<Self> {
        let precision =
            precision::resolve(case.choice, &args.dtype, args.quantization_bit, args.quantize_lm_head)?;
        let assumed = longest_pair(args.max_length);
        let pairs = match case.rows {
            Rows::Known(pairs) => pairs,
            Rows::Longest => std::slice::from_ref(&assumed),
        };
        let keep = chosen.keep;
        let flops_of = |batch: &Batch| {
            let shape = StepShape::of(batch, case.ranks, precision, keep, false, 0, case.place());
            StepFlops::of(case.config, &shape).total()
        };
        // Everything that is counted grows with tokens, rows and visible pairs, so that an epoch is one long step.
        let mut by_length = Vec::with_capacity(pairs.len());
        let mut flops = 0.0;
        for pair in pairs {
            let batch = pack(&[pair], case.loss_compat);
            flops += flops_of(&batch);
            by_length.push((batch.n_tokens(), pair));
        }
        let tokens: usize = by_length.iter().map(|(tokens, _)| tokens).sum();
        let (mean_tokens, mean_flops) = (tokens as f64 / pairs.len() as f64, flops / pairs.len() as f64);
        let typical = pack(&middling(by_length, args.batch_size), case.loss_compat);
        let typical_flops = flops_of(&typical);
        let work = |what, flops| Self { what, flops, typical: (typical, typical_flops), keep, precision };
        let is_known = n_pairs.is_some();
        let pairs_of = |steps| steps * args.batch_size * args.gradient_accumulation_steps.unwrap_or(1);
        let Some(n_pairs) = n_pairs.or(args.max_steps.map(pairs_of)) else {
            let what = format!(
                "{} pairs, as neither --dataset nor --max_steps says how many: {} tokens, {} TFLOP",
                thousands(PAIRS),
                thousands((mean_tokens * PAIRS as f64) as usize),
                tflop(mean_flops * PAIRS as f64)
            );
            return Ok(work(what, mean_flops * PAIRS as f64));
        };
        let (plan, max_steps) = plan_of(args, n_pairs);
        let epochs = plan.epoch(max_steps);
        let flops = mean_flops * n_pairs as f64 * epochs;
        let what = format!(
            "{} of {}, {}{} tokens: {} TFLOP",
            counted(max_steps, "optimizer step"),
            counted(plan.pairs_of_step(), "pair"),
            // Pairs that are only assumed are as many as the steps take.
            if is_known { format!("{epochs:.2} epochs of ") } else { String::new() },
            thousands((mean_tokens * n_pairs as f64) as usize),
            tflop(flops)
        );
        Ok(work(what, flops))
    }

    /// How long it takes, measured on the device.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn time(self, args: &TrainArgs, case: &Case<'_>) -> Result<String> {
        let product = device::guard("measuring a product", case.choice, || self.best_product(case.choice))?;
        let seconds = |flops: f64| flops / (RATE * product.flops);
        let memory = StepMemory::of(case.config, &self.shape(case)).total();
        let is_timed = *case.choice == DeviceChoice::Cpu
            && seconds(self.typical.1) < TIMED_SECONDS
            && memory < TIMED_BYTES;
        if is_timed {
            let (flops, typical_flops) = (self.flops, self.typical.1);
            let n_tokens = self.typical.0.n_tokens();
            let step_s = device::guard("timing a step", case.choice, || self.timed(args, case))?;
            return Ok(format!(
                "about {}, without evaluations and saves: a micro-batch of {} tokens, with random weights, took {step_s:.2} s here just now",
                duration(flops / typical_flops * step_s),
                thousands(n_tokens),
            ));
        }
        Ok(format!(
            "about {}, without evaluations and saves, at {:.0} % of the {:.3} TFLOP/s of the best product, {}, measured here just \
             now. That share is an estimate, and far too high for models of a few million weights; `orpo-wgpu bench` measures a step.",
            duration(seconds(self.flops)),
            100.0 * RATE,
            product.flops / 1e12,
            product.by
        ))
    }

    fn shape(&self, case: &Case<'_>) -> StepShape {
        StepShape::of(&self.typical.0, case.ranks, self.precision, self.keep, false, 0, case.place())
    }

    fn best_product(&self, choice: &DeviceChoice) -> Result<Product> {
        let dtype = self.precision.dtype;
        match choice {
            DeviceChoice::Cpu => best_product::<Flex>(dtype, choice, &Default::default()),
            DeviceChoice::Wgpu { device, .. } => best_product::<Wgpu>(dtype, choice, device),
            #[cfg(feature = "cuda")]
            DeviceChoice::Cuda(gpu) => best_product::<burn_cuda::Cuda>(dtype, choice, &gpu.device()),
        }
    }

    /// Seconds of the typical micro-batch on the CPU, with its share of the optimizer's step.
    fn timed(self, args: &TrainArgs, case: &Case<'_>) -> Result<f64> {
        let shard_bytes = case.choice.shard_bytes();
        let mut model = Llama::<Flex>::random(case.config, self.precision, shard_bytes, &Default::default());
        let ranks = LINEAR_NAMES.iter().zip(case.ranks).filter(|(_, rank)| *rank > 0);
        let target_modules = ranks.map(|(name, _)| name.rsplit('.').next().unwrap_or(name).to_owned());
        let target_modules = target_modules.collect();
        let r = case.ranks.into_iter().max().unwrap_or(args.lora_rank);
        lora::attach(&mut model, &LoraConfig { r, lora_alpha: args.lora_alpha, target_modules }, args.seed);
        let mut step = MeasuredStep::new(model, self.typical.0, self.keep);
        let first_s = step.timed()?;
        let n_timed = if first_s > TIMED_SECONDS { 1 } else { N_TIMED };
        let micro_batch_s =
            median(&mut (0..n_timed).map(|_| step.timed_micro_batch()).collect::<Result<Vec<_>>>()?);
        let step_s = match n_timed {
            1 => first_s,
            n => median(&mut (0..n).map(|_| step.timed()).collect::<Result<Vec<_>>>()?),
        };
        Ok(with_share_of_update(micro_batch_s, step_s, args.gradient_accumulation_steps.unwrap_or(1)))
    }
}

/// Seconds of a micro-batch and its share of the update, which a step of one micro-batch makes after it, and others once.
fn with_share_of_update(micro_batch_s: f64, step_s: f64, gradient_accumulation_steps: usize) -> f64 {
    micro_batch_s + (step_s - micro_batch_s).max(0.0) / gradient_accumulation_steps as f64
}

/// The pairs in the middle by length, as many as a micro-batch has.
fn middling(mut by_length: Vec<(usize, &TokenizedPair)>, batch_size: usize) -> Vec<&TokenizedPair> {
    by_length.sort_by_key(|(tokens, _)| *tokens);
    let n = batch_size.min(by_length.len());
    let first = (by_length.len() - n) / 2;
    by_length[first..first + n].iter().map(|(_, pair)| *pair).collect()
}

fn tflop(flops: f64) -> String {
    let tflop = flops / 1e12;
    if tflop < 100.0 { format!("{tflop:.3}") } else { thousands(tflop.round() as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::budget::tests::pair;

    #[test]
    fn an_update_is_shared_by_the_micro_batches_of_its_step() {
        assert_eq!([1, 4].map(|n| with_share_of_update(1.0, 1.5, n)), [1.5, 1.125]);
        assert_eq!(with_share_of_update(1.0, 0.9, 4), 1.0, "noise");
    }

    #[test]
    fn pairs_of_middling_length_are_timed() {
        let pairs: Vec<TokenizedPair> = [90, 10, 50, 30, 70].map(pair).into();
        let prompts = |batch_size| -> Vec<usize> {
            let by_length = pairs.iter().map(|pair| (pair.prompt.len(), pair)).collect();
            middling(by_length, batch_size).iter().map(|pair| pair.prompt.len()).collect()
        };
        assert_eq!(prompts(1), [50]);
        assert_eq!(prompts(2), [30, 50]);
        assert_eq!(prompts(9), [10, 30, 50, 70, 90]);
    }
}
