//! `orpo-wgpu train`: opens model and data, trains, and sums up.

use std::path::{Path, PathBuf};

use burn::tensor::DType;
use burn_flex::Flex;
use burn_wgpu::Wgpu;

use super::advice::{check_fits, smaller};
use super::budget::{Budget, Case, Rows, Setting, runs_again};
use super::longest;
use super::open::{Loaded, OpenModel, adapter_in};
use super::outcome::{answers, print_answers, print_summary, program};
use super::precision;
use super::progress::Progress;
use super::rows::{Data, is_demo_data, is_demo_set, lengths, note_positions, plan_of};
use super::tune;
use super::words::noted;
use crate::config::TrainArgs;
use crate::data::batch::LossCompat;
use crate::data::source;
use crate::data::tokenize::TokenizedPair;
use crate::demo;
use crate::device::{self, DeviceChoice, size};
use crate::error::{Error, Result, counted};
use crate::lora::{self, LoraConfig};
use crate::model::llama::{Keep, LINEAR_NAMES};
use crate::model::{Llama, Precision};
use crate::ops::Kernels;
use crate::shell::pasted;
use crate::train::loss_scale::LossScaleConfig;
use crate::train::plan::Plan;
use crate::train::run_folder::{
    CheckpointTexts, RunFolder, Tracker, TrainerState, holds_run, newest_checkpoint,
};
use crate::train::schedule::Schedule;
use crate::train::{TrainData, TrainSettings, train};

/// Steps of a run up to which the first of a warm-up, whose rate is 0, is a tenth of it or more.
const SHORT_RUN: usize = 10;

/// Runs the subcommand.
///
/// # Errors
/// Everything that a user's settings, files and device can be wrong in.
pub fn run(args: TrainArgs) -> Result<()> {
    if let (Some(name), None) = (&args.model_type, &args.model_id_or_path) {
        return Err(Error::config(format!("--model_type `{name}` names a model, and nothing is downloaded"))
            .with_hint("fetch the model and pass its folder as --model_id_or_path; without both, the demo is trained"));
    }
    let args = with_checkpoint(args)?;
    check_output(&args)?;
    let open = OpenModel::open(args.model_id_or_path.as_deref(), &args.template_type)?;
    adapter_of(&args).map_or(Ok(()), |folder| open.check_adapter(folder))?;
    let target_modules = lora::target_modules(&args.lora_target_modules)?;
    let ranks = ranks(&args)?;
    // Before the rows, which may take long: a device that is not there, and a type that it does not have.
    let selected = device::select(&args.device)?;
    let choice = &selected.choice;
    let precision = precision::resolve(choice, &args.dtype, args.quantization_bit, args.quantize_lm_head)?;
    let data = Data::load(&args, &open)?;
    if let Some(note) = &selected.note {
        tell("device", note);
    }
    let case = Case::new(&args, &open.config, ranks, Rows::Known(&data.train), choice)?
        .with_val(&data.val)
        .stored_with(open.width()?);
    device::guard("training", choice, || match choice {
        DeviceChoice::Cpu => {
            run_on::<Flex>(&args, &open, precision, target_modules, &data, &Default::default(), &case)
        }
        DeviceChoice::Wgpu { device, .. } => {
            run_on::<Wgpu>(&args, &open, precision, target_modules, &data, device, &case)
        }
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(gpu) => {
            run_on::<burn_cuda::Cuda>(&args, &open, precision, target_modules, &data, &gpu.device(), &case)
        }
    })
    .map_err(|error| with_advice(error, &args, &case))
}

