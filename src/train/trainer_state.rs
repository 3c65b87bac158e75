//! Where a run stands, in a checkpoint: `trainer_state.json`, and the optimizer's moments in `optimizer.safetensors`.

use std::fs;
use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::loss_scale::{LossScale, MAX_SCALE, MIN_SCALE};
use super::optim::AdamW;
use super::plan::Plan;
use super::run_folder::ARGS_FILE;
use crate::data::draw::Shuffle;
use crate::error::{Error, Result};
use crate::lora;
use crate::model::Llama;
use crate::model::load::Checkpoint;
use crate::shell::pasted;

/// Where a checkpoint's run was.
pub(super) const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// Where a run stands when it saves.
#[derive(Debug, Clone, Copy)]
pub struct Position<'a> {
    /// Optimizer steps done.
    pub step: usize,
    /// The run's rows by step.
    pub plan: &'a Plan,
    /// The [`fingerprint`](crate::data::tokenize::fingerprint) of the rows.
    pub rows: u64,
    /// The loss scale of the next step, in fp16.
    pub loss_scale: Option<LossScale>,
}

/// Writes where the run stands into the folder of a checkpoint, with the log so far, and after which steps checkpoints are kept.
///
/// # Errors
/// If the device cannot be read or a file cannot be written.
pub(super) fn write<B: Backend>(
    folder: &Path,
    model: &Llama<B>,
    optimizer: &AdamW<B>,
    position: Position<'_>,
    log_history: &[Value],
    checkpoints: &[usize],
    saved_at: Timestamp,
) -> Result<()> {
    let names = || lora::tensors(model).into_iter().map(|(name, _)| name);
    let moments = |part: &str, values: &[Tensor<B, 2>]| -> Vec<(String, Tensor<B, 2>)> {
        names().zip(values).map(|(name, value)| (format!("{name}.{part}"), value.clone())).collect()
    };
    let mut state = moments("exp_avg", &optimizer.exp_avg);
    state.extend(moments("exp_avg_sq", &optimizer.exp_avg_sq));
    lora::write_safetensors(&folder.join(OPTIMIZER_FILE), &state)?;
    let Position { step, plan, rows, loss_scale } = position;
    let state = json!({
        "global_step": step,
        "epoch": plan.epoch(step),
        "n_rows": plan.n_rows,
        "rows": format!("{rows:016x}"),
        "batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "shuffle_seed": shuffle_seed(plan),
        "n_updates": optimizer.n_updates,
        "loss_scale": loss_scale,
        "checkpoints": checkpoints,
        "saved_at": saved_at.to_string(),
        "log_history": log_history,
    });
    let path = folder.join(STATE_FILE);
    fs::write(&path, format!("{state:#}\n")).map_err(Error::io("write", &path))
}

/// The seed of the epochs' orders; null for the file's order.
fn shuffle_seed(plan: &Plan) -> Option<u64> {
    match plan.shuffle {
        Shuffle::Seeded(seed) => Some(seed),
        Shuffle::Off => None,
    }
}

/// What a checkpoint says of the run that wrote it.
#[derive(Debug)]
pub struct TrainerState<B: Backend> {
    /// Optimizer steps done.
    pub global_step: usize,
    /// The log up to there.
    pub log_history: Vec<Value>,
    /// After which steps the run had saved what was there of it, this checkpoint among them.
    pub checkpoints: Vec<usize>,
    /// The loss scale to go on with, of a run in fp16.
    pub loss_scale: Option<LossScale>,
    /// Steps that were not skipped.
    n_updates: usize,
    exp_avg: Vec<Tensor<B, 2>>,
    exp_avg_sq: Vec<Tensor<B, 2>>,
}

