//! What a run starts from: a new adapter, one that there is, or a checkpoint.

use std::path::{Path, PathBuf};

use super::adapter::adapter_in;
use crate::config::TrainArgs;
use crate::data::tokenize::{TokenizedPair, fingerprint};
use crate::error::{Error, Result};
use crate::lora::{self, LoraConfig, StoredConfig};
use crate::model::Llama;
use crate::model::llama::LINEAR_NAMES;
use crate::ops::Kernels;
use crate::train::TrainSettings;
use crate::train::checkpoints::newest_checkpoint;
use crate::train::trainer_state::TrainerState;

/// Checks that a model that is named is one that can be loaded.
///
/// # Errors
/// If it has a name alone.
pub(super) fn check_model(args: &TrainArgs) -> Result<()> {
    match (&args.model_type, &args.model_id_or_path) {
        (Some(name), None) => Err(Error::config(format!(
            "--model_type `{name}` names a model, and nothing is downloaded"
        ))
        .with_hint(
            "fetch the model and pass its folder as --model_id_or_path; without both, the demo is taken",
        )),
        _ => Ok(()),
    }
}

/// The same settings, where `--resume_from_checkpoint` and `--adapters` are checkpoints instead of the runs that they are the newest
/// of.
///
/// # Errors
/// If there is none to resume from.
pub(super) fn with_checkpoint(args: TrainArgs) -> Result<TrainArgs> {
    let resume_from_checkpoint = args.resume_from_checkpoint.as_deref().map(checkpoint_of).transpose()?;
    let adapters = args.adapters.as_deref().map(adapter_in);
    Ok(TrainArgs { resume_from_checkpoint, adapters, ..args })
}

/// The adapter that the run starts from.
pub(super) fn adapter_of(args: &TrainArgs) -> Option<&Path> {
    args.resume_from_checkpoint.as_deref().or(args.adapters.as_deref())
}

/// Whether the run goes on in the folder of the run that it resumes.
pub(super) fn goes_on_in(args: &TrainArgs, folder: &Path) -> bool {
    let checkpoint = args.resume_from_checkpoint.as_deref().and_then(|path| path.canonicalize().ok());
    let parent = checkpoint.as_deref().and_then(Path::parent);
    parent.is_some_and(|parent| folder.canonicalize().is_ok_and(|folder| folder == parent))
}

/// The ranks of the run's adapters: those of the adapter it starts from, else those of `--lora_rank` and `--lora_target_modules`.
///
/// # Errors
/// If that adapter's configuration cannot be read, it is another than was asked for, or there is no such module.
pub(super) fn ranks(args: &TrainArgs) -> Result<[usize; LINEAR_NAMES.len()]> {
    match adapter_of(args) {
        Some(folder) => {
            let config = lora::stored_config(folder)?;
            check_given(args, &config, folder)?;
            Ok(config.ranks)
        }
        None => Ok(lora::ranks(args.lora_rank, &lora::target_modules(&args.lora_target_modules)?)),
    }
}

/// An adapter keeps its rank, its alpha and its modules: what was given for one of them has to be what it has.
fn check_given(args: &TrainArgs, config: &StoredConfig, folder: &Path) -> Result<()> {
    let modules = lora::target_modules(&args.lora_target_modules)?;
    // Of a regular expression the tensors tell.
    let theirs = config.target_modules.as_ref().unwrap_or(&modules);
    let settings = [
        (
            "lora_rank",
            args.lora_rank == config.r,
            format!("a rank of {}, and --lora_rank is {}", config.r, args.lora_rank),
        ),
        (
            "lora_alpha",
            args.lora_alpha == config.lora_alpha,
            format!("an alpha of {}, and --lora_alpha is {}", config.lora_alpha, args.lora_alpha),
        ),
        (
            "lora_target_modules",
            modules.len() == theirs.len() && modules.iter().all(|module| theirs.contains(module)),
            format!(
                "the modules {}, and --lora_target_modules is {}",
                theirs.join(","),
                args.lora_target_modules.join(",")
            ),
        ),
    ];
    let others = settings.into_iter().filter(|(name, is_same, _)| !is_same && args.given.contains(*name));
    let (flags, problems): (Vec<_>, Vec<_>) =
        others.map(|(name, _, problem)| (format!("--{name}"), problem)).unzip();
    if problems.is_empty() {
        return Ok(());
    }
    let hint = format!(
        "leave {} out, on the command line and in --config: training goes on with the adapter's; other ones are a new adapter's",
        flags.join(" and ")
    );
    Err(Error::config(format!("the adapter in {} has {}", folder.display(), problems.join("; ")))
        .with_hint(hint))
}

/// The folder itself if it is a checkpoint, else the newest one of the run that it is.
fn checkpoint_of(folder: &Path) -> Result<PathBuf> {
    if folder.join(lora::ADAPTER_FILE).exists() {
        return Ok(folder.to_owned());
    }
    if !folder.is_dir() {
        return Err(Error::file(folder, "there is no such folder")
            .with_hint("--resume_from_checkpoint takes a run's folder, as output/DIR/v0-…, or one of the checkpoints in it"));
    }
    newest_checkpoint([folder.to_owned()]).ok_or_else(|| {
        Error::file(folder, "holds no checkpoint to resume from").with_hint(
            "--save_steps says how often one is saved; the same command without --resume_from_checkpoint begins the run again",
        )
    })
}

/// Gives the model its adapter: the one that the run starts from, else a new one.
///
/// # Errors
/// If that adapter cannot be read, or does not fit the model.
pub(super) fn start_adapter<B: Kernels>(args: &TrainArgs, model: &mut Llama<B>) -> Result<LoraConfig> {
    if let Some(folder) = adapter_of(args) {
        return lora::load(model, folder);
    }
    let target_modules = lora::target_modules(&args.lora_target_modules)?;
    let config = LoraConfig { r: args.lora_rank, lora_alpha: args.lora_alpha, target_modules };
    lora::attach(model, &config, args.seed);
    Ok(config)
}

/// Where the run that is resumed was; none if it is a new one.
///
/// # Errors
/// If the checkpoint cannot be read, is of other settings, or is the last one already.
pub(super) fn resume_state<B: Kernels>(
    args: &TrainArgs,
    model: &Llama<B>,
    rows: &[TokenizedPair],
    settings: &TrainSettings,
) -> Result<Option<TrainerState<B>>> {
    let Some(folder) = &args.resume_from_checkpoint else { return Ok(None) };
    let state = TrainerState::read(folder, model, &settings.plan, fingerprint(rows))?;
    let (n_done, max_steps) = (state.global_step, settings.schedule.max_steps);
    if n_done >= max_steps {
        return Err(Error::config(format!(
            "nothing to train: {n_done} of {max_steps} steps are done already"
        ))
        .with_hint("raise --max_steps or --num_train_epochs"));
    }
    Ok(Some(state))
}
