//! `orpo-wgpu export`: a model's folder with an adapter in its weights.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::adapter::{adapter_named, as_flags, demo_runs, trained_with};
use super::interrupts;
use super::open::OpenModel;
use super::outcome::program;
use super::progress::bar_of_bytes;
use crate::data::template::Template;
use crate::demo;
use crate::device::size;
use crate::error::{Error, Result};
use crate::lora::{self, Merged};
use crate::model::load::{INDEX_FILE, check_llama};
use crate::shell::pasted;
use crate::train::run_folder::check_writable;
use crate::words::counted;

/// How often a folder is removed that is filled meanwhile.
const REMOVALS: usize = 10;

/// What `orpo-wgpu export` is told.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// A Hugging Face model folder [default: the demo inside this program]
    #[arg(long)]
    model_id_or_path: Option<PathBuf>,
    /// A PEFT adapter folder, a run or a folder of runs (the newest checkpoint) [default: the demo's newest one below output/demo]
    #[arg(long)]
    adapters: Option<PathBuf>,
    /// A new folder for the merged model [default: the adapter's, with -merged at its end]
    #[arg(long)]
    output_dir: Option<PathBuf>,
}

/// Runs the subcommand.
///
/// # Errors
/// If the model or the adapter is missing, damaged or not of the other, or the folder is there or cannot be written.
pub fn run(args: &ExportArgs) -> Result<()> {
    // Merging writes no conversations, so that none of their formats is asked for.
    let open = OpenModel::open(args.model_id_or_path.as_deref(), "default-generation")?;
    let adapter = adapter_named(args.adapters.as_deref(), open.is_demo()).ok_or_else(|| {
        let what = match open.folder() {
            None if args.adapters.is_none() => format!("there is no adapter below {}", demo_runs().display()),
            _ => "no adapter is named".to_owned(),
        };
        Error::config(what)
            .with_hint("--adapters takes a run, one of its checkpoints, or another PEFT adapter")
    })?;
    open.check_adapter(&adapter)?;
    let place = match &args.output_dir {
        Some(folder) => folder.clone(),
        None => beside(&adapter)?,
    };
    check_new(&place)?;
    // Before anything is written: the whole model, with all that is missing.
    check_llama(&open.checkpoint()?, &open.config)?;
    let partial = new_partial(&place)?;
    interrupts::end_after({
        let partial = partial.clone();
        move || {
            remove(&partial);
            note!("interrupted: nothing is exported");
        }
    });
    let merged = write(&open, &adapter, &partial).and_then(|merged| {
        fs::rename(&partial, &place).map_err(Error::io("create", &place)).map(|()| merged)
    });
    let Merged { n_matrices, bytes } = merged.inspect_err(|_| remove(&partial))?;
    say!(
        "{} of {} merged into {}: {}",
        counted(n_matrices, "linear layer"),
        adapter.display(),
        open.name,
        size(bytes)
    );
    say!("model: {}", place.display());
    let template = Template::detect(&open.tokenizer, open.tokenizer.chat_template()).ok();
    let flags = as_flags(trained_with(&adapter, template));
    let space = if flags.is_empty() { "" } else { " " };
    say!("talk to it: {} infer --model_id_or_path {}{space}{flags}", program(), pasted(&place));
    Ok(())
}

/// `checkpoint-30-merged`
fn beside(adapter: &Path) -> Result<PathBuf> {
    // `.` and `..` have no name.
    let named = match adapter.file_name() {
        Some(_) => adapter.to_owned(),
        None => adapter.canonicalize().map_err(Error::io("read", adapter))?,
    };
    with_name(&named, |name| format!("{name}-merged"))
}

fn with_name(path: &Path, name: impl Fn(&str) -> String) -> Result<PathBuf> {
    let last = path.file_name().ok_or_else(|| {
        Error::config(format!("--output_dir is {}, which is the name of no new folder", path.display()))
    })?;
    Ok(path.with_file_name(name(&last.to_string_lossy())))
}

/// Checks that there is nothing of this name, and that a folder can be made there.
fn check_new(folder: &Path) -> Result<()> {
    // A link to nowhere is there as well, and an empty folder may be one that something else is waiting for.
    match folder.symlink_metadata() {
        Ok(_) => {
            return Err(Error::file(folder, "is there already").with_hint(
                "name a folder that is not there with --output_dir; it may be within one that is",
            ));
        }
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("create", folder)(error)),
        Err(_) => {}
    }
    check_writable(above(folder))
        .map_err(|error| error.with_hint("--output_dir names a folder in another place"))
}

