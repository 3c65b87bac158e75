//! `orpo-wgpu bench`: a training step on random weights, and how far from the device's own limits it is.

use std::path::Path;

use burn_flex::Flex;
use burn_wgpu::Wgpu;

use super::advice::misfit;
use super::budget::{Case, Rows, Setting, runs_again};
use super::limits::{self, measure_limits};
use super::measured_step::{MeasuredStep, median};
use super::precision::PrecisionArgs;
use super::profile_table::{self, Step};
use super::tune;
use super::words::millions;
use crate::config::{ByteSize, TrainArgs};
use crate::data::batch::{LossCompat, pack};
use crate::data::dataset::Location;
use crate::data::tokenize::{TokenizedPair, TruncationStrategy};
use crate::device::{self, DeviceChoice, size};
use crate::error::{Error, Result};
use crate::lora::{self, LoraConfig, MAX_RANK};
use crate::model::llama::LINEAR_NAMES;
use crate::model::presets;
use crate::model::{Llama, LlamaConfig, Precision};
use crate::ops::tune::LinearKind;
use crate::ops::{Kernels, profile};
use crate::train::cost::{StepFlops, StepMemory, StepShape};
use crate::words::counted;

/// The products are timed as for a run of so many steps, which is what the bench tells of.
const STEPS_OF_A_RUN: usize = 1000;

/// What `orpo-wgpu bench` is told.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Shape of the model; `orpo-wgpu bench --model_type list` lists them
    #[arg(long, default_value = "small")]
    model_type: String,
    /// Decoder layers, where fewer than the model's are to be measured
    #[arg(long)]
    num_hidden_layers: Option<usize>,
    /// Tokens of each of a pair's two sequences; they share the first half
    #[arg(long, default_value_t = 512)]
    max_length: usize,
    /// Pairs of a step
    #[arg(long, default_value_t = TrainArgs::default().batch_size)]
    batch_size: usize,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Rank of the adapters, at most 256
    #[arg(long, default_value_t = TrainArgs::default().lora_rank)]
    lora_rank: usize,
    /// Run each layer again in backward instead of keeping its activations
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = TrainArgs::default().gradient_checkpointing)]
    gradient_checkpointing: bool,
    /// Steps that are timed, after one to warm up
    #[arg(long, default_value_t = 5)]
    max_steps: usize,
    /// Where to compute: auto, cpu, wgpu or wgpu:1; cuda or cuda:1 in a build with that feature
    #[arg(long, default_value_t = TrainArgs::default().device)]
    device: String,
    /// Memory that the device is taken to have instead of what it says: 8GiB or 8GB
    #[arg(long)]
    max_memory: Option<ByteSize>,
}

/// Runs the subcommand.
///
/// # Errors
/// Settings that cannot be run, a device that is not there or fails.
pub fn run(args: &BenchArgs) -> Result<()> {
    if args.model_type == "list" {
        say!("{}", presets::list());
        return Ok(());
    }
    let config = args.config()?;
    let selected = device::select(&args.device)?;
    if let Some(note) = &selected.note {
        say!("device   {note}");
    }
    let choice = &selected.choice;
    let shape = args.shape(&config, choice)?;
    device::guard("the bench", choice, || match choice {
        DeviceChoice::Cpu => run_on::<Flex>(args, &config, &shape, &Default::default(), choice),
        DeviceChoice::Wgpu { device, .. } => run_on::<Wgpu>(args, &config, &shape, device, choice),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(gpu) => run_on::<burn_cuda::Cuda>(args, &config, &shape, &gpu.device(), choice),
    })
}

impl BenchArgs {
    fn config(&self) -> Result<LlamaConfig> {
        let mut problems = Vec::new();
        for (name, value, least) in [
            ("max_length", self.max_length, 4),
            ("batch_size", self.batch_size, 1),
            ("lora_rank", self.lora_rank, 1),
            ("max_steps", self.max_steps, 1),
            ("num_hidden_layers", self.num_hidden_layers.unwrap_or(1), 1),
        ] {
            if value < least {
                problems.push(format!("--{name} is {value}, expected at least {least}"));
            }
        }
        if self.lora_rank > MAX_RANK {
            problems.push(format!("--lora_rank is {}, expected at most {MAX_RANK}", self.lora_rank));
        }
        let config = presets::named(&self.model_type);
        problems.extend(config.as_ref().err().cloned());
        let Some(config) = config.ok().filter(|_| problems.is_empty()) else {
            return Err(Error::Config { problems, hint: None });
        };
        let num_hidden_layers = self.num_hidden_layers.unwrap_or(config.num_hidden_layers);
        Ok(LlamaConfig { num_hidden_layers, ..config })
    }

