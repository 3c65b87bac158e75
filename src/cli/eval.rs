//! `orpo-wgpu eval`: what a run logs of the rows that it holds out, of an adapter that there is.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn_flex::Flex;
use burn_wgpu::Wgpu;

use super::adapter::{adapter_in, adapter_named, note_trained_otherwise};
use super::open::OpenModel;
use super::outcome::table;
use super::precision;
use super::progress::bar_of_rows;
use super::rows::Data;
use super::start::check_model;
use super::words::noted;
use crate::config::TrainArgs;
use crate::data::tokenize::TokenizedPair;
use crate::device::{self, DeviceChoice};
use crate::error::{Error, Result};
use crate::lora;
use crate::model::Precision;
use crate::ops::Kernels;
use crate::train::Evaluation;
use crate::train::run_folder::ARGS_FILE;
use crate::words::counted;

/// Runs the subcommand, which takes the flags of `train` and looks at those that tell of model, rows and loss. `is_named` says whether
/// `--adapters` is a flag, and not a setting of `configs`.
///
/// # Errors
/// Everything that a user's settings, files and device can be wrong in.
pub fn run(args: &TrainArgs, is_named: bool, configs: &[PathBuf]) -> Result<()> {
    check_model(args)?;
    let open = &OpenModel::open(args.model_id_or_path.as_deref(), &args.template_type)?;
    let adapter = match run_of(configs).filter(|_| !is_named) {
        Some(run) => Some(adapter_of_run(run)?),
        None => adapter_named(args.adapters.as_deref(), open.is_demo()),
    };
    adapter.as_deref().map_or(Ok(()), |folder| open.check_adapter(folder))?;
    let selected = device::select(&args.device)?;
    if let Some(note) = &selected.note {
        note!("{}", noted("device", note));
    }
    let choice = &selected.choice;
    let precision = precision::resolve(choice, &args.dtype, args.quantization_bit, args.quantize_lm_head)?;
    let rows = &Data::load_to_evaluate(args, open)?.val;
    let evaluated = Evaluated { args, open, adapter: adapter.as_deref(), rows, precision, choice };
    device::guard("evaluating", choice, || match choice {
        DeviceChoice::Cpu => evaluated.run_on::<Flex>(&Default::default()),
        DeviceChoice::Wgpu { device, .. } => evaluated.run_on::<Wgpu>(device),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(gpu) => evaluated.run_on::<burn_cuda::Cuda>(&gpu.device()),
    })
    .map_err(|error| match error {
        Error::OutOfMemory { .. } => error.with_hint(
            "a smaller --batch_size or --max_length takes less, and so do --dtype fp16, --quantization_bit 8 or 4 and --quantize_lm_head true",
        ),
        other => other,
    })
}

/// The folder of the run whose record is among these files. Such a record tells what the run began from.
fn run_of(configs: &[PathBuf]) -> Option<&Path> {
    let record = configs.iter().rfind(|config| config.file_name().is_some_and(|name| name == ARGS_FILE))?;
    record.parent().map(|folder| if folder == Path::new("") { Path::new(".") } else { folder })
}

/// A run's newest checkpoint, or the checkpoint that the folder is.
fn adapter_of_run(run: &Path) -> Result<PathBuf> {
    let adapter = adapter_in(run);
    if adapter.join(lora::ADAPTER_FILE).exists() {
        return Ok(adapter);
    }
    Err(Error::file(run, "holds no checkpoint to evaluate")
        .with_hint("--adapters names one, or with `none` takes the model by itself"))
}

/// What is evaluated, whatever it is computed with.
struct Evaluated<'a> {
    args: &'a TrainArgs,
    open: &'a OpenModel,
    adapter: Option<&'a Path>,
    rows: &'a [TokenizedPair],
    precision: Precision,
    choice: &'a DeviceChoice,
}

impl Evaluated<'_> {
    fn run_on<B: Kernels>(&self, device: &B::Device) -> Result<()> {
        let Self { args, open, adapter, rows, precision, choice } = *self;
        device::self_test::<B>(device, choice, precision.dtype)?;
        device::doing("loading the weights");
        let (mut model, loaded) = open.load::<B>(precision, device, choice.shard_bytes())?;
        if let Some(folder) = adapter {
            lora::load(&mut model, folder)?;
        }
        let with = adapter.map_or_else(|| "no adapter".to_owned(), |folder| folder.display().to_string());
        let speed = loaded.speed().map_or_else(String::new, |speed| format!(", {speed}"));
        note!("{} with {with}, in {precision} on {choice}{speed}", open.name);
        if let Some(folder) = adapter {
            note_trained_otherwise(folder, open.template, &args.template_type, args.system.as_deref());
        }
        device::doing("evaluating");
        let (beta, loss_compat) = (args.beta as f32, args.loss_compat.parse()?);
        let evaluation = Evaluation { beta, loss_compat, batch_size: args.batch_size, step: 0 };
        let bar = bar_of_rows("evaluating", rows.len());
        let started = Instant::now();
        let metrics = evaluation.run(&model, rows, &|n_done| {
            bar.set_position(n_done as u64);
            true
        });
        let metrics = metrics.map_err(|error| match error {
            Error::NonFinite { value, rows, .. } => {
                Error::file(&with, format!("gives a loss of {value} on {rows}"))
                    .with_hint("its run has diverged, or these rows overflow fp16, where --dtype fp32 may do")
            }
            other => other,
        })?;
        bar.finish_and_clear();
        let mut table = table(&["validation rows", &counted(rows.len(), "row")]);
        for (name, figure) in metrics.iter().flat_map(|metrics| metrics.to_json("eval_")) {
            table.add_row([name, format!("{:.4}", figure.as_f64().unwrap_or(f64::NAN))]);
        }
        say!("{table}");
        say!(
            "loss {loss_compat} with beta {}; {} evaluated in {:.1} s",
            args.beta,
            counted(rows.len(), "row"),
            started.elapsed().as_secs_f64()
        );
        Ok(())
    }
}