fn above(folder: &Path) -> &Path {
    folder.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
}

/// Makes a folder of no other's beside the one that is to be, for what is not whole yet.
fn new_partial(place: &Path) -> Result<PathBuf> {
    fs::create_dir_all(above(place)).map_err(Error::io("create", above(place)))?;
    let mut number = std::process::id();
    loop {
        let partial = with_name(place, |name| format!(".{name}.{number}.partial"))?;
        match fs::create_dir(&partial) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number = number.wrapping_add(1),
            made => return made.map_err(Error::io("create", &partial)).map(|()| partial),
        }
    }
}

/// Removes what is not whole, into which something may be written meanwhile.
fn remove(partial: &Path) {
    let is_filled =
        || fs::remove_dir_all(partial).is_err_and(|error| error.kind() == ErrorKind::DirectoryNotEmpty);
    // Not for ever: over NFS an open file stays until it is closed. What cannot be removed tells nothing that what ended the work does not.
    let _ = (0..REMOVALS).find(|_| !is_filled());
}

/// Writes the model's files into a folder.
fn write(open: &OpenModel, adapter: &Path, folder: &Path) -> Result<Merged> {
    let files = open.weight_files()?;
    match open.folder() {
        Some(model) => copy_settings(model, folder)?,
        None => {
            demo::FILES.iter().try_for_each(|(name, content)| write_whole(&folder.join(name), content))?;
        }
    }
    let bar = bar_of_bytes("merging");
    let on_written = |written, all| {
        bar.set_length(all);
        bar.set_position(written);
    };
    let merged = lora::merge(&files, &open.config, adapter, folder, &on_written);
    bar.finish_and_clear();
    merged
}

/// Copies what a model's folder has beside its weights: settings, tokenizer, chat template, and its licence, which goes with the weights.
fn copy_settings(model: &Path, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(model).map_err(Error::io("read", model))? {
        let from = entry.map_err(Error::io("read", model))?.path();
        let Some(name) = from.file_name().and_then(|name| name.to_str()) else { continue };
        if !from.is_file() || !is_setting(name) {
            continue;
        }
        // Not with the permissions it has, which may be to read alone.
        let content = fs::read(&from).map_err(Error::io("read", &from))?;
        write_whole(&folder.join(name), &content)?;
    }
    Ok(())
}

/// Writes a file, and has it reach the disk: the folder has its name once all of it is there.
fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let written = File::create_new(path).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.map_err(Error::io("write", path))
}

/// Whether a file of this name belongs to the model whatever its weights. So does the index of those, as tensors keep names and sizes.
fn is_setting(name: &str) -> bool {
    let is_index = name.ends_with(".index.json");
    let ends = [".json", ".model", ".jinja"].iter().any(|end| name.ends_with(end));
    let is_legal = ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"]
        .iter()
        .any(|start| name.to_uppercase().starts_with(start));
    // An adapter that lies in the folder is none of the merged model's.
    let is_other = name.starts_with('.') || name.starts_with("adapter_");
    !is_other && (name == INDEX_FILE || !is_index && ends || is_legal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_model_but_other_weights_is_copied() {
        for name in
            ["config.json", "tokenizer.model", "chat_template.jinja", "LICENSE.txt", "Notice", INDEX_FILE]
        {
            assert!(is_setting(name), "{name}");
        }
        for name in [
            "model-00001-of-00004.safetensors",
            "pytorch_model.bin.index.json",
            "model.gguf",
            "adapter_config.json",
            ".gitattributes",
            "README.md",
        ] {
            assert!(!is_setting(name), "{name}");
        }
    }

    #[test]
    fn a_merged_model_is_beside_its_adapter() {
        assert_eq!(
            beside(Path::new("out/v0/checkpoint-3")).unwrap(),
            Path::new("out/v0/checkpoint-3-merged")
        );
        let here = beside(Path::new(".")).unwrap();
        assert!(here.is_absolute() && here.to_string_lossy().ends_with("-merged"), "{}", here.display());
        assert!(with_name(Path::new("/"), str::to_owned).is_err());
    }
}
