//! The resolved configuration of a run: what `args.json` holds and `--config` reads back.
//!
//! [`TrainArgs::default`] holds the only defaults. A run's values come, each over the one before, from these defaults, from the demo's
//! own settings (where no model is named), from `--config FILE` and from the flags.

mod byte_size;
mod file;
pub mod other_names;
mod problems;
mod value_problem;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use byte_size::ByteSize;
pub(crate) use problems::{check_precision, template};
pub(crate) use value_problem::value_problem;

use crate::error::{Error, Result};
use crate::shell::pasted;
use crate::train::loss_scale::LossScaleConfig;
use crate::train::optim::AdamWConfig;
use crate::train::schedule::LrSchedulerType;

/// What `orpo-wgpu train` is told. Names are ms-swift's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct TrainArgs {
    /// Registry name of the model, for the name of the output folder; alone, `plan` knows its shape by it
    #[arg(long, help_heading = "Model")]
    pub model_type: Option<String>,
    /// A Hugging Face model folder [default: the demo inside this program]
    #[arg(long, help_heading = "Model")]
    pub model_id_or_path: Option<PathBuf>,
    /// Start from this PEFT adapter folder
    #[arg(long, help_heading = "Model")]
    pub adapters: Option<PathBuf>,
    /// What is trained: `lora`
    #[arg(long, default_value_t = Self::default().sft_type, help_heading = "Model")]
    pub sft_type: String,
    /// Modules that carry an adapter: ALL (every linear but lm_head) or names such as q_proj,v_proj
    #[arg(long, value_delimiter = ',', default_values_t = Self::default().lora_target_modules, help_heading = "Model")]
    pub lora_target_modules: Vec<String>,
    /// Rank of the adapters, at most 256
    #[arg(long, default_value_t = Self::default().lora_rank, help_heading = "Model")]
    pub lora_rank: usize,
    /// The update is scaled by lora_alpha / lora_rank
    #[arg(long, default_value_t = Self::default().lora_alpha, help_heading = "Model")]
    pub lora_alpha: f64,
    /// Must be 0: ORPO disables dropout, as TRL does
    #[arg(long, default_value_t = Self::default().lora_dropout, help_heading = "Model")]
    pub lora_dropout: f64,
    /// Data type of the computation: bf16, fp16, fp32, or AUTO for the first of them that a GPU computes in
    #[arg(long, default_value_t = Self::default().dtype, value_parser = parse_dtype, help_heading = "Model")]
    pub dtype: String,
    /// What fp16 multiplies the loss with at first, so that small gradients do not vanish; it falls when gradients overflow
    #[arg(long, default_value_t = Self::default().fp16_init_scale, help_heading = "Training")]
    pub fp16_init_scale: f64,
    /// How much the scale grows after fp16_growth_interval steps without an overflow
    #[arg(long, default_value_t = Self::default().fp16_growth_factor, help_heading = "Training")]
    pub fp16_growth_factor: f64,
    /// What is left of the scale after an overflow, whose step is skipped
    #[arg(long, default_value_t = Self::default().fp16_backoff_factor, help_heading = "Training")]
    pub fp16_backoff_factor: f64,
    /// Steps in a row without an overflow before the scale grows
    #[arg(long, default_value_t = Self::default().fp16_growth_interval, help_heading = "Training")]
    pub fp16_growth_interval: usize,
    /// Bits of the frozen linear layers: 8 (int8), 4 (NF4), or 0 for those of --dtype
    #[arg(long, default_value_t = Self::default().quantization_bit, help_heading = "Model")]
    pub quantization_bit: u32,
    /// Store lm_head in int8 as well, where the linear layers are quantised
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = Self::default().quantize_lm_head, help_heading = "Model")]
    pub quantize_lm_head: bool,

    /// Data sets: files, folders or registry names, separated by commas; NAME#500 samples 500 rows [default: the demo's pairs]
    #[arg(long, value_delimiter = ',', help_heading = "Data")]
    pub dataset: Vec<String>,
    /// Data sets to evaluate on, instead of a part of --dataset; demo stands for the demo's held-out pairs
    #[arg(long, value_delimiter = ',', help_heading = "Data")]
    pub val_dataset: Vec<String>,
    /// Share of the rows that is held out for evaluation
    #[arg(long, default_value_t = Self::default().dataset_test_ratio, help_heading = "Data")]
    pub dataset_test_ratio: f64,
    /// Shuffle the rows; false keeps the file's order
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = Self::default().dataset_shuffle, help_heading = "Data")]
    pub dataset_shuffle: bool,
    /// Other names of the columns, as JSON: {"question":"query"}; {"input":""} leaves one out
    #[arg(long, value_parser = parse_columns, help_heading = "Data")]
    pub columns: Option<Columns>,
    /// System prompt of rows that have none of their own
    #[arg(long, help_heading = "Data")]
    pub system: Option<String>,
    /// Chat format: AUTO, llama3, llama3_2 (3.1 and later) or default-generation (plain text)
    #[arg(long, default_value_t = Self::default().template_type, help_heading = "Data")]
    pub template_type: String,
    /// The most tokens of a row, prompt + longer answer
    #[arg(long, default_value_t = Self::default().max_length, help_heading = "Data")]
    pub max_length: usize,
    /// What happens to longer rows: delete (left out, and named) or truncation_right (the answers are cut)
    #[arg(long, default_value_t = Self::default().truncation_strategy, help_heading = "Data")]
    pub truncation_strategy: String,
    /// A row that cannot be used is an error
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = Self::default().strict, help_heading = "Data")]
    pub strict: bool,

    /// Weight of the odds-ratio term
    #[arg(long, default_value_t = Self::default().beta, help_heading = "Training")]
    pub beta: f64,
    /// Tokens of the NLL term: swift (chosen response), trl (prompt and chosen response) or llamafactory (mean by pair)
    #[arg(long, default_value_t = Self::default().loss_compat, help_heading = "Training")]
    pub loss_compat: String,
    /// Pairs of a micro-batch
    #[arg(long, default_value_t = Self::default().batch_size, help_heading = "Training")]
    pub batch_size: usize,
    /// Micro-batches of an optimizer step [default: 16 / batch_size, rounded up]
    #[arg(long, help_heading = "Training")]
    pub gradient_accumulation_steps: Option<usize>,
    /// Passes over the data
    #[arg(long, default_value_t = Self::default().num_train_epochs, help_heading = "Training")]
    pub num_train_epochs: f64,
    /// Optimizer steps of the run, instead of num_train_epochs
    #[arg(long, help_heading = "Training")]
    pub max_steps: Option<usize>,
    /// Learning rate after the warm-up
    #[arg(long, default_value_t = Self::default().learning_rate, help_heading = "Training")]
    pub learning_rate: f64,
    /// How the rate falls
    #[arg(long, value_enum, default_value_t = Self::default().lr_scheduler_type, help_heading = "Training")]
    pub lr_scheduler_type: LrSchedulerType,
    /// Share of the steps in which the rate rises
    #[arg(long, default_value_t = Self::default().warmup_ratio, help_heading = "Training")]
    pub warmup_ratio: f64,
    /// AdamW's decay
    #[arg(long, default_value_t = Self::default().weight_decay, help_heading = "Training")]
    pub weight_decay: f64,
    /// Decay of AdamW's first moment
    #[arg(long, default_value_t = Self::default().adam_beta1, help_heading = "Training")]
    pub adam_beta1: f64,
    /// Decay of AdamW's second moment
    #[arg(long, default_value_t = Self::default().adam_beta2, help_heading = "Training")]
    pub adam_beta2: f64,
    /// Added to the root of AdamW's second moment
    #[arg(long, default_value_t = Self::default().adam_epsilon, help_heading = "Training")]
    pub adam_epsilon: f64,
    /// Largest global norm of the gradients; 0 for no clipping
    #[arg(long, default_value_t = Self::default().max_grad_norm, help_heading = "Training")]
    pub max_grad_norm: f64,
    /// Run layers again in backward, but those whose activations a GPU has room for; false keeps everything
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = Self::default().gradient_checkpointing, help_heading = "Training")]
    pub gradient_checkpointing: bool,
    /// Print what each kernel costs, for one step after the first
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = Self::default().profile, help_heading = "Training")]
    pub profile: bool,
    /// Seed of everything random
    #[arg(long, default_value_t = Self::default().seed, help_heading = "Training")]
    pub seed: u64,
    /// Where to compute: auto, cpu, wgpu or wgpu:1; cuda or cuda:1 in a build with that feature
    #[arg(long, default_value_t = Self::default().device, help_heading = "Training")]
    pub device: String,
    /// Memory that the device is taken to have instead of what it says: 8GiB (of 2^30 bytes, as cards are sold) or 8GB (of 10^9)
    #[arg(long, help_heading = "Training")]
    pub max_memory: Option<ByteSize>,

    /// Steps between lines of the log
    #[arg(long, default_value_t = Self::default().logging_steps, help_heading = "Output")]
    pub logging_steps: usize,
    /// Steps between evaluations
    #[arg(long, default_value_t = Self::default().eval_steps, help_heading = "Output")]
    pub eval_steps: usize,
    /// Steps between checkpoints
    #[arg(long, default_value_t = Self::default().save_steps, help_heading = "Output")]
    pub save_steps: usize,
    /// Checkpoints that are kept
    #[arg(long, default_value_t = Self::default().save_total_limit, help_heading = "Output")]
    pub save_total_limit: usize,
    /// Folder for runs
    #[arg(long, default_value_os_t = Self::default().output_dir, help_heading = "Output")]
    pub output_dir: PathBuf,
    /// Write into {output_dir}/{model_type}/v{N}-{time} instead of into the folder itself
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = Self::default().add_output_dir_suffix, help_heading = "Output")]
    pub add_output_dir_suffix: bool,
    /// Write over a run that {output_dir} itself holds
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = Self::default().overwrite_output_dir, help_heading = "Output")]
    pub overwrite_output_dir: bool,
    /// Go on from this checkpoint folder, or from the newest one of a run's folder
    #[arg(long, help_heading = "Output")]
    pub resume_from_checkpoint: Option<PathBuf>,
    /// Trackers: tensorboard or none
    #[arg(long, default_value_t = Self::default().report_to, help_heading = "Output")]
    pub report_to: String,
    /// Taken for the sake of ms-swift's commands; nothing is asked of a hub
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = Self::default().check_model_is_latest, help_heading = "Output")]
    pub check_model_is_latest: bool,

    /// Names of the settings that the user gave, by flag or by `--config`: of those that were not, a value is only a default.
    #[arg(skip)]
    #[serde(skip)]
    pub given: BTreeSet<String>,
}

