//! `orpo-wgpu bench`: a training step on random weights, and how far from the device's own limits it is.

use std::path::Path;
use std::time::Instant;

use burn::tensor::{DType, Distribution, FloatDType, Tensor};
use burn_flex::Flex;
use burn_wgpu::Wgpu;

use super::precision::PrecisionArgs;
use super::profile_table::{self, Limits};
use crate::data::batch::{Batch, LossCompat, pack};
use crate::data::dataset::Location;
use crate::data::tokenize::TokenizedPair;
use crate::device::{self, DeviceChoice, size};
use crate::error::{Error, Result};
use crate::lora::{self, LoraConfig};
use crate::model::llama::Keep;
use crate::model::presets::{PRESETS, preset};
use crate::model::{Llama, LlamaConfig, Precision};
use crate::ops::adamw::grad_norm;
use crate::ops::lora_linear::lora_linear;
use crate::ops::{Kernels, profile};
use crate::train::cost::{StepFlops, StepMemory, StepShape};
use crate::train::optim::{AdamW, AdamWConfig, read};
use crate::train::step::forward_backward;

const BETA: f32 = 0.1;

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
    #[arg(long, default_value_t = 1)]
    batch_size: usize,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Rank of the adapters
    #[arg(long, default_value_t = 8)]
    lora_rank: usize,
    /// Run each layer again in backward instead of keeping its activations
    #[arg(long, action = clap::ArgAction::Set, default_value_t = true)]
    gradient_checkpointing: bool,
    /// Steps that are timed, after one to warm up
    #[arg(long, default_value_t = 5)]
    max_steps: usize,
    /// Where to compute: auto, cpu, wgpu or wgpu:1
    #[arg(long, default_value = "auto")]
    device: String,
}

