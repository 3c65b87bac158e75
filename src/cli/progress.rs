//! What a run shows while it runs: the lines of its log, on a terminal above a bar.

use std::error::Error as _;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use super::{interrupts, profile_table};
use crate::data::dataset::Location;
use crate::device;
use crate::error::Error;
use crate::ops::profile;
use crate::train::Observer;
use crate::train::metrics::StepMetrics;
use crate::words::{counted, first_of};

/// Rows of a step that an error names.
const SHOWN_ROWS: usize = 16;

/// A bar of bytes for what takes them; it goes away when it ends or is dropped.
pub fn bar_of_bytes(doing: &str) -> ProgressBar {
    let style = "{bar:30} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
    ProgressBar::no_length().with_style(styled(&format!("{doing}  {style}")))
}

/// A bar of rows for what takes them; it goes away as that of bytes does.
pub fn bar_of_rows(doing: &str, n_rows: usize) -> ProgressBar {
    let style = format!("{doing}  {{bar:30}} {{pos}}/{{len}} rows  {{eta}} left");
    ProgressBar::new(n_rows as u64).with_style(styled(&style))
}

/// A bar's style from a template.
fn styled(template: &str) -> ProgressStyle {
    // The templates are constants, and the default style serves as well should one ever be wrong.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Shows loss, tokens per second and time left.
pub struct Progress<'a> {
    bar: ProgressBar,
    memory_bytes: &'a dyn Fn() -> u64,
    /// When the first step began, behind the evaluation before it.
    started: Option<Instant>,
    first_step: usize,
    max_steps: usize,
    /// Steps between lines of the log.
    logging_steps: usize,
    left: Duration,
    /// The step under way, in words.
    step: String,
    /// The step whose kernels are timed, and when it began.
    profiled: Option<(usize, Instant)>,
    /// Whether a signal came, so that the next one ends the program.
    is_interrupted: Arc<AtomicBool>,
}

impl<'a> Progress<'a> {
    /// A bar of `max_steps`, of which `done` are done; `memory_bytes` is asked once a line of the log where the device does not tell.
    /// With `profile`, the kernels of the second step are timed, or of the only one. From here on Ctrl-C has a run saved.
    pub fn new(
        max_steps: usize,
        done: usize,
        logging_steps: usize,
        profile: bool,
        memory_bytes: &'a dyn Fn() -> u64,
    ) -> Self {
        let bar = ProgressBar::new(max_steps as u64).with_position(done as u64);
        // As wide as is left of the line, which it must not exceed: what wraps cannot be drawn over.
        bar.set_style(styled("{wide_bar} {pos}/{len}  {msg}  {elapsed} elapsed"));
        bar.set_message("starting");
        bar.enable_steady_tick(Duration::from_millis(500));
        let now = Instant::now();
        let is_interrupted = interrupts::watch({
            let bar = bar.clone();
            move || {
                bar.suspend(|| {
                    note!("interrupted: the step under way is finished and saved; Ctrl-C again ends the run at once");
                });
            }
        });
        Self {
            bar,
            memory_bytes,
            started: None,
            first_step: done,
            max_steps,
            logging_steps,
            left: Duration::ZERO,
            step: String::new(),
            profiled: profile.then_some(((done + 2).min(max_steps), now)),
            is_interrupted,
        }
    }

    /// Leaves the bar as it is, and Ctrl-C to end the program.
    pub fn finish(&self) {
        self.bar.abandon();
        // What comes next begins a line, wherever the terminal shows it.
        if !self.bar.is_hidden() {
            note!("");
        }
        self.is_interrupted.store(true, Ordering::Relaxed);
    }
}

/// `step 12 (pairs.jsonl:3)`
fn in_words(step: usize, rows: &[&Location]) -> String {
    format!("step {step} ({})", first_of(rows, SHOWN_ROWS).join(", "))
}

