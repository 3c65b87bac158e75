//! `orpo-wgpu train`: opens model and data, trains, and sums up.

use std::path::Path;

use burn::tensor::DType;
use burn_flex::Flex;
use burn_wgpu::Wgpu;

use super::advice::{check_fits, smaller};
use super::budget::{Budget, Case, Rows, Setting, runs_again};
use super::longest;
use super::open::{Loaded, OpenModel};
use super::outcome::{answers, print_answers, print_summary, program};
use super::precision;
use super::progress::Progress;
use super::record::{create_folder, run_folder};
use super::rows::{Data, is_demo_data, lengths, note_positions, plan_of};
use super::start::{
    adapter_of, check_model, goes_on_in, ranks, resume_state, start_adapter, with_checkpoint,
};
use super::tune;
use super::words::noted;
use crate::config::TrainArgs;
use crate::data::tokenize::TokenizedPair;
use crate::demo;
use crate::device::{self, DeviceChoice, size};
use crate::error::{Error, Result};
use crate::lora::{self, LoraConfig};
use crate::model::llama::KeepPlan;
use crate::model::{Llama, Precision};
use crate::ops::Kernels;
use crate::shell::pasted;
use crate::train::checkpoints::newest_checkpoint;
use crate::train::plan::Plan;
use crate::train::run_folder::{RunFolder, check_free, check_writable, holds_run};
use crate::train::schedule::Schedule;
use crate::train::trainer_state::TrainerState;
use crate::train::{TrainData, TrainSettings, train};
use crate::words::counted;

/// Steps of a run up to which the first of a warm-up, whose rate is 0, is a tenth of it or more.
const SHORT_RUN: usize = 10;

/// Runs the subcommand.
///
/// # Errors
/// Everything that a user's settings, files and device can be wrong in.
pub fn run(args: TrainArgs) -> Result<()> {
    check_model(&args)?;
    let args = with_checkpoint(args)?;
    check_output(&args)?;
    let open = OpenModel::open(args.model_id_or_path.as_deref(), &args.template_type)?;
    check_writable(&run_folder(&args, &open))?;
    adapter_of(&args).map_or(Ok(()), |folder| open.check_adapter(folder))?;
    let ranks = ranks(&args)?;
    // Before the rows, which may take long: a device that is not there, and a type that it does not have.
    let selected = device::select(&args.device)?;
    if let Some(note) = &selected.note {
        tell("device", note);
    }
    let choice = &selected.choice;
    let precision = precision::resolve(choice, &args.dtype, args.quantization_bit, args.quantize_lm_head)?;
    let data = Data::load(&args, &open)?;
    let case = Case::new(&args, &open.config, ranks, Rows::Known(&data.train), choice)?
        .with_val(&data.val)
        .stored_with(open.width()?);
    let run = Run { args: &args, open: &open, data: &data, case: &case, precision };
    device::guard("training", choice, || match choice {
        DeviceChoice::Cpu => run_on::<Flex>(run, &Default::default()),
        DeviceChoice::Wgpu { device, .. } => run_on::<Wgpu>(run, device),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(gpu) => run_on::<burn_cuda::Cuda>(run, &gpu.device()),
    })
    .map_err(|error| with_advice(error, &args, &case))
}

