//! The folder of a run: its log and its checkpoints.
//!
//! A checkpoint folder is complete or absent: it is written beside its place, flushed to the disk, and then renamed.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, backend::Backend};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::checkpoints::{checkpoints, saved_now, step_of};
use super::loss_scale::{LossScale, MAX_SCALE, MIN_SCALE};
use super::optim::AdamW;
use super::plan::Plan;
use super::plots;
use super::tensorboard::TensorBoard;
use crate::data::dataset::Shuffle;
use crate::error::{Error, Result};
use crate::lora::{self, LoraConfig};
use crate::model::Llama;
use crate::model::load::Checkpoint;

/// The settings of a run, in its folder and in its checkpoints.
pub(crate) const ARGS_FILE: &str = "args.json";
const LOG_FILE: &str = "logging.jsonl";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Where a checkpoint's run was.
pub(super) const STATE_FILE: &str = "trainer_state.json";
/// Drawing takes time from training, and a small model may save every few seconds.
const BETWEEN_PLOTS: Duration = Duration::from_secs(30);

/// What every checkpoint carries besides the adapter.
#[derive(Debug, Clone)]
pub struct CheckpointTexts {
    /// `base_model_name_or_path` of the adapter's configuration.
    pub base_model: String,
    /// The resolved configuration, `args.json`.
    pub args: String,
    /// The adapter's card, `README.md`.
    pub card: String,
}

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

/// Where the log goes besides `logging.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracker {
    /// Event files in `runs/`.
    TensorBoard,
    /// Nowhere.
    None,
}

/// The step after that of the last line; 0 of an empty log.
fn after_last(log_history: &[Value]) -> usize {
    let last = log_history.last().and_then(|line| line["step"].as_u64());
    last.map_or(0, |step| step as usize + 1)
}

