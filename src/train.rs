//! Training: the loop, and in its rooms the step, the optimizer, the schedule, the metrics and the run folder.
//!
//! Everything that a step does is a function of the step's number, the seed and the model's state: a run that is resumed from a
//! checkpoint takes the same rows at the same rates as one that was never interrupted.

pub mod cost;
pub mod loss_scale;
pub mod metrics;
pub mod optim;
pub mod plan;
pub mod plots;
pub mod run_folder;
pub mod schedule;
pub mod step;
pub mod tensorboard;

use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};

use crate::data::batch::{LossCompat, pack};
use crate::data::dataset::Location;
use crate::data::tokenize::TokenizedPair;
use crate::error::{Error, Result, counted};
use crate::lora::{self, LoraConfig};
use crate::model::Llama;
use crate::model::llama::KeepPlan;
use crate::ops::Kernels;
use crate::ops::adamw::grad_norm;
use loss_scale::{LossScale, LossScaleConfig, MIN_SCALE};
use metrics::{StepMetrics, StepTrace};
use optim::{AdamW, AdamWConfig};
use plan::Plan;
use run_folder::{Position, RunFolder, TrainerState};
use schedule::Schedule;
use step::{DeviceBatch, evaluate, forward_backward};

/// What the loop is told; names as in Hugging Face's `TrainingArguments` and TRL's `ORPOConfig`.
#[derive(Debug, Clone)]
pub struct TrainSettings {
    /// Which rows each step takes.
    pub plan: Plan,
    /// Weight of the odds-ratio term.
    pub beta: f32,
    /// Whose loss is computed.
    pub loss_compat: LossCompat,
    /// The learning rate by step.
    pub schedule: Schedule,
    /// The optimizer.
    pub adamw: AdamWConfig,
    /// How the loss is scaled, in fp16.
    pub loss_scale: Option<LossScaleConfig>,
    /// What of the layers is kept for backward.
    pub keep: KeepPlan,
    /// Steps between lines of the log.
    pub logging_steps: usize,
    /// Steps between evaluations.
    pub eval_steps: usize,
    /// Steps between checkpoints.
    pub save_steps: usize,
}

/// What the loop trains on.
#[derive(Debug, Clone, Copy)]
pub struct TrainData<'a> {
    /// Rows to learn from.
    pub train: &'a [TokenizedPair],
    /// Rows to evaluate on; may be empty.
    pub val: &'a [TokenizedPair],
}

/// Who watches a run.
pub trait Observer {
    /// An optimizer step begins, the `step`-th from 1, on these rows.
    fn before_step(&mut self, step: usize, rows: &[&Location]);
    /// The first rows of the next step, the `step`-th from 1, are sent to the device, which is at work on the one before.
    fn before_prefetch(&mut self, _step: usize, _rows: &[&Location]) {}
    /// They are sent, and the step before is waited for.
    fn after_prefetch(&mut self) {}
    /// The validation rows are evaluated after `step` steps.
    fn before_evaluation(&mut self, step: usize);
    /// An optimizer step is done; `tokens_per_second` is that since the last line of the log.
    fn on_step(&mut self, step: usize, metrics: &StepMetrics, tokens_per_second: f64);
    /// Whether measuring slows this step down, so that it tells nothing of how fast others are.
    fn is_profiled(&self, _step: usize) -> bool {
        false
    }
    /// A step's gradient overflowed at this scale of the loss, and nothing was updated.
    fn on_skip(&mut self, step: usize, scale: f64);
    /// A line was written to the log.
    fn on_log(&mut self, line: &Map<String, Value>);
    /// Something went wrong that is no reason to end the run.
    fn on_warning(&mut self, _warning: &Error) {}
    /// Whether the run is to end: asked after each step, which is then saved, and in the evaluations, which are then left.
    fn is_interrupted(&self) -> bool {
        false
    }
    /// Memory in use in bytes, asked where the device does not tell what its tensors take.
    fn memory_bytes(&self) -> u64;
}

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Optimizer steps made by this process.
    pub n_steps: usize,
    /// Those of them that were skipped, as their gradients overflowed in fp16.
    pub n_skipped: usize,
    /// Metrics before the first step, of the validation rows, else of the first line of the log, where that is not the last one as well.
    pub before: Option<StepMetrics>,
    /// Metrics after the last step, of the validation rows, else of the last line of the log.
    pub after: StepMetrics,
    /// Whether the two are of the validation rows.
    pub is_validation: bool,
    /// The last checkpoint.
    pub checkpoint: std::path::PathBuf,
    /// Seconds in the loop.
    pub elapsed_s: f64,
}