/// Takes PyTorch's names of the types as well; what is no type is told of with all else that is wrong.
pub(crate) fn parse_dtype(text: &str) -> Result<String, Infallible> {
    let name = text.to_ascii_lowercase();
    let ours = match name.strip_prefix("torch.").unwrap_or(&name) {
        "bfloat16" => "bf16",
        "float16" | "half" => "fp16",
        "float32" | "float" => "fp32",
        _ => text,
    };
    Ok(ours.to_owned())
}

/// `--columns`: the user's names to ours.
pub type Columns = BTreeMap<String, String>;

fn parse_columns(text: &str) -> Result<Columns, String> {
    serde_json::from_str(text)
        .map_err(|e| format!("expected a JSON object such as {{\"question\":\"query\"}}: {e}"))
}

impl Default for TrainArgs {
    fn default() -> Self {
        Self {
            model_type: None,
            model_id_or_path: None,
            adapters: None,
            sft_type: "lora".to_owned(),
            lora_target_modules: vec!["ALL".to_owned()],
            lora_rank: 8,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            dtype: "AUTO".to_owned(),
            fp16_init_scale: LossScaleConfig::default().init_scale,
            fp16_growth_factor: LossScaleConfig::default().growth_factor,
            fp16_backoff_factor: LossScaleConfig::default().backoff_factor,
            fp16_growth_interval: LossScaleConfig::default().growth_interval,
            quantization_bit: 0,
            quantize_lm_head: false,
            dataset: Vec::new(),
            val_dataset: Vec::new(),
            dataset_test_ratio: 0.01,
            dataset_shuffle: true,
            columns: None,
            system: None,
            template_type: "AUTO".to_owned(),
            max_length: 2048,
            truncation_strategy: "delete".to_owned(),
            strict: false,
            beta: 0.1,
            loss_compat: "swift".to_owned(),
            batch_size: 1,
            gradient_accumulation_steps: None,
            num_train_epochs: 1.0,
            max_steps: None,
            learning_rate: 1e-4,
            lr_scheduler_type: LrSchedulerType::default(),
            warmup_ratio: 0.05,
            weight_decay: 0.1,
            adam_beta1: 0.9,
            adam_beta2: 0.95,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            gradient_checkpointing: true,
            profile: false,
            seed: 42,
            device: "auto".to_owned(),
            max_memory: None,
            logging_steps: 5,
            eval_steps: 50,
            save_steps: 50,
            save_total_limit: 2,
            output_dir: PathBuf::from("output"),
            add_output_dir_suffix: true,
            overwrite_output_dir: false,
            resume_from_checkpoint: None,
            report_to: "tensorboard".to_owned(),
            check_model_is_latest: true,
            given: BTreeSet::new(),
        }
    }
}

