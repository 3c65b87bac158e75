//! A run's folder, and what is written there of the run itself.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;

use super::open::OpenModel;
use super::rows::is_demo_set;
use super::start::goes_on_in;
use super::train::check_output;
use crate::config::TrainArgs;
use crate::data::source;
use crate::error::{Error, Result};
use crate::lora::LoraConfig;
use crate::train::run_folder::{ARGS_FILE, CheckpointTexts, RunFolder, Tracker};
use crate::train::trainer_state::TrainerState;

/// Creates the run's folder, with these settings in it and the log of the run that it goes on with, and gives its path as well.
///
/// # Errors
/// If it cannot be written.
pub(super) fn create_folder<B: Backend>(
    args: &TrainArgs,
    open: &OpenModel,
    lora_config: &LoraConfig,
    resume: Option<&TrainerState<B>>,
) -> Result<(PathBuf, RunFolder)> {
    let folder = new_folder(args, open)?;
    let tracker = if args.report_to == "none" { Tracker::None } else { Tracker::TensorBoard };
    let texts = texts(&in_full(args, &folder), open, lora_config);
    let log_history = resume.map(|state| state.log_history.clone()).unwrap_or_default();
    let mut files = RunFolder::create(&folder, texts, args.save_total_limit, log_history, tracker)?;
    if let Some(state) = resume.filter(|_| goes_on_in(args, &folder)) {
        files.go_on_with(&state.checkpoints);
    }
    Ok((folder, files))
}

/// Makes the run's folder, which with a suffix is no other's, whoever starts in the same second.
fn new_folder(args: &TrainArgs, open: &OpenModel) -> Result<PathBuf> {
    loop {
        let folder = run_folder(args, open);
        if !args.add_output_dir_suffix {
            // Another run may have come and gone while this one was loaded.
            return check_output(args).map(|()| folder);
        }
        let parent = folder.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        match std::fs::create_dir(&folder) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => {
                made.map_err(Error::io("create", &folder))?;
                return Ok(folder);
            }
        }
    }
}

/// The run's folder: `{output_dir}/{model_type}/v{N}-{time}`, or the output folder itself.
pub(super) fn run_folder(args: &TrainArgs, open: &OpenModel) -> PathBuf {
    if !args.add_output_dir_suffix {
        return args.output_dir.clone();
    }
    let folder = args.output_dir.join(args.model_type.clone().unwrap_or_else(|| open.base_name()));
    let version = |name: &str| name.strip_prefix('v')?.split('-').next()?.parse::<usize>().ok();
    let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let next = entries
        .filter_map(|e| version(&e.file_name().to_string_lossy()))
        .max()
        .map_or(0, |newest| newest + 1);
    folder.join(format!("v{next}-{}", jiff::Zoned::now().strftime("%Y%m%d-%H%M%S")))
}

/// The same settings as the record of a run in this folder has them: with paths in full, so that it can be read from everywhere, and such
/// that they repeat the run.
fn in_full(args: &TrainArgs, folder: &Path) -> TrainArgs {
    let full = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let specs = |specs: &[String]| match is_demo_set(specs) {
        true => specs.to_vec(),
        false => specs.iter().map(|spec| source::in_full(spec)).collect(),
    };
    // What repeats a run that went on in its folder begins where that began, and not at a checkpoint that it would write over.
    let goes_on = goes_on_in(args, folder);
    TrainArgs {
        model_id_or_path: args.model_id_or_path.as_ref().map(full),
        adapters: if goes_on { first_adapters(folder) } else { args.adapters.as_ref().map(full) },
        dataset: specs(&args.dataset),
        val_dataset: specs(&args.val_dataset),
        output_dir: full(&args.output_dir),
        // Of this command alone: another that takes the record would write over this run.
        overwrite_output_dir: false,
        resume_from_checkpoint: args.resume_from_checkpoint.as_ref().filter(|_| !goes_on).map(full),
        ..args.clone()
    }
}

/// The adapter that the run in this folder began with, by its record.
fn first_adapters(folder: &Path) -> Option<PathBuf> {
    let record = std::fs::read_to_string(folder.join(ARGS_FILE)).ok()?;
    serde_json::from_str::<TrainArgs>(&record).ok()?.adapters
}

/// `args` are those of the record.
fn texts(args: &TrainArgs, open: &OpenModel, lora_config: &LoraConfig) -> CheckpointTexts {
    let base_model = match &args.model_id_or_path {
        // PEFT resolves the name from wherever it runs, so a folder is named in full.
        Some(folder) => std::path::absolute(folder).unwrap_or_else(|_| folder.clone()).display().to_string(),
        None => open.name.clone(),
    };
    if open.is_demo() {
        let card = "# ORPO adapter for the demo of orpo-wgpu\n\nIts base model is inside the program: `orpo-wgpu infer --adapters .`\n";
        return CheckpointTexts { base_model, args: args.to_json(), card: card.to_owned() };
    }
    let card = format!(
        "---\nbase_model: {base_model}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- orpo\n- lora\n---\n\n\
         # ORPO adapter for {base_model}\n\n\
         LoRA of rank {} (alpha {}) on {}, trained with orpo-wgpu: beta {}, \
         learning rate {:e}, loss `{}`. The settings are in `args.json`.\n\n\
         ```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
         model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(\"{base_model}\"), \".\")\n```\n",
        lora_config.r,
        lora_config.lora_alpha,
        lora_config.target_modules.join(", "),
        args.beta,
        args.learning_rate,
        args.loss_compat,
    );
    CheckpointTexts { base_model, args: args.to_json(), card }
}