/// Runs the subcommand.
///
/// # Errors
/// Settings that cannot be run, a device that is not there or fails.
pub fn run(args: &BenchArgs) -> Result<()> {
    if args.model_type == "list" {
        for (name, what) in PRESETS {
            println!("{name:24} {what}");
        }
        return Ok(());
    }
    let config = args.config()?;
    let selected = device::select(&args.device)?;
    if let Some(note) = &selected.note {
        println!("device   {note}");
    }
    let choice = &selected.choice;
    let precision = args.precision.resolve(choice)?;
    device::guard("the bench", choice, || match choice {
        DeviceChoice::Cpu => run_on::<Flex>(args, &config, precision, &Default::default(), choice),
        DeviceChoice::Wgpu { device, .. } => run_on::<Wgpu>(args, &config, precision, device, choice),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(gpu) => run_on::<burn_cuda::Cuda>(args, &config, precision, &gpu.device(), choice),
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
        let Some(config) = preset(&self.model_type) else {
            let names = PRESETS.map(|(name, _)| name).join(", ");
            problems.push(format!("--model_type `{}`: expected one of {names}", self.model_type));
            return Err(Error::Config { problems, hint: None });
        };
        if !problems.is_empty() {
            return Err(Error::Config { problems, hint: None });
        }
        let num_hidden_layers = self.num_hidden_layers.unwrap_or(config.num_hidden_layers);
        Ok(LlamaConfig { num_hidden_layers, ..config })
    }

    fn keep(&self) -> Keep {
        if self.gradient_checkpointing { Keep::Input } else { Keep::All }
    }

    /// The step's pairs: `max_length` tokens a sequence, the first half shared, as unlike as token ids can be.
    fn batch(&self, config: &LlamaConfig) -> Batch {
        let location = Location { path: Path::new("bench").into(), line: 1 };
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
        let pairs: Vec<_> = pairs.collect();
        pack(&pairs.iter().collect::<Vec<_>>(), LossCompat::Swift)
    }
}

fn run_on<B: Kernels>(
    args: &BenchArgs,
    config: &LlamaConfig,
    precision: Precision,
    device: &B::Device,
    choice: &DeviceChoice,
) -> Result<()> {
    let dtype = precision.dtype;
    device::self_test::<B>(device, choice, dtype)?;
    let batch = args.batch(config);
    let place = match choice {
        DeviceChoice::Cpu => choice.describe(),
        _ => format!("{choice} ({})", choice.describe()),
    };
    println!(
        "model    {}, {} layer{}, {:.2} billion weights, random, {precision}, on {place}",
        args.model_type,
        config.num_hidden_layers,
        if config.num_hidden_layers == 1 { "" } else { "s" },
        config.n_weights() as f64 / 1e9,
    );
    println!(
        "step     {} x 2 x {} tokens, of which {} are computed: a pair shares its first half, and last tokens predict nothing",
        args.batch_size,
        args.max_length,
        batch.n_tokens()
    );
    let limits = measure_limits::<B>(dtype, choice, device)?;
    println!(
        "limits   {:.3} TFLOP/s in the best {} product found, {:.1} GB/s in an addition",
        limits.flops / 1e12,
        Precision::dense(dtype),
        limits.bytes / 1e9
    );
    let mut model = Llama::<B>::random(config, precision, choice.shard_bytes(), device);
    let target_modules = lora::target_modules(&["ALL".to_owned()])?;
    lora::attach(&mut model, &LoraConfig { r: args.lora_rank, lora_alpha: 32.0, target_modules }, 42);
    let mut bench = Bench::new(model, batch, args.keep());

    println!("warm-up  the first step, which compiles the kernels");
    let (first_s, _) = bench.timed_step()?;
    println!("         took {first_s:.2} s");
    let mut times = Vec::with_capacity(args.max_steps);
    let mut peak = None;
    for _ in 0..args.max_steps {
        let (seconds, bytes) = bench.timed_step()?;
        times.push(seconds);
        peak = peak.max(bytes);
    }
    times.sort_by(f64::total_cmp);
    let step_s = times[times.len() / 2];
    let logits_bytes = bench.model.lm_head.logits_bytes(bench.batch.rows.len());
    let shape = StepShape::of(&bench.batch, args.lora_rank, precision, args.keep(), false, logits_bytes);
    let flops = StepFlops::of(config, &shape).total();
    let tokens = bench.batch.n_tokens() as f64;
    println!(
        "\n{:.1} tokens/s ({:.1} with a pair's shared tokens counted twice): {step_s:.3} s a step, the median of {}",
        tokens / step_s,
        (2 * args.batch_size * args.max_length) as f64 / step_s,
        times.len()
    );
    println!(
        "{:.3} TFLOP a step: {:.3} TFLOP/s, {:.0} % of the best product",
        flops / 1e12,
        flops / step_s / 1e12,
        100.0 * flops / step_s / limits.flops
    );
    print_memory(config, &shape, peak, choice);

    profile::start();
    let profiled = bench.timed_step();
    let entries = profile::finish();
    let (profiled_s, _) = profiled?;
    match entries.is_empty() {
        true => println!("\nthe CPU runs no kernels that could be timed one by one"),
        false => println!("\n{}", profile_table::table(&entries, profiled_s, Some(limits))),
    }
    Ok(())
}

fn print_memory(config: &LlamaConfig, shape: &StepShape, peak: Option<u64>, choice: &DeviceChoice) {
    let memory = StepMemory::of(config, shape);
    let bytes = |n: usize| size(n as u64);
    let predicted = memory.total();
    match peak {
        Some(peak) => println!(
            "{} of memory in tensors at the fullest, {} predicted ({:+.1} %); {} held by the allocator",
            size(peak),
            bytes(predicted),
            100.0 * (predicted as f64 / peak as f64 - 1.0),
            size(choice.memory_bytes())
        ),
        None => println!(
            "{} of memory predicted; the process has {} resident",
            bytes(predicted),
            size(choice.memory_bytes())
        ),
    }
    println!(
        "  weights {}, adapters {}, gradients {}, kept for backward {}, one layer {}, scratch {}, head {}",
        bytes(memory.weights),
        bytes(memory.adapters),
        bytes(memory.gradients),
        bytes(memory.kept),
        bytes(memory.layer),
        bytes(memory.scratch),
        bytes(memory.head)
    );
}

/// A model with its optimizer and the batch that every step takes.
struct Bench<B: Kernels> {
    model: Llama<B>,
    batch: Batch,
    keep: Keep,
    optimizer: AdamW<B>,
}

impl<B: Kernels> Bench<B> {
    fn new(model: Llama<B>, batch: Batch, keep: Keep) -> Self {
        let config = AdamWConfig {
            adam_beta1: 0.9,
            adam_beta2: 0.95,
            adam_epsilon: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: 1.0,
        };
        let optimizer = AdamW::new(config, &lora::parameters(&model));
        Self { model, batch, keep, optimizer }
    }

    /// Seconds of one whole step, and the most bytes in use in it, where the device tells.
    fn timed_step(&mut self) -> Result<(f64, Option<u64>)> {
        let started = Instant::now();
        let grads = forward_backward(&self.model, &self.batch, BETA, 1.0, self.keep);
        let norm = grad_norm(&grads.lora);
        self.optimizer.update(1e-5, lora::tensors_mut(&mut self.model), grads.lora, &norm, 1.0);
        let stats = read(grads.stats)?;
        let norm = read(norm)?;
        wait::<B>(&self.model.device())?;
        if let Some(value) = stats.iter().chain(&norm).find(|value| !value.is_finite()) {
            let rows = "random weights".to_owned();
            return Err(Error::NonFinite {
                step: self.optimizer.n_updates,
                quantity: "a figure",
                value: f64::from(*value),
                rows,
            });
        }
        Ok((started.elapsed().as_secs_f64(), grads.peak_bytes))
    }
}

/// The device's limits as this program can reach them: the best of its own products and burn's, and an addition of two long vectors.
fn measure_limits<B: Kernels>(dtype: DType, choice: &DeviceChoice, device: &B::Device) -> Result<Limits> {
    let is_slow = *choice == DeviceChoice::Cpu || choice.is_software();
    let (n, length) = if is_slow { (1024, 1 << 23) } else { (4096, 1 << 26) };
    let random = |rows: usize| {
        let tensor = Tensor::<B, 2>::random([rows, n], Distribution::Normal(0.0, 1.0), device);
        tensor.cast(FloatDType::from(dtype))
    };
    let (x, w) = (random(n), random(n));
    let ours = best_seconds::<B>(device, || lora_linear(x.clone(), w.clone(), None, None).0)?;
    let burn = best_seconds::<B>(device, || x.clone().matmul(w.clone().transpose()))?;
    let long = |_| Tensor::<B, 2>::ones([1, length], device);
    let (a, b) = (long(0), long(1));
    let addition = best_seconds::<B>(device, || a.clone() + b.clone())?;
    Ok(Limits {
        flops: 2.0 * (n as f64).powi(3) / ours.min(burn),
        bytes: 3.0 * (length * size_of::<f32>()) as f64 / addition,
    })
}

/// The shortest of a few runs, in seconds.
fn best_seconds<B: Kernels>(device: &B::Device, f: impl Fn() -> Tensor<B, 2>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        wait::<B>(device)?;
        let started = Instant::now();
        let result = f();
        wait::<B>(device)?;
        best = best.min(started.elapsed().as_secs_f64());
        drop(result);
    }
    Ok(best)
}

/// Waits until everything launched is done.
fn wait<B: Kernels>(device: &B::Device) -> Result<()> {
    B::sync(device).map_err(|e| Error::Device {
        device: format!("{device:?}"),
        problem: format!("failed: {e:?}"),
        hint: None,
    })
}