impl TrainArgs {
    /// Resolves a run's configuration from the parsed command line of [`TrainArgs`] and its `--config FILE`s, of which a later one wins.
    ///
    /// `demo` is what applies over the defaults where neither names a model.
    ///
    /// # Errors
    /// If the file cannot be read or holds something that is not a setting, or settings cannot be run: all of them in one error.
    pub fn resolve(matches: &ArgMatches, configs: &[PathBuf], demo: &Map<String, Value>) -> Result<Self> {
        let parsed = Self::from_arg_matches(matches).map_err(|e| Error::config(e.to_string()))?;
        let (mut given, mut problems, mut hint) = (Map::new(), Vec::new(), None);
        for config in configs {
            let mut of_file = Map::new();
            match file::read(config, &mut of_file) {
                Ok(()) => {}
                Err(Error::Config { problems: more, hint: what_to_do }) => {
                    problems.extend(more);
                    hint = hint.or(what_to_do);
                }
                Err(other) => return Err(other),
            }
            put_over(&mut given, of_file);
        }
        let parsed = to_map(&parsed);
        let from_user = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        // JSON has no other number that is null.
        let not_finite = parsed.iter().filter(|(id, value)| value.is_null() && from_user(id));
        problems.extend(not_finite.map(|(name, _)| format!("--{name} is no finite number")));
        put_over(&mut given, parsed.into_iter().filter(|(id, _)| from_user(id)).collect());
        // A null says nothing: `args.json` writes one for every setting that was left open.
        given.retain(|_, value| !value.is_null());
        let mut settings = to_map(&Self::default());
        // A name alone is a model's, of which `plan` knows the shape.
        if !["model_id_or_path", "model_type"].into_iter().any(|name| given.contains_key(name)) {
            settings.extend(demo.clone());
        }
        let names = given.keys().cloned().collect();
        settings.extend(given);
        let args: Self =
            serde_json::from_value(Value::Object(settings)).map_err(|e| Error::config(e.to_string()))?;
        let mut args = Self { given: names, ..args };
        let accumulation = 16usize.div_ceil(args.batch_size.max(1));
        args.gradient_accumulation_steps.get_or_insert(accumulation);
        let (more, what_to_do) = args.problems();
        problems.extend(more);
        if problems.is_empty() {
            Ok(args)
        } else {
            Err(Error::Config { problems, hint: hint.or(what_to_do) })
        }
    }