    /// The shape of a step, which keeps what `train` would.
    ///
    /// # Errors
    /// If it does not fit where `train`'s would not.
    fn shape(&self, config: &LlamaConfig, choice: &DeviceChoice) -> Result<StepShape> {
        let pairs = self.pairs(config);
        let case = Case {
            config,
            ranks: [self.lora_rank; LINEAR_NAMES.len()],
            rows: Rows::Known(&pairs),
            val: &[],
            truncation: TruncationStrategy::Delete,
            loss_compat: LossCompat::Swift,
            choice,
            memory: self.max_memory.map(|size| size.0).or_else(|| choice.total_memory()),
            // The CPU's random one is f32, and no other is counted.
            embedding_width: size_of::<f32>(),
        };
        let setting = Setting {
            dtype: self.precision.dtype.clone(),
            quantization_bit: self.precision.quantization_bit,
            quantize_lm_head: self.precision.quantize_lm_head,
            max_length: self.max_length,
            batch_size: self.batch_size,
            gradient_accumulation_steps: 1,
            gradient_checkpointing: self.gradient_checkpointing,
        };
        let none = || Error::config("there is no pair to measure");
        let shape = case.longest_step(&setting)?.ok_or_else(none)?;
        match misfit(&case, &case.budget(&shape)) {
            None => Ok(shape),
            Some(problem) => {
                let hint = "--num_hidden_layers 2 measures a slice of the model; --quantization_bit 8 or 4, a smaller --max_length or \
                            --batch_size take less";
                Err(Error::DoesNotFit { problem, hint: Some(hint.to_owned()) })
            }
        }
    }

    /// The step's pairs: `max_length` tokens a sequence, the first half shared, as unlike as token ids can be.
    fn pairs(&self, config: &LlamaConfig) -> Vec<TokenizedPair> {
        let location = Location::new(Path::new("bench"), 1);
        let n_prompt = self.max_length / 2;
        let ids = |n: usize, seed: usize| {
            (0..n).map(|i| ((i * 7919 + seed * 104_729) % config.vocab_size) as u32).collect::<Vec<_>>()
        };
        let pairs = (0..self.batch_size).map(|pair| TokenizedPair {
            prompt: ids(n_prompt, 3 * pair + 1),
            chosen: ids(self.max_length - n_prompt, 3 * pair + 2),
            rejected: ids(self.max_length - n_prompt, 3 * pair + 3),
            location: location.clone(),
        });
        pairs.collect()
    }
}