/// The lines of a log that can be read.
fn read_log(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Whether a folder is a run's.
pub fn holds_run(folder: &Path) -> bool {
    [ARGS_FILE, LOG_FILE].iter().any(|file| folder.join(file).exists())
        || checkpoints(folder).next().is_some()
}

/// Whether a folder can be written, or made where it is to be.
///
/// # Errors
/// If it cannot.
pub fn check_writable(folder: &Path) -> Result<()> {
    let mut above = folder.ancestors().map(|path| if path == Path::new("") { Path::new(".") } else { path });
    let there = above.find(|path| path.exists()).unwrap_or(folder);
    // A number of a process may come again where one was ended in between.
    let probe = there.join(format!(".orpo-wgpu-{}-{}", std::process::id(), Timestamp::now().as_nanosecond()));
    File::create_new(&probe).map_err(Error::io("write into", there))?;
    fs::remove_file(&probe).map_err(Error::io("remove", &probe))
}

/// Keeps other runs out of a folder for as long as this is open; none where folders are not opened or locked.
fn lock(folder: &Path) -> Result<Option<File>> {
    let Ok(opened) = File::open(folder) else { return Ok(None) };
    match opened.try_lock() {
        Ok(()) => Ok(Some(opened)),
        Err(TryLockError::WouldBlock) => {
            let hint = "wait for it to end, or name another --output_dir";
            Err(Error::file(folder, "another run is writing there").with_hint(hint))
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// An open run folder.
#[derive(Debug)]
pub struct RunFolder {
    folder: PathBuf,
    /// The folder, locked as long as the run has it, on systems that open folders.
    _lock: Option<File>,
    log: File,
    log_history: Vec<Value>,
    tensorboard: Option<TensorBoard>,
    texts: CheckpointTexts,
    save_total_limit: usize,
    checkpoints: Vec<PathBuf>,
    /// When the pictures were drawn last, or the run began.
    plotted: Instant,
    /// Pictures of the run that this one replaces.
    replaced_pictures: BTreeSet<PathBuf>,
}

impl RunFolder {
    /// Creates the folder with its `args.json` and a `logging.jsonl` that begins with `log_history`, the lines of the run that this one
    /// goes on from.
    ///
    /// # Errors
    /// If something cannot be written, or another run has the folder.
    pub fn create(
        folder: &Path,
        texts: CheckpointTexts,
        save_total_limit: usize,
        log_history: Vec<Value>,
        tracker: Tracker,
    ) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let lock = lock(folder)?;
        let args = folder.join(ARGS_FILE);
        fs::write(&args, &texts.args).map_err(Error::io("write", &args))?;
        let path = folder.join(LOG_FILE);
        let replaced = if log_history.is_empty() { read_log(&path) } else { Vec::new() };
        let replaced_pictures = plots::pictures(folder, &replaced);
        let log = OpenOptions::new().create(true).write(true).truncate(true).open(&path);
        let mut log = log.map_err(Error::io("write", &path))?;
        let lines: String = log_history.iter().map(|line| format!("{line}\n")).collect();
        log.write_all(lines.as_bytes()).map_err(Error::io("write", &path))?;
        let tensorboard = match tracker {
            Tracker::TensorBoard => Some(TensorBoard::create(folder, after_last(&log_history))?),
            Tracker::None => None,
        };
        let folder = folder.to_owned();
        Ok(Self {
            folder,
            _lock: lock,
            log,
            log_history,
            tensorboard,
            texts,
            save_total_limit,
            checkpoints: Vec::new(),
            plotted: Instant::now(),
            replaced_pictures,
        })
    }

    /// Takes the checkpoints after these steps for its own: it goes on in the folder of the run that saved them.
    pub fn go_on_with(&mut self, steps: &[usize]) {
        let places = steps.iter().map(|step| self.folder.join(format!("checkpoint-{step}")));
        self.checkpoints = places.filter(|place| place.exists()).collect();
    }

    /// The newest checkpoint of this run.
    pub fn last_checkpoint(&self) -> Option<&Path> {
        self.checkpoints.last().map(PathBuf::as_path)
    }

    /// Whether the log has an evaluation after so many steps.
    pub fn has_evaluation(&self, step: usize) -> bool {
        self.log_history.iter().any(|line| line["step"] == step && line.get("eval_loss").is_some())
    }

    /// Appends a line to `logging.jsonl` and to the tracker.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn log(&mut self, step: usize, line: &Map<String, Value>) -> Result<()> {
        if let Some(tensorboard) = &mut self.tensorboard {
            tensorboard.scalars(step, line)?;
        }
        let line = Value::Object(line.clone());
        let path = || self.folder.join(LOG_FILE);
        // In one piece: who reads along, or is left with it by a signal, has whole lines.
        self.log.write_all(format!("{line}\n").as_bytes()).map_err(|e| Error::io("write", path())(e))?;
        self.log_history.push(line);
        Ok(())
    }

    /// Draws the log so far into `images/`; unless it `is_last`, not again within half a minute.
    ///
    /// # Errors
    /// If a picture cannot be written.
    pub fn plot(&mut self, is_last: bool) -> Result<()> {
        if !is_last && self.plotted.elapsed() < BETWEEN_PLOTS {
            return Ok(());
        }
        plots::write(&self.folder, &self.log_history)?;
        let own = plots::pictures(&self.folder, &self.log_history);
        for picture in std::mem::take(&mut self.replaced_pictures).difference(&own) {
            // Somebody may have been faster, and one that stays does no harm.
            let _ = fs::remove_file(picture);
        }
        self.plotted = Instant::now();
        Ok(())
    }

    /// Saves `checkpoint-{step}`, unless it is there.
    ///
    /// # Errors
    /// If something cannot be written; what was there before stays, and nothing half-written is left.
    pub fn save<B: Backend>(
        &mut self,
        model: &Llama<B>,
        lora_config: &LoraConfig,
        optimizer: &AdamW<B>,
        position: Position<'_>,
    ) -> Result<()> {
        let step = position.step;
        let place = self.folder.join(format!("checkpoint-{step}"));
        if self.checkpoints.contains(&place) {
            return Ok(());
        }
        let partial = self.folder.join(format!(".checkpoint-{step}.partial"));
        let written = self.write_checkpoint(&partial, model, lora_config, optimizer, position);
        if let Err(error) = written.and_then(|()| put_in_place(&partial, &place)) {
            // The first error is the one to report; a folder that cannot be removed either tells nothing new.
            let _ = fs::remove_dir_all(&partial);
            return Err(error);
        }
        self.checkpoints.push(place);
        Ok(())
    }

    /// Removes the oldest checkpoints beyond the limit. Gives why one of these stays, where it cannot be removed: the run is saved all the
    /// same.
    pub fn prune(&mut self) -> Option<Error> {
        let mut staying = None;
        while self.checkpoints.len() > self.save_total_limit.max(1) {
            let oldest = self.checkpoints.remove(0);
            staying = remove_folder(&oldest).err().or(staying);
        }
        staying
    }

    fn write_checkpoint<B: Backend>(
        &self,
        folder: &Path,
        model: &Llama<B>,
        lora_config: &LoraConfig,
        optimizer: &AdamW<B>,
        position: Position<'_>,
    ) -> Result<()> {
        remove_folder(folder)?;
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        lora::save(model, lora_config, &self.texts.base_model, folder)?;
        let names = || lora::tensors(model).into_iter().map(|(name, _)| name);
        let moments = |part: &str, values: &[Tensor<B, 2>]| -> Vec<(String, Tensor<B, 2>)> {
            names().zip(values).map(|(name, value)| (format!("{name}.{part}"), value.clone())).collect()
        };
        let mut state = moments("exp_avg", &optimizer.exp_avg);
        state.extend(moments("exp_avg_sq", &optimizer.exp_avg_sq));
        lora::write_safetensors(&folder.join(OPTIMIZER_FILE), &state)?;
        let Position { step, plan, rows, loss_scale } = position;
        let saved: Vec<_> =
            self.checkpoints.iter().filter_map(|place| step_of(place)).chain([step]).collect();
        let kept = &saved[saved.len().saturating_sub(self.save_total_limit.max(1))..];
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
            "checkpoints": kept,
            "saved_at": saved_now(&self.folder).to_string(),
            "log_history": self.log_history,
        });
        let texts = [
            (STATE_FILE, format!("{state:#}\n")),
            (ARGS_FILE, self.texts.args.clone()),
            ("README.md", self.texts.card.clone()),
        ];
        for (name, text) in texts {
            let path = folder.join(name);
            fs::write(&path, text).map_err(Error::io("write", &path))?;
        }
        Ok(())
    }
}