/// Trains the model's adapter.
///
/// # Errors
/// If a loss or a gradient is no longer finite, the device fails, a file cannot be written, the adapter came out as it went in, or the
/// observer interrupts. The checkpoints written before stay.
pub fn train<B: Kernels>(
    model: &mut Llama<B>,
    lora_config: &LoraConfig,
    data: TrainData<'_>,
    settings: &TrainSettings,
    run: &mut RunFolder,
    resume: Option<TrainerState<B>>,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    let started = Instant::now();
    let max_steps = settings.schedule.max_steps;
    let initial = lora::parameters(model);
    let mut optimizer = AdamW::new(settings.adamw, &initial);
    let mut first_step = 0;
    let mut loss_scale = settings.loss_scale.map(|config| (config, LossScale::new(&config)));
    if let Some(state) = resume {
        first_step = state.global_step;
        if let (Some((_, scale)), Some(saved)) = (&mut loss_scale, state.loss_scale) {
            *scale = saved;
        }
        state.restore(&mut optimizer);
    }
    let n_skipped =
        |scale: &Option<(LossScaleConfig, LossScale)>| scale.map_or(0, |(_, scale)| scale.n_skipped);
    let skipped_before = n_skipped(&loss_scale);
    let mut before = evaluate_all(model, data.val, settings, first_step, observer)?;
    let is_validation = before.is_some();
    let mut n_logged = 0;
    let mut window = Window::default();
    let mut prefetched = None;
    for step in first_step..max_steps {
        let (planned, first) = prefetched.take().unzip();
        let micro_batches = planned.unwrap_or_else(|| settings.plan.micro_batches(step));
        observer.before_step(step + 1, &locations(data.train, &micro_batches.concat()));
        let scale = loss_scale.map_or(1.0, |(_, loss_scale)| loss_scale.scale);
        let (step_started, tokens_before) = (Instant::now(), window.n_tokens);
        let (grads, stats) =
            accumulate(model, data.train, &micro_batches, first, settings, scale, &mut window);
        let norm = grad_norm(&grads);
        let learning_rate = settings.schedule.at(step);
        optimizer.update(learning_rate, lora::tensors_mut(model), grads, &norm, scale);
        // The device is at work until the step is read.
        if step + 1 < max_steps {
            let next = settings.plan.micro_batches(step + 1);
            if let Some(indices) = next.first() {
                observer.before_prefetch(step + 2, &locations(data.train, indices));
                let first = upload(model, data.train, indices, settings.loss_compat);
                observer.after_prefetch();
                prefetched = Some((next, first));
            }
        }
        let (metrics, scaled_norm) = read_step(stats, norm, settings.beta, &mut window)?;
        let grad_norm = scaled_norm / scale;
        let indices = micro_batches.concat();
        check_finite(step + 1, "loss", metrics.loss, data.train, &indices)?;
        match &mut loss_scale {
            None => check_finite(step + 1, "grad_norm", grad_norm, data.train, &indices)?,
            Some((config, loss_scale)) => {
                loss_scale.update(config, grad_norm.is_finite());
                if !grad_norm.is_finite() {
                    // The device has left everything as it was.
                    optimizer.n_updates -= 1;
                    observer.on_skip(step + 1, scale);
                }
                if loss_scale.scale < MIN_SCALE {
                    // No matter of scale: its rows are what there is to look at.
                    let quantity = "grad_norm, at this loss scale as at larger ones,";
                    check_finite(step + 1, quantity, grad_norm, data.train, &indices)?;
                }
            }
        }

        let done = step + 1;
        let is_last = done == max_steps;
        if observer.is_profiled(done) {
            window.leave_out(window.n_tokens - tokens_before, step_started.elapsed());
        }
        observer.on_step(done, &metrics, window.tokens_per_second());
        let log = |window: &mut Window, run: &mut RunFolder, observer: &mut dyn Observer| {
            let mean = window.mean();
            let trace = StepTrace {
                grad_norm,
                learning_rate,
                tokens_per_second: window.tokens_per_second(),
                memory_bytes: window.peak_bytes.unwrap_or_else(|| observer.memory_bytes()),
                loss_scale: loss_scale.map(|_| scale),
                skipped_steps: loss_scale.map(|_| n_skipped(&loss_scale)),
            };
            let line = log_line(done, settings.plan.epoch(done), &mean.to_json(""), Some(&trace));
            run.log(done, &line)?;
            observer.on_log(&line);
            *window = Window { last: Some(mean), started: Some(Instant::now()), ..Window::default() };
            Result::Ok(mean)
        };
        if done.is_multiple_of(settings.logging_steps) || is_last {
            n_logged += 1;
            before.get_or_insert(log(&mut window, run, observer)?);
        }
        let save = |run: &mut RunFolder, observer: &mut dyn Observer| -> Result<()> {
            let loss_scale = loss_scale.map(|(_, loss_scale)| loss_scale);
            let position = Position { step: done, plan: &settings.plan, loss_scale };
            if let Some(warning) = run.save(model, lora_config, &optimizer, position)? {
                observer.on_warning(&warning);
            }
            Ok(())
        };
        if is_last {
            check_moved(step, n_skipped(&loss_scale) - skipped_before, &initial, &lora::parameters(model))?;
            // Before the evaluation that ends the run, which nothing but the end of the program ends.
            save(run, observer)?;
        }
        // An evaluation may take longer than what sends the signal waits, and nothing is saved before its end.
        if is_last || done.is_multiple_of(settings.eval_steps) && !observer.is_interrupted() {
            let paused = Instant::now();
            if let Some(metrics) = evaluate_all(model, data.val, settings, done, observer)? {
                let line = log_line(done, settings.plan.epoch(done), &metrics.to_json("eval_"), None);
                run.log(done, &line)?;
                observer.on_log(&line);
                window.last_eval = Some(metrics);
            }
            window.paused_s += paused.elapsed().as_secs_f64();
        }
        let is_interrupted = !is_last && observer.is_interrupted();
        if is_interrupted && !window.losses.is_empty() {
            // The line that these steps belong to does not come: a run that goes on does not make them again.
            log(&mut window, run, observer)?;
        }
        if done.is_multiple_of(settings.save_steps) || is_last || is_interrupted {
            let paused = Instant::now();
            if !is_last {
                save(run, observer)?;
            }
            run.plot(is_last)?;
            window.paused_s += paused.elapsed().as_secs_f64();
        }
        if is_interrupted {
            return Err(Error::Interrupted { step: done, max_steps, hint: None });
        }
    }
    let last = if is_validation { window.last_eval } else { window.last };
    let (Some(before), Some(after), Some(checkpoint)) = (before, last, run.last_checkpoint()) else {
        return Err(Error::config(format!(
            "nothing to train: {first_step} of {max_steps} steps are done already"
        )));
    };
    Ok(Summary {
        n_steps: max_steps - first_step,
        n_skipped: n_skipped(&loss_scale) - skipped_before,
        before: (is_validation || n_logged > 1).then_some(before),
        after,
        is_validation,
        checkpoint: checkpoint.to_owned(),
        elapsed_s: started.elapsed().as_secs_f64(),
    })
}

