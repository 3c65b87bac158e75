//! `orpo-wgpu infer`: opens a model and its adapter and talks.

use std::io::{IsTerminal, stderr, stdin, stdout};
use std::path::PathBuf;

use burn_flex::Flex;
use burn_wgpu::Wgpu;

use super::adapter::{adapter_named, demo_runs, note_trained_otherwise};
use super::interrupts;
use super::keyboard::Keyboard;
use super::open::OpenModel;
use super::precision::PrecisionArgs;
use super::words::noted;
use crate::config::TrainArgs;
use crate::data::prompts::{Prompt, read_prompts};
use crate::device::{self, DeviceChoice};
use crate::error::{Error, Result};
use crate::infer::chat::{self, Chat, Manner};
use crate::infer::generate::GenerationConfig;
use crate::infer::prompts::{answer_prompts, answerable};
use crate::infer::results::Results;
use crate::infer::sample::SamplingConfig;
use crate::infer::talk::{self, Piped, Prompted};
use crate::lora;
use crate::ops::Kernels;
use crate::words::counted;

/// What `orpo-wgpu infer` is told.
#[derive(Debug, clap::Args)]
pub struct InferArgs {
    /// Answer this and end; without it and without --prompts, chat
    prompt: Option<String>,
    /// A Hugging Face model folder [default: the demo inside this program]
    #[arg(long)]
    model_id_or_path: Option<PathBuf>,
    /// A PEFT adapter folder, a run or a folder of runs (the newest checkpoint), or `none` [default: none; for the demo its newest one below output/demo]
    #[arg(long)]
    adapters: Option<PathBuf>,
    /// Answer every prompt of this file: one a line, or JSONL as for training (query or messages is enough)
    #[arg(long, conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Write the answers to --prompts here, as JSONL, into a new file
    #[arg(long, requires = "prompts", conflicts_with = "prompt")]
    result_file: Option<PathBuf>,
    /// Add what a --result_file still lacks, of which this model and these settings have answered some
    #[arg(long, requires = "result_file")]
    append: bool,
    /// System prompt
    #[arg(long)]
    system: Option<String>,
    /// Chat format: AUTO, llama3, llama3_2 (3.1 and later) or default-generation (plain text)
    #[arg(long, default_value_t = TrainArgs::default().template_type)]
    template_type: String,
    /// The most tokens of an answer
    #[arg(long, default_value_t = GenerationConfig::default().max_new_tokens)]
    max_new_tokens: usize,
    /// What logits are divided by; 0 always takes the likeliest token
    #[arg(long, allow_negative_numbers = true, default_value_t = SamplingConfig::default().temperature)]
    temperature: f32,
    /// Choose among this many of the likeliest tokens; 0 for all
    #[arg(long, default_value_t = SamplingConfig::default().top_k)]
    top_k: usize,
    /// Choose among the likeliest tokens that reach this probability
    #[arg(long, default_value_t = SamplingConfig::default().top_p)]
    top_p: f32,
    /// How strongly tokens that were there already are avoided; 1 is not at all
    #[arg(long, default_value_t = SamplingConfig::default().repetition_penalty)]
    repetition_penalty: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = SamplingConfig::default().seed)]
    seed: u64,
    /// Where to compute: auto, cpu, wgpu or wgpu:1; cuda or cuda:1 in a build with that feature
    #[arg(long, default_value_t = TrainArgs::default().device)]
    device: String,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Say how fast every answer was
    #[arg(long)]
    verbose: bool,
}

impl InferArgs {
    fn generation(&self) -> GenerationConfig {
        GenerationConfig {
            max_new_tokens: self.max_new_tokens,
            sampling: SamplingConfig {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
            },
        }
    }
}

