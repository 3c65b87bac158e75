//! What becomes of a run whose older checkpoints somebody else takes away, or in whose place something stands.

use std::fs;
use std::path::{Path, PathBuf};

use burn_flex::Flex;
use orpo_wgpu::data::batch::LossCompat;
use orpo_wgpu::data::dataset::Location;
use orpo_wgpu::error::Error;
use orpo_wgpu::train::metrics::StepMetrics;
use orpo_wgpu::train::run_folder::{CheckpointTexts, RunFolder, Tracker};
use orpo_wgpu::train::{Observer, TrainData, TrainSettings, train};
use serde_json::{Map, Value};

use crate::goldens::Case;

/// Does something to the first checkpoint before the second is saved.
struct Meddler {
    first: PathBuf,
    meddle: fn(&Path),
    warnings: Vec<String>,
}

impl Observer for Meddler {
    fn before_step(&mut self, step: usize, _rows: &[&Location]) {
        if step == 2 {
            (self.meddle)(&self.first);
        }
    }
    fn before_evaluation(&mut self, _step: usize) {}
    fn on_step(&mut self, _step: usize, _metrics: &StepMetrics, _tokens_per_second: f64) {}
    fn on_skip(&mut self, _step: usize, _scale: f64) {}
    fn on_log(&mut self, _line: &Map<String, Value>) {}
    fn on_warning(&mut self, warning: &Error) {
        self.warnings.push(warning.to_string());
    }
    fn memory_bytes(&self) -> u64 {
        0
    }
}

/// Interrupts a run at a place, and keeps what it evaluates and logs.
struct Interrupter {
    at: (&'static str, usize),
    is_interrupted: bool,
    evaluations: Vec<usize>,
    lines: Vec<u64>,
}

impl Interrupter {
    fn reached(&mut self, place: &'static str, step: usize) {
        self.is_interrupted |= self.at == (place, step);
    }
}

impl Observer for Interrupter {
    fn before_step(&mut self, _step: usize, _rows: &[&Location]) {}
    fn before_evaluation(&mut self, step: usize) {
        self.evaluations.push(step);
        self.reached("evaluation", step);
    }
    fn on_step(&mut self, step: usize, _metrics: &StepMetrics, _tokens_per_second: f64) {
        self.reached("step", step);
    }
    fn on_skip(&mut self, _step: usize, _scale: f64) {}
    fn on_log(&mut self, line: &Map<String, Value>) {
        if line.contains_key("eval_loss") {
            assert_eq!(line["step"], 0, "no later evaluation comes to its end");
        } else {
            self.lines.push(line["step"].as_u64().unwrap());
        }
    }
    fn is_interrupted(&self) -> bool {
        self.is_interrupted
    }
    fn memory_bytes(&self) -> u64 {
        0
    }
}

/// An evaluation may take longer than whoever interrupts a run waits for it to end.
#[test]
fn an_interrupted_run_is_saved_without_an_evaluation() {
    for (at, evaluations, steps) in [
        (("step", 3), &[0][..], &[2, 3][..]),
        (("evaluation", 3), &[0, 3], &[2, 3]),
        (("evaluation", 0), &[0], &[1]),
    ] {
        let case = Case::open("gqa");
        let (mut model, lora_config) = case.adapted::<Flex>(&Default::default());
        let folder = tempfile::tempdir().unwrap();
        let texts = CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
        let mut run = RunFolder::create(folder.path(), texts, 1, Vec::new(), Tracker::None).unwrap();
        let mut settings =
            TrainSettings { eval_steps: 3, logging_steps: 2, ..case.settings(LossCompat::Swift) };
        settings.schedule.max_steps = 9;
        settings.save_steps = 100;
        let mut interrupter =
            Interrupter { at, is_interrupted: false, evaluations: Vec::new(), lines: Vec::new() };
        let data = TrainData { train: &case.pairs, val: &case.pairs };
        let error =
            train(&mut model, &lora_config, data, &settings, &mut run, None, &mut interrupter).unwrap_err();
        let last = *interrupter.lines.last().unwrap() as usize;
        assert!(matches!(error, Error::Interrupted { done, .. } if done == last), "{at:?}: {error}");
        assert!(folder.path().join(format!("checkpoint-{last}")).exists(), "{at:?}");
        assert_eq!((&interrupter.evaluations[..], &interrupter.lines[..]), (evaluations, steps), "{at:?}");
    }
}

/// Weights that give no numbers are no checkpoint: the last good one stays.
#[test]
fn a_run_whose_evaluation_is_no_number_keeps_its_last_checkpoint() {
    // In the midst of a run, and at its end, which is saved before it is evaluated.
    for max_steps in [9, 2] {
        let case = Case::open("gqa");
        let (mut model, lora_config) = case.adapted::<Flex>(&Default::default());
        let folder = tempfile::tempdir().unwrap();
        let texts = CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
        let mut run = RunFolder::create(folder.path(), texts, 1, Vec::new(), Tracker::None).unwrap();
        let mut settings = TrainSettings { eval_steps: 1, save_steps: 1, ..case.settings(LossCompat::Swift) };
        // The first rate is 0, and the second beyond what the products of such weights can be.
        (settings.schedule.max_steps, settings.schedule.warmup_steps) = (max_steps, 2);
        settings.schedule.learning_rate = 1e30;
        let data = TrainData { train: &case.pairs, val: &case.pairs };
        let mut meddler = Meddler { first: PathBuf::new(), meddle: |_| (), warnings: Vec::new() };
        let error =
            train(&mut model, &lora_config, data, &settings, &mut run, None, &mut meddler).unwrap_err();
        assert!(matches!(error, Error::NonFinite { step: 2, quantity: "eval_loss", .. }), "{error}");
        let exists = |step: usize| folder.path().join(format!("checkpoint-{step}")).exists();
        assert_eq!([exists(1), exists(2)], [true, max_steps == 2]);
    }
}

/// Trains three steps with one checkpoint kept, and gives the warnings.
fn warnings_of(meddle: fn(&Path)) -> Vec<String> {
    let case = Case::open("gqa");
    let (mut model, lora_config) = case.adapted::<Flex>(&Default::default());
    let folder = tempfile::tempdir().unwrap();
    let texts = CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
    let mut run = RunFolder::create(folder.path(), texts, 1, Vec::new(), Tracker::None).unwrap();
    let mut settings = TrainSettings { save_steps: 1, ..case.settings(LossCompat::Swift) };
    settings.schedule.max_steps = 3;
    let mut meddler = Meddler { first: folder.path().join("checkpoint-1"), meddle, warnings: Vec::new() };
    let data = TrainData { train: &case.pairs, val: &[] };
    train(&mut model, &lora_config, data, &settings, &mut run, None, &mut meddler).unwrap();
    assert!(folder.path().join("checkpoint-3").exists());
    assert!(!folder.path().join("checkpoint-2").exists(), "the limit holds for what can be removed");
    meddler.warnings
}

#[test]
fn a_run_goes_on_without_an_old_checkpoint() {
    assert_eq!(warnings_of(|first| fs::remove_dir_all(first).unwrap()), [""; 0]);
}

#[test]
fn a_run_goes_on_beside_an_old_checkpoint_that_cannot_be_removed() {
    let warnings = warnings_of(|first| {
        fs::remove_dir_all(first).unwrap();
        fs::write(first, "no folder").unwrap();
    });
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("cannot remove") && warnings[0].contains("checkpoint-1"), "{warnings:?}");
}