/// What has happened since the last line of the log.
#[derive(Default)]
struct Window {
    /// Of every micro-batch.
    metrics: Vec<StepMetrics>,
    /// Of every step.
    losses: Vec<f64>,
    n_tokens: usize,
    /// Tokens of the steps that tell nothing of the others' speed, and what these took in seconds.
    left_out: (usize, f64),
    /// The most bytes in tensors, where the device tells.
    peak_bytes: Option<u64>,
    started: Option<Instant>,
    paused_s: f64,
    last: Option<StepMetrics>,
    last_eval: Option<StepMetrics>,
}

impl Window {
    /// Micro-batches count the same, as TRL logs its metrics; for the loss steps do, as `Trainer` logs it.
    fn mean(&self) -> StepMetrics {
        let loss = self.losses.iter().sum::<f64>() / self.losses.len() as f64;
        StepMetrics { loss, ..StepMetrics::mean(&self.metrics) }
    }

    fn leave_out(&mut self, n_tokens: usize, elapsed: Duration) {
        self.left_out.0 += n_tokens;
        self.left_out.1 += elapsed.as_secs_f64();
    }

    /// Of all steps where all of them are left out: nothing else is known.
    fn tokens_per_second(&self) -> f64 {
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

/// Forward and backward of a step's micro-batches, of which the first may be prefetched: their mean gradient, times the loss scale, and
/// each one's statistics.
fn accumulate<B: Kernels>(
    model: &Llama<B>,
    rows: &[TokenizedPair],
    micro_batches: &[Vec<usize>],
    mut prefetched: Option<DeviceBatch<B>>,
    settings: &TrainSettings,
    loss_scale: f64,
    window: &mut Window,
) -> (Vec<Tensor<B, 2>>, Vec<Tensor<B, 2>>) {
    window.started.get_or_insert_with(Instant::now);
    let grad_scale = (loss_scale / micro_batches.len() as f64) as f32;
    let mut total: Option<Vec<Tensor<B, 2>>> = None;
    let mut stats = Vec::with_capacity(micro_batches.len());
    for indices in micro_batches {
        let batch = prefetched.take().unwrap_or_else(|| upload(model, rows, indices, settings.loss_compat));
        window.n_tokens += batch.n_tokens();
        let grads = forward_backward(model, batch, settings.beta, grad_scale, settings.keep);
        stats.push(grads.stats);
        window.peak_bytes = window.peak_bytes.max(grads.peak_bytes);
        total = Some(match total {
            Some(total) => total.into_iter().zip(grads.lora).map(|(a, b)| a + b).collect(),
            None => grads.lora,
        });
    }
    (total.unwrap_or_default(), stats)
}

/// Reads what a step came to, once for all of it: the mean metrics of its micro-batches and the norm of its gradient as it came.
fn read_step<B: Kernels>(
    stats: Vec<Tensor<B, 2>>,
    norm: Tensor<B, 1>,
    beta: f32,
    window: &mut Window,
) -> Result<(StepMetrics, f64)> {
    let lengths: Vec<usize> = stats.iter().map(|s| s.dims().iter().product()).collect();
    let flat = stats.into_iter().zip(&lengths).map(|(s, &n)| s.reshape([n]));
    let values = optim::read(Tensor::cat(std::iter::once(norm).chain(flat).collect(), 0))?;
    let (norm, mut values) = (f64::from(values[0]), &values[1..]);
    let mut all = Vec::with_capacity(lengths.len());
    for n in lengths {
        let (stats, rest) = values.split_at(n);
        all.push(StepMetrics::from_stats(stats, beta));
        values = rest;
    }
    let mean = StepMetrics::mean(&all);
    window.metrics.extend(all);
    window.losses.push(mean.loss);
    Ok((mean, norm))
}

fn locations<'a>(rows: &'a [TokenizedPair], indices: &[usize]) -> Vec<&'a Location> {
    indices.iter().map(|&i| &rows[i].location).collect()
}