    /// The optimizer's settings.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_epsilon: self.adam_epsilon,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
        }
    }

    /// How the loss is scaled in fp16.
    pub fn loss_scale(&self) -> LossScaleConfig {
        LossScaleConfig {
            init_scale: self.fp16_init_scale,
            growth_factor: self.fp16_growth_factor,
            backoff_factor: self.fp16_backoff_factor,
            growth_interval: self.fp16_growth_interval,
        }
    }

    /// Those of these settings that are not the defaults, as flags that can be pasted.
    pub(crate) fn changed_flags(&self, names: &[&str]) -> String {
        let (own, default) = (to_map(self), to_map(&Self::default()));
        let changed = names.iter().filter(|name| own.get(**name) != default.get(**name));
        let flag = |name: &&str| match &own[*name] {
            Value::String(text) => format!("--{name} {}", pasted(Path::new(text))),
            other => format!("--{name} {other}"),
        };
        changed.map(flag).collect::<Vec<_>>().join(" ")
    }

    /// The configuration as `args.json` holds it.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", Value::Object(to_map(self)))
    }
}

fn to_map(args: &TrainArgs) -> Map<String, Value> {
    match serde_json::to_value(args) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// Adds the form with dashes to every flag with underscores: `--learning_rate` is also `--learning-rate`.
pub fn with_dashed_aliases(command: clap::Command) -> clap::Command {
    command.mut_args(|arg| {
        let id = arg.get_id().as_str().to_owned();
        let dashed = id.replace('_', "-");
        let is_flag = arg.get_long().is_some();
        // A negative number reaches the checks of its setting, which know what is expected.
        let arg =
            if is_flag && arg.get_action().takes_values() { arg.allow_negative_numbers(true) } else { arg };
        match is_flag && dashed != id {
            true => arg.long(id).alias(dashed),
            false => arg,
        }
    })
}

/// The flags of [`TrainArgs`] alone, for tests and documentation.
pub fn train_command() -> clap::Command {
    #[derive(clap::Parser)]
    #[command(name = "train")]
    struct Train {
        #[command(flatten)]
        _args: TrainArgs,
    }
    with_dashed_aliases(Train::command())
}

/// Puts later settings over those that there are. Where to start from is one choice: a later one goes over the other as well.
fn put_over(settings: &mut Map<String, Value>, later: Map<String, Value>) {
    for (chosen, other) in [("resume_from_checkpoint", "adapters"), ("adapters", "resume_from_checkpoint")] {
        if later.contains_key(chosen) {
            settings.remove(other);
        }
    }
    settings.extend(later);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.toml");
        std::fs::write(&file, "betta = 1\nwarmup_ratio = 7\n").unwrap();
        let flags = "train --learning_rate nan --batch_size 0 --lora_alpha -1 --lora_rank 257".split(' ');
        let matches = train_command().try_get_matches_from(flags).unwrap();
        let error = TrainArgs::resolve(&matches, &[file], &Map::new()).unwrap_err();
        let message = error.to_string();
        for says in [
            "run.toml: `betta` is no setting",
            "--warmup_ratio is 7",
            "--learning_rate is no finite number",
            "--batch_size is 0, expected at least 1",
            "--lora_alpha is -1, expected more than 0",
            "--lora_rank is 257, expected at most 256",
        ] {
            assert!(message.contains(says), "no `{says}` in {message}");
        }
        assert_eq!(error.hint(), Some("did you mean `beta`?"));
    }

    #[test]
    fn no_flags_are_the_defaults() {
        let matches = train_command().try_get_matches_from(["train"]).unwrap();
        assert_eq!(TrainArgs::from_arg_matches(&matches).unwrap(), TrainArgs::default());
    }

    #[test]
    fn types_have_pytorch_s_names_as_well() {
        let dtype = |given: &str| {
            let matches = train_command().try_get_matches_from(["train", "--dtype", given]).unwrap();
            TrainArgs::from_arg_matches(&matches).unwrap().dtype
        };
        for (given, ours) in [
            ("bfloat16", "bf16"),
            ("torch.float16", "fp16"),
            ("half", "fp16"),
            ("Float32", "fp32"),
            ("BF16", "BF16"),
            ("auto", "auto"),
            ("fp8", "fp8"),
        ] {
            assert_eq!(dtype(given), ours);
        }
    }

    #[test]
    fn of_several_files_the_later_wins() {
        let folder = tempfile::tempdir().unwrap();
        let files = [
            ("a.toml", "beta = 0.2\nlora_rank = 4\nadapters = 'a'"),
            ("b.toml", "beta = 0.3\nresume_from_checkpoint = 'b'"),
        ]
        .map(|(name, text)| {
            let file = folder.path().join(name);
            std::fs::write(&file, text).unwrap();
            file
        });
        let matches = train_command().try_get_matches_from(["train"]).unwrap();
        let args = TrainArgs::resolve(&matches, &files, &Map::new()).unwrap();
        assert_eq!((args.beta, args.lora_rank), (0.3, 4));
        assert_eq!((args.adapters, args.resume_from_checkpoint), (None, Some("b".into())));
    }
}
