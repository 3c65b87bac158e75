//! Training: the loop, and in its rooms the step, the optimizer, the schedule, the metrics and the run folder.
//!
//! Everything that a step does is a function of the step's number, the seed and the model's state: a run that is resumed from a
//! checkpoint takes the same rows at the same rates as one that was never interrupted.

mod accumulate;
pub mod checkpoints;
mod checks;
pub mod cost;
mod evaluation;
pub mod loss_scale;
pub mod metrics;
pub mod optim;
pub mod plan;
pub mod plots;
pub mod run_folder;
pub mod schedule;
pub mod step;
pub mod tensorboard;
pub mod trainer_state;
mod window;

use std::time::Instant;

pub use evaluation::Evaluation;

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};

use crate::data::batch::LossCompat;
use crate::data::dataset::Location;
use crate::data::tokenize::{TokenizedPair, fingerprint};
use crate::error::{Error, Result};
use crate::lora::{self, LoraConfig};
use crate::model::Llama;
use crate::model::llama::KeepPlan;
use crate::ops::Kernels;
use crate::ops::adamw::grad_norm;
use accumulate::{accumulate, locations, read_step, upload};
use checks::{check_finite, check_moved};
use loss_scale::{LossScale, LossScaleConfig, MIN_SCALE};
use metrics::{StepMetrics, StepTrace};
use optim::{AdamW, AdamWConfig};
use plan::Plan;
use run_folder::RunFolder;
use schedule::Schedule;
use step::DeviceBatch;
use trainer_state::{Position, TrainerState};
use window::Window;

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
///
/// # Panics
/// If all steps of the schedule are done already.
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
    let first_step = resume.as_ref().map_or(0, |state| state.global_step);
    let max_steps = settings.schedule.max_steps;
    assert!(first_step < max_steps, "{first_step} of {max_steps} steps are done already");
    let initial = lora::parameters(model);
    let mut optimizer = AdamW::new(settings.adamw, &initial);
    let mut loss_scale = settings.loss_scale.map(|config| (config, LossScale::new(&config)));
    if let Some(state) = resume {
        if let (Some((_, scale)), Some(saved)) = (&mut loss_scale, state.loss_scale) {
            *scale = saved;
        }
        state.restore(&mut optimizer);
    }
    let mut training = Training {
        model,
        lora_config,
        data,
        settings,
        run,
        observer,
        fingerprint: fingerprint(data.train),
        first_step,
        initial,
        optimizer,
        loss_scale,
        skipped_before: loss_scale.map_or(0, |(_, scale)| scale.n_skipped),
        prefetched: None,
        window: Window::default(),
        lines: Vec::new(),
        evaluations: Vec::new(),
    };
    training.evaluate_at_start(first_step)?;
    for step in first_step..max_steps {
        let figures = training.step(step)?;
        training.end_of_step(step + 1, &figures)?;
    }
    let is_validation = !data.val.is_empty();
    let figures = if is_validation { &training.evaluations } else { &training.lines };
    let (Some(after), Some(checkpoint)) = (figures.last(), training.run.last_checkpoint()) else {
        unreachable!("the last step is logged, evaluated and saved");
    };
    Ok(Summary {
        n_steps: max_steps - first_step,
        n_skipped: training.n_skipped(),
        before: (figures.len() > 1).then(|| figures[0]),
        after: *after,
        is_validation,
        checkpoint: checkpoint.to_owned(),
        elapsed_s: started.elapsed().as_secs_f64(),
    })
}

/// A run under way.
struct Training<'a, B: Kernels> {
    model: &'a mut Llama<B>,
    lora_config: &'a LoraConfig,
    data: TrainData<'a>,
    settings: &'a TrainSettings,
    run: &'a mut RunFolder,
    observer: &'a mut dyn Observer,
    /// Of the training rows.
    fingerprint: u64,
    /// Steps that were done before this process.
    first_step: usize,
    /// The adapter as it came in.
    initial: Vec<Tensor<B, 2>>,
    optimizer: AdamW<B>,
    /// In fp16.
    loss_scale: Option<(LossScaleConfig, LossScale)>,
    /// Steps that were skipped before this process.
    skipped_before: usize,
    /// The rows of the next step, and the first of its micro-batches on the device.
    prefetched: Option<(Vec<Vec<usize>>, DeviceBatch<B>)>,
    window: Window,
    /// The means that were logged, oldest first.
    lines: Vec<StepMetrics>,
    /// Of the validation rows, that before the first step first.
    evaluations: Vec<StepMetrics>,
}