/// A run stays as it is, unless this one goes on from it or is told to write over it.
fn check_output(args: &TrainArgs) -> Result<()> {
    let folder = &args.output_dir;
    if args.add_output_dir_suffix || args.overwrite_output_dir || !holds_run(folder) {
        return Ok(());
    }
    let is_in = |checkpoint: &Path| {
        let (checkpoint, folder) = (checkpoint.canonicalize().ok()?, folder.canonicalize().ok()?);
        Some(checkpoint.parent()? == folder)
    };
    if args.resume_from_checkpoint.as_deref().and_then(is_in) == Some(true) {
        return Ok(());
    }
    let resume = match newest_checkpoint([folder.clone()]) {
        Some(_) => format!("--resume_from_checkpoint {} goes on from it, ", pasted(folder)),
        None => String::new(),
    };
    Err(Error::config(format!("--output_dir {} holds a run, whose files would be replaced", folder.display())).with_hint(
        format!(
            "{resume}another --output_dir or --add_output_dir_suffix true leaves it as it is, --overwrite_output_dir true writes over it"
        ),
    ))
}

fn tell(label: &str, text: &str) {
    note!("{}", noted(label, text));
}

/// Predicts the longest step and says so, before a long load that would be in vain.
fn budget(args: &TrainArgs, case: &Case<'_>) -> Result<Budget> {
    let setting = Setting::of(args);
    let resumes = args.resume_from_checkpoint.is_some();
    let none = || Error::config("no row is left to train on");
    let budget = case.predict(&setting)?.ok_or_else(none)?;
    check_fits(case, &setting, &budget, resumes)?;
    let room = case.memory.map_or_else(String::new, |bytes| format!(" of {}", size(bytes)));
    let again = runs_again(budget.keep, case.config.num_hidden_layers);
    let total = size(budget.memory.total() as u64);
    tell("memory", &format!("{total}{room} predicted for the longest step; {again}"));
    Ok(budget)
}

/// The same error; where the device is out of memory, with the flags that make the run fit.
fn with_advice(error: Error, args: &TrainArgs, case: &Case<'_>) -> Error {
    if !matches!(error, Error::OutOfMemory { .. }) {
        return error;
    }
    match smaller(case, &Setting::of(args), args.resume_from_checkpoint.is_some()) {
        Ok(Some(advice)) => error.with_hint(advice),
        Ok(None) | Err(_) => error,
    }
}

/// The same settings, where `--resume_from_checkpoint` and `--adapters` are checkpoints instead of the runs that they are the newest
/// of.
///
/// # Errors
/// If there is none to resume from.
pub fn with_checkpoint(args: TrainArgs) -> Result<TrainArgs> {
    let resume_from_checkpoint = args.resume_from_checkpoint.as_deref().map(checkpoint_of).transpose()?;
    let adapters = args.adapters.as_deref().map(adapter_in);
    Ok(TrainArgs { resume_from_checkpoint, adapters, ..args })
}

/// The adapter that the run starts from.
pub fn adapter_of(args: &TrainArgs) -> Option<&Path> {
    args.resume_from_checkpoint.as_deref().or(args.adapters.as_deref())
}

/// The ranks of the run's adapters: those of the adapter it starts from, else those of `--lora_rank` and `--lora_target_modules`.
///
/// # Errors
/// If that adapter's configuration cannot be read, or there is no such module.
pub fn ranks(args: &TrainArgs) -> Result<[usize; LINEAR_NAMES.len()]> {
    match adapter_of(args) {
        Some(folder) => lora::ranks_of(folder),
        None => Ok(lora::ranks(args.lora_rank, &lora::target_modules(&args.lora_target_modules)?)),
    }
}