fn run_on<B: Kernels>(
    args: &BenchArgs,
    config: &LlamaConfig,
    shape: &StepShape,
    device: &B::Device,
    choice: &DeviceChoice,
) -> Result<()> {
    let precision = shape.precision;
    let dtype = precision.dtype;
    let bytes_before = choice.memory_bytes();
    device::self_test::<B>(device, choice, dtype)?;
    let batch = pack(&args.pairs(config).iter().collect::<Vec<_>>(), LossCompat::Swift);
    let place = match choice {
        DeviceChoice::Cpu => choice.describe(),
        _ => format!("{choice} ({})", choice.describe()),
    };
    say!(
        "model    {}, {}, {} weights, random, {precision}, on {place}",
        args.model_type,
        counted(config.num_hidden_layers, "layer"),
        millions(config.n_weights()),
    );
    say!(
        "step     {} x 2 x {} tokens, of which {} are computed: a pair shares its first half, and last tokens predict nothing",
        args.batch_size,
        args.max_length,
        batch.n_tokens()
    );
    let note = |note| say!("device   {note}");
    let n = limits::square(choice) as u32;
    let square = LinearKind { extents: [n, n, n, 0], dtype, joins_stream: false, shares_input: false };
    tune::tune(choice, &[square], STEPS_OF_A_RUN, note);
    let limits = measure_limits::<B>(dtype, choice, device)?;
    say!(
        "limits   {:.3} TFLOP/s in the best {} product found, {}, {:.1} GB/s in an addition",
        limits.product.flops / 1e12,
        Precision::dense(dtype),
        limits.product.by,
        limits.bytes / 1e9
    );
    let mut model = Llama::<B>::random(config, precision, choice.shard_bytes(), device);
    let TrainArgs { lora_target_modules, lora_alpha, seed, .. } = TrainArgs::default();
    let target_modules = lora::target_modules(&lora_target_modules)?;
    lora::attach(&mut model, &LoraConfig { r: args.lora_rank, lora_alpha, target_modules }, seed);
    tune::tune(choice, &tune::linears(&model, [batch.n_tokens(); 2]), STEPS_OF_A_RUN, note);
    say!("backward {}", runs_again(shape.keep, config.num_hidden_layers));
    let n_tokens = batch.n_tokens();
    let mut step = MeasuredStep::new(model, batch, shape.keep);

    let compiles = if *choice == DeviceChoice::Cpu { "" } else { ", in which kernels are compiled" };
    say!("warm-up  the first step{compiles}");
    let first_s = step.timed()?;
    say!("         took {first_s:.2} s");
    let mut times = Vec::with_capacity(args.max_steps);
    for _ in 0..args.max_steps {
        times.push(step.timed()?);
    }
    let step_s = median(&mut times);
    let flops = StepFlops::of(config, shape).total();
    let tokens = n_tokens as f64;
    say!(
        "\n{:.1} tokens/s ({:.1} with a pair's shared tokens counted twice): {step_s:.3} s a step, the median of {}",
        tokens / step_s,
        (2 * args.batch_size * args.max_length) as f64 / step_s,
        times.len()
    );
    say!(
        "{:.3} TFLOP a step, what runs again included: {:.3} TFLOP/s, {:.0} % of the best product",
        flops / 1e12,
        flops / step_s / 1e12,
        100.0 * flops / step_s / limits.product.flops
    );
    profile::start();
    let (profiled, peak) = profile::watch_memory(|| step.timed());
    let entries = profile::finish();
    let profiled_s = profiled?;
    print_memory(config, shape, peak, choice, bytes_before);
    match entries.is_empty() {
        true => say!("\nthe CPU runs no kernels that could be timed one by one"),
        false => {
            let step = Step::of(&entries, step_s, profiled_s);
            say!("\n{}", profile_table::table(&entries, step, Some(limits)));
        }
    }
    if flops / step_s > limits.product.flops || profile_table::exceed(&entries, limits) {
        say!("{}", profile_table::WHY_EXCEEDED);
    }
    Ok(())
}

/// `bytes_before`: what the device held before it was given anything.
fn print_memory(
    config: &LlamaConfig,
    shape: &StepShape,
    peak: Option<u64>,
    choice: &DeviceChoice,
    bytes_before: u64,
) {
    let memory = StepMemory::of(config, shape);
    let bytes = |n: usize| size(n as u64);
    let predicted = memory.total();
    match peak {
        Some(peak) => say!(
            "{} of memory in tensors at the fullest, {} predicted ({:+.1} %); {} held by the allocator",
            size(peak),
            bytes(predicted),
            100.0 * (predicted as f64 / peak as f64 - 1.0),
            size(choice.memory_bytes())
        ),
        None => say!(
            "{} of memory predicted; the process had {} resident at the fullest, and {} before anything was made",
            bytes(predicted),
            size(device::peak_resident()),
            size(bytes_before)
        ),
    }
    let embedding = match memory.embedding {
        0 => "the embedding none, as it is in the computer's own memory".to_owned(),
        n => format!("embedding {}", bytes(n)),
    };
    say!(
        "  predicted: weights {}, {embedding}, adapters {}, gradients {}, kept for backward {}, one layer {}, scratch {}, head {}",
        bytes(memory.weights),
        bytes(memory.adapters),
        bytes(memory.gradients),
        bytes(memory.kept),
        bytes(memory.layer),
        bytes(memory.scratch),
        bytes(memory.head)
    );
}

#[cfg(test)]
mod tests {
    use clap::{Args, FromArgMatches};

    use super::*;

    #[test]
    fn what_train_would_refuse_is_not_measured() {
        let flags = ["bench", "--model-type", "llama3-8b-instruct", "--dtype", "fp16"];
        let matches = BenchArgs::augment_args(clap::Command::new("bench")).get_matches_from(flags);
        let (args, gib) = (BenchArgs::from_arg_matches(&matches).unwrap(), 1 << 30);
        let config = args.config().unwrap();
        let refused =
            |memory: u64| args.shape(&config, &DeviceChoice::elsewhere(memory)).map_err(|e| e.to_string());
        assert!(refused(24 * gib).is_ok());
        let error = refused(16 * gib).unwrap_err();
        assert!(error.starts_with("does not fit the device: the longest step, "), "{error}");
        assert!(error.contains("(85 % of 16 GiB)"), "{error}");
    }
}