/// What a line of the log tells of its last step alone.
struct StepFigures {
    grad_norm: f64,
    learning_rate: f64,
    loss_scale: f64,
}

impl<B: Kernels> Training<'_, B> {
    /// Steps of this process that were skipped.
    fn n_skipped(&self) -> usize {
        self.loss_scale.map_or(0, |(_, scale)| scale.n_skipped) - self.skipped_before
    }

    /// Makes an optimizer step, the `step`-th from 0.
    fn step(&mut self, step: usize) -> Result<StepFigures> {
        let Self { data, settings, .. } = *self;
        let (planned, first) = self.prefetched.take().unzip();
        let micro_batches = planned.unwrap_or_else(|| settings.plan.micro_batches(step));
        let indices = micro_batches.concat();
        self.observer.before_step(step + 1, &locations(data.train, &indices));
        let loss_scale = self.loss_scale.map_or(1.0, |(_, loss_scale)| loss_scale.scale);
        let (started, tokens_before) = (Instant::now(), self.window.n_tokens);
        let (grads, stats) =
            accumulate(self.model, data.train, &micro_batches, first, settings, loss_scale, &mut self.window);
        let norm = grad_norm(&grads);
        let learning_rate = settings.schedule.at(step);
        self.optimizer.update(learning_rate, lora::tensors_mut(self.model), grads, &norm, loss_scale);
        self.prefetch(step + 1);
        let (metrics, scaled_norm) = read_step(stats, norm, settings.beta, &mut self.window)?;
        let grad_norm = scaled_norm / loss_scale;
        check_finite(step + 1, "loss", metrics.loss, data.train, &indices)?;
        self.check_gradient(step + 1, grad_norm, &indices)?;
        if self.observer.is_profiled(step + 1) {
            self.window.leave_out(self.window.n_tokens - tokens_before, started.elapsed());
        }
        self.observer.on_step(step + 1, &metrics, self.window.tokens_per_second());
        Ok(StepFigures { grad_norm, learning_rate, loss_scale })
    }

    /// Sends the first rows of the `step`-th step from 0, where there is one: the device is at work on the step before until that is
    /// read.
    fn prefetch(&mut self, step: usize) {
        let Self { data, settings, .. } = *self;
        if step == settings.schedule.max_steps {
            return;
        }
        let micro_batches = settings.plan.micro_batches(step);
        if let Some(indices) = micro_batches.first() {
            self.observer.before_prefetch(step + 1, &locations(data.train, indices));
            let first = upload(self.model, data.train, indices, settings.loss_compat);
            self.observer.after_prefetch();
            self.prefetched = Some((micro_batches, first));
        }
    }

    /// Checks the norm of the gradient of the `step`-th step from 1, and in fp16 sets the scale of the next loss by it.
    fn check_gradient(&mut self, step: usize, grad_norm: f64, indices: &[usize]) -> Result<()> {
        let rows = self.data.train;
        let Some((config, loss_scale)) = &mut self.loss_scale else {
            return check_finite(step, "grad_norm", grad_norm, rows, indices);
        };
        let scale = loss_scale.scale;
        loss_scale.update(config, grad_norm.is_finite());
        if !grad_norm.is_finite() {
            // The device has left everything as it was.
            self.optimizer.n_updates -= 1;
            self.observer.on_skip(step, scale);
        }
        if loss_scale.scale < MIN_SCALE {
            // No matter of scale: its rows are what there is to look at.
            let quantity = "grad_norm, at this loss scale as at larger ones,";
            check_finite(step, quantity, grad_norm, rows, indices)?;
        }
        Ok(())
    }

    /// Logs, evaluates and saves what is due after `step` steps.
    fn end_of_step(&mut self, step: usize, figures: &StepFigures) -> Result<()> {
        let settings = self.settings;
        let is_last = step == settings.schedule.max_steps;
        let is_due = |every: usize| is_last || step.is_multiple_of(every);
        if is_due(settings.logging_steps) {
            self.log(step, figures)?;
        }
        let paused = Instant::now();
        if is_last {
            check_moved(
                step,
                self.first_step,
                self.n_skipped(),
                &self.initial,
                &lora::parameters(self.model),
            )?;
            // Before the evaluation that ends the run, which nothing but the end of the program ends; those before it stay until that has
            // given numbers.
            self.save(step)?;
        }
        // An evaluation may take longer than what sends the signal waits.
        if is_due(settings.eval_steps) && (is_last || !self.observer.is_interrupted()) {
            self.log_evaluation(step)?;
        }
        let is_interrupted = !is_last && self.observer.is_interrupted();
        if is_interrupted && !self.window.losses.is_empty() {
            // The line that these steps belong to does not come: a run that goes on does not make them again.
            self.log(step, figures)?;
        }
        if is_due(settings.save_steps) || is_interrupted {
            self.save(step)?;
            if let Some(warning) = self.run.prune() {
                self.observer.on_warning(&warning);
            }
            if let Err(warning) = self.run.plot(is_last) {
                // The log has what the pictures show.
                self.observer.on_warning(&warning);
            }
        }
        self.window.paused_s += paused.elapsed().as_secs_f64();
        if is_interrupted {
            return Err(Error::Interrupted {
                what: "step",
                done: step,
                of: settings.schedule.max_steps,
                hint: None,
            });
        }
        Ok(())
    }

    fn log(&mut self, step: usize, figures: &StepFigures) -> Result<()> {
        let mean = self.window.mean();
        let trace = StepTrace {
            grad_norm: figures.grad_norm,
            learning_rate: figures.learning_rate,
            tokens_per_second: self.window.tokens_per_second(),
            memory_bytes: self.window.peak_bytes.unwrap_or_else(|| self.observer.memory_bytes()),
            loss_scale: self.loss_scale.map(|_| figures.loss_scale),
            skipped_steps: self.loss_scale.map(|(_, scale)| scale.n_skipped),
        };
        self.write_line(step, &mean.to_json(""), Some(&trace))?;
        self.lines.push(mean);
        self.window = Window::starting_now();
        Ok(())
    }

    /// Evaluates after `step` steps, and logs what that comes to.
    fn log_evaluation(&mut self, step: usize) -> Result<()> {
        if let Some(metrics) = self.evaluate(step)? {
            self.write_line(step, &metrics.to_json("eval_"), None)?;
            self.evaluations.push(metrics);
        }
        Ok(())
    }

    /// Evaluates before the first step, and logs that unless the run that goes on has.
    fn evaluate_at_start(&mut self, step: usize) -> Result<()> {
        if let Some(metrics) = self.evaluate(step)? {
            if !self.run.has_evaluation(step) {
                self.write_line(step, &metrics.to_json("eval_"), None)?;
            }
            self.evaluations.push(metrics);
        }
        Ok(())
    }

    fn write_line(
        &mut self,
        step: usize,
        metrics: &Map<String, Value>,
        trace: Option<&StepTrace>,
    ) -> Result<()> {
        let line = log_line(step, self.settings.plan.epoch(step), metrics, trace);
        self.run.log(step, &line)?;
        self.observer.on_log(&line);
        Ok(())
    }

    /// Metrics of the validation rows; none without rows, and of a run that is interrupted meanwhile.
    fn evaluate(&mut self, step: usize) -> Result<Option<StepMetrics>> {
        let Self { data: TrainData { val: rows, .. }, settings, .. } = *self;
        if rows.is_empty() {
            return Ok(None);
        }
        self.observer.before_evaluation(step);
        let &TrainSettings { beta, loss_compat, ref plan, .. } = settings;
        let evaluation = Evaluation { beta, loss_compat, batch_size: plan.batch_size, step };
        let may_go_on = |_| step == settings.schedule.max_steps || !self.observer.is_interrupted();
        evaluation.run(self.model, rows, &may_go_on)
    }

    fn save(&mut self, step: usize) -> Result<()> {
        let loss_scale = self.loss_scale.map(|(_, loss_scale)| loss_scale);
        let position = Position { step, plan: &self.settings.plan, rows: self.fingerprint, loss_scale };
        self.run.save(self.model, self.lora_config, &self.optimizer, position)
    }
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