/// The seed of the epochs' orders; null for the file's order.
fn shuffle_seed(plan: &Plan) -> Option<u64> {
    match plan.shuffle {
        Shuffle::Seeded(seed) => Some(seed),
        Shuffle::Off => None,
    }
}

/// Removes a folder, where there is one: somebody may have been faster.
fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// Flushes a folder's files and renames it to its place.
fn put_in_place(partial: &Path, place: &Path) -> Result<()> {
    for entry in fs::read_dir(partial).map_err(Error::io("read", partial))? {
        let path = entry.map_err(Error::io("read", partial))?.path();
        // Flushing needs a handle that may write, on Windows.
        let file = OpenOptions::new().write(true).open(&path);
        file.and_then(|file| file.sync_all()).map_err(Error::io("flush", &path))?;
    }
    // An older checkpoint of this name is set aside for a moment; one that a crash left there would be in the way.
    let replaced = partial.with_extension("replaced");
    remove_folder(&replaced)?;
    if place.exists() {
        fs::rename(place, &replaced).map_err(Error::io("replace", place))?;
    }
    if let Err(error) = fs::rename(partial, place) {
        // What was there before stays.
        let _ = fs::rename(&replaced, place);
        return Err(Error::io("write", place)(error));
    }
    if let Some(parent) = place.parent() {
        flush_folder(parent)?;
    }
    // It is in place; what cannot be removed now is before the next.
    let _ = remove_folder(&replaced);
    Ok(())
}

/// Has the names in a folder reach the disk, on systems that open folders.
fn flush_folder(folder: &Path) -> Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    let opened = File::open(folder);
    match opened.and_then(|folder| folder.sync_all()) {
        // Some file systems flush no folders.
        Err(error) if !matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
            Err(Error::io("flush", folder)(error))
        }
        _ => Ok(()),
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
            return Err(Error::file(&path, format!("belongs to another run: {}", differing.join(", ")))
                .with_hint("resume with the data and the flags of the first run (its args.json), or start anew with --adapters"));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_takes_the_place_of_an_older_one_also_after_a_crash() {
        let run = tempfile::tempdir().unwrap();
        let [partial, place, replaced] = [".checkpoint-2.partial", "checkpoint-2", ".checkpoint-2.replaced"]
            .map(|name| run.path().join(name));
        let write = |folder: &Path, text: &str| {
            fs::create_dir_all(folder).unwrap();
            fs::write(folder.join(STATE_FILE), text).unwrap();
        };
        // The crash came between the two renames, or before what was replaced was removed.
        for is_there in [false, true] {
            write(&replaced, "oldest");
            if is_there {
                write(&place, "old");
            }
            write(&partial, "new");
            put_in_place(&partial, &place).unwrap();
            assert_eq!(fs::read_to_string(place.join(STATE_FILE)).unwrap(), "new", "{is_there}");
            assert!(!partial.exists() && !replaced.exists(), "{is_there}");
            fs::remove_dir_all(&place).unwrap();
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_is_one_run_s_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let create = || {
            let texts =
                CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
            RunFolder::create(folder.path(), texts, 2, Vec::new(), Tracker::None)
        };
        let first = create().unwrap();
        let message = create().unwrap_err().to_string();
        assert!(message.ends_with("another run is writing there"), "{message}");
        drop(first);
        create().unwrap();
    }

    #[test]
    fn a_folder_that_is_gone_is_removed_and_one_that_cannot_be_is_an_error() {
        let run = tempfile::tempdir().unwrap();
        remove_folder(&run.path().join("gone")).unwrap();
        let file = run.path().join("checkpoint-2");
        fs::write(&file, "").unwrap();
        assert!(remove_folder(&file).is_err());
    }
}