/// A run stays as it is, unless this one goes on from it or is told to write over it.
pub(super) fn check_output(args: &TrainArgs) -> Result<()> {
    let folder = &args.output_dir;
    if !args.add_output_dir_suffix {
        check_free(folder)?;
    }
    if args.add_output_dir_suffix && args.overwrite_output_dir {
        let why = "each run has a folder of its own in --output_dir; with --add_output_dir_suffix false it writes over the run there";
        tell("output", &format!("--overwrite_output_dir true does nothing: {why}"));
    }
    let may_write = args.add_output_dir_suffix || args.overwrite_output_dir || goes_on_in(args, folder);
    if may_write || !holds_run(folder) {
        return Ok(());
    }
    let resume = match newest_checkpoint([folder.clone()]) {
        Some(_) => {
            format!("--resume_from_checkpoint {} goes on from it with the same flags, ", pasted(folder))
        }
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

/// What a run is made of, whatever it is computed with.
#[derive(Clone, Copy)]
struct Run<'a> {
    args: &'a TrainArgs,
    open: &'a OpenModel,
    data: &'a Data,
    case: &'a Case<'a>,
    precision: Precision,
}

fn run_on<B: Kernels>(run: Run<'_>, device: &B::Device) -> Result<()> {
    let Run { args, open, data, case, precision } = run;
    device::self_test::<B>(device, case.choice, precision.dtype)?;
    let budget = budget(args, case)?;
    let settings = settings(args, case, precision, data.train.len(), budget.keep);
    device::doing("loading the weights");
    let (mut model, loaded) = open.load::<B>(precision, device, case.choice.shard_bytes())?;
    let lora_config = start_adapter(args, &mut model)?;
    let resume = resume_state(args, &model, &data.train, &settings)?;
    let first_step = resume.as_ref().map_or(0, |state| state.global_step);
    let recorded = recorded(run, &lora_config);
    describe(&recorded, open, &model, data, &settings, case.choice, &loaded);
    // Ahead of the longest row, which then takes the memory that the run's own products take.
    tune_products(run, &model, settings.schedule.max_steps - first_step);
    try_longest(run, &model, &settings, &budget)?;
    device::doing("preparing the run");
    if let (Some(checkpoint), Some(state)) = (&args.resume_from_checkpoint, &resume) {
        tell_resume(checkpoint, state, &settings);
    }
    let held_out = if open.is_demo() && is_demo_data(args) { demo::held_out()?.rows } else { Vec::new() };
    let questions: Vec<&str> = held_out.iter().map(|row| row.query.as_str()).collect();
    let start = if first_step == 0 { "before training" } else { "at the resume" };
    let before = answers(&model, open, &questions, start)?;
    let (folder, mut files) = create_folder(&recorded, open, &lora_config, resume.as_ref())?;
    data.list_left_out(&folder)?;
    note!("output   {}", folder.display());
    let memory = || case.choice.memory_bytes();
    let mut progress =
        Progress::new(settings.schedule.max_steps, first_step, args.logging_steps, args.profile, &memory);
    let rows = TrainData { train: &data.train, val: &data.val };
    // Guarded by itself, so that the run's folder is at hand when the device fails.
    let trained = device::guard("training", case.choice, || {
        train(&mut model, &lora_config, rows, &settings, &mut files, resume, &mut progress)
    });
    progress.finish();
    let summary = trained.map_err(|error| keep_what_is_left(error, &mut files, &folder))?;
    device::doing("answering after the training");
    let after = answers(&model, open, &questions, "after training")?;
    print_answers(&questions, start, &before, &after);
    print_summary(&summary, args);
    Ok(())
}

fn settings(
    args: &TrainArgs,
    case: &Case<'_>,
    precision: Precision,
    n_rows: usize,
    keep: KeepPlan,
) -> TrainSettings {
    let (plan, max_steps) = plan_of(args, n_rows);
    let schedule = Schedule {
        learning_rate: args.learning_rate,
        kind: args.lr_scheduler_type,
        // The first step of a warm-up has a rate of 0, and a run of one step has no other.
        warmup_steps: if max_steps == 1 { 0 } else { (args.warmup_ratio * max_steps as f64).ceil() as usize },
        max_steps,
    };
    TrainSettings {
        plan,
        beta: args.beta as f32,
        loss_compat: case.loss_compat,
        schedule,
        adamw: args.adamw(),
        loss_scale: (precision.dtype == DType::F16).then(|| args.loss_scale()),
        keep,
        logging_steps: args.logging_steps,
        eval_steps: args.eval_steps,
        save_steps: args.save_steps,
    }
}

/// The settings as the run's own record has them: what the device, the model and the adapter brought along goes over the flags.
fn recorded(Run { args, open, precision, .. }: Run<'_>, lora_config: &LoraConfig) -> TrainArgs {
    let is_auto = args.dtype.eq_ignore_ascii_case("auto");
    TrainArgs {
        template_type: open.template.to_string(),
        dtype: if is_auto { precision.dtype_name().to_owned() } else { args.dtype.clone() },
        lora_rank: lora_config.r,
        lora_alpha: lora_config.lora_alpha,
        lora_target_modules: lora_config.target_modules.clone(),
        ..args.clone()
    }
}

/// Times the products of a row of middling length and of the longest.
fn tune_products<B: Kernels>(run: Run<'_>, model: &Llama<B>, n_steps: usize) {
    device::doing("timing products");
    let rows = &run.data.train;
    let lengths = rows.iter().map(|pair| pair.prompt.len() + pair.chosen.len() + pair.rejected.len());
    let mean = lengths.clone().sum::<usize>() / rows.len().max(1);
    let tokens = [lengths.max().unwrap_or(0), mean].map(|tokens| tokens * run.args.batch_size);
    tune::tune(run.case.choice, &tune::linears(model, tokens), n_steps, |note| tell("device", &note));
}

/// Computes the longest row first, where that tells something, so that what does not fit fails at once.
fn try_longest<B: Kernels>(
    run: Run<'_>,
    model: &Llama<B>,
    settings: &TrainSettings,
    budget: &Budget,
) -> Result<()> {
    let Run { args, case, .. } = run;
    if !longest::is_worth_it(case, budget) {
        return Ok(());
    }
    let Plan { batch_size, gradient_accumulation_steps, .. } = settings.plan;
    let batch = case.longest_batch(args.max_length, batch_size);
    let compiles = match case.choice {
        DeviceChoice::Cpu => "",
        _ => "; what the device has not run yet is compiled on the way",
    };
    tell("longest", &format!("the longest row is tried first{compiles}"));
    let accumulates = gradient_accumulation_steps > 1;
    let tried = longest::try_longest(model, &batch, settings.beta, budget, accumulates, case.choice)?;
    tell("longest", &tried);
    Ok(())
}

fn tell_resume<B: Kernels>(checkpoint: &Path, state: &TrainerState<B>, settings: &TrainSettings) {
    let scale = state.loss_scale.filter(|_| settings.loss_scale.is_some());
    let scale = scale.map_or_else(String::new, |s| format!(", with its loss scale of {}", s.scale));
    let (step, max_steps) = (state.global_step, settings.schedule.max_steps);
    tell("resume", &format!("after step {step} of {max_steps}, from {}{scale}", checkpoint.display()));
}

/// The same error, once what the run leaves is in order and said: its plots, its last checkpoint, and how it goes on.
fn keep_what_is_left(error: Error, files: &mut RunFolder, folder: &Path) -> Error {
    // The error is what there is to report; that its picture cannot be drawn either tells nothing new.
    let _ = files.plot(true);
    if let Some(checkpoint) = files.last_checkpoint() {
        note!("the last checkpoint stays: {}", checkpoint.display());
    }
    match error {
        Error::Interrupted { .. } => error.with_hint(format!(
            "to go on: {} train --config {} --resume_from_checkpoint {}",
            program(),
            pasted(&folder.join("args.json")),
            pasted(folder)
        )),
        other => other,
    }
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