fn upload<B: Kernels>(
    model: &Llama<B>,
    rows: &[TokenizedPair],
    indices: &[usize],
    compat: LossCompat,
) -> DeviceBatch<B> {
    let pairs: Vec<&TokenizedPair> = indices.iter().map(|&i| &rows[i]).collect();
    DeviceBatch::new(model, &pack(&pairs, compat))
}

/// Metrics of the rows, every batch counting as many times as it has rows, as `Trainer.evaluate` averages the loss; none without rows,
/// and of a run that is interrupted meanwhile.
fn evaluate_all<B: Kernels>(
    model: &Llama<B>,
    rows: &[TokenizedPair],
    settings: &TrainSettings,
    step: usize,
    observer: &mut dyn Observer,
) -> Result<Option<StepMetrics>> {
    if rows.is_empty() {
        return Ok(None);
    }
    observer.before_evaluation(step);
    let mut metrics = Vec::with_capacity(rows.len());
    let indices: Vec<usize> = (0..rows.len()).collect();
    for indices in indices.chunks(settings.plan.batch_size) {
        if observer.is_interrupted() && step < settings.schedule.max_steps {
            return Ok(None);
        }
        let stats = evaluate(model, upload(model, rows, indices, settings.loss_compat));
        let batch = StepMetrics::from_stats(&optim::read(stats)?, settings.beta);
        check_finite(step, "eval_loss", batch.loss, rows, indices)?;
        metrics.extend(vec![batch; indices.len()]);
    }
    Ok(Some(StepMetrics::mean(&metrics)))
}