impl<B: Backend> TrainerState<B> {
    /// Reads a checkpoint's state and optimizer; the model already carries the checkpoint's adapter.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the run was cut into other steps than `plan`, or had others than these rows.
    pub fn read(checkpoint: &Path, model: &Llama<B>, plan: &Plan, rows: u64) -> Result<Self> {
        let path = checkpoint.join(STATE_FILE);
        if !path.exists() {
            return Err(Error::file(
                checkpoint,
                format!("is an adapter without a {STATE_FILE}, from which no run goes on"),
            )
            .with_hint("--adapters begins a run from it"));
        }
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let state: Value = serde_json::from_str(&text).map_err(|e| {
            Error::file(&path, format!("is not a trainer state: {e}"))
                .with_hint("resume from another checkpoint of the run")
        })?;
        let expected = [
            ("n_rows", json!(plan.n_rows)),
            ("batch_size", json!(plan.batch_size)),
            ("gradient_accumulation_steps", json!(plan.gradient_accumulation_steps)),
            ("shuffle_seed", json!(shuffle_seed(plan))),
        ];
        let differing: Vec<String> = expected
            .iter()
            .filter(|(name, value)| state[*name] != *value)
            .map(|(name, value)| {
                let called = if *name == "n_rows" { "the number of rows" } else { name };
                format!("{called} was {} and is {value}", state[*name])
            })
            .collect();
        // Checkpoints from before there was one have none.
        let are_others = state["rows"].as_str().is_some_and(|there| there != format!("{rows:016x}"));
        let differing = match are_others && differing.is_empty() {
            true => vec!["its rows were others, or are others as tokens".to_owned()],
            false => differing,
        };
        if !differing.is_empty() {
            let hint = format!(
                "--config {} --resume_from_checkpoint {} goes on with that run's flags, where its data are as they were; --adapters {} begins anew \
                 from its adapter",
                pasted(&checkpoint.join(ARGS_FILE)),
                pasted(checkpoint),
                pasted(checkpoint)
            );
            return Err(Error::file(&path, format!("belongs to another run: {}", differing.join(", ")))
                .with_hint(hint));
        }
        let Some(global_step) = state["global_step"].as_u64() else {
            return Err(Error::file(&path, "has no global_step"));
        };
        let file = Checkpoint::open_file(&checkpoint.join(OPTIMIZER_FILE))?;
        let tensors = lora::tensors(model);
        let names = |part: &str| {
            tensors.iter().map(|(name, t)| (format!("{name}.{part}"), t.dims().to_vec())).collect()
        };
        let (first, second): (Vec<_>, Vec<_>) = (names("exp_avg"), names("exp_avg_sq"));
        file.check(&[first.clone(), second.clone()].concat(), |_| false)?;
        let device = model.device();
        let load = |names: Vec<(String, Vec<usize>)>| {
            names.iter().map(|(name, _)| file.tensor(name, &device)).collect()
        };
        let loss_scale: Option<LossScale> = serde_json::from_value(state["loss_scale"].clone())
            .map_err(|e| Error::file(&path, format!("has a damaged loss_scale: {e}")))?;
        if let Some(LossScale { scale, .. }) = loss_scale
            && !(MIN_SCALE..=MAX_SCALE).contains(&scale)
        {
            let what = format!("has a loss scale of {scale}, expected {MIN_SCALE} to {MAX_SCALE}");
            return Err(Error::file(&path, what).with_hint("resume from another checkpoint"));
        }
        // Checkpoints from before they were written down tell of themselves alone.
        let steps =
            state["checkpoints"].as_array().cloned().unwrap_or_else(|| vec![state["global_step"].clone()]);
        let checkpoints = steps.iter().filter_map(|step| usize::try_from(step.as_u64()?).ok()).collect();
        let log_history = state["log_history"].as_array().cloned().unwrap_or_default();
        Ok(Self {
            global_step: global_step as usize,
            loss_scale,
            n_updates: state["n_updates"].as_u64().unwrap_or(global_step) as usize,
            log_history,
            checkpoints,
            exp_avg: load(first),
            exp_avg_sq: load(second),
        })
    }

    /// Puts the optimizer where it was.
    pub fn restore(self, optimizer: &mut AdamW<B>) {
        optimizer.n_updates = self.n_updates;
        (optimizer.exp_avg, optimizer.exp_avg_sq) = (self.exp_avg, self.exp_avg_sq);
    }
}
