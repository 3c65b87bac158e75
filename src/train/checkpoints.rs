//! The checkpoints of a run's folder, and which of them is the newest.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use serde::Deserialize;

use super::trainer_state::STATE_FILE;
use crate::lora;

/// After how many steps a checkpoint was saved, by its name.
pub(super) fn step_of(checkpoint: &Path) -> Option<usize> {
    checkpoint.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()
}

/// A run folder's checkpoints, and how many steps are behind each; one without an adapter is none.
pub(super) fn checkpoints(run: &Path) -> impl Iterator<Item = (usize, PathBuf)> {
    let folders = fs::read_dir(run).into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = folders.filter(|path| path.join(lora::ADAPTER_FILE).exists());
    folders.filter_map(|path| Some((step_of(&path)?, path)))
}

/// When a checkpoint was saved: by what it says itself, as copies of files have their own times, else by its adapter's file.
fn saved_at(checkpoint: &Path) -> SystemTime {
    #[derive(Deserialize)]
    struct Saved {
        saved_at: String,
    }
    let state = fs::read_to_string(checkpoint.join(STATE_FILE)).unwrap_or_default();
    let said = serde_json::from_str(&state).ok().and_then(|Saved { saved_at }| saved_at.parse().ok());
    said.map(|said: Timestamp| said.into()).unwrap_or_else(|| {
        let file = checkpoint.join(lora::ADAPTER_FILE).metadata();
        file.and_then(|file| file.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
    })
}

/// When a checkpoint beside these is saved: now, but after all of them also where the clock was set back.
pub(super) fn saved_now(run: &Path) -> Timestamp {
    let last = checkpoints(run).map(|(_, path)| saved_at(&path)).max();
    let after = last.and_then(|last| Timestamp::try_from(last + Duration::from_millis(1)).ok());
    after.map_or_else(Timestamp::now, |after| after.max(Timestamp::now()))
}

/// The newest checkpoint among those of some run folders: the one saved last, since an older run may have come further in the same folder.
pub fn newest_checkpoint(runs: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let checkpoints = runs.into_iter().flat_map(|run| checkpoints(&run).collect::<Vec<_>>());
    checkpoints.max_by_key(|(step, path)| (saved_at(path), *step)).map(|(_, path)| path)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use serde_json::json;

    use super::*;

    #[test]
    fn the_newest_checkpoint_is_the_one_written_last() {
        let run = tempfile::tempdir().unwrap();
        let newest = || newest_checkpoint([run.path().to_owned()]).map(|p| p.file_name().unwrap().to_owned());
        let write = |name: &str, seconds: u64| {
            let folder = run.path().join(name);
            fs::create_dir_all(&folder).unwrap();
            let file = File::create(folder.join(lora::ADAPTER_FILE)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        };
        assert_eq!(newest(), None);
        fs::create_dir(run.path().join("checkpoint-300")).unwrap();
        File::create(run.path().join("checkpoint-400")).unwrap();
        write(".checkpoint-11.partial", 9);
        assert_eq!(newest(), None, "neither a folder without an adapter nor one half-written");
        write("checkpoint-9", 5);
        write("checkpoint-10", 5);
        assert_eq!(newest().unwrap(), "checkpoint-10", "by steps where the clock is too coarse");
        write("checkpoint-2", 6);
        assert_eq!(newest().unwrap(), "checkpoint-2", "of the later run in the same folder");
        let say = |name: &str, seconds: i64| {
            let state = json!({ "saved_at": Timestamp::from_second(seconds).unwrap().to_string() });
            fs::write(run.path().join(name).join(STATE_FILE), state.to_string()).unwrap();
        };
        say("checkpoint-9", 8);
        say("checkpoint-2", 7);
        assert_eq!(newest().unwrap(), "checkpoint-9", "by what they say, whenever they were copied");
        let far = Timestamp::now().as_second() + 1_000_000;
        say("checkpoint-9", far);
        let now = saved_now(run.path());
        assert!(now > Timestamp::from_second(far).unwrap(), "a clock that was set back: {now}");
    }
}