fn check_finite(
    n_steps: usize,
    quantity: &'static str,
    value: f64,
    rows: &[TokenizedPair],
    indices: &[usize],
) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let rows: Vec<String> = locations(rows, indices).iter().map(ToString::to_string).collect();
    Err(Error::NonFinite { step: n_steps, quantity, value, rows: rows.join(", ") })
}

/// A run that moved nothing has trained nothing, whatever its log says.
fn check_moved<B: Kernels>(
    step: usize,
    n_skipped: usize,
    before: &[Tensor<B, 2>],
    after: &[Tensor<B, 2>],
) -> Result<()> {
    let moved = before.iter().zip(after).map(|(b, a)| (a.clone() - b.clone()).abs().max());
    let moved = optim::read(Tensor::cat(moved.collect(), 0).max())?[0];
    if !moved.is_finite() {
        let rows = "the step's update".to_owned();
        return Err(Error::NonFinite { step: step + 1, quantity: "the adapter", value: moved.into(), rows });
    }
    if moved > 0.0 {
        return Ok(());
    }
    if n_skipped > 0 {
        let (steps, were) = (counted(n_skipped, "step"), if n_skipped == 1 { "was" } else { "were" });
        return Err(Error::config(format!(
            "the adapter did not change: {steps} {were} skipped, as gradients overflowed fp16, and the others had a learning rate of 0"
        ))
        .with_hint("a lower --fp16_init_scale, more steps for the scale to fall, or --dtype fp32"));
    }
    Err(Error::config(format!("the adapter did not change in the whole run (largest change {moved})"))
        .with_hint("raise --learning_rate"))
}

fn log_line(
    step: usize,
    epoch: f64,
    metrics: &Map<String, Value>,
    trace: Option<&StepTrace>,
) -> Map<String, Value> {
    let mut line = Map::new();
    line.insert("step".to_owned(), json!(step));
    line.insert("epoch".to_owned(), json!(epoch));
    line.extend(metrics.clone());
    if let Some(Ok(Value::Object(trace))) = trace.map(serde_json::to_value) {
        line.extend(trace);
    }
    line
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