/// Runs the subcommand.
///
/// # Errors
/// Everything that a user's settings, files and device can be wrong in.
pub fn run(args: &InferArgs) -> Result<()> {
    args.generation().check()?;
    if args.prompt.as_ref().is_some_and(|prompt| prompt.trim().is_empty()) {
        return Err(Error::config("the prompt is empty").with_hint("without one, infer starts a chat"));
    }
    let mut prompts = args.prompts.as_deref().map(read_prompts).transpose()?.unwrap_or_default();
    let mut has_answers = false;
    let results = match &args.result_file {
        None => None,
        Some(path) if !args.append => Some(Results::create(path)?),
        Some(path) => {
            let n_prompts = prompts.len();
            let (results, rest) = Results::go_on(path, prompts)?;
            prompts = rest;
            let has = format!("{} has {}", path.display(), counted(n_prompts - prompts.len(), "answer"));
            has_answers = prompts.len() < n_prompts;
            if has_answers && !prompts.iter().any(Result::is_ok) {
                note!("{}", noted("prompts", &format!("{has}, and no prompt is left")));
                return Ok(());
            }
            if has_answers {
                note!("{}", noted("prompts", &format!("{has}, to which the others are added")));
            }
            Some(results)
        }
    };
    let asked = Asked { prompts, results, has_answers };
    let open = OpenModel::open(args.model_id_or_path.as_deref(), &args.template_type)?;
    let selected = device::select(&args.device)?;
    if let Some(note) = &selected.note {
        note!("{}", noted("device", note));
    }
    match &selected.choice {
        choice @ DeviceChoice::Cpu => run_on::<Flex>(args, asked, &open, &Default::default(), choice),
        choice @ DeviceChoice::Wgpu { device, .. } => run_on::<Wgpu>(args, asked, &open, device, choice),
        #[cfg(feature = "cuda")]
        choice @ DeviceChoice::Cuda(gpu) => {
            run_on::<burn_cuda::Cuda>(args, asked, &open, &gpu.device(), choice)
        }
    }
}

/// What `--prompts` asks, where answers to it go, and whether some of them are there already.
struct Asked {
    prompts: Vec<Result<Prompt>>,
    results: Option<Results>,
    has_answers: bool,
}

fn run_on<B: Kernels>(
    args: &InferArgs,
    Asked { prompts, results, has_answers }: Asked,
    open: &OpenModel,
    device: &B::Device,
    choice: &DeviceChoice,
) -> Result<()> {
    let precision = args.precision.resolve(choice)?;
    device::self_test::<B>(device, choice, precision.dtype)?;
    device::guard("answering", choice, || {
        let adapter = adapter_named(args.adapters.as_deref(), open.is_demo());
        if let Some(folder) = &adapter {
            open.check_adapter(folder)?;
        }
        let (mut model, loaded) = open.load::<B>(precision, device, choice.shard_bytes())?;
        if let Some(folder) = &adapter {
            lora::load(&mut model, folder)?;
        }
        let name = match &adapter {
            Some(folder) => folder.display().to_string(),
            None if args.adapters.is_none() && open.is_demo() => {
                format!("no adapter, as there is none below {}", demo_runs().display())
            }
            None => "no adapter".to_owned(),
        };
        let speed = loaded.speed().map_or_else(String::new, |speed| format!(", {speed}"));
        note!("{} with {name}, in {precision} on {choice}{speed}", open.name);
        if let Some(folder) = &adapter {
            note_trained_otherwise(folder, open.template, &args.template_type, args.system.as_deref());
        }
        let mut chat =
            Chat::new(&model, &open.tokenizer, open.template, args.system.clone(), &args.generation())?;
        let (output, notes) = (&mut stdout(), &mut stderr());
        let manner = Manner { is_terminal: stdin().is_terminal(), verbose: args.verbose };
        match (&args.prompt, &args.prompts) {
            (Some(prompt), _) => chat::one_shot(&mut chat, prompt, output, notes, manner),
            (None, Some(_)) => {
                let prompts = match answerable(&mut chat, prompts, notes) {
                    // The others have their answers.
                    Err(left_out @ Error::Row { .. }) if has_answers => {
                        note!("no prompt is left that can be answered: {left_out}");
                        return Ok(());
                    }
                    prompts => prompts?,
                };
                if results.is_some() {
                    chat.interrupted_by(interrupts::watch(|| ()));
                }
                answer_prompts(&mut chat, &prompts, results, output, notes, manner)
            }
            (None, None) => match Keyboard::open().filter(|_| manner.is_terminal) {
                Some(mut keyboard) => {
                    chat.interrupted_by(interrupts::watch_ctrl_c());
                    talk::run(&mut chat, &mut keyboard, output, notes, manner)
                }
                None if manner.is_terminal => {
                    talk::run(&mut chat, &mut Prompted(stdin().lock(), stderr()), output, notes, manner)
                }
                None => talk::run(&mut chat, &mut Piped(stdin().lock()), output, notes, manner),
            },
        }
    })
    .map_err(|error| match error {
        Error::OutOfMemory { .. } => error.with_hint(
            "--dtype fp16, --quantization_bit 8 or 4 and --quantize_lm_head true make the model smaller, a smaller --max_new_tokens what \
             is kept of a conversation; other programs may hold the rest",
        ),
        other => other,
    })
}