impl Observer for Progress<'_> {
    fn before_step(&mut self, step: usize, rows: &[&Location]) {
        self.step = in_words(step, rows);
        device::doing(self.step.as_str());
        self.started.get_or_insert_with(Instant::now);
        if let Some((profiled, started)) = &mut self.profiled
            && *profiled == step
        {
            *started = Instant::now();
            profile::start();
        }
    }

    fn before_prefetch(&mut self, step: usize, rows: &[&Location]) {
        device::doing(format!("{}, sent ahead", in_words(step, rows)));
    }

    fn after_prefetch(&mut self) {
        device::doing(self.step.as_str());
    }

    fn before_evaluation(&mut self, step: usize) {
        device::doing(format!("the evaluation after {}", counted(step, "step")));
    }

    fn is_profiled(&self, step: usize) -> bool {
        self.profiled.is_some_and(|(profiled, _)| profiled == step)
    }

    fn on_step(&mut self, step: usize, metrics: &StepMetrics, tokens_per_second: f64) {
        if let Some((_, started)) = self.profiled.take_if(|(profiled, _)| *profiled == step) {
            let entries = profile::finish();
            let step_s = started.elapsed().as_secs_f64();
            self.bar.suspend(|| match entries.is_empty() {
                true => say!(
                    "step {step} took {step_s:.3} s; the CPU runs no kernels that could be timed one by one"
                ),
                false => {
                    let step_s = profile_table::Step::Profiled(step_s);
                    say!("kernels of step {step}\n{}", profile_table::table(&entries, step_s, None));
                }
            });
        }
        self.bar.set_position(step as u64);
        // By the steps of this process alone: a resumed run did not make the others.
        let elapsed = self.started.map_or(Duration::ZERO, |started| started.elapsed());
        let per_step = elapsed.div_f64((step - self.first_step) as f64);
        self.left = per_step.mul_f64((self.max_steps - step) as f64);
        let left = HumanDuration(self.left);
        self.bar
            .set_message(format!("loss {:.4}  {tokens_per_second:.0} tokens/s  {left:#} left", metrics.loss));
        let is_first = step == self.first_step + 1;
        let next = step.next_multiple_of(self.logging_steps).min(self.max_steps);
        // Where the lines are all there is, the first tells how fast it goes before the log has one.
        if is_first && next > step && !std::io::stderr().is_terminal() {
            note!(
                "step {step}/{}  loss {:.4}  {tokens_per_second:.0} tokens/s  {} s left; the next line comes after step {next}",
                self.max_steps,
                metrics.loss,
                self.left.as_secs()
            );
        }
    }

    fn on_skip(&mut self, step: usize, scale: f64) {
        self.bar.suspend(|| {
            note!("step {step} skipped: its gradient overflows fp16 at loss scale {scale}, which is lowered");
        });
    }

    fn on_log(&mut self, line: &Map<String, Value>) {
        let figure = |name: &str| line.get(name).and_then(Value::as_f64);
        let shown = [
            "loss",
            "eval_loss",
            "nll_loss",
            "log_odds_ratio",
            "rewards/accuracies",
            "eval_rewards/accuracies",
        ];
        let figures = shown.iter().filter_map(|name| Some(format!("{name} {:.4}", figure(name)?)));
        let speed = figure("tokens_per_second").map(|v| format!("{v:.0} tokens/s"));
        // Before the first step nothing is known of that.
        let left = self.started.map(|_| format!("{} s left", self.left.as_secs()));
        let figures: Vec<String> = figures.chain(speed).chain(left).collect();
        let (step, figures) = (&line["step"], figures.join("  "));
        self.bar.suspend(|| note!("step {step}/{}  {figures}", self.max_steps));
    }

    fn on_warning(&mut self, warning: &Error) {
        let cause = warning.source().map_or_else(String::new, |cause| format!(": {cause}"));
        self.bar.suspend(|| note!("note: {warning}{cause}; the run goes on"));
    }

    fn is_interrupted(&self) -> bool {
        self.is_interrupted.load(Ordering::Relaxed)
    }

    fn memory_bytes(&self) -> u64 {
        (self.memory_bytes)()
    }
}
