//! The folder of a run: its log and its checkpoints.
//!
//! A checkpoint folder is complete or absent: it is written beside its place, flushed to the disk, and then renamed.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use jiff::Timestamp;
use serde_json::{Map, Value};

use super::checkpoints::{checkpoints, saved_now, step_of};
use super::optim::AdamW;
use super::plots;
use super::tensorboard::TensorBoard;
use super::trainer_state::{self, Position};
use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::lora::{self, LoraConfig};
use crate::model::Llama;

/// The settings of a run, in its folder and in its checkpoints.
pub(crate) const ARGS_FILE: &str = "args.json";
const LOG_FILE: &str = "logging.jsonl";
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

/// Takes a folder, which is there; none where folders are not opened.
///
/// # Errors
/// If another run has it.
fn lock(folder: &Path) -> Result<Option<Lock>> {
    File::open(folder).ok().map(|opened| Lock::of(opened, folder)).transpose()
}

/// Checks that no other run has a folder now, where there is one.
///
/// # Errors
/// If one has.
pub fn check_free(folder: &Path) -> Result<()> {
    lock(folder).map(drop)
}

/// An open run folder.
#[derive(Debug)]
pub struct RunFolder {
    folder: PathBuf,
    _lock: Option<Lock>,
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
        // Before what makes the folder a run's: what cannot be begun leaves none behind.
        let tensorboard = match tracker {
            Tracker::TensorBoard => Some(TensorBoard::create(folder, after_last(&log_history))?),
            Tracker::None => None,
        };
        let args = folder.join(ARGS_FILE);
        fs::write(&args, &texts.args).map_err(Error::io("write", &args))?;
        let path = folder.join(LOG_FILE);
        let replaced = if log_history.is_empty() { read_log(&path) } else { Vec::new() };
        let replaced_pictures = plots::pictures(folder, &replaced);
        let log = OpenOptions::new().create(true).write(true).truncate(true).open(&path);
        let mut log = log.map_err(Error::io("write", &path))?;
        let lines: String = log_history.iter().map(|line| format!("{line}\n")).collect();
        log.write_all(lines.as_bytes()).map_err(Error::io("write", &path))?;
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
        self.plotted = Instant::now();
        plots::write(&self.folder, &self.log_history)?;
        let own = plots::pictures(&self.folder, &self.log_history);
        for picture in std::mem::take(&mut self.replaced_pictures).difference(&own) {
            // Somebody may have been faster, and one that stays does no harm.
            let _ = fs::remove_file(picture);
        }
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
        let saved: Vec<_> =
            self.checkpoints.iter().filter_map(|place| step_of(place)).chain([position.step]).collect();
        let kept = &saved[saved.len().saturating_sub(self.save_total_limit.max(1))..];
        trainer_state::write(
            folder,
            model,
            optimizer,
            position,
            &self.log_history,
            kept,
            saved_now(&self.folder),
        )?;
        for (name, text) in [(ARGS_FILE, &self.texts.args), ("README.md", &self.texts.card)] {
            let path = folder.join(name);
            fs::write(&path, text).map_err(Error::io("write", &path))?;
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::super::trainer_state::STATE_FILE;
    use super::*;

    /// What goes on in another folder has the earlier lines as they were.
    #[test]
    fn the_numbers_of_a_log_are_read_as_they_were_written() {
        // serde_json's faster way of reading takes the next number for this one.
        let line = r#"{"loss":31.245270191439438}"#;
        assert_eq!(serde_json::from_str::<Value>(line).unwrap().to_string(), line);
    }

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
        let texts = CheckpointTexts { base_model: String::new(), args: String::new(), card: String::new() };
        let run = RunFolder::create(folder.path(), texts, 2, Vec::new(), Tracker::None).unwrap();
        assert!(check_free(folder.path()).is_err());
        drop(run);
        check_free(folder.path()).unwrap();
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
