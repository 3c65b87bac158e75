//! `--adapters`: which folder it means, and how its run wrote conversations.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::words::noted;
use crate::config;
use crate::data::template::Template;
use crate::demo;
use crate::lora;
use crate::shell::quoted;
use crate::train::checkpoints::newest_checkpoint;
use crate::train::run_folder::ARGS_FILE;

/// The adapter that `--adapters` means: none where it is `none`, or left out; then it is the demo's newest.
pub fn adapter_named(named: Option<&Path>, is_demo: bool) -> Option<PathBuf> {
    match named {
        Some(name) if name == Path::new("none") => None,
        Some(folder) => Some(adapter_in(folder)),
        None if is_demo => {
            let runs = std::fs::read_dir(demo_runs());
            newest_checkpoint(runs.into_iter().flatten().flatten().map(|run| run.path()))
        }
        None => None,
    }
}

/// Where the demo's runs are, when nothing else was said.
pub fn demo_runs() -> PathBuf {
    Path::new("output").join(demo::NAME)
}

/// The folder itself if it holds an adapter, else the newest checkpoint of the run that it is, or of the runs in it, as in `--output_dir`,
/// which has a folder for each model. Of another folder, loading says what is missing.
pub fn adapter_in(folder: &Path) -> PathBuf {
    if folder.join(lora::ADAPTER_FILE).exists() {
        return folder.to_owned();
    }
    let inside = |folder: &PathBuf| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let mut folders = vec![folder.to_owned()];
    for _ in ["a run", "a model's runs", "all runs"] {
        let within = folders.iter().flat_map(inside).collect();
        if let Some(newest) = newest_checkpoint(std::mem::replace(&mut folders, within)) {
            return newest;
        }
    }
    folder.to_owned()
}

/// What an adapter's run was told of conversations, by its record, and is not so of itself with a model whose chat format is this one:
/// flags of `infer` and their values.
pub fn trained_with(adapter: &Path, template: Option<Template>) -> Vec<(&'static str, String)> {
    let record = std::fs::read_to_string(adapter.join(ARGS_FILE)).unwrap_or_default();
    let record: Value = serde_json::from_str(&record).unwrap_or_default();
    let is_other =
        |theirs: &&str| matches!(config::template(theirs), Ok(Some(named)) if Some(named) != template);
    let template_type = record["template_type"].as_str().filter(is_other);
    let system = record["system"].as_str().filter(|theirs| !theirs.is_empty());
    let flags = [("template_type", template_type), ("system", system)];
    flags.into_iter().filter_map(|(name, value)| Some((name, value?.to_owned()))).collect()
}

/// Says how the adapter's run wrote conversations, where that is another way than this model's chat format and system prompt, and nobody
/// has chosen these: `template_type` is `AUTO`, and no system prompt is given.
pub fn note_trained_otherwise(adapter: &Path, template: Template, template_type: &str, system: Option<&str>) {
    let is_auto = config::template(template_type).is_ok_and(|named| named.is_none());
    let is_open = |(name, _): &(&str, String)| if *name == "system" { system.is_none() } else { is_auto };
    let flags = as_flags(trained_with(adapter, Some(template)).into_iter().filter(is_open));
    if !flags.is_empty() {
        note!("{}", noted("adapter", &format!("it was trained with {flags}, which is not given here")));
    }
}

/// Flags as they are pasted: `--system 'Be brief.'`
pub fn as_flags(flags: impl IntoIterator<Item = (&'static str, String)>) -> String {
    let flags = flags.into_iter().map(|(name, value)| format!("--{name} {}", quoted(&value)));
    flags.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_found_in_what_holds_it() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("Llama/v0-20260101-000000/checkpoint-3");
        assert_eq!(adapter_in(folder.path()), folder.path(), "there is none");
        std::fs::create_dir_all(&checkpoint).unwrap();
        for file in [lora::ADAPTER_CONFIG_FILE, lora::ADAPTER_FILE] {
            std::fs::write(checkpoint.join(file), "").unwrap();
        }
        for holder in checkpoint.ancestors().take(4) {
            assert_eq!(adapter_in(holder), checkpoint, "{}", holder.display());
        }
    }
}