/// An adapter keeps its rank, its alpha and its modules: what was given for one of them has to be what it has.
fn check_given(args: &TrainArgs, config: &LoraConfig, folder: &Path) -> Result<()> {
    let modules = lora::target_modules(&args.lora_target_modules)?;
    let has_modules = |other: &Vec<String>| modules.iter().all(|module| other.contains(module));
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
            modules.len() == config.target_modules.len() && has_modules(&config.target_modules),
            format!(
                "the modules {}, and --lora_target_modules is {}",
                config.target_modules.join(","),
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
    Err(Error::file(folder, format!("the adapter has {}", problems.join("; "))).with_hint(hint))
}

/// The folder itself if it is a checkpoint, else the newest one of the run that it is.
fn checkpoint_of(folder: &Path) -> Result<PathBuf> {
    if folder.join(lora::ADAPTER_FILE).exists() {
        return Ok(folder.to_owned());
    }
    if !folder.is_dir() {
        return Err(Error::file(folder, "there is no such folder")
            .with_hint("--resume_from_checkpoint takes a run's folder, or one of the checkpoints in it"));
    }
    newest_checkpoint([folder.to_owned()]).ok_or_else(|| {
        Error::file(folder, "holds no checkpoint to resume from").with_hint(
            "--save_steps says how often one is saved; the same command without --resume_from_checkpoint begins the run again",
        )
    })
}

fn run_on<B: Kernels>(
    args: &TrainArgs,
    open: &OpenModel,
    precision: Precision,
    target_modules: Vec<String>,
    data: &Data,
    device: &B::Device,
    case: &Case<'_>,
) -> Result<()> {
    let choice = case.choice;
    let dtype = precision.dtype;
    device::self_test::<B>(device, choice, dtype)?;
    let loss_scale = (dtype == DType::F16).then_some(LossScaleConfig {
        init_scale: args.fp16_init_scale,
        growth_factor: args.fp16_growth_factor,
        backoff_factor: args.fp16_backoff_factor,
        growth_interval: args.fp16_growth_interval,
    });
    let settings = settings(args, loss_scale, data)?;
    let budget = budget(args, case)?;
    let settings = TrainSettings { keep: budget.keep, ..settings };
    device::doing("loading the weights");
    let (mut model, loaded) = open.load::<B>(precision, device, choice.shard_bytes())?;
    let lora_config = match adapter_of(args) {
        Some(folder) => {
            let config = lora::load(&mut model, folder)?;
            check_given(args, &config, folder)?;
            config
        }
        None => {
            let config = LoraConfig { r: args.lora_rank, lora_alpha: args.lora_alpha, target_modules };
            lora::attach(&mut model, &config, args.seed);
            config
        }
    };
    let resume = match &args.resume_from_checkpoint {
        Some(folder) => Some(TrainerState::read(folder, &model, &settings.plan)?),
        None => None,
    };
    let first_step = resume.as_ref().map_or(0, |state| state.global_step);
    let max_steps = settings.schedule.max_steps;
    if first_step >= max_steps {
        return Err(Error::config(format!(
            "nothing to train: {first_step} of {max_steps} steps are done already"
        ))
        .with_hint("raise --max_steps or --num_train_epochs"));
    }
    // What the device and the adapter brought along goes over the flags, and into the run's own record.
    let asked = args;
    let is_auto = args.dtype.eq_ignore_ascii_case("auto");
    let args = &TrainArgs {
        dtype: if is_auto { precision.dtype_name().to_owned() } else { args.dtype.clone() },
        lora_rank: lora_config.r,
        lora_alpha: lora_config.lora_alpha,
        lora_target_modules: lora_config.target_modules.clone(),
        ..args.clone()
    };
    describe(args, open, &model, data, &settings, choice, &loaded);
    let n_steps = max_steps - first_step;
    device::doing("timing products");
    let lengths = data.train.iter().map(|pair| pair.prompt.len() + pair.chosen.len() + pair.rejected.len());
    let mean = lengths.clone().sum::<usize>() / data.train.len().max(1);
    let tokens = [lengths.max().unwrap_or(0), mean].map(|tokens| tokens * args.batch_size);
    // Ahead of the longest row, which then takes the memory that the run's own products take.
    tune::tune(choice, &tune::linears(&model, tokens), n_steps, |note| tell("device", &note));
    let Plan { batch_size, gradient_accumulation_steps, .. } = settings.plan;
    if longest::is_worth_it(case, &budget) {
        let batch = case.longest_batch(args.max_length, batch_size);
        let compiles = match choice {
            DeviceChoice::Cpu => "",
            _ => "; what the device has not run yet is compiled on the way",
        };
        tell("longest", &format!("the longest row is tried first{compiles}"));
        let accumulates = gradient_accumulation_steps > 1;
        let tried = longest::try_longest(&model, &batch, settings.beta, &budget, accumulates, choice)?;
        tell("longest", &tried);
    }
    device::doing("preparing the run");
    if let Some(checkpoint) = &args.resume_from_checkpoint {
        let scale = resume.as_ref().and_then(|state| state.loss_scale).filter(|_| dtype == DType::F16);
        let scale = scale.map_or_else(String::new, |s| format!(", with its loss scale of {}", s.scale));
        let from = checkpoint.display();
        tell("resume", &format!("after step {first_step} of {max_steps}, from {from}{scale}"));
    }

    let is_demo = open.is_demo() && is_demo_data(args);
    let held_out = if is_demo { demo::held_out()?.rows } else { Vec::new() };
    let questions: Vec<&str> = held_out.iter().map(|row| row.query.as_str()).collect();
    let start = if first_step == 0 { "before training" } else { "at the resume" };
    let before = answers(&model, open, &questions, start)?;
    let folder = run_folder(args, open);
    let history = resume.as_ref().map(|state| state.log_history.clone()).unwrap_or_default();
    let tracker = if args.report_to == "none" { Tracker::None } else { Tracker::TensorBoard };
    let texts = texts(args, open, &lora_config);
    let mut run = RunFolder::create(&folder, texts, args.save_total_limit, history, tracker)?;
    data.list_left_out(&folder)?;
    note!("output   {}", folder.display());
    let memory = || choice.memory_bytes();
    let mut progress = Progress::new(max_steps, first_step, args.logging_steps, args.profile, &memory);
    let data = TrainData { train: &data.train, val: &data.val };
    // Guarded by itself, so that the run's folder is at hand when the device fails.
    let trained = device::guard("training", choice, || {
        train(&mut model, &lora_config, data, &settings, &mut run, resume, &mut progress)
    });
    progress.finish();
    let summary = trained.map_err(|error| {
        // The error is what there is to report; that its picture cannot be drawn either tells nothing new.
        let _ = run.plot(true);
        if let Some(checkpoint) = run.last_checkpoint() {
            note!("the last checkpoint stays: {}", checkpoint.display());
        }
        match error {
            Error::Interrupted { .. } => error.with_hint(format!(
                "{} train --config {} --resume_from_checkpoint {} goes on",
                program(),
                pasted(&folder.join("args.json")),
                pasted(&folder)
            )),
            other => other,
        }
    })?;
    device::doing("answering after the training");
    let after = answers(&model, open, &questions, "after training")?;
    print_answers(&questions, start, &before, &after);
    print_summary(&summary, asked);
    Ok(())
}

fn settings(args: &TrainArgs, loss_scale: Option<LossScaleConfig>, data: &Data) -> Result<TrainSettings> {
    let (plan, max_steps) = plan_of(args, data.train.len());
    let loss_compat: LossCompat = args.loss_compat.parse()?;
    let schedule = Schedule {
        learning_rate: args.learning_rate,
        kind: args.lr_scheduler_type,
        // The first step of a warm-up has a rate of 0, and a run of one step has no other.
        warmup_steps: if max_steps == 1 { 0 } else { (args.warmup_ratio * max_steps as f64).ceil() as usize },
        max_steps,
    };
    Ok(TrainSettings {
        plan,
        beta: args.beta as f32,
        loss_compat,
        schedule,
        adamw: args.adamw(),
        loss_scale,
        keep: Keep::Input.into(),
        logging_steps: args.logging_steps,
        eval_steps: args.eval_steps,
        save_steps: args.save_steps,
    })
}

fn describe<B: Kernels>(
    args: &TrainArgs,
    open: &OpenModel,
    model: &Llama<B>,
    data: &Data,
    settings: &TrainSettings,
    choice: &DeviceChoice,
    loaded: &Loaded,
) {
    let trainable: usize = lora::tensors(model).iter().map(|(_, t)| t.dims().iter().product::<usize>()).sum();
    let longest = data.train.iter().map(TokenizedPair::prompt_and_longer_answer).max().unwrap_or(0);
    let loaded = loaded.speed().unwrap_or_else(|| format!("loaded in {:.1} s", loaded.elapsed.as_secs_f64()));
    let (name, precision) = (&open.name, model.precision);
    tell("model", &format!("{name} in {precision} on {choice}, {loaded}, {trainable} trainable weights"));
    tell(
        "data",
        &format!(
            "{} to train on, {} to evaluate on, {} left out; template {}",
            counted(data.train.len(), "row"),
            data.val.len(),
            data.skipped.len(),
            open.template
        ),
    );
    tell("lengths", &lengths(&data.train));
    tell(
        "training",
        &format!(
            "{} of {}, loss {} with beta {}, learning rate {:e}",
            counted(settings.schedule.max_steps, "step"),
            counted(settings.plan.pairs_of_step(), "pair"),
            settings.loss_compat,
            args.beta,
            args.learning_rate
        ),
    );
    let Schedule { warmup_steps, max_steps, .. } = settings.schedule;
    if warmup_steps > 0 && max_steps <= SHORT_RUN && args.resume_from_checkpoint.is_none() {
        note!(
            "note: the first of {max_steps} steps has a learning rate of 0, where a warm-up begins; --warmup_ratio 0 lets it learn as well"
        );
    }
    note_positions(longest, &open.config);
}

/// The run's folder: `{output_dir}/{model_type}/v{N}-{time}`, or the output folder itself.
fn run_folder(args: &TrainArgs, open: &OpenModel) -> PathBuf {
    if !args.add_output_dir_suffix {
        return args.output_dir.clone();
    }
    let base_name = || {
        let folder = Path::new(&open.name);
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        folder.file_name().map_or(open.name.clone(), |name| name.to_string_lossy().into_owned())
    };
    let folder = args.output_dir.join(args.model_type.clone().unwrap_or_else(base_name));
    let version = |name: &str| name.strip_prefix('v')?.split('-').next()?.parse::<usize>().ok();
    let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let next = entries
        .filter_map(|e| version(&e.file_name().to_string_lossy()))
        .max()
        .map_or(0, |newest| newest + 1);
    folder.join(format!("v{next}-{}", jiff::Zoned::now().strftime("%Y%m%d-%H%M%S")))
}

/// The same settings with paths in full, so that a run's record can be read from every folder.
fn in_full(args: &TrainArgs) -> TrainArgs {
    let full = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let specs = |specs: &[String]| match is_demo_set(specs) {
        true => specs.to_vec(),
        false => specs.iter().map(|spec| source::in_full(spec)).collect(),
    };
    TrainArgs {
        model_id_or_path: args.model_id_or_path.as_ref().map(full),
        adapters: args.adapters.as_ref().map(full),
        dataset: specs(&args.dataset),
        val_dataset: specs(&args.val_dataset),
        output_dir: full(&args.output_dir),
        // Of this command alone: another that takes the record would write over this run.
        overwrite_output_dir: false,
        resume_from_checkpoint: args.resume_from_checkpoint.as_ref().map(full),
        ..args.clone()
    }
}

fn texts(args: &TrainArgs, open: &OpenModel, lora_config: &LoraConfig) -> CheckpointTexts {
    let base_model = match &args.model_id_or_path {
        // PEFT resolves the name from wherever it runs, so a folder is named in full.
        Some(folder) => std::path::absolute(folder).unwrap_or_else(|_| folder.clone()).display().to_string(),
        None => open.name.clone(),
    };
    if open.is_demo() {
        let card = "# ORPO adapter for the demo of orpo-wgpu\n\nIts base model is inside the program: `orpo-wgpu infer --adapters .`\n";
        return CheckpointTexts { base_model, args: in_full(args).to_json(), card: card.to_owned() };
    }
    let card = format!(
        "---\nbase_model: {base_model}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- orpo\n- lora\n---\n\n\
         # ORPO adapter for {base_model}\n\n\
         LoRA of rank {} (alpha {}) on {}, trained with [orpo-wgpu](https://crates.io/crates/orpo-wgpu): beta {}, \
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
    CheckpointTexts { base_model, args: in_full(args).to_json(), card }
}
